#!/usr/bin/env python
"""Trains the network behind the extractor "portrait" (dfu_diffusers/extractors.py), and measures it.

python experiments/train_portrait_reader.py [--output dfu_diffusers/assets/portrait-reader] [--steps 3400]
python experiments/train_portrait_reader.py --steps 0    # measures what lies in --output

It learns to read portraits of the series 10_002, new ones at every step, rendered at random sizes of 16 to 128 px and
in part blurred and made noisy; it is measured on the series 10_001, which no training of ours draws from. Writes
config.json and model.safetensors, complete or not at all, and prints the tables of the folder's README.md. All seeds
are fixed.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dfu_diffusers.data.portraits import PARAMETERS, portrait_parameters, render_portraits
from dfu_diffusers.evaluation.extractors import (
    CIRCULAR,
    PORTRAIT_READER,
    PortraitReader,
    encode_parameters,
    load_extractor,
)
from dfu_diffusers.evaluation.metrics import FeatureStatistics, frechet_distance
from dfu_diffusers.evaluation.tables import markdown
from dfu_diffusers.training.checkpoints import replace_contents

TRAINING, HELD_OUT = 10_002, 10_001  # series of portraits
SIDES = 16, 128
BATCH, SIZES = 64, 4  # portraits of a step, and sizes among them
LEARNING_RATE = 2e-3
R2_SIZES, FRECHET_SIZES = (16, 24, 32, 48, 64, 96, 128, 256), (32, 64, 128)


def draw_size(generator: torch.Generator) -> tuple[int, int]:
    """(height, width): a log-uniform side; for one batch in four the other side is another one, up to 1.5 times."""
    low, high = SIDES
    u, v, w = torch.rand(3, generator=generator).tolist()
    side = low * (high / low) ** u
    other = side * 1.5 ** (2 * v - 1) if w < 0.25 else side
    return tuple(min(max(round(n), low), high) for n in (side, other))


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of standard deviation `sigma` in pixels; the border repeats."""
    radius = min(math.ceil(3 * sigma), min(images.shape[-2:]) - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images).expand(images.shape[1], 1, -1)
    images = F.pad(images, (radius,) * 4, mode="replicate")
    images = F.conv2d(images, kernel[:, :, None], groups=images.shape[1])
    return F.conv2d(images, kernel[..., None], groups=images.shape[1])


def degrade(images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Blurs a sixth of a batch, makes another noisy and does both to a third one; returns (n, 2) QUALITIES, too."""
    n, side = len(images), min(images.shape[-2:])
    qualities = torch.zeros(n, 2)
    u, *v = torch.rand(1 + n, generator=generator).tolist()
    sigma = 0.3 * (max(0.6, 0.03 * side) / 0.3) ** u  # px
    blurred = [i for i in range(n) if i % 6 in (3, 5)]
    images[blurred] = blur(images[blurred], sigma)
    qualities[blurred, 0] = math.log2(1 + sigma)
    for i in (i for i in range(n) if i % 6 in (4, 5)):
        images[i] += 0.2 * v[i] * torch.randn(images[i].shape, generator=generator)
        qualities[i, 1] = 10 * 0.2 * v[i]
    return images.clamp_(-1, 1), qualities


def train(steps: int) -> PortraitReader:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = PortraitReader().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.08, cycle_momentum=False
    )  # fmt: skip
    start, shown = time.monotonic(), []
    for step in range(1, steps + 1):
        parameters = portrait_parameters(range((step - 1) * BATCH, step * BATCH), seed=TRAINING)
        averages, qualities = [], []
        for rows in parameters.chunk(SIZES):  # the head's batch norms need the statistics of all sizes
            images, quality = degrade(render_portraits(rows, *draw_size(generator)), generator)
            with torch.autocast("cpu", torch.bfloat16):
                averages.append(model.averages(images.contiguous(memory_format=torch.channels_last)))
            qualities.append(quality)
        outputs = model.read(model.head(torch.cat(averages)))
        target = torch.cat([encode_parameters(parameters), torch.cat(qualities)], 1)
        error = (outputs - target).square()
        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        shown.append(error[:, :-2].mean().item())
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(
                f"step {step}/{steps}  error {sum(shown) / len(shown):.4f}  {step * BATCH} portraits  {seconds:.0f} s",
                flush=True,
            )
            shown = []
    return model.eval()


def accuracy(extractor, size: int, count: int) -> torch.Tensor:
    """R^2 of each parameter on `count` held-out portraits: (len(PARAMETERS),).

    1 - mean squared error / variance, where what is circular is off by at most half a turn: so guessing the mean, or
    any value of a circular parameter, scores 0.
    """
    squares = torch.zeros(len(PARAMETERS), dtype=torch.float64)
    low, span = torch.tensor([(p.low, p.high - p.low) for p in PARAMETERS]).T
    circular = torch.tensor([p.name in CIRCULAR for p in PARAMETERS])
    for parameters in portrait_parameters(range(count), HELD_OUT).split(BATCH):
        images = render_portraits(parameters, size)
        error = (extractor.read_parameters(images) - parameters).div(span).abs()
        squares += torch.where(circular, torch.minimum(error, 1 - error), error).double().square().sum(0)
    return 1 - 12 * squares / count  # 1/12: the variance of a uniform number


def statistics(extractor, size: int, indices: range, change=None) -> FeatureStatistics:
    """Of the features of held-out portraits, each batch changed by `change(images)`."""
    result = FeatureStatistics()
    for parameters in portrait_parameters(indices, HELD_OUT).split(BATCH):
        images = render_portraits(parameters, size)
        result.update(extractor(images if change is None else change(images)))
    return result


def distances(extractor, size: int, count: int) -> dict[str, float]:
    """Frechet distances to `count` real portraits, each from as many others, made worse in a known way."""
    generator = torch.Generator().manual_seed(0)

    def noise(std):
        return lambda x: (x + std * torch.randn(x.shape, generator=generator)).clamp(-1, 1)

    def enlarged(factor):
        def change(x):
            small = F.interpolate(x, scale_factor=1 / factor, mode="area")
            return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)

        return change

    changes = {
        "none: the floor": None,
        "blur, 0.4 px": lambda x: blur(x, 0.4),
        "blur, 0.8 px": lambda x: blur(x, 0.8),
        "blur, 1.6 px": lambda x: blur(x, 1.6),
        "noise, 0.05": noise(0.05),
        "noise, 0.1": noise(0.1),
        "noise, 0.2": noise(0.2),
        "half the size, enlarged": enlarged(2),
        "a quarter of the size, enlarged": enlarged(4),
    }
    real, others = statistics(extractor, size, range(count)), range(count, 2 * count)
    result = {name: frechet_distance(real, statistics(extractor, size, others, f)) for name, f in changes.items()}
    for name, other in (("1.5 times the size", size * 3 // 2), ("half the size", size // 2)):
        result[name] = frechet_distance(real, statistics(extractor, other, others))
    return result


def report(extractor, count: int) -> None:
    """Prints Markdown tables of `accuracy` and `distances`."""
    scores = {str(size): accuracy(extractor, size, count) for size in R2_SIZES}
    rows = [{"size": "**mean R^2**"} | {size: f"**{score.mean():.3f}**" for size, score in scores.items()}]
    for i, parameter in enumerate(PARAMETERS):
        rows.append({"size": f"`{parameter.name}`"} | {size: f"{score[i]:.2f}" for size, score in scores.items()})
    print(markdown(rows))
    found = {f"{size} px": distances(extractor, size, count) for size in FRECHET_SIZES}
    names = next(iter(found.values()))
    print(markdown([{"change": name} | {size: f"{row[name]:.3f}" for size, row in found.items()} for name in names]))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PORTRAIT_READER)
    parser.add_argument("--steps", type=int, default=3400, help="of training; 0: measure only")
    parser.add_argument("--count", type=int, default=512, help="held-out portraits to measure with, each time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.steps:
        replace_contents(args.output, train(args.steps).save)
    report(load_extractor(f"portrait:{args.output}"), args.count)


if __name__ == "__main__":
    main()
