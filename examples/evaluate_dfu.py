#!/usr/bin/env python
"""Measure DFU models at sizes they were and were not trained on, beside upsampling and real images.

    python examples/evaluate_dfu.py --sizes 64 96 64x96 --num_images 256                 # the shipped portraits
    accelerate launch examples/evaluate_dfu.py --model outputs/dual outputs/unet --sizes 64 96 128
    accelerate launch examples/evaluate_dfu.py --model me/ffhq --reference_dir FFHQ --extractor inception

Each model draws --num_images images at each size, from seeds --seed, --seed + 1, ... They depend on neither the number
of processes nor --batch_size. Finished batches are kept: the same command goes on where it was stopped.

Writes into --output_dir: results.json, results.md (the table), curves.png, samples.png, and the images with their
features in samples/. Rows beside the models: the same seeds sampled at the training size and enlarged by Lanczos and
by Fourier zero-padding, and a second set of real images, the floor of every distance.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm.auto import tqdm

import dfu_diffusers
from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, hub
from dfu_diffusers.command_line import DTYPES, count, device_name, git_commit, natural, positive, resolution
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.folders import load_table
from dfu_diffusers.data.resolutions import Size, format_resolution
from dfu_diffusers.evaluation import extractors
from dfu_diffusers.evaluation.collections import MIN_IMAGES, MIN_SIDE, Collection, Features, coarse_size
from dfu_diffusers.evaluation.report import COLUMNS, FLOOR, HEADINGS, METRICS, Compared, Row, measure, sheet
from dfu_diffusers.evaluation.sources import EvaluationError, ModelSource, Pictures, Portraits, Resized
from dfu_diffusers.evaluation.tables import markdown
from dfu_diffusers.files import write_atomically
from dfu_diffusers.pipelines.dfu import STRATEGIES

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"

FACTORS = (1, 4 / 3, 5 / 3, 2)  # of the training size: the default of --sizes


# ---------------------------------------------------------------------------------------------------------------------
# Options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", nargs="+", default=[str(CHECKPOINT)], help="folders of saved pipelines, or their ids on the Hub")
    add("--sizes", nargs="+", type=resolution, help="HEIGHT or HEIGHTxWIDTH (default: training size x 1, 4/3, 5/3, 2)")
    add(
        "--train_size",
        type=resolution,
        help="largest size in training (default: the models' sample_size)",
    )
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="default: all")
    add("--extractor", default="portrait", help="portrait, inception, dinov2[:id], clip[:id] or efficientnet")
    add("--num_images", type=count, default=1000, help="of each model and size, and of references")
    add("--seed", type=natural, default=0, help="of the first image")
    add("--num_inference_steps", type=count, default=18)
    add("--octave_steps", type=count, help="of the refiner, in each doubling of the size (default: the pipeline's)")
    add("--class_labels", nargs="+", type=natural, help="classes to draw, in turn (default: all of the model's)")
    add("--guidance_scale", type=positive, help="of the classes or of the guide (default: the pipeline's)")
    add("--strategy", choices=STRATEGIES, help="default: octaves with a refiner, else direct; see docs/zero_shot.md")
    add("--dtype", choices=DTYPES, default="float32", help="of the models, in sampling")
    add("--batch_size", type=count, default=32, help="images at once in each process")

    references = parser.add_argument_group("references (default: held-out procedural portraits)")
    references.add_argument("--reference_dir", help="folder or zip of images, nested ones too")
    references.add_argument("--dataset_name", help="data set id on the Hub, or a folder that `datasets` can load")
    references.add_argument("--dataset_config_name", help="its configuration")
    references.add_argument("--dataset_split", default="train")
    references.add_argument("--image_column", default="image")
    references.add_argument(
        "--small_images", choices=["fail", "skip", "upscale"], default="fail",
        help="what to do with images smaller than one of the sizes",
    )  # fmt: skip
    references.add_argument("--cache_dir", help="keep them and their features there (default: in --output_dir)")

    add("--output_dir", type=Path, default=Path("outputs/evaluation"))
    add("--update_model_card", action="store_true", help="put the figures into README.md of each --model")
    return parser


def parse_args(argv) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.reference_dir and args.dataset_name:
        parser.error("--reference_dir and --dataset_name both name references: give one of them")
    for model, times in Counter(args.model).items():
        if times > 1:
            parser.error(f"--model names {model} {times} times: once will do")
        if not Path(model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            parser.error(f"--model: there is no folder {model}; name a saved pipeline, or its id on the Hub")
        if args.update_model_card and not (Path(model) / hub.CARD).is_file():
            parser.error(f"--update_model_card: there is no {Path(model) / hub.CARD}; name a local folder with a card")
    for size in (args.sizes or []) + [args.train_size] * bool(args.train_size):
        if min(size) < MIN_SIDE:
            parser.error(f"size {format_resolution(size)} is too small to measure: both sides must be >= {MIN_SIDE}")
    if args.num_images < MIN_IMAGES:
        parser.error(f"--num_images {args.num_images} is too few to compare sets: take at least {MIN_IMAGES}")
    return args


def ways_to_sample(args) -> dict:
    """Arguments of the pipeline that are given."""
    names = ("octave_steps", "guidance_scale", "strategy")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def labels(models: list[str]) -> list[str]:
    """Short names for the models: the last parts of their paths if these differ."""
    names = [Path(model).resolve().name if Path(model).is_dir() else model for model in models]
    return names if len(set(names)) == len(names) else [model.strip("/") for model in models]


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Evaluation:
    """Everything that a run holds. Making it checks what can be checked before the first image is drawn."""

    def __init__(self, args: argparse.Namespace, command: str):
        self.args, self.command = args, command
        # The others wait while the main process computes, longer than the usual ten minutes.
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=4))])
        configs = [load_config(model) for model in args.model]
        self.training_size = args.train_size or common_size(args.model, configs)
        grown = [tuple(round(factor * side) for side in self.training_size) for factor in FACTORS]
        self.sizes = sorted(set(args.sizes or grown), key=lambda size: (math.prod(size), size))
        channels = [config["in_channels"] for config in configs]
        largest = max(args.class_labels or [-1])
        for model, config in zip(args.model, configs):
            if args.class_labels and largest >= (classes := config.get("num_class_embeds") or 0):
                raise EvaluationError(f"--class_labels {largest}: {model} has {classes} classes, numbered from 0.")
        self.features = self._features()
        self.reference_source, self.data = self._references(channels)

    def _features(self) -> Features | None:
        args, device = self.args, self.accelerator.device
        if not any(METRICS[name].uses_features for name in args.metrics):
            return None
        with self.accelerator.local_main_process_first():  # one process a machine downloads
            features = Features(extractors.load_extractor(args.extractor, device), self.training_size, device)
        features.check_count(args.num_images, args.metrics)
        return features

    def _references(self, channels: list[int]):
        """The source of real images, and what to call them."""
        args = self.args
        name = args.reference_dir or args.dataset_name
        if not name:
            return Portraits(), "procedural portraits, held out"
        sizes = self.sizes + [size for size in map(self._coarse, self.sizes) if size]
        with self.accelerator.local_main_process_first():
            table = load_table(
                args.dataset_name, args.dataset_config_name, args.dataset_split, data_dir=args.reference_dir
            )
            dataset = ImageDataset(
                table, "L" if set(channels) == {1} else "RGB", args.image_column, small_images=args.small_images,
                min_size=tuple(map(max, zip(*sizes))),
            )  # fmt: skip
        if len(dataset) < 2 * args.num_images:
            raise EvaluationError(
                f"{name} has {len(dataset)} usable images, but {args.num_images} references and as many for the "
                f"floor are needed: lower --num_images to {len(dataset) // 2}, or add images."
            )
        return Pictures(dataset), Path(name).name if Path(name).exists() else name

    def _coarse(self, size: Size) -> Size | None:
        return coarse_size(size, self.training_size)

    def _collect(self, folder: Path, title: str, source, size: Size, start: int) -> Collection:
        indices = range(start, start + self.args.num_images)
        collection = Collection(folder / format_resolution(size), source, size, indices, self.features)
        return collection.complete(self.accelerator, self.args.batch_size, f"{title} {format_resolution(size)}")

    def run(self) -> list[Row]:
        self._collect_references()
        rows = [self._row(FLOOR, FLOOR, floor) for floor in self.floors]
        for model, label in zip(self.args.model, labels(self.args.model)):
            rows += self._collect_model(model, label)
        if self.accelerator.is_main_process:
            for row in tqdm(rows, desc="metrics", unit="row"):
                row.figures = measure(row.compared, self.args.metrics)
            self._write(rows)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return rows

    def _collect_references(self) -> None:
        """References at each size and at those that images are shrunk to; at each size a second set, of others."""
        folder = Path(self.args.cache_dir or self.args.output_dir / "references")
        sizes = dict.fromkeys([*self.sizes, *filter(None, map(self._coarse, self.sizes))])
        source, start = self.reference_source, self.args.num_images
        self.references = {size: self._collect(folder, "references", source, size, 0) for size in sizes}
        self.floors = [self._collect(folder / "floor", "floor", source, size, start) for size in self.sizes]

    def _collect_model(self, model: str, label: str) -> list[Row]:
        args, seed = self.args, self.args.seed
        pipe = DFUPipeline.from_pretrained(model, torch_dtype=DTYPES[args.dtype]).to(self.accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        steps = args.num_inference_steps
        source = ModelSource(pipe, args.class_labels, num_inference_steps=steps, **ways_to_sample(args))
        folder = args.output_dir / "samples" / label.replace("/", "--")
        beyond = [size for size in self.sizes if self._coarse(size)]
        needed = bool(beyond) or ("agreement" in args.metrics and self.sizes != [self.training_size])
        sizes = dict.fromkeys([self.training_size] * needed + self.sizes)
        samples = {size: self._collect(folder, label, source, size, seed) for size in sizes}
        trained = samples.get(self.training_size)
        rows = [self._row(label, "model", samples[size], trained) for size in self.sizes]
        for method in ("lanczos", "fourier"):
            name = folder.with_name(f"{folder.name}, {method}")
            for size in beyond:
                enlarged = self._collect(name, f"{label}, {method}", Resized(trained, method), size, seed)
                rows.append(self._row(label, method, enlarged, trained))
        return rows

    def _row(self, model: str, method: str, samples: Collection, trained: Collection | None = None) -> Row:
        coarse = self.references.get(self._coarse(samples.size))
        compared = Compared(samples, self.references[samples.size], coarse, trained, self.args.seed)
        return Row(model, method, compared)

    # -- what it leaves -----------------------------------------------------------------------------------------------

    def _write(self, rows: list[Row]) -> None:
        rows.sort(key=lambda row: (self.sizes.index(row.size), row.method == FLOOR))  # stable: models as they came
        output, table = self.args.output_dir, self._table(rows)
        write_atomically(output / "results.json", json.dumps(self._facts(rows), indent=2) + "\n")
        write_atomically(output / "results.md", table)
        plot_curves(output / "curves.png", rows, self.training_size)
        sheet(rows).save(output / "samples.png")
        print(table)
        if self.args.update_model_card:
            for model, label in zip(self.args.model, labels(self.args.model)):
                hub.update_card(Path(model), self._card_figures(rows, label), COLUMNS, self.data, self._protocol())
        print(f"Wrote results.json, results.md, curves.png and samples.png into {output}.")

    def _card_figures(self, rows: list[Row], label: str) -> dict[Size, dict[str, float]]:
        own = [row for row in rows if row.model == label and row.method == "model"]
        return {row.size: {c: value for c, value in row.figures.items() if c in HEADINGS} for row in own}

    def _protocol(self) -> str:
        extractor = f"{self.features.extractor.name}, " if self.features else ""
        ways = "".join(f", {name} {value}" for name, value in ways_to_sample(self.args).items())
        dtype = "" if self.args.dtype == "float32" else f", {self.args.dtype}"
        return f"{extractor}{self.args.num_images} images, {self.args.num_inference_steps} steps{ways}{dtype}"

    def _facts(self, rows: list[Row]) -> dict:
        options = {name: _plain(value) for name, value in sorted(vars(self.args).items())}
        return {
            "command": self.command,
            "options": options,
            "training_size": format_resolution(self.training_size),
            "extractor": self.features and self.features.extractor.name,
            "references": self.reference_source.key(self.training_size),
            "rows": [self._facts_of_row(row) for row in rows],
            "versions": {m.__name__: m.__version__ for m in (dfu_diffusers, torch, diffusers, accelerate)},
            "commit": git_commit(),
            "device": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
        }

    def _facts_of_row(self, row: Row) -> dict:
        samples = row.compared.samples
        return {
            "name": row.name,
            "method": row.method,
            "size": format_resolution(row.size),
            "factor": round(math.sqrt(math.prod(row.size) / math.prod(self.training_size)), 3),
            "count": len(samples.indices),
            "figures": row.figures,
            "images": samples.key,
            "seconds_per_image": round(samples.seconds_per_image, 5),
        }

    def _table(self, rows: list[Row]) -> str:
        columns = [column for column in HEADINGS if any(column in row.figures for row in rows)]
        lines = []
        for row in rows:
            facts = self._facts_of_row(row)
            cells = {HEADINGS[column]: _cell(row.figures, column) for column in columns}
            lines.append({"size": facts["size"], "factor": f"{facts['factor']:.2f}x", "images": row.name, **cells})
        return (
            f"{self._protocol()}, against {self.data}; trained at up to {format_resolution(self.training_size)} px. "
            f"In brackets: 95% interval.\n\n{markdown(lines)}"
        )


def load_config(model: str) -> dict:
    """Of `unet` in a saved pipeline here or on the Hub, with the `sample_size` of the refiner if there is one."""
    try:
        config = DFUModel.load_config(model, subfolder="unet")
        if DFUPipeline.load_config(model).get("refiner", [None])[0]:
            config["sample_size"] = DFURefiner.load_config(model, subfolder="refiner")["sample_size"]
        return config
    except OSError as error:
        raise EvaluationError(
            f"--model {model} cannot be loaded ({error}): name the folder of a saved pipeline, or its id on the Hub."
        ) from error


def common_size(models: list[str], configs: list[dict]) -> Size:
    """The (height, width) that all models name as theirs."""
    sizes = [config["sample_size"] for config in configs]
    sizes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    if len(set(sizes)) > 1:
        named = ", ".join(f"{model} {format_resolution(size)}" for model, size in zip(models, sizes))
        raise EvaluationError(f"The models have different sample sizes ({named}): say which with --train_size.")
    return sizes[0]


def _plain(value):
    if isinstance(value, tuple):
        return format_resolution(value)
    return list(map(_plain, value)) if isinstance(value, list) else str(value) if isinstance(value, Path) else value


def _cell(figures: dict[str, float], column: str) -> str:
    if column not in figures:
        return ""
    interval = " ({kid_low:.3g} to {kid_high:.3g})".format(**figures) if column == "kid" else ""
    return f"{figures[column]:.3g}{interval}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def plot_curves(path: Path, rows: list[Row], training_size: Size) -> None:
    """Each metric against size, the root of the number of pixels; a line for each kind of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [column for column in HEADINGS if any(column in row.figures for row in rows)]
    names = list(dict.fromkeys(row.name for row in rows))
    across = min(4, len(columns))
    figure, axes = plt.subplots(
        -(-len(columns) // across), across, figsize=(4 * across, 3 * -(-len(columns) // across)), squeeze=False
    )
    for axis in axes.flat[len(columns) :]:
        axis.remove()
    for axis, column in zip(axes.flat, columns):
        for index, name in enumerate(names):
            shown = [row for row in rows if row.name == name and column in row.figures]
            sides = [math.sqrt(math.prod(row.size)) for row in shown]
            style = "k--" if name == FLOOR else f"C{index % 10}"
            axis.plot(sides, [row.figures[column] for row in shown], style, marker="o", markersize=4, label=name)
        axis.axvline(math.sqrt(math.prod(training_size)), color="0.8", zorder=0)
        axis.set(title=HEADINGS[column], xlabel="size, px (grey: largest in training)")
    handles = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.tight_layout()
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(argv=None) -> list[Row]:
    """Returns the rows of the table, with figures in the main process."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        return Evaluation(args, shlex.join(["evaluate_dfu.py", *argv])).run()
    except (ValueError, OSError, ImportError, hub.HubError) as error:  # what the options ask for cannot be had
        raise SystemExit(f"evaluate_dfu.py: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
