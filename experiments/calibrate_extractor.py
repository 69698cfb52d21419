#!/usr/bin/env python
# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What an extractor sees: distances of damaged pictures from others of their kind, as a Markdown table.

    python examples/make_data.py emoji landscapes
    python experiments/calibrate_extractor.py

Two disjoint sets of emoji are drawn at random; the second one is damaged in a different way in each row.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.metrics import kernel_distance
from dfu_diffusers.evaluation.sources import to_floats
from dfu_diffusers.evaluation.tables import markdown

SIDE = 256


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/data"))
    parser.add_argument("--extractor", default="efficientnet")
    parser.add_argument("--count", type=int, default=600, help="pictures in each set")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(0)

    def draw(pattern: str) -> list[Path]:
        return list(rng.permutation(sorted(args.data_dir.glob(pattern))))

    emoji = [np.array(Image.open(path)) for path in draw("emoji/*/*/*.png")[: 2 * args.count]]
    first, second = np.stack(emoji[: args.count]), np.stack(emoji[args.count :])
    train, held_out = (
        np.stack([np.array(Image.open(path)) for path in draw(f"emoji/{split}/*/*.png")[: args.count]])
        for split in ("train", "validation")
    )
    photos = draw("landscapes/*/*.jpg")
    landscapes = np.stack([crop(photos[i % len(photos)], rng) for i in range(args.count)])

    extractor = load_extractor(args.extractor)
    features = lambda pictures: torch.cat([extractor(batch) for batch in to_floats(pictures).split(50)])  # noqa: E731
    reference = features(first)
    rows = {
        "other emoji": second,
        "through 192 px": through(second, 192),
        "through 128 px": through(second, 128),
        "quadrants shuffled": shuffle_quadrants(second, rng),
        "through 64 px": through(second, 64),
        "noise of 10 levels": (second + rng.normal(0, 10, second.shape)).round().clip(0, 255).astype(np.uint8),
        "through 32 px": through(second, 32),
        "landscapes, 256 px crops": landscapes,
    }
    table = [compare(name, reference, features(pictures)) for name, pictures in rows.items()]
    table.append(compare("held-out against training emoji", features(train), features(held_out)))
    print(f"{extractor.name}, {args.count} against {args.count} pictures\n\n{markdown(table)}")


def compare(name: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, str]:
    distance, low, high = kernel_distance(x, y)
    return {"pictures": name, "FD": f"{frechet(x, y):.1f}", "KID": f"{distance:.4f} ({low:.4f} to {high:.4f})"}


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Frechet distance also of fewer pictures than features, which `metrics.frechet_distance` refuses.

    The covariances are X^T X and Y^T Y, so the trace of the root of their product is the nuclear norm of X Y^T.
    """
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root).item()


def through(pictures: np.ndarray, side: int) -> np.ndarray:
    """Made smaller and enlarged again, both with Pillow's Lanczos filter."""
    lanczos = Image.Resampling.LANCZOS
    small = (Image.fromarray(picture).resize((side, side), lanczos) for picture in pictures)
    return np.stack([np.array(picture.resize((SIDE, SIDE), lanczos)) for picture in small])


def shuffle_quadrants(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The four quarters of each picture in another order."""
    shuffled, half = np.empty_like(pictures), SIDE // 2
    places = [(top, left) for top in (0, half) for left in (0, half)]
    for old, new in zip(pictures, shuffled):
        for (top, left), place in zip(places, rng.permutation(4)):
            y, x = places[place]
            new[top : top + half, left : left + half] = old[y : y + half, x : x + half]
    return shuffled


def crop(path: Path, rng: np.random.Generator) -> np.ndarray:
    pixels = np.array(Image.open(path).convert("RGB"))
    top, left = rng.integers(pixels.shape[0] - SIDE + 1), rng.integers(pixels.shape[1] - SIDE + 1)
    return pixels[top : top + SIDE, left : left + SIDE]


if __name__ == "__main__":
    main()
