#!/usr/bin/env python
"""How good are enlarged portraits and photographs, beside bicubic and Lanczos interpolation?

    python experiments/super_resolution.py [--model checkpoints/dfu-portraits] [--side 32] [--scales 1.5 2 2.7 4]

Held-out portraits, rendered at 512 px, are area-averaged to each size, which is the truth, and to --side pixels, which
is the input: as a camera does it. (An input averaged from the truth itself would favour consistency where the factor
is no integer.) With --photographs, squares of those that come with scikit-image and scikit-learn take their place.
Prints a Markdown table and writes it, OUTPUT.csv and a picture, OUTPUT.png (input, each method, truth).

PSNR in dB and SSIM (torchmetrics) compare each image with its truth: higher is better, and smooth images win. The
Frechet distance of the portrait reader's features compares the sets: lower is better, and detail that portraits do not
have loses; it needs more than 96 images. Consistency error: largest difference of an 8-bit result, area-averaged to
the input's size, from the input, in 1/255.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from dfu_diffusers import DFUSuperResolutionPipeline
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import FeatureStatistics, frechet_distance
from dfu_diffusers.evaluation.sources import to_bytes
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines.super_resolution import AreaAverage
from pictures import portraits, sheet

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


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(n, h, w, c) bytes to (n, c, h, w) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255


def averaged(pixels: np.ndarray, size: int) -> np.ndarray:
    return to_bytes(2 * resample(to_tensor(pixels), (size, size)) - 1)


def interpolated(pixels: np.ndarray, size: int, resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(each).resize((size, size), resampling)) for each in pixels])


def projected(pixels: np.ndarray, size: int) -> np.ndarray:
    """What the pipeline's data consistency alone makes of bicubic interpolation, without a network."""
    average = AreaAverage(2 * to_tensor(pixels) - 1, (size, size))
    return to_bytes(average.project_into_range(2 * to_tensor(interpolated(pixels, size, FILTERS["bicubic"])) - 1))


def enlarged(pipe, pixels: np.ndarray, size: int, **options) -> np.ndarray:
    """By the pipeline, each image from noise of its own; 8 bits."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(pixels))]
    images = pipe(
        [Image.fromarray(each) for each in pixels], size, generator=generators, max_batch_size=16, **options
    ).images
    return np.stack([np.asarray(image) for image in images])


def measure(result: np.ndarray, truth: np.ndarray, small: np.ndarray, extractor=None) -> dict[str, float]:
    """The columns of the table; the Frechet distance only with an extractor and enough images."""
    x, y = to_tensor(result), to_tensor(truth)
    error = (resample(x, small.shape[1:3]) - to_tensor(small)).abs().max().item()
    figures = {
        "psnr": peak_signal_noise_ratio(x, y, data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean").item(),
        "ssim": structural_similarity_index_measure(x, y, data_range=1.0).item(),
        "frechet": float("nan"),
        "consistency": 255 * error,
    }
    if extractor is not None and len(x) > extractor.dim:
        statistics = FeatureStatistics(), FeatureStatistics()
        for each, images in zip(statistics, (x, y)):
            each.update(extractor(2 * images - 1))
        figures["frechet"] = frechet_distance(*statistics)
    return figures


def main(argv=None) -> list[dict]:
    """Returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "checkpoints" / "dfu-portraits"))
    parser.add_argument("--side", type=int, default=32, help="of the images to enlarge")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 2, 2.7, 4])
    parser.add_argument("--count", type=int, default=100, help="portraits")
    parser.add_argument("--steps", type=int, default=18, help="of the whole schedule")
    parser.add_argument("--strengths", type=float, nargs="+", help="(default: the pipeline's own)")
    parser.add_argument("--photographs", action="store_true", help="enlarge photographs rather than portraits")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "super_resolution", help="without suffix")
    args = parser.parse_args(argv)
    pipe = DFUSuperResolutionPipeline.from_pretrained(args.model)
    extractor = None if args.photographs else load_extractor("portrait")
    pictures = photographs if args.photographs else (lambda size: portraits(args.count, size))

    rows, shown = [], []
    settings = [{"strength": value} for value in args.strengths or []] or [{}]
    settings = [{**each, "consistency": value} for each in settings for value in (True, False)]
    for scale in args.scales:
        size = round(scale * args.side)
        truth, small = pictures(size), pictures(args.side)
        methods = {name: partial(interpolated, small, size, f) for name, f in FILTERS.items()}
        methods["bicubic, projected"] = partial(projected, small, size)
        for options in settings:
            name = "DFU, consistent" if options["consistency"] else "DFU, free"
            name += f", strength {options['strength']}" if "strength" in options else ""
            methods[name] = partial(enlarged, pipe, small, size, num_inference_steps=args.steps, **options)
        shown = [small]
        for name, method in methods.items():
            start = time.perf_counter()
            shown.append(method())
            seconds = (time.perf_counter() - start) / len(small)
            row = {"size": size, "method": name, **measure(shown[-1], truth, small, extractor), "seconds": seconds}
            rows.append(row)
            print(markdown(rows[-1:], header=len(rows) == 1), flush=True)
        shown.append(truth)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(shown, args.output.with_suffix(".png"))
    args.output.with_suffix(".md").write_text(markdown(rows) + "\n")
    with open(args.output.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def markdown(rows: list[dict], header: bool = True) -> str:
    lines = ["| size | method | PSNR, dB | SSIM | Frechet | consistency, 1/255 | s per image |", "|" + "---|" * 7]
    lines = lines if header else []
    for r in rows:
        lines.append(
            f"| {r['size']} | {r['method']} | {r['psnr']:.2f} | {r['ssim']:.4f} | {r['frechet']:.2f} | "
            f"{r['consistency']:.2f} | {r['seconds']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
