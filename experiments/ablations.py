#!/usr/bin/env python
"""Which cheap changes at sampling time help beyond the training size? The same seeds with each, sampled directly.

    python experiments/ablations.py [--model checkpoints/dfu-portraits] [--factors 1.5 2] [--num_images 100]

Variants of a trained model, none of which needs other weights:
    as it is                what `DFUPipeline` does
    attention, log N        queries scaled by ln N / ln N_train for N pixels (arXiv 2306.08645)
    edges repeated          3x3 convolutions that repeat the edge in place of zeros beyond it
    spectral x G early      results of the Fourier layers times G while sigma is above 1 (after arXiv 2510.20766)
    levels from L fixed     levels from L on work on the grid that they have at the training size, whatever the size
                            of the picture (after arXiv 2311.17528); "early": while sigma is above 1
    away from spectral x G  guidance of 1.5 with the model itself for a guide, its Fourier layers times G (after
                            autoguidance, arXiv 2406.02507): twice the network calls
Distances are to real portraits, see docs/evaluate.md. Finished images are kept in --output_dir: the same command goes
on where it was stopped. Writes results.md, results.csv and a sheet for each size.
"""

import argparse
import contextlib
import copy
import math
from pathlib import Path

import torch
from accelerate import Accelerator

from dfu_diffusers import DFUPipeline
from dfu_diffusers.data.resolutions import format_resolution
from dfu_diffusers.evaluation.collections import Collection, Features
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.report import METRICS, Compared, Row, measure, sheet
from dfu_diffusers.evaluation.sources import ModelSource, Portraits
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.layers import DFUAttention, DFUBlock
from dfu_diffusers.models.spectral import SpectralConv2d

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"

EARLY = math.log(1.0) / 4  # c_noise of sigma 1


class Variant:
    """Hooks that change a model as long as they are there. `early` tells whether the noise level is above 1."""

    def __init__(self, unet):
        self.unet, self.hooks, self.early = unet, [], True
        self.watch(unet, self.see_level)

    def watch(self, module, hook, after: bool = False) -> None:
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        self.hooks.append(register(hook))

    def see_level(self, unet, args):
        self.early = bool(torch.as_tensor(args[1]).max() > EARLY)

    def modules(self, kind):
        return [module for module in self.unet.modules() if isinstance(module, kind)]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


@contextlib.contextmanager
def as_it_is(unet, size: int):
    yield


@contextlib.contextmanager
def log_attention(unet, size: int):
    """At `size` px, the side of a training image."""
    variant = Variant(unet)

    def scale(qkv, args, output):
        pixels, channels = args[0].shape[-2], output.shape[-1] // 3
        factor = math.log(pixels) / math.log(variant.training_pixels[qkv])
        return torch.cat([output[..., :channels] * max(1.0, factor), output[..., channels:]], -1)

    variant.training_pixels = {}

    def remember(qkv, args):
        variant.training_pixels[qkv] = args[0].shape[-2]

    layers = [attention.qkv for attention in variant.modules(DFUAttention)]
    hooks = [layer.register_forward_pre_hook(remember) for layer in layers]
    with torch.no_grad():
        unet(torch.zeros(1, unet.config.in_channels, size, size, dtype=unet.dtype), 0.0)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        variant.watch(layer, scale, after=True)
    try:
        yield
    finally:
        variant.remove()


@contextlib.contextmanager
def repeated_edges(unet, size: int):
    convolutions = [m for m in unet.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    for convolution in convolutions:
        convolution.padding_mode = "replicate"
    try:
        yield
    finally:
        for convolution in convolutions:
            convolution.padding_mode = "zeros"


def spectral_gain(gain: float, always: bool = False):
    @contextlib.contextmanager
    def change(unet, size: int):
        variant = Variant(unet)

        def set_gain(unet, args):
            for layer in variant.modules(SpectralConv2d):
                layer.gain = gain if variant.early or always else 1.0

        variant.watch(unet, set_gain)
        with unet.use_spectral_gain(gain):  # which puts the gains back
            try:
                yield
            finally:
                variant.remove()

    return change


def fixed_levels(first: int, only_early: bool = False):
    @contextlib.contextmanager
    def change(unet, size: int):
        variant = Variant(unet)

        def fix(block, args):
            grid = math.ceil(size / 2**block.level)
            if block.resample == "up":  # to the level above, whose size its skip connection has
                return None
            if block.level < first or (only_early and not variant.early):
                return None
            return (*args[:2], tuple(min(side, grid) for side in args[2])) if block.resample else None

        for block in variant.modules(DFUBlock):
            variant.watch(block, fix)
        try:
            yield
        finally:
            variant.remove()

    return change


def both(first, second):
    @contextlib.contextmanager
    def change(unet, size: int):
        with first(unet, size), second(unet, size):
            yield

    return change


VARIANTS = {
    "as it is": as_it_is,
    "attention, log N": log_attention,
    "edges repeated": repeated_edges,
    "spectral x 1.1 early": spectral_gain(1.1),
    "spectral x 1.25 early": spectral_gain(1.25),
    "spectral x 1.5 early": spectral_gain(1.5),
    "spectral x 1.25": spectral_gain(1.25, always=True),
    "spectral x 1.5": spectral_gain(1.5, always=True),
    "spectral x 0.9 early": spectral_gain(0.9),
    "levels from 1 fixed": fixed_levels(1),
    "levels from 2 fixed": fixed_levels(2),
    "levels from 1 fixed, spectral x 1.1 early": both(fixed_levels(1), spectral_gain(1.1)),
    "levels from 1 fixed, spectral x 1.25": both(fixed_levels(1), spectral_gain(1.25, always=True)),
    "levels from 1 fixed early": fixed_levels(1, only_early=True),
    "levels from 2 fixed early": fixed_levels(2, only_early=True),
}

GUIDES = {"away from spectral x 0.7": 0.7, "away from spectral x 0.5": 0.5}


def weakened(unet, gain: float):
    """A copy whose Fourier layers count less."""
    guide = copy.deepcopy(unet)
    for layer in guide.modules():
        if isinstance(layer, SpectralConv2d):
            layer.weight.data.mul_(gain)
    return guide


class Changed(ModelSource):
    """Images of a variant."""

    def __init__(self, pipe, steps: int, name: str, size: int, strategy: str):
        options = {} if strategy == "direct" else {"strategy": strategy}
        if name in GUIDES:
            pipe = type(pipe)(pipe.unet, pipe.scheduler, guide=weakened(pipe.unet, GUIDES[name]))
            pipe.set_progress_bar_config(disable=True)
            options["guidance_scale"] = 1.5
        super().__init__(pipe, steps, **options)
        self.name, self.training_size = name, size

    def key(self, size) -> dict:
        return super().key(size) | ({} if self.name == "as it is" else {"variant": self.name})

    def draw(self, indices, size):
        with VARIANTS.get(self.name, as_it_is)(self.pipe.unet, self.training_size):
            return super().draw(indices, size)


def rows_at(size: tuple[int, int], pipe, features: Features, accelerator: Accelerator, args) -> list[Row]:
    training_size, folder = pipe.unet.config.sample_size, args.output_dir / "samples"

    def collect(name: str, source, at, start: int = args.seed) -> Collection:
        indices, place = range(start, start + args.num_images), folder / name / format_resolution(at)
        collection = Collection(place, source, at, indices, features)
        return collection.complete(accelerator, args.batch_size, f"{name} {format_resolution(at)}")

    real, coarse_size = collect("real", Portraits(), size, 0), features.coarse_size(size)
    coarse = coarse_size and collect("real", Portraits(), coarse_size, 0)
    trained = collect("trained", ModelSource(pipe, args.num_inference_steps), features.training_size)
    rows = []
    for name in args.variants:
        folder_name = name if args.strategy == "direct" else f"{args.strategy}, {name}"
        samples = collect(
            folder_name, Changed(pipe, args.num_inference_steps, name, training_size, args.strategy), size
        )
        row = Row(name, "model", Compared(samples, real, coarse, trained, args.seed))
        row.figures = measure(row.compared, args.metrics) | {"seconds": samples.seconds_per_image}
        rows.append(row)
    return rows


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder of a saved pipeline with a square `sample_size`")
    add("--factors", type=float, nargs="+", default=[1.5, 2], help="of the training size")
    add("--variants", nargs="+", choices=[*VARIANTS, *GUIDES], default=[*VARIANTS, *GUIDES])
    add("--strategy", choices=["direct", "guided", "cascade"], default="direct", help="of the pipeline")
    add("--num_images", type=int, default=100)
    add("--seed", type=int, default=0, help="of the first image")
    add("--num_inference_steps", type=int, default=18)
    add("--metrics", nargs="+", choices=METRICS, default=["coherence", "fd", "patch", "spectrum", "agreement"])
    add("--extractor", default="portrait", help="portrait, inception, dinov2[:id] or clip[:id]")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="of the model")
    add("--batch_size", type=int, default=10)
    add("--output_dir", type=Path, default=Path("outputs/ablations"))
    args = parse(parser, argv)

    accelerator = Accelerator()
    pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    side, device = pipe.unet.config.sample_size, accelerator.device
    features = Features(load_extractor(args.extractor, device), (side, side), device)
    features.check_count(args.num_images, args.metrics)
    table = []
    for factor in args.factors:
        size = (round(factor * side),) * 2
        rows = rows_at(size, pipe, features, accelerator, args)
        sheet(rows, number=min(6, args.num_images)).save(args.output_dir / f"samples_{format_resolution(size)}.png")
        table += [{"size": size[0], "factor": factor, "variant": row.model} | row.figures for row in rows]
    args.device, args.output = device.type, args.output_dir / "results"
    report(table, f"{args.num_images} images a row.", "python experiments/ablations.py", args)
    return table


if __name__ == "__main__":
    main()
