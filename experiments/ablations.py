#!/usr/bin/env python
"""Which choices in the design of octaves pay? Small networks, each trained with one choice changed, at equal cost.

    python experiments/ablations.py refiner --trunk outputs/experiment/octaves-0
    python experiments/ablations.py refiner soft law --trunk outputs/experiment/octaves-0    # only these
    python experiments/ablations.py trunk --refiner checkpoints/dfu-portraits

Variants of the refiner, trained on portraits of 20 to 32 px (or to --largest 64), drawn at up to 8 times the size with
the trunk of --trunk:
    base      64 channels, 5 blocks, 48,000 pictures, one deviation of detail for all sides
    law       the deviation of detail follows the power law that is measured on the training pictures
    half      the same with half of its exponent, as in the trainer
    damped    the damping by pixels is not undone (the trunk's is)
    clean     the coarse picture always has the noise of sampling, in training, too
    soft      half of the pictures are blurred by up to 1.5 px: soft coarse pictures then mean little detail
    recolour  pictures of 0.1 to 1 of their contrast, around a random colour
    small     half of the pictures are of 10 to 14 px: one octave more (with --largest 32)
    wide      96 channels, 2 blocks
    deep      48 channels, 9 blocks
    narrow    32 channels, 5 blocks
Variants of the trunk, trained on portraits cut to the modes of its grid, drawn at 64 px with the refiner of --refiner:
    spatial-16, dual-16, spatial-24, spatial-32
Refiners see pictures in inverse proportion to their parameters, trunks in inverse proportion to the pixels of their
grid. Columns: those of experiments/octaves.py, and the loss of a refiner on held-out portraits, from 16 to 32 px. The
same command goes on where it was stopped.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.command_line import count
from dfu_diffusers.data.portraits import PortraitDataset, portrait_parameters, render_portraits
from dfu_diffusers.data.resolutions import Size, format_resolution
from dfu_diffusers.evaluation.collections import Collection, Features
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import octave_power
from dfu_diffusers.evaluation.report import Compared, measure
from dfu_diffusers.evaluation.sources import EvaluationError, ModelSource, Portraits
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.modes import (
    DETAIL_SIDE,
    average_pixels,
    from_modes,
    octave_sizes,
    to_modes,
    unaverage_pixels,
)
from dfu_diffusers.training import losses
from pictures import CHECKPOINT, HELD_OUT

BATCH = 32
HELD_OUT_IMAGES = 256
DETAIL_STD = 0.13  # of portraits of 32 px
MAX_BLUR = 1.5  # px
METRICS = ("fd", "patch", "spectrum")
COLUMNS = {"fd": "FD", "patch_fd": "patches", "spectrum": "spectrum"}


def portraits(numbers: range, size: Size, series: int = 0) -> torch.Tensor:
    return render_portraits(portrait_parameters(numbers, series), *size)


# ---------------------------------------------------------------------------------------------------------------------
# What the variants change


class RawPipeline(DFUPipeline):
    """For a refiner whose pictures were not freed of the damping by pixels: it is not put back either."""

    @functools.wraps(DFUPipeline.__call__)
    def __call__(self, **options):
        result = super().__call__(**options)
        result.images = unaverage_pixels(result.images)
        return result


def soften(images: torch.Tensor, numbers: range) -> torch.Tensor:
    """Half of the images blurred by a Gaussian of up to `MAX_BLUR` px."""
    choice, width = torch.special.ndtr(losses.image_normals(7, numbers, 2)).T
    blur = torch.where(choice < 0.5, 0.0, MAX_BLUR * width).view(-1, 1, 1, 1)
    size = images.shape[-2:]
    rows, columns = (math.pi * torch.arange(side) / side for side in size)
    response = torch.exp(-(rows[:, None] ** 2 + columns**2) * blur**2 / 2)
    return from_modes(to_modes(images, averaged=True) * response, size, averaged=True)


def recolour(images: torch.Tensor, numbers: range) -> torch.Tensor:
    """Images of a random share, at least a tenth, of their contrast around a random colour."""
    share, *colour = torch.special.ndtr(losses.image_normals(8, numbers, 4)).T
    share = (0.1**share).view(-1, 1, 1, 1)
    return images * share + (1 - share) * (2 * torch.stack(colour, 1)[:, :, None, None] - 1)


@dataclass
class Refiner:
    """A variant of the refiner: arguments of its network, sides in px and their shares, and changes."""

    channels: int = 64
    blocks: int = 5
    sides: dict[int, float] | None = None  # default: those of SIDES
    law: float = 0.0  # share of the measured exponent
    pipeline: type = DFUPipeline
    change: Callable = staticmethod(lambda images, numbers: images)
    told: tuple[float, float] = losses.TOLD_NOISE

    def build(self, sides: dict[int, float]) -> DFURefiner:
        side = max(sides)
        _, exponent = losses.detail_law(portraits(range(128), (side, side)), self.law)
        detail = dict(detail_std=DETAIL_STD * (DETAIL_SIDE / 32) ** exponent, detail_exponent=exponent)
        return DFURefiner(hidden_channels=self.channels, num_layers=self.blocks, **detail)

    @property
    def cost(self) -> float:
        """Of a picture, in those of `base`: nearly all lies in the kernels of 3x3 between the blocks' features."""
        return self.channels**2 * self.blocks / (64**2 * 5)


REFINERS = {
    "base": Refiner(),
    "law": Refiner(law=1.0),
    "half": Refiner(law=losses.LAW_SHARE),
    "damped": Refiner(pipeline=RawPipeline, change=lambda images, numbers: average_pixels(images)),
    "clean": Refiner(told=(losses.SAMPLING_NOISE, losses.SAMPLING_NOISE)),
    "soft": Refiner(change=soften),
    "recolour": Refiner(change=recolour),
    "small": Refiner(sides={10: 0.25, 14: 0.25, 20: 0.1, 26: 0.1, 32: 0.3}),
    "wide": Refiner(channels=96, blocks=2),
    "deep": Refiner(channels=48, blocks=9),
    "narrow": Refiner(channels=32, blocks=5),
}
SIDES = {  # px, and how often they are drawn, by the largest
    32: {20: 0.2, 26: 0.2, 32: 0.6},
    64: {20: 0.1, 26: 0.1, 32: 0.35, 40: 0.08, 48: 0.07, 57: 0.07, 64: 0.23},
}
TRUNKS = {"spatial-16": 16, "dual-16": 16, "spatial-24": 24, "spatial-32": 32}  # and their grids, in px
TRUNK = dict(block_out_channels=[64, 96, 128], layers_per_block=1, attention_levels=[1, 2], dropout=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def fit(network: nn.Module, loss_at: Callable[[int], torch.Tensor], steps: int, title: str) -> nn.Module:
    """Train in bfloat16; the average of the weights. `loss_at` gives the losses of a step's pictures."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)  # beta1 cycles, too
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    progress = tqdm(range(steps), desc=title, unit="step")
    for step in progress:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_at(step).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return average.module.eval()


def train_refiner(variant: Refiner, largest: int, steps: int, title: str) -> DFURefiner:
    shares_of = variant.sides or SIDES[largest]
    network = variant.build(shares_of).train()
    loss = losses.OctaveLoss(network, losses.octave_scalings(network.config))
    generator, sides = torch.Generator().manual_seed(0), list(shares_of)
    shares = torch.tensor(list(shares_of.values()))

    def loss_at(step):
        side = sides[torch.multinomial(shares, 1, generator=generator).item()]
        numbers, size = range(BATCH * step, BATCH * (step + 1)), (side, side)
        return loss(variant.change(portraits(numbers, size), numbers), numbers, size)

    usual, losses.TOLD_NOISE = losses.TOLD_NOISE, variant.told
    try:
        return fit(network, loss_at, round(steps / variant.cost), title)
    finally:
        losses.TOLD_NOISE = usual


def train_trunk(name: str, steps: int) -> DFUModel:
    side, kind = TRUNKS[name], name.split("-")[0]
    modes = [[5, 6], [4, 5], [2, 3]] if kind == "dual" else [None] * 3
    network = DFUModel(sample_size=side, conv_type=kind, fourier_modes=modes, **TRUNK).train()
    loss = losses.TrainingLoss(network, EDMHeunScheduler(), p_mean=-1.7, p_std=1.6)

    def loss_at(step):
        numbers = range(BATCH * step, BATCH * (step + 1))
        return loss(portraits(numbers, (64, 64)), numbers, (side, side))

    return fit(network, loss_at, round(steps * (16 / side) ** 2), name)


def held_out_loss(refiner: DFURefiner) -> float:
    """From 16 to 32 px, the coarse pictures with the noise of sampling."""
    data, size = PortraitDataset(HELD_OUT_IMAGES, seed=HELD_OUT), (32, 32)
    scalings = losses.octave_scalings(refiner.config)
    loss = losses.OctaveValidationLoss(data, [size], scalings, p_mean=-2.3, p_std=1.4)
    return loss(refiner)[size][0].item()


def trained(folder: Path, network: type, train: Callable[[], nn.Module]) -> nn.Module:
    """The network that was saved in the folder, or else a new one, which is saved there."""
    if not list(folder.glob("*.safetensors")):  # which are saved last
        train().save_pretrained(folder)
    return network.from_pretrained(folder).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


class Comparison:
    """Draws each variant's pictures, and compares them with portraits."""

    def __init__(self, args, training_side: int):
        self.args, self.accelerator, self.training_size = args, Accelerator(cpu=True), (training_side, training_side)
        self.features = Features(load_extractor("portrait"), self.training_size)
        self.features.check_count(args.count, METRICS)

    def collect(self, name: str, source, side: int, start: int = 0) -> Collection:
        size = (side, side)
        samples = f"samples-{self.args.part}-{self.training_size[0]}"
        folder = self.args.output_dir / samples / f"{name}-{start}" / format_resolution(size)
        samples = Collection(folder, source, size, range(start, start + self.args.count), self.features)
        return samples.complete(self.accelerator, 10, f"{name} {format_resolution(size)}")

    def row(self, name: str, source, side: int, start: int = 0) -> dict:
        """The figures of pictures `start`, `start` + 1, ... of a source at one size."""
        references = self.collect("references", Portraits(), side)
        samples = self.collect(name, source, side, start)
        figures = measure(Compared(samples, references, None, None, 0), METRICS)
        row = {"variant": name, "size": side} | {heading: figures[key] for key, heading in COLUMNS.items()}
        power = (octave_power(samples.images, (16, 16)) / octave_power(references.images, (16, 16))).log10().tolist()
        sides = [rows for rows, _ in octave_sizes((side, side), (16, 16))]
        return row | {f"power, {a} to {b} px": value for a, b, value in zip(sides, sides[1:], power[1:])}

    def rows(self, name: str, pipe: DFUPipeline) -> list[dict]:
        pipe.set_progress_bar_config(disable=True)
        source = ModelSource(pipe.to(torch.bfloat16))
        return [self.row(name, source, side) for side in self.args.sides]

    def floor(self) -> list[dict]:
        return [self.row("real", Portraits(), side, self.args.count) for side in self.args.sides]


def component(folder: str, option: str, name: str) -> nn.Module:
    """The unet or refiner of a saved pipeline."""
    try:
        found = getattr(DFUPipeline.from_pretrained(folder), name)
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{option} {folder} cannot be loaded as a pipeline: {error}") from error
    if found is None:
        raise EvaluationError(f"{option} {folder} has no {name}: name another pipeline.")
    return found


def compare_refiners(names: list[str], args) -> list[dict]:
    trunk = component(args.trunk, "--trunk", "unet")
    comparison, rows = Comparison(args, args.largest), []
    for name in names or REFINERS:
        variant = REFINERS[name]
        train = functools.partial(train_refiner, variant, args.largest, args.steps, name)
        folder = args.output_dir / f"refiner-{name}-{args.largest}px-{args.steps}"
        refiner = trained(folder, DFURefiner, train)
        loss = None if variant.pipeline is RawPipeline else held_out_loss(refiner)
        pipe = variant.pipeline(trunk, EDMHeunScheduler(), refiner=refiner)
        rows += [row | {"loss": loss} for row in comparison.rows(name, pipe)]
    return rows + comparison.floor()


def compare_trunks(names: list[str], args) -> list[dict]:
    refiner = component(args.refiner, "--refiner", "refiner")
    comparison, rows = Comparison(args, 64), []
    for name in names or TRUNKS:
        train = functools.partial(train_trunk, name, args.steps)
        trunk = trained(args.output_dir / f"trunk-{name}-{args.steps}", DFUModel, train)
        rows += comparison.rows(name, DFUPipeline(trunk, EDMHeunScheduler(), refiner=refiner))
    return rows + comparison.floor()


def main(argv=None) -> list[dict]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", choices=["refiner", "trunk"])
    add("variants", nargs="*", help="default: all")
    add("--trunk", default="outputs/experiment/octaves-0", help="pipeline whose unet is the trunk")
    add("--refiner", default=str(CHECKPOINT), help="pipeline whose refiner is taken")
    add("--largest", type=int, choices=SIDES, default=32, help="side of the refiner's training pictures, px")
    add("--steps", type=count, default=1500, help=f"of {BATCH} pictures, for the first variant (default: %(default)s)")
    add("--sides", nargs="+", type=count, help="px (default: --largest and 2, 4, 8 times it; 64 for the trunk)")
    add("--count", type=count, default=100, help="pictures of each row (default: %(default)s)")
    add("--threads", type=count, help="of the CPU (default: torch's own choice)")
    add("--output_dir", type=Path, default=Path("outputs/ablations"), help="of one process at a time")
    args = parse(parser, argv)
    compare, known = {"refiner": (compare_refiners, REFINERS), "trunk": (compare_trunks, TRUNKS)}[args.part]
    if unknown := set(args.variants) - set(known):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if args.largest != 32 and "small" in (args.variants or known) and args.part == "refiner":
        parser.error("the variant small is for --largest 32: name the others")
    args.sides = args.sides or ([factor * args.largest for factor in (1, 2, 4, 8)] if args.part == "refiner" else [64])
    args.device, args.output = "cpu", args.output_dir / f"ablations_{args.part}"
    try:
        rows = compare(args.variants, args)
    except (EvaluationError, OSError) as error:  # what the options ask for cannot be had
        parser.error(str(error))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{column: row.get(column) for column in columns} for row in rows]
    title = f"{args.count} pictures a row, {args.steps:,} steps of {BATCH} pictures for the first variant."
    report(rows, title, "python experiments/ablations.py", args)
    return rows


if __name__ == "__main__":
    main()
