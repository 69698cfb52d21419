#!/usr/bin/env python
"""How good are enlarged portraits and photographs, beside bicubic and Lanczos interpolation?

    python experiments/super_resolution.py [--model checkpoints/dfu-portraits] [--side 32] [--scales 1.25 1.5 2 3 4]
    python experiments/super_resolution.py --model checkpoints/dfu-upscaler --side 90 --scales 1.5 2 3 4 \\
        --image_dir outputs/data/landscapes/validation --extractor efficientnet

Held-out portraits, rendered at 512 px, are area-averaged to each size, which is the truth, and shrunk to --side
pixels, which is the input: averaged as a camera does it, or by --shrink bicubic. (An input averaged from the truth
itself would favour consistency where the factor is no integer.) With --image_dir the middle squares of its pictures
take their place. Writes OUTPUT.csv, OUTPUT.md and a picture, OUTPUT.png (input, each method, truth).

Rows: "sample" is what the pipeline makes by default, "mean" the mean of --samples of them, "one call" that of one call
in each octave (octave_steps=1).

PSNR in dB and SSIM (torchmetrics) compare each image with its truth: higher is better, and smooth images win. The
feature distance is the mean distance between the extractor's features of an image and of its truth, relative to that
between two truths: lower is better. Frechet and kernel distance (KID times 1000) compare the sets: lower is better;
the first needs more images than features. Consistency error: largest difference of an 8-bit result, area-averaged to
the input's size, from the input, in 1/255.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from dfu_diffusers import DFUSuperResolutionPipeline
from dfu_diffusers.data.images import read_image
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import FeatureStatistics, frechet_distance, kernel_distance, psnr
from dfu_diffusers.evaluation.sources import to_bytes, to_floats
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines.super_resolution import AreaAverage
from pictures import CHECKPOINT, FINEST, portraits, sheet

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}


def squares(folder: Path, count: int, size: int | None) -> np.ndarray:
    """Middle squares of a folder's first pictures, area-averaged to size x size; None for the size of the smallest."""
    paths = sorted(folder.iterdir())[:count]
    pictures = [read_image({"path": str(path), "bytes": None}, "RGB") for path in paths]
    side = min(min(picture.size) for picture in pictures)
    crops = np.stack([np.asarray(ImageOps.fit(each, (side, side))) for each in pictures])
    return crops if size in (None, side) else averaged(crops, size)


def averaged(pixels: np.ndarray, size: int) -> np.ndarray:
    return to_bytes(resample(to_floats(pixels), (size, size)))


def interpolated(pixels: np.ndarray, size: int, resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(each).resize((size, size), resampling)) for each in pixels])


def projected(pixels: np.ndarray, size: int) -> np.ndarray:
    """What the pipeline's data consistency alone makes of bicubic interpolation, without a network."""
    average = AreaAverage(to_floats(pixels), (size, size))
    return to_bytes(average.project_into_range(to_floats(interpolated(pixels, size, FILTERS["bicubic"]))))


def enlarged(pipe, pixels: np.ndarray, size: int, samples: int = 1, **options) -> np.ndarray:
    """By the pipeline, the mean of some samples of each image, each from noise of its own; 8 bits."""
    total, images = 0, [Image.fromarray(each) for each in pixels]
    for sample in range(samples):
        seeds = range(sample * len(pixels), (sample + 1) * len(pixels))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = dict(generator=generators, max_batch_size=16, output_type="pt") | options
        total = total + pipe(images, size, **options).images
    return to_bytes(2 * total / samples - 1)


def measure(result: np.ndarray, truth: np.ndarray, small: np.ndarray, extractor) -> dict[str, float | None]:
    """Columns of the table."""
    x, y, given = (to_floats(pixels) for pixels in (result, truth, small))
    true, found = extractor(y), extractor(x)
    between = (true - true.roll(1, 0)).norm(dim=1).mean()
    return {
        "PSNR, dB": psnr(x, y).mean().item(),
        "SSIM": structural_similarity_index_measure(x, y, data_range=2.0).item(),
        "feature distance": ((true - found).norm(dim=1).mean() / between).item(),
        "Frechet": frechet_distance(statistics(true), statistics(found)) if len(x) > extractor.dim else None,
        "KID, 1/1000": 1000 * kernel_distance(true, found, resamples=1)[0],
        "consistency, 1/255": 127.5 * (resample(x, given.shape[-2:]) - given).abs().max().item(),
    }


def statistics(features: torch.Tensor) -> FeatureStatistics:
    result = FeatureStatistics()
    result.update(features)
    return result


def main(argv=None) -> list[dict]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder of a saved pipeline, or its id")
    add("--side", type=int, default=32, help="of the images to enlarge")
    add("--scales", type=float, nargs="+", default=[1.25, 1.5, 2, 3, 4])
    add("--shrink", choices=["averaging", "bicubic"], default="averaging", help="how the input is made")
    add("--count", type=int, default=100, help="images")
    add("--samples", type=int, default=16, help="of each image, whose mean has a row")
    add("--image_dir", type=Path, help="enlarge the pictures of this folder rather than portraits")
    add("--extractor", default="portrait", help='of features: "efficientnet" for photographs')
    add("--threads", type=int, help="of the CPU (default: torch's own choice)")
    add("--output", type=Path, default=Path("outputs/super_resolution"), help="write OUTPUT.csv, .md and .png")
    args = parse(parser, argv)
    args.device = "cpu"
    pipe = DFUSuperResolutionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    extractor = load_extractor(args.extractor)
    pictures = partial(squares, args.image_dir, args.count) if args.image_dir else partial(portraits, args.count)
    small = pictures(args.side)
    if args.shrink == "bicubic":
        small = interpolated(pictures(None if args.image_dir else FINEST), args.side, FILTERS["bicubic"])

    rows = []
    for scale in args.scales:
        size = round(scale * args.side)
        truth, columns = pictures(size), {"input": small}
        draw = partial(enlarged, pipe, small, size)
        methods = {name: partial(interpolated, small, size, f) for name, f in FILTERS.items()}
        methods |= {
            "bicubic, projected": partial(projected, small, size),
            "sample": draw,
            "sample, consistency=False": partial(draw, consistency=False),
            "one call": partial(draw, octave_steps=1),
        }
        if args.samples > 1:
            methods[f"mean of {args.samples}"] = partial(draw, samples=args.samples)
        for name, method in tqdm(methods.items(), desc=f"{size} px", unit="method"):
            start = time.perf_counter()
            columns[name] = method()
            seconds = (time.perf_counter() - start) / len(small)
            figures = measure(columns[name], truth, small, extractor)
            rows.append({"size": size, "method": name, **figures, "s per image": seconds})
        title = f"Enlarged from {args.side} px, made by {args.shrink}."
        report(rows, title, "python experiments/super_resolution.py", args)
    sheet(columns | {"truth": truth}).save(args.output.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
