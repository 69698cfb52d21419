#!/usr/bin/env python
"""The same portraits from the training size to eight times that: writes outputs/demo.png.

    python examples/demo.py [--model checkpoints/dfu-portraits] [--sizes 64 128 256 512] [--seeds 2 4]

Prints how well the portraits of each size, averaged down to the smallest size, agree with those drawn there (PSNR in
dB), beside the agreement of different portraits, and the seconds that one took.
"""

import argparse
import time
from pathlib import Path

import torch

from dfu_diffusers import DFUPipeline
from dfu_diffusers.evaluation.metrics import agreement
from dfu_diffusers.evaluation.sheets import contact_sheet
from dfu_diffusers.evaluation.sources import to_bytes
from dfu_diffusers.evaluation.tables import markdown

ROOT = Path(__file__).resolve().parent.parent


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "dfu-portraits"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512], help="sides, in px")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 4], help="a portrait each")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo.png")
    args = parser.parse_args(argv)
    pipe = DFUPipeline.from_pretrained(args.model)
    drawn, rows = {}, []
    for size in sorted(args.sizes):
        pipe.set_progress_bar_config(desc=f"{size}x{size}")
        generators, start = [torch.Generator().manual_seed(seed) for seed in args.seeds], time.perf_counter()
        images = pipe(len(args.seeds), size, size, generator=generators, output_type="pt").images * 2 - 1
        seconds = (time.perf_counter() - start) / len(args.seeds)
        drawn[size], smallest = images, drawn.get(min(args.sizes), images)
        same, other = (agreement(each, images).mean().item() for each in (smallest, smallest.roll(1, 0)))
        rows.append({"size": size, "PSNR to the smallest, dB": same, "to others, dB": other, "s": seconds})

    portraits = zip(*(list(to_bytes(images)) for images in drawn.values()))
    rows_of_sheet = {f"seed {seed}": images for seed, images in zip(args.seeds, portraits)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows_of_sheet, height=256, columns=[f"{size}x{size}" for size in drawn]).save(args.output)
    print(markdown(rows) + f"\nSaved {args.output}.")


if __name__ == "__main__":
    main()
