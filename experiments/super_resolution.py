#!/usr/bin/env python
"""How good are enlarged portraits and photographs, beside bicubic and Lanczos interpolation?

    python experiments/super_resolution.py [--model checkpoints/dfu-portraits] [--side 32] [--scales 1.25 1.5 2 3 4]

Held-out portraits, rendered at 512 px, are area-averaged to each size, which is the truth, and shrunk to --side
pixels, which is the input: averaged as a camera does it, or by --shrink bicubic. (An input averaged from the truth
itself would favour consistency where the factor is no integer.) With --photographs, squares of those that come with
scikit-image and scikit-learn take their place. Writes OUTPUT.csv, OUTPUT.md and a picture, OUTPUT.png (input, each
method, truth).

PSNR in dB and SSIM (torchmetrics) compare each image with its truth: higher is better, and smooth images win, so that
the mean of several samples has a row, too. Frechet and kernel distance (KID times 1000) of the portrait reader's
features compare the sets: lower is better, and detail that portraits do not have loses; the first needs more than 96
images. Consistency error: largest difference of an 8-bit result, area-averaged to the input's size, from the input, in
1/255.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from dfu_diffusers import DFUSuperResolutionPipeline
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import FeatureStatistics, frechet_distance, kernel_distance, psnr
from dfu_diffusers.evaluation.sources import to_bytes, to_floats
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines.super_resolution import AreaAverage
from pictures import FINEST, portraits, sheet

ROOT = Path(__file__).resolve().parent.parent
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "Lanczos": Image.Resampling.LANCZOS}
PHOTOS = ["astronaut", "chelsea", "coffee", "rocket", "china.jpg", "flower.jpg"]


def photographs(size: int) -> np.ndarray:
    """Sample photographs of scikit-image and scikit-learn, their middle squares area-averaged to size x size."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    images = []
    for name in PHOTOS:
        pixels = load_sample_image(name) if name.endswith(".jpg") else getattr(data, name)()
        side = min(pixels.shape[:2])
        top, left = ((n - side) // 2 for n in pixels.shape[:2])
        images.append(averaged(pixels[None, top : top + side, left : left + side], size))
    return np.concatenate(images)


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


def measure(result: np.ndarray, truth: np.ndarray, small: np.ndarray, extractor=None) -> dict[str, float | None]:
    """Columns of the table; distances only with an extractor and enough images."""
    x, y, given = (to_floats(pixels) for pixels in (result, truth, small))
    features = [extractor(images) for images in (y, x)] if extractor is not None else []
    enough = features and len(x) > extractor.dim
    return {
        "PSNR, dB": psnr(x, y).mean().item(),
        "SSIM": structural_similarity_index_measure(x, y, data_range=2.0).item(),
        "Frechet": frechet_distance(*map(statistics, features)) if enough else None,
        "KID, 1/1000": 1000 * kernel_distance(*features, resamples=1)[0] if features else None,
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
    add("--model", default=str(ROOT / "checkpoints" / "dfu-portraits"), help="folder of a saved pipeline, or its id")
    add("--side", type=int, default=32, help="of the images to enlarge")
    add("--scales", type=float, nargs="+", default=[1.25, 1.5, 2, 3, 4])
    add("--shrink", choices=["averaging", "bicubic"], default="averaging", help="how the input is made")
    add("--count", type=int, default=100, help="portraits")
    add("--samples", type=int, default=16, help="of each image, whose mean has a row")
    add("--photographs", action="store_true", help="enlarge photographs rather than portraits")
    add("--threads", type=int, help="of the CPU (default: torch's own choice)")
    add("--output", type=Path, default=ROOT / "outputs" / "super_resolution", help="without suffix")
    args = parse(parser, argv)
    args.device = "cpu"
    pipe = DFUSuperResolutionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    extractor = None if args.photographs else load_extractor("portrait")
    pictures = photographs if args.photographs else partial(portraits, args.count)
    small = pictures(args.side)
    if args.shrink == "bicubic":
        small = interpolated(pictures(FINEST), args.side, FILTERS["bicubic"])

    rows = []
    for scale in args.scales:
        size = round(scale * args.side)
        truth, columns = pictures(size), {"input": small}
        draw = partial(enlarged, pipe, small, size)
        methods = {name: partial(interpolated, small, size, f) for name, f in FILTERS.items()}
        methods |= {
            "bicubic, projected": partial(projected, small, size),
            "DFU, consistent": partial(draw, consistency=True),
            "DFU, free": partial(draw, consistency=False),
            f"DFU, mean of {args.samples}": partial(draw, samples=args.samples),
        }
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
