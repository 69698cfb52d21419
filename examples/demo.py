#!/usr/bin/env python
"""The same portraits at many sizes, most of them never seen in training: writes outputs/demo.png.

python examples/demo.py [--model checkpoints/dfu-portraits] [--output outputs/demo.png]

Prints how well the portraits of a size, averaged down to the smallest size, agree with those sampled there (PSNR in
dB), beside the agreement of different portraits.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dfu_diffusers import DFUPipeline
from dfu_diffusers.models.resampling import resample

ROOT = Path(__file__).resolve().parent.parent
SMALL = [32, 48, 64, 96, 128]  # shown in a grid, a column each, four portraits high
LARGE = 512  # one portrait
ODD = [(33, 33), (61, 61), (97, 131), (48, 96), (96, 48), (127, 64)]  # one portrait each
CELL, LABEL = 128, 16


def generate(pipe: DFUPipeline, seeds: list[int], height: int, width: int) -> list[Image.Image]:
    pipe.set_progress_bar_config(desc=f"{height}x{width}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(batch_size=len(seeds), height=height, width=width, generator=generators).images


def agreement(images: list[Image.Image], references: list[Image.Image]) -> float:
    """Mean PSNR in dB of `images`, averaged over the cells of the smaller `references`."""
    fine, coarse = (torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2) / 255 for group in (images, references))
    errors = (resample(fine, coarse.shape[-2:]) - coarse).square().mean((1, 2, 3))
    return -10 * errors.log10().mean().item()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "dfu-portraits"))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo.png")
    parser.add_argument("--large", type=int, default=LARGE, help="size of the large portrait")
    args = parser.parse_args(argv)
    pipe = DFUPipeline.from_pretrained(args.model)
    seeds = [0, 1, 2, 3]

    sheet = Image.new("RGB", ((len(SMALL) + 4) * CELL, 5 * CELL + 2 * LABEL), "white")
    draw = ImageDraw.Draw(sheet)

    def place(image: Image.Image, x: int, y: int, side: int, label: str = "") -> None:
        """Show an image enlarged to fit a square of `side`, pixels as squares, with a label above."""
        scale = side / max(image.size)
        resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        sheet.paste(image.resize((round(scale * image.width), round(scale * image.height)), resampling), (x, y))
        draw.text((x + 2, y - LABEL + 2), label, fill="black")

    portraits = [generate(pipe, seeds, size, size) for size in SMALL]
    for column, (size, images) in enumerate(zip(SMALL, portraits)):
        for row, image in enumerate(images):
            place(image, column * CELL, LABEL + row * CELL, CELL, f"{size}x{size}" if row == 0 else "")
    for column, (height, width) in enumerate(ODD):
        image = generate(pipe, seeds[:1], height, width)[0]
        place(image, column * CELL, 2 * LABEL + 4 * CELL, CELL, f"{height}x{width}")
    image = generate(pipe, seeds[:1], args.large, args.large)[0]
    place(image, len(SMALL) * CELL, LABEL, 4 * CELL, f"{args.large}x{args.large}")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(f"| size | PSNR to the same portraits at {SMALL[0]} px, dB | to other portraits, dB |\n|---|---|---|")
    smallest = portraits[0]
    for size, images in zip(SMALL[1:], portraits[1:]):
        same, other = agreement(images, smallest), agreement(images, smallest[1:] + smallest[:1])
        print(f"| {size} | {same:.1f} | {other:.1f} |")
    print(f"Saved {args.output}.")


if __name__ == "__main__":
    main()
