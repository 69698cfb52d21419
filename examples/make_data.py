#!/usr/bin/env python
"""Write three small data sets without a download, for the runs in examples/README.md.

    python examples/make_data.py [--output_dir outputs/data]

photos      eight photographs that ship inside scikit-image and scikit-learn
digits      scikit-learn's 1,797 handwritten digits, 8x8 grey, in one folder for each class
portraits   4,000 procedural portraits at 48 px in a parquet file
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits, load_sample_image

from dfu_diffusers.data.portraits import portraits_to_datasets


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/data")
    parser.add_argument("--portraits", type=int, default=4000, help="how many")
    args = parser.parse_args(argv)
    folder = Path(args.output_dir)

    photos = {name: getattr(data, name)() for name in ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")}
    photos |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name, pixels in photos.items():
        save(pixels, folder / "photos" / f"{name}.png")

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):  # values from 0 to 16
        save((pixels * 255 / 16).astype(np.uint8), folder / "digits" / str(label) / f"{number}.png")

    (folder / "portraits").mkdir(parents=True, exist_ok=True)
    portraits_to_datasets(args.portraits, size=48, seed=3).to_parquet(str(folder / "portraits" / "train.parquet"))
    print(f"{len(photos)} photos, {len(digits.target)} digits and {args.portraits} portraits are in {folder}.")


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


if __name__ == "__main__":
    main()
