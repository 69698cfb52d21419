#!/usr/bin/env python
"""Is one seed one picture at every size? Samples of a seed, averaged down to the smallest size, beside each other.

    python experiments/one_seed.py [--model checkpoints/dfu-portraits] [--sizes 32 48 64 96 128 256] [--count 8]

Prints the mean PSNR between the picture of a seed at each size and that of the same seed at the smallest size: drawn
directly, with a spectral gain, with fixed levels, guided and by the cascade; and, for comparison, directly from noise
drawn pixel by pixel, and of another seed. --output writes the table and a sheet, a seed a row.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from dfu_diffusers import DFUPipeline
from dfu_diffusers.evaluation.metrics import agreement
from dfu_diffusers.evaluation.tables import parse, report

ROOT = Path(__file__).resolve().parent.parent

WAYS = {
    "direct": {},
    "direct, gain 0.4": {"spectral_gain": 0.4},
    "direct, levels fixed": {"fixed_levels": True},
    "guided": {"strategy": "guided"},
    "cascade": {"strategy": "cascade"},
    "plain noise": {"nested_noise": False},
}


def sheet(images: dict[int, torch.Tensor], cell: int = 128) -> Image.Image:
    """A column for each size, a row for each of the first four seeds."""
    rows = min(4, len(next(iter(images.values()))))
    picture = Image.new("RGB", (cell * len(images), cell * rows))
    for column, at_size in enumerate(images.values()):
        arrays = at_size[:rows].clamp(-1, 1).add(1).div(2).permute(0, 2, 3, 1).float().numpy()
        for row, image in enumerate(DFUPipeline.numpy_to_pil(arrays)):
            how = Image.Resampling.BOX if image.width > cell else Image.Resampling.NEAREST
            picture.paste(image.resize((cell, cell), how), (column * cell, row * cell))
    return picture


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "dfu-portraits"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 48, 64, 96, 128, 256])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--count", type=int, default=8, help="seeds, from 0 on")
    parser.add_argument("--num_inference_steps", type=int, default=18)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md, OUTPUT.csv and a sheet for each way")
    args = parse(parser, argv)
    pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    limit = max(pipe._size(None, None))

    def draw(size: int, way: str) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.count)]
        options = dict(batch_size=args.count, num_inference_steps=args.num_inference_steps, generator=generators)
        return pipe(height=size, width=size, output_type="latent", **options, **WAYS[way]).images.cpu()

    rows = []
    images = {way: {} for way in args.ways}
    for size in sorted(args.sizes):
        row = {"size": size}
        for way in args.ways:
            # Within the training size all but plain noise are one and the same.
            same = size <= limit and way != "plain noise" and "direct" in args.ways[: args.ways.index(way)]
            images[way][size] = images["direct"][size] if same else draw(size, way)
            small = images[way][min(args.sizes)]
            if size > min(args.sizes):
                row[way] = agreement(small, images[way][size]).mean().item()
        if len(row) > 1:
            first = images[args.ways[0]]
            row["another seed"] = agreement(first[min(args.sizes)].roll(1, 0), first[size]).mean().item()
            rows.append(row)
        print(f"{size} px done", flush=True)
    title = f"PSNR in dB, {args.count} seeds, {args.num_inference_steps} Heun steps in {args.dtype}."
    report(rows, title, "python experiments/one_seed.py", args)
    if args.output:
        for way, at_sizes in images.items():
            name = way.replace(",", "").replace(" ", "_")
            sheet(at_sizes).save(args.output.with_name(f"{args.output.name}_{name}.png"))
    return rows


if __name__ == "__main__":
    main()
