#!/usr/bin/env python
"""How fast do images come? Images a second of a DataLoader without workers, from JPEG files and from the cache.

    python benchmarks/bench_data.py                           # 400 portraits at 256 px, loaded at 32, 64 and 96 px
    python benchmarks/bench_data.py --source_size 512 --sizes 96 160 --output benchmarks/results/data_cpu

files   decoded, cropped and resized when asked for
cached  read from the arrays that `build_cache` made, whose making is timed, too: all sizes at once

Both mirror half of the images and shuffle, and end in one float32 batch on the CPU. They take turns, and the figure is
that of the fastest turn: on a shared machine the others tell more about the neighbours. Prints a Markdown table;
--output writes the rows, too.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dfu_diffusers.data.cache import build_cache
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.folders import load_table
from dfu_diffusers.data.portraits import PortraitDataset
from dfu_diffusers.evaluation.tables import report


def write_photos(folder: Path, count: int, size: int) -> None:
    """JPEG files of portraits, with some noise: a photograph is harder to decode than a drawing."""
    noise = torch.Generator().manual_seed(0)
    for number, item in enumerate(PortraitDataset(count, size)):
        pixels = (item["image"] + 1) * 127.5 + 8 * torch.randn(3, size, size, generator=noise)
        pixels = pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=90)


def images_per_second(dataset: ImageDataset, size: int, batch_size: int, seconds: float) -> float:
    """Epochs until the time is over, one at least."""
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() - start < seconds:
        order = np.random.default_rng(count).permutation(len(dataset))
        batches = [
            [(int(index), (size, size), int(index)) for index in order[first : first + batch_size]]
            for first in range(0, len(order), batch_size)
        ]
        count += sum(len(batch["image"]) for batch in DataLoader(dataset, batch_sampler=batches))
    return count / (time.perf_counter() - start)


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--source_size", type=int, default=256, help="side of the JPEG files in pixels")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1, help="at least, for each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each contender; what is printed is the best")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.md")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "photos")
        folder.mkdir()
        write_photos(folder, args.images, args.source_size)
        table = load_table(data_dir=folder, cache_dir=Path(temporary, "tables"))
        files = ImageDataset(table, random_flip=True)
        start = time.perf_counter()
        cache = build_cache(files, [(size, size) for size in args.sizes], Path(temporary, "cache"))
        building = args.images / (time.perf_counter() - start)
        contenders = {"files": files, "cached": ImageDataset(table, random_flip=True, cache=cache)}
        rows = []
        for size in args.sizes:
            best = dict.fromkeys(contenders, 0.0)
            for _ in range(args.turns):
                for name, dataset in contenders.items():
                    speed = images_per_second(dataset, size, args.batch_size, args.seconds)
                    best[name] = max(best[name], speed)
            rows.append({"size": size, **best, "cached_over_files": best["cached"] / best["files"]})
    args.device = "cpu"
    title = f"{args.images} JPEG files at {args.source_size} px, batches of {args.batch_size}, images a second."
    title += f" The cache was built at {building:.0f} of them."
    report(rows, title, "python benchmarks/bench_data.py", args)
    return rows


if __name__ == "__main__":
    main()
