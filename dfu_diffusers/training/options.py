# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Options of a training run: typed groups of them, the command line, and files of options."""

import argparse
import dataclasses
import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import yaml

from ..command_line import count, natural, number, positive, resolution
from ..data.resolutions import Size, format_resolution


def path(text: str) -> str:
    """A path, a Hub id, or a name; the home directory may be `~`."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: leave the option out, or name a path")
    return os.path.expanduser(text)


# A type, and how to read it from text.
Location = Annotated[str, path]
Resolution = Annotated[Size, resolution]
Count, Natural = Annotated[int, count], Annotated[int, natural]
Positive, NonNegative = Annotated[float, positive], Annotated[float, number(float, 0)]
Rate, Level = Annotated[float, number(float, 0, 1e30, open_low=True)], Annotated[float, number(float, -50, 50)]
Spread, Seed = Annotated[float, number(float, 0, 50, open_low=True)], Annotated[int, number(int, 0, 2**32 - 1)]
Share, Rank = Annotated[float, number(float, 0, 1)], Annotated[float, number(float, 0, 0.999, open_low=True)]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


def option(default, help: str):
    """A field of a group with its line in --help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class ModelOptions:
    """model"""

    model_config: Location | None = option(None, "config.json of a DFUModel or DFURefiner (default: the portraits')")
    init_from: Location | None = option(None, "fine-tune this pipeline, a folder or a Hub id, not a new model")
    component: Literal["unet", "refiner"] | None = option(None, "of it to train (default: its unet, if it has one)")
    spectral_rank: Rank | None = option(None, "factorise its spectral weights (0.4: about a sixth of them)")
    freeze: list[str] = option([], "spatial, spectral, norm, attention, skip, embedding, level:N, level:N.KIND")


@dataclass
class DataOptions:
    """data (default: procedural portraits, endless)"""

    train_data_dir: Location | None = option(None, "folder or zip of images, nested ones too")
    dataset_name: Location | None = option(None, "data set id on the Hub, or a folder that `datasets` can load")
    dataset_config_name: str | None = option(None, "its configuration")
    dataset_split: str = option("train", "its part to train on")
    streaming: bool = option(False, "read it as it comes; each process and worker reads all")
    image_column: str = option("image", "where its images are")
    label_column: str = option("label", "class of an image; folders make one of this name")
    class_conditional: bool = option(False, "train on --label_column too")
    random_crop: bool = option(False, "crop to the aspect ratio at random, not centred")
    random_flip: bool = option(False, "mirror half of the images")
    small_images: Literal["fail", "skip", "upscale"] = option("fail", "those smaller than the largest resolution")
    cache_dir: Location | None = option(None, "keep images resized in memory-mapped files there")
    num_workers: Natural = option(0, "processes that load images")
    num_validation_images: Natural = option(64, "images held out, up to a tenth of a data set")


@dataclass
class BatchOptions:
    """resolutions (HEIGHT or HEIGHTxWIDTH) and batches"""

    resolutions: list[Resolution] = option([(16, 16), (24, 24), (32, 32)], "to train at (default: 16 24 32)")
    resolution_weights: list[NonNegative] | None = option(None, "how often each is drawn (default: equally)")
    upsample_resolutions: list[Resolution] = option([], "larger sizes, trained on enlarged images")
    upsample_weight: Share = option(0.0, "share of steps that draw one of these")
    source_resolution: Resolution | None = option(
        None, "load images of so many pixels and cut them to the modes of a resolution, as octaves do, instead of "
        "resizing (default: no; for a refiner the largest resolution)",
    )  # fmt: skip
    batch_size: Count = option(32, "images per step, over all processes together")
    max_pixels_per_batch: Count | None = option(None, "images x height x width at once on a device")


@dataclass
class LossOptions:
    """noise and loss"""

    p_mean: Level | None = option(None, "mean of ln sigma (default: -1.2, of a refiner -2.3)")
    p_std: Spread | None = option(None, "its standard deviation (default: 1.2, of a refiner 1.4)")
    augment_probability: Share = option(0.0, "of EDM's geometric augmentation, which uses 0.12")
    label_dropout: Share = option(0.0, "images without their label, for classifier-free guidance (0.1, say)")


@dataclass
class OptimizerOptions:
    """Adam and averages of the weights"""

    max_train_steps: Count = option(2000, "length of the run, over which the learning rate decays")
    learning_rate: Rate = option(1e-3, "at its highest")
    lr_scheduler: Schedule = option("cosine", "how it goes on")
    lr_warmup_images: Natural = option(3200, "images over which it rises, except with `constant`")
    max_grad_norm: Positive = option(1.0, "longer gradients are scaled down to it")
    max_nonfinite_steps: Count = option(10, "without a finite loss, in a row, end the run")
    ema_halflife_images: Positive = option(20_000, "half-life of the averaged weights")
    ema_rampup_ratio: Positive = option(0.05, "the half-life is at most this times the images seen")


@dataclass
class DeviceOptions:
    """precision and memory"""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(None, "(default: the launcher's)")
    tf32: bool = option(False, "faster float32 matrix products on NVIDIA GPUs")
    gradient_checkpointing: bool = option(False, "less memory, more time")
    checkpointed_levels: list[Natural] | None = option(None, "of these only: 0, the full image, holds most")
    torch_compile: bool = option(False, "compile the repeated blocks")


@dataclass
class RunOptions:
    """run: checkpoints, reports, Hub"""

    config: str | None = option(None, "YAML file with any of these options; the command line overrules it")
    dry_run: bool = option(False, "check, print model, schedule and memory, and stop")
    seed: Seed = option(0, "of all that is random")
    output_dir: Location = option("outputs/dfu-portraits", "where everything is written")
    checkpointing_steps: Count = option(1000, "save what the run needs to go on every so many steps")
    checkpoints_total_limit: Count = option(2, "how many of them to keep")
    resume_from_checkpoint: Location | None = option(None, "a checkpoint folder, or 'latest'")
    report_images: Count = option(32_000, "sample and validate every so many images")
    report_to: str = option("tensorboard", "a tracker of Accelerate (wandb, ...), or none")
    push_to_hub: bool = option(False, "upload the pipeline with a model card at the end")
    hub_model_id: str | None = option(None, "repository (default: name of --output_dir)")
    hub_private: bool = option(False, "create it as a private one")
    hub_license: str | None = option(None, "in the card, as the Hub names it: cc-by-4.0, say")
    hub_advised_sizes: str | None = option(None, 'in the card: "16 to 96 px", say')
    hub_limits: str | None = option(None, "in the card: what the model is bad at")


@dataclass
class Options(RunOptions, DeviceOptions, OptimizerOptions, LossOptions, BatchOptions, DataOptions, ModelOptions):
    """All options of a run, as fields of one object."""


GROUPS = Options.__bases__[::-1]
TYPES = get_type_hints(Options, include_extras=True)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """A flag for each field; what is not given is left to the fields' defaults. A description begins --help."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    for group in GROUPS:
        section = parser.add_argument_group(group.__doc__)
        for field in dataclasses.fields(group):
            help = field.metadata["help"]
            if field.default and field.default is not dataclasses.MISSING:
                help += f" (default: {field.default})"
            section.add_argument(f"--{field.name}", help=help, **_reading(TYPES[field.name]))
    return parser


def _reading(kind) -> dict:
    """How argparse reads a value of this type."""
    if type(None) in get_args(kind):
        return _reading(get_args(kind)[0])
    if get_origin(kind) is list:
        return {"nargs": "+", **_reading(get_args(kind)[0])}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is Annotated:
        return {"type": get_args(kind)[1]}
    return {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}


def parse_args(argv: list[str], configs: Path, description: str | None = None) -> Options:
    """The options of a command line. Ends the program with a message where they do not fit each other.

    Args:
        argv: without the name of the program.
        configs: folder of presets of the model.
        description: what --help begins with.
    """
    parser = build_parser(description)
    try:
        args = Options(**vars(parser.parse_args(argv)))
        if args.config:
            args = Options(**vars(parser.parse_args(words_of_file(args.config) + argv)))
        check(args)
        args.model_config = args.model_config or str(configs / "portraits.json")
        if not Path(args.model_config).is_file():
            presets = ", ".join(sorted(path.name for path in configs.glob("*.json")))
            raise ValueError(f"--model_config {args.model_config} is not a file; presets in {configs}: {presets}")
    except ValueError as error:
        parser.error(str(error))
    return args


def words_of_file(path: str) -> list[str]:
    """The options in a YAML file as words of a command line, so that both pass the same checks.

    Raises:
        ValueError: the file cannot be read, or names an option that there is not.
    """
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} must hold lines such as `batch_size: 64`")
    known = TYPES.keys() - {"config"}
    if unknown := sorted(set(map(str, options)) - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"--config {path}: no option {unknown[0]!r}" + "".join(f", perhaps {name!r}" for name in close)
        )
    words = []
    for name, value in options.items():
        if TYPES[name] is bool and isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list) else ["no" if value is False else value]  # YAML's bare `no`
            words += [f"--{name}", *map(str, values)]
    return words


def check(args: Options) -> None:
    """Raise a ValueError that names the remedy where options do not fit each other."""
    images, sizes, output = args.dataset_name or args.train_data_dir, args.resolutions, Path(args.output_dir)
    own = [name for name in ("class_conditional", "random_crop", "random_flip", "cache_dir") if vars(args)[name]]
    if args.train_data_dir and args.dataset_name:
        raise ValueError("--train_data_dir and --dataset_name: give one of them")
    if args.streaming and (not images or args.cache_dir):
        raise ValueError("--streaming needs --dataset_name or --train_data_dir, and goes without --cache_dir")
    if own and not images:
        raise ValueError(f"--{own[0]} is for pictures of your own, but the portraits are drawn on the fly")
    if images and Path(images).is_dir() and output.resolve().is_relative_to(Path(images).resolve()):
        raise ValueError(f"--output_dir {output} lies in {images}: samples would be trained on; choose another")
    if args.label_dropout and not args.class_conditional:
        raise ValueError("--label_dropout drops the labels of --class_conditional: give both, or neither")
    if args.random_crop and args.cache_dir:
        raise ValueError("--random_crop and --cache_dir, which holds images cropped already: give one of them")
    if args.init_from and args.model_config:
        raise ValueError("--init_from brings its own model: leave out --model_config")
    if args.component and not args.init_from:
        raise ValueError("--component is a part of the pipeline of --init_from: give both, or neither")
    if args.checkpointed_levels and not args.gradient_checkpointing:
        raise ValueError("--checkpointed_levels says where: --gradient_checkpointing asks for it")
    if args.spectral_rank and not args.init_from:
        raise ValueError("--spectral_rank factorises the model of --init_from; of a new one it is in --model_config")
    if args.resolution_weights and len(args.resolution_weights) != len(sizes):
        raise ValueError(f"--resolution_weights needs {len(sizes)} numbers, one for each of --resolutions")


def public_options(args: Options) -> dict:
    """The options in words that JSON has."""
    values = dict(sorted(vars(args).items()))
    for name in ("resolutions", "upsample_resolutions"):
        values[name] = [format_resolution(size) for size in values[name]]
    if values["source_resolution"]:
        values["source_resolution"] = format_resolution(values["source_resolution"])
    return values
