# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Options of a training run: the command line, and files of options."""

import argparse
import difflib
import os
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType

from ..command_line import count, natural, number, positive, resolution
from ..data.resolutions import format_resolution

SCHEDULES = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]  # it needs rules
SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)  # --no-OPTION overrules a file of options


def path(text: str) -> str:
    """A path, a Hub id, or a name; the home directory may be `~`."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: leave the option out, or name a path")
    return os.path.expanduser(text)


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All options; a description is what --help begins with."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file with any of these options; the command line overrules it")
    parser.add_argument("--dry_run", action="store_true", help="check, print model, schedule and memory, and stop")

    data = parser.add_argument_group("data (default: procedural portraits, endless)")
    data.add_argument("--train_data_dir", type=path, help="folder or zip of images, nested ones too")
    data.add_argument(
        "--dataset_name", type=path, help="data set id on the Hub, or a local folder that `datasets` can load"
    )
    data.add_argument("--dataset_config_name", help="its configuration")
    data.add_argument("--dataset_split", default="train")
    data.add_argument("--streaming", **SWITCH, help="read it as it comes; each process and worker reads all")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label", help="class of an image; folders make one of this name")
    data.add_argument("--class_conditional", **SWITCH, help="train on --label_column too")
    data.add_argument("--random_crop", **SWITCH, help="crop to the aspect ratio at random, not centred")
    data.add_argument("--random_flip", **SWITCH, help="mirror half of the images")
    data.add_argument(
        "--small_images", choices=["fail", "skip", "upscale"], default="fail",
        help="what to do with images smaller than the largest resolution",
    )  # fmt: skip
    data.add_argument("--cache_dir", type=path, help="keep images resized in memory-mapped files there")
    data.add_argument("--num_workers", type=natural, default=0, help="that load images")
    data.add_argument(
        "--num_validation_images", type=natural, default=64, help="held out, up to a tenth of a data set"
    )

    sizes = parser.add_argument_group("resolutions, as HEIGHT or HEIGHTxWIDTH")
    sizes.add_argument("--resolutions", nargs="+", type=resolution, default=[(16, 16), (24, 24), (32, 32)])
    sizes.add_argument("--resolution_weights", nargs="+", type=number(float, 0), help="how often (default: equally)")
    sizes.add_argument("--resolution_warmup_steps", type=natural, default=0, help="sizes join, smallest first")
    sizes.add_argument("--upsample_resolutions", nargs="+", type=resolution, default=[], help="from enlarged images")
    sizes.add_argument("--upsample_weight", type=number(float, 0, 1), default=0.0, help="share of steps that do")
    sizes.add_argument(
        "--source_resolution", type=resolution,
        help="load images of about as many pixels and cut them to the modes that a resolution has, as the octaves of "
        "a pipeline do, instead of resizing (default: no; for a refiner the largest resolution)",
    )  # fmt: skip
    sizes.add_argument("--max_pixels_per_batch", type=count, help="images x height x width at once on a device")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_config",
        type=path,
        help="config.json of a DFUModel or DFURefiner, whose detail_std may be null (default: configs/portraits.json)",
    )
    model.add_argument(
        "--init_from", type=path, help="fine-tune this pipeline, a folder or a Hub id, in place of a new model"
    )
    model.add_argument(
        "--spectral_rank", type=number(float, 0, 0.999, open_low=True), metavar="SHARE",
        help="factorise the spectral weights of --init_from's model (0.4: about a sixth of them); see DFUModel",
    )  # fmt: skip
    model.add_argument(
        "--freeze", nargs="+", default=[], metavar="GROUP",
        help="spatial, spectral, norm, attention, skip, embedding, level:N or level:N.KIND",
    )  # fmt: skip

    training = parser.add_argument_group("training")
    training.add_argument("--batch_size", type=count, default=32, help="images per step, over all processes together")
    training.add_argument("--max_train_steps", type=count, default=2000)
    training.add_argument("--optimizer", choices=["adam", "adamw", "adam8bit"], default="adam")
    training.add_argument("--learning_rate", type=number(float, 0, 1e30, open_low=True), default=1e-3)
    training.add_argument("--weight_decay", type=number(float, 0, 1e6), default=0.01, help="of adamw")
    training.add_argument("--lr_scheduler", default="cosine", choices=SCHEDULES)
    training.add_argument("--lr_warmup_images", type=natural, default=3200, help="(not of `constant`)")
    training.add_argument("--max_grad_norm", type=positive, default=1.0)
    training.add_argument("--max_nonfinite_steps", type=count, default=10, help="stop after so many in a row")
    level, spread = number(float, -50, 50), number(float, 0, 50, open_low=True)
    training.add_argument("--p_mean", type=level, help="mean of ln sigma (default: -1.2, of a refiner -2.3)")
    training.add_argument("--p_std", type=spread, help="its standard deviation (default: 1.2, of a refiner 1.4)")
    training.add_argument(
        "--label_dropout", type=number(float, 0, 1), default=0.0,
        help="share of images without their label, for classifier-free guidance (0.1, say)",
    )  # fmt: skip
    training.add_argument("--sigma_data", type=positive, help="of the images (default: 0.5, or --init_from's)")
    training.add_argument("--augment_probability", type=number(float, 0, 1), default=0.0, help="EDM uses 0.12")
    training.add_argument("--ema_halflife_images", type=positive, default=20_000, help="of the averaged weights")
    training.add_argument("--ema_rampup_ratio", type=positive, default=0.05, help="half-life at most this x images")
    training.add_argument(
        "--power_ema", nargs="+", type=positive, default=[], metavar="SIGMA_REL",
        help="also keep power-function averages (EDM2: 0.05 0.1) for dfu_diffusers.training.ema.reconstruct",
    )  # fmt: skip
    training.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], help="(default: the launcher's)")
    training.add_argument("--tf32", **SWITCH, help="faster float32 matrix products on NVIDIA GPUs")
    training.add_argument("--gradient_checkpointing", **SWITCH, help="less memory, more time")
    training.add_argument(
        "--checkpointed_levels", type=natural, nargs="+", metavar="LEVEL",
        help="--gradient_checkpointing of these levels only: 0, the full image, holds most",
    )  # fmt: skip
    training.add_argument("--torch_compile", **SWITCH, help="compile the repeated blocks")
    training.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=path, default="outputs/dfu-portraits")
    output.add_argument("--checkpointing_steps", type=count, default=1000)
    output.add_argument("--checkpoints_total_limit", type=count, default=2)
    output.add_argument("--resume_from_checkpoint", type=path, help="a checkpoint folder, or 'latest'")
    output.add_argument("--report_images", type=count, default=32_000, help="sample and validate every so many images")
    output.add_argument("--report_to", default="tensorboard", help="a tracker of Accelerate (wandb, ...), or none")
    output.add_argument("--save_raw_weights", **SWITCH, help='beside the average, as variant="raw"')
    output.add_argument("--push_to_hub", **SWITCH, help="upload the pipeline with a model card at the end")
    output.add_argument("--hub_model_id", help="repository (default: name of --output_dir)")
    output.add_argument("--hub_private", **SWITCH, help="create it as a private one")
    output.add_argument("--hub_revision", help="branch to push to (default: main)")
    output.add_argument("--hub_tag", help="a name for this state, such as v1.0")
    output.add_argument("--hub_self_contained", **SWITCH, help="with code: loads without dfu_diffusers")
    output.add_argument("--hub_license", help="in the card, as the Hub names it: cc-by-4.0, say")
    output.add_argument("--hub_advised_sizes", help='in the card: "16 to 96 px", say')
    output.add_argument("--hub_limits", help="in the card: what the model is bad at")
    return parser


def parse_args(argv: list[str], configs: Path, description: str | None = None) -> argparse.Namespace:
    """The options of a command line. Ends the program with a message where they do not fit each other.

    Args:
        argv: without the name of the program.
        configs: folder of presets of the model.
        description: what --help begins with.
    """
    parser = build_parser(description)
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config = config_parser.parse_known_args(argv)[0].config
    args = parser.parse_args((options_of_file(parser, config) if config else []) + argv)

    if args.train_data_dir and args.dataset_name:
        parser.error("--train_data_dir and --dataset_name: give one of them")
    if args.streaming and (not (args.dataset_name or args.train_data_dir) or args.cache_dir):
        parser.error("--streaming needs --dataset_name or --train_data_dir, and goes without --cache_dir")
    if not (args.dataset_name or args.train_data_dir):
        given = [name for name in ("class_conditional", "random_crop", "random_flip", "cache_dir") if vars(args)[name]]
        if given:
            parser.error(f"--{given[0]} is for pictures of your own, but the portraits are drawn on the fly")
    for folder in filter(None, (args.train_data_dir, args.dataset_name)):
        if Path(folder).is_dir() and Path(args.output_dir).resolve().is_relative_to(Path(folder).resolve()):
            parser.error(
                f"--output_dir {args.output_dir} lies in {folder}: samples would be trained on; choose another"
            )
    if args.label_dropout and not args.class_conditional:
        parser.error("--label_dropout drops the labels of --class_conditional: give both, or neither")
    if args.random_crop and args.cache_dir:
        parser.error("--random_crop and --cache_dir: the cache holds images cropped already, so give one of them")
    if args.init_from and args.model_config:
        parser.error("--init_from brings its own model: leave out --model_config")
    if args.checkpointed_levels and not args.gradient_checkpointing:
        parser.error("--checkpointed_levels says where: --gradient_checkpointing asks for it")
    if args.spectral_rank and not args.init_from:
        parser.error("--spectral_rank factorises the model of --init_from: for a new one it belongs in --model_config")
    if args.resolution_weights and len(args.resolution_weights) != len(args.resolutions):
        parser.error(f"--resolution_weights needs {len(args.resolutions)} numbers, one for each of --resolutions")
    args.model_config = args.model_config or str(configs / "portraits.json")
    if not Path(args.model_config).is_file():
        presets = sorted(path.name for path in configs.glob("*.json"))
        parser.error(f"--model_config {args.model_config} is not a file; presets in {configs}: {', '.join(presets)}")
    return args


def options_of_file(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The options in a YAML file as a command line, so that both pass the same checks."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(options, dict):
        parser.error(f"--config {path} must hold lines such as `batch_size: 64`")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    if unknown := sorted(set(map(str, options)) - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        parser.error(f"--config {path}: no option {unknown[0]!r}" + "".join(f", perhaps {name!r}" for name in close))
    argv = []
    switches = {action.dest for action in parser._actions if isinstance(action, argparse.BooleanOptionalAction)}
    for name, value in options.items():
        if name in switches and isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, list) else ["no" if value is False else value]  # YAML's bare `no`
            argv += [f"--{name}", *map(str, values)]
    return argv


def public_options(args) -> dict:
    """The options in words that JSON has."""
    values = dict(sorted(vars(args).items()))
    for name in ("resolutions", "upsample_resolutions"):
        values[name] = [format_resolution(size) for size in values[name]]
    if values["source_resolution"]:
        values["source_resolution"] = format_resolution(values["source_resolution"])
    return values
