#!/usr/bin/env python
"""How good are portraits of one pipeline at many sizes, beside real ones and beside enlarging?

    python experiments/octaves.py [--model checkpoints/dfu-portraits] [--baseline FOLDER] [--count 100] [--seeds 0]

Rows at each size:
    octaves           the pipeline with default arguments, one seed for each picture
    enlarged          its samples at the training size, enlarged by Lanczos
    direct, cascade   another pipeline, --baseline, with these strategies
    real              other real portraits, as many: the floor of every distance
Columns: Frechet distance at the size, and what of it lies above the floor; coherence, the distance after averaging
down to the training size; patches, that of crops at the native scale; distance of spectra; PSNR in dB to the own
sample at the training size; log10 of the power in the cosine modes that each octave adds, less that of real portraits
at this size; seconds for a picture.

Finished pictures are kept in --output_dir/samples: the same command goes on where it was stopped. Writes octaves.csv,
octaves.md and octaves.png there, after each size.
"""

import argparse
import itertools
from pathlib import Path

from accelerate import Accelerator

from dfu_diffusers import DFUPipeline
from dfu_diffusers.command_line import DTYPES, count, natural, resolution
from dfu_diffusers.data.resolutions import Size, format_resolution
from dfu_diffusers.evaluation.collections import Collection, Features
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import octave_power
from dfu_diffusers.evaluation.report import Compared, measure
from dfu_diffusers.evaluation.sheets import contact_sheet
from dfu_diffusers.evaluation.sources import EvaluationError, ModelSource, Portraits, Resized
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.modes import octave_sizes
from pictures import CHECKPOINT

SIZES = [(64, 64), (85, 85), (97, 97), (128, 128), (96, 192), (192, 192), (256, 256), (512, 512)]
ROWS = ("octaves", "enlarged", "direct", "cascade", "real")
FIGURES = {
    "fd": "FD", "above": "above real", "coherence": "coherence", "patch_fd": "patches", "spectrum": "spectrum",
    "agreement": "PSNR to small, dB",
}  # fmt: skip
METRICS = ("fd", "coherence", "patch", "spectrum", "agreement")


class SquareFeatures(Features):
    """Features of functions on the unit square: every shape is averaged down to the training size."""

    def coarse_size(self, size: Size) -> Size | None:
        coarse = tuple(map(min, size, self.training_size))
        return None if coarse == size else coarse


class Comparison:
    """What all rows share, and what makes a row."""

    def __init__(self, args):
        self.args, self.accelerator = args, Accelerator()
        self.pipe = self.load(args.model)
        if self.pipe.refiner is None:
            raise EvaluationError(f"--model {args.model} has no refiner: name a pipeline that has one.")
        self.base, self.training_size = self.pipe._coarse_size((1, 1)), self.pipe._size(None, None)
        self.octaves = octave_sizes(tuple(map(max, zip(*args.sizes))), self.base)
        device = self.accelerator.device
        self.features = SquareFeatures(load_extractor("portrait", device), self.training_size, device)
        self.features.check_count(args.count, METRICS)

    def load(self, folder) -> DFUPipeline:
        pipe = DFUPipeline.from_pretrained(folder, torch_dtype=DTYPES[self.args.dtype])
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.accelerator.device)

    def collect(self, name: str, source, size: Size, start: int) -> Collection:
        """Images `start`, `start` + 1, ... of a source."""
        folder = self.args.output_dir / "samples" / f"{name}-{start}" / format_resolution(size)
        samples = Collection(folder, source, size, range(start, start + self.args.count), self.features)
        return samples.complete(self.accelerator, self.args.batch_size, f"{name} {format_resolution(size)}")

    def sources(self, size: Size, trained: Collection) -> dict:
        """What draws each row."""
        sources = {"octaves": ModelSource(self.pipe), "enlarged": Resized(trained, "lanczos")}
        if size == self.training_size:
            del sources["enlarged"]
        if self.args.baseline and max(size) <= self.args.baseline_limit:
            baseline = self.load(self.args.baseline)
            sources |= {name: ModelSource(baseline, strategy=name) for name in self.args.baseline_strategies}
        return sources | {"real": Portraits()}

    def at(self, size: Size, seed: int) -> tuple[list[dict], dict[str, Collection]]:
        """The rows of one size from `seed` on, and the pictures of each."""
        references = self.collect("references", Portraits(), size, 0)
        coarse_size = self.features.coarse_size(size)
        coarse = coarse_size and self.collect("references", Portraits(), coarse_size, 0)
        trained = self.collect("octaves", ModelSource(self.pipe), self.training_size, seed)
        true_power = octave_power(references.images, self.base)
        rows, drawn = [], {}
        for name, source in self.sources(size, trained).items():
            start = seed + self.args.count if name == "real" else seed  # others than the references
            samples = drawn[name] = self.collect(name, source, size, start)
            own = trained if name in ("octaves", "enlarged") else None
            figures = measure(Compared(samples, references, coarse, own, seed), METRICS)
            figures.setdefault("coherence", figures["fd"])  # within the training size
            seconds = samples.seconds_per_image + (trained.seconds_per_image if name == "enlarged" else 0)
            power = (octave_power(samples.images, self.base) / true_power).log10().tolist()
            rows.append(self.row(size, name, seed, figures, power) | {"s per image": seconds})
        for row in rows:
            row[FIGURES["above"]] = row[FIGURES["fd"]] - rows[-1][FIGURES["fd"]]
        return rows, drawn

    def row(self, size: Size, name: str, seed: int, figures: dict, power: list[float]) -> dict:
        row = {"size": format_resolution(size), "pictures": name, "seed": seed}
        row |= {heading: figures.get(column) for column, heading in FIGURES.items()}
        last = [max(octave) for octave in self.octaves]
        titles = [f"power to {last[0]} px", *(f"{a} to {b} px" for a, b in zip(last, last[1:]))]
        return row | dict(zip(titles, power + [None] * (len(titles) - len(power))))


def sheet(drawn: dict[Size, dict[str, Collection]], shown: int):
    """A column for each size; the first pictures of each row of the table beneath each other."""
    rows = {}
    for i, name in itertools.product(range(shown), ROWS):
        found = [collections.get(name) for collections in drawn.values()]
        if any(found):
            label = f"{name}, {next(filter(None, found)).indices[i]}"
            rows[label] = [each and each.pixels([each.indices[i]])[0] for each in found]
    return contact_sheet(rows, height=256, columns=list(map(format_resolution, drawn)))


def main(argv=None) -> list[dict]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder of a saved pipeline with a refiner, or its id on the Hub")
    add("--baseline", help="folder of another pipeline, to be sampled by --baseline_strategies")
    add("--baseline_strategies", nargs="+", choices=["direct", "cascade"], default=["direct", "cascade"])
    add("--baseline_limit", type=count, default=256, help="largest side at which it is sampled (default: %(default)s)")
    add("--sizes", nargs="+", type=resolution, default=SIZES, help="HEIGHT or HEIGHTxWIDTH")
    add("--count", type=count, default=100, help="pictures of each row (default: %(default)s)")
    add("--seeds", nargs="+", type=natural, default=[0], help="of the first picture: a set of rows for each")
    add("--shown", type=count, default=2, help="pictures of each row in octaves.png (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the models")
    add("--batch_size", type=count, default=4)
    add("--threads", type=count, help="of the CPU (default: torch's own choice)")
    add("--output_dir", type=Path, default=Path("outputs/octaves"))
    args = parse(parser, argv)
    try:
        comparison = Comparison(args)
        args.device, args.output = comparison.accelerator.device.type, args.output_dir / "octaves"
        title = f"{args.count} pictures a row, each from a seed of its own, default arguments, {args.dtype}."
        rows, drawn = [], {}
        for size in args.sizes:
            for seed in args.seeds:
                found, pictures = comparison.at(size, seed)
                rows += found
                drawn.setdefault(size, pictures)
            report(rows, title, "python experiments/octaves.py", args)
            sheet(drawn, min(args.shown, args.count)).save(args.output.with_suffix(".png"))
    except (EvaluationError, OSError) as error:  # what the options ask for cannot be had
        parser.error(str(error))
    return rows


if __name__ == "__main__":
    main()
