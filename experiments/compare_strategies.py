#!/usr/bin/env python
"""Which strategy draws best beyond the training size? The same seeds by each, measured against real portraits.

    python experiments/compare_strategies.py [--factors 1.5 2 3 4] [--num_images 256] [--dtype bfloat16]

Rows, for each factor of the model's `sample_size`: `DFUPipeline` with strategy "direct", the same with noise levels
shifted in proportion to the side, with `spectral_gain` 0.4, with `fixed_levels`, "guided", and "cascade" at each of
--cascade_sigmas with each of --cascade_holds (--strategies chooses among these); the training-size samples enlarged by
Lanczos; and other real portraits, the floor of every distance. Columns are explained in docs/evaluate.md. Beside them
the network calls of one image, at the full size and at smaller ones, their pixels in full-size calls, and the seconds
that one image took in batches of --batch_size.

Finished batches are kept in --output_dir/samples: the same command goes on where it was stopped. Writes results.md,
results.csv and, of the same seeds by each row, samples_SIZE.png.
"""

import argparse
import csv
import math
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator

from dfu_diffusers import DFUPipeline
from dfu_diffusers.data.resolutions import format_resolution
from dfu_diffusers.evaluation.collections import Collection, Features
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.report import HEADINGS, METRICS, Compared, Row, measure, sheet
from dfu_diffusers.evaluation.sources import ModelSource, Portraits, Resized
from dfu_diffusers.files import write_atomically

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"

FIGURES = ("coherence", "fd", "patch", "spectrum", "agreement")
COSTS = {
    "calls": "calls", "small_calls": "smaller ones", "cost": "cost, in full-size calls", "seconds": "s per image",
}  # fmt: skip


STRATEGIES = ["direct, shifted", "direct, gain", "direct, levels fixed", "guided", "cascade"]


class CallCounter(DFUPipeline):
    """Runs without the network, and counts its calls by size in `calls`."""

    def _evaluate(self, sample, *arguments):
        self.calls[tuple(sample.shape[-2:])] += 1
        return torch.zeros_like(sample)


def count_calls(pipe: DFUPipeline, size: tuple[int, int], **options) -> dict[str, float]:
    """The network calls that `pipe(height, width, **options)` makes for one image."""
    counter = CallCounter(**pipe.components)
    counter.calls = Counter()
    counter.set_progress_bar_config(disable=True)
    counter(height=size[0], width=size[1], output_type="latent", **options)
    pixels = sum(math.prod(each) * calls for each, calls in counter.calls.items())
    full = counter.calls[size]
    return {"calls": full, "small_calls": counter.calls.total() - full, "cost": pixels / math.prod(size)}


class Comparison:
    """The collections that all rows share, and what makes a row."""

    def __init__(self, args):
        self.args, self.accelerator = args, Accelerator()
        dtype = getattr(torch, args.dtype)
        self.pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=dtype).to(self.accelerator.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.training_size = self.pipe._size(None, None)
        device = self.accelerator.device
        self.features = Features(load_extractor(args.extractor, device), self.training_size, device)
        self.features.check_count(args.num_images, args.metrics)
        self.trained = self.collect("trained", self.source(), self.training_size, args.seed)

    def source(self, **options) -> ModelSource:
        return ModelSource(self.pipe, self.args.num_inference_steps, **options)

    def collect(self, name: str, source, size, start: int) -> Collection:
        """Images `start`, `start` + 1, ... of a source."""
        folder, indices = self.args.output_dir / "samples" / name, range(start, start + self.args.num_images)
        collection = Collection(folder / format_resolution(size), source, size, indices, self.features)
        return collection.complete(self.accelerator, self.args.batch_size, f"{name} {format_resolution(size)}")

    def at(self, factor: float) -> list[Row]:
        """All rows of one factor, measured."""
        args, size = self.args, tuple(round(factor * side) for side in self.training_size)
        references = self.collect("real", Portraits(), size, 0)
        coarse_size = self.features.coarse_size(size)
        coarse = coarse_size and self.collect("real", Portraits(), coarse_size, 0)
        rows = []

        def add(name: str, source, start: int = args.seed, trained=self.trained, costs=None) -> None:
            samples = self.collect(name, source, size, start)
            row = Row(name, "model", Compared(samples, references, coarse, trained, args.seed))
            row.figures = measure(row.compared, args.metrics) | (costs or {})
            if costs:
                row.figures["seconds"] = samples.seconds_per_image
            rows.append(row)

        strategies = {
            "direct": {},
            "direct, shifted": {"noise_shift": 1.0},
            "direct, gain 0.4": {"spectral_gain": 0.4},
            "direct, levels fixed": {"fixed_levels": True},
            "guided": {"strategy": "guided"},
            **{
                f"cascade, {sigma:g}, hold {hold:g}": dict(strategy="cascade", cascade_sigma=sigma, cascade_hold=hold)
                for sigma in args.cascade_sigmas
                for hold in args.cascade_holds
            },
        }
        for name, options in strategies.items():
            if not name.startswith(tuple(args.strategies)) and name != "direct":
                continue
            calls = count_calls(self.pipe, size, num_inference_steps=args.num_inference_steps, **options)
            add(name, self.source(**options), costs=calls)
        calls = count_calls(self.pipe, self.training_size, num_inference_steps=args.num_inference_steps)
        share = math.prod(self.training_size) / math.prod(size)
        lanczos = {"calls": 0, "small_calls": calls["calls"], "cost": calls["calls"] * share}
        add("sampled small, Lanczos", Resized(self.trained, "lanczos"), costs=lanczos)
        rows[-1].figures["seconds"] += self.trained.seconds_per_image
        add("other real portraits", Portraits(), start=args.num_images, trained=None)
        return rows


def table(rows: list[Row], columns: dict[str, str], training_size) -> str:
    lines = [" | ".join(["| size", "factor", "images", *columns.values()]) + " |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        factor = math.sqrt(math.prod(row.size) / math.prod(training_size))
        cells = [f"{row.figures[column]:.4g}" if column in row.figures else "" for column in columns]
        lines.append(" | ".join([f"| {format_resolution(row.size)}", f"{factor:.2f}x", row.model, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> list[Row]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder of a saved pipeline or its id on the Hub")
    add("--factors", type=float, nargs="+", default=[1.5, 2, 3, 4], help="of the training size")
    add("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES, help="besides direct sampling")
    add("--cascade_sigmas", type=float, nargs="+", default=[0.25], help="noise levels of the cascade, a row each")
    add("--cascade_holds", type=float, nargs="+", default=[0.0, 0.25], help="shares that it holds, a row each")
    add("--num_images", type=int, default=256)
    add("--seed", type=int, default=0, help="of the first image")
    add("--num_inference_steps", type=int, default=18)
    add("--metrics", nargs="+", choices=METRICS, default=list(FIGURES))
    add("--extractor", default="portrait", help="portrait, inception, dinov2[:id] or clip[:id]")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    add("--batch_size", type=int, default=16)
    add("--output_dir", type=Path, default=Path("outputs/strategies"))
    args = parser.parse_args(argv)
    if min(args.factors) <= 1:
        parser.error(f"--factors must be greater than 1, where strategies differ, but got {min(args.factors):g}")

    comparison = Comparison(args)
    rows = []
    for factor in args.factors:
        at_size = comparison.at(factor)
        rows += at_size
        sheet(at_size, number=min(6, args.num_images)).save(
            args.output_dir / f"samples_{format_resolution(at_size[0].size)}.png"
        )
        columns = {c: name for c, name in (HEADINGS | COSTS).items() if any(c in row.figures for row in rows)}
        text = table(rows, columns, comparison.training_size)
        write_atomically(args.output_dir / "results.md", text)
        with open(args.output_dir / "results.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["size", "images", *columns])
            writer.writeheader()
            for row in rows:
                figures = {column: row.figures.get(column) for column in columns}
                writer.writerow({"size": format_resolution(row.size), "images": row.model, **figures})
    print(text)
    return rows


if __name__ == "__main__":
    main()
