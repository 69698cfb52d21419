# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training data at several resolutions: one source image serves them all, and each step draws one resolution.

Which images and which resolution make up step n is a pure function of (seed, n): all processes agree without talking
to each other, a resumed run repeats and skips nothing, and the schedule does not depend on their number.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler


def parse_resolution(text: str) -> tuple[int, int]:
    """(height, width) from "64" or "64x96".

    >>> parse_resolution("64"), parse_resolution("64x96")
    ((64, 64), (64, 96))
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(text))
    if match is None:
        raise ValueError(f"A resolution is HEIGHT or HEIGHTxWIDTH in whole pixels, such as 64 or 64x96, not {text!r}.")
    height, width = match.groups()
    return int(height), int(width or height)


class MixedResolutionBatchSampler(Sampler):
    """Batches at mixed resolutions: step n takes the next `batch_size` images, all at one random resolution.

    Every epoch visits each image once, in an order drawn from (seed, epoch); batches run across the end of an epoch,
    so that no image is dropped.

    Args:
        length: number of images.
        batch_size: images per step over all processes together.
        resolutions: (height, width) pairs.
        weights: probability of each resolution up to a common factor; None for equal ones.
        num_steps, first_step: steps first_step .. num_steps - 1 are yielded.
        seed: of orders and resolutions.
        rank, num_processes: this process takes its equal share of each batch.

    Yields lists of (index, (height, width)), as `PortraitDataset` and `ImageDataset` take them.

    Raises:
        ValueError: an argument out of its range, or a batch that cannot be shared equally.

    >>> sampler = MixedResolutionBatchSampler(10, 2, resolutions=[(16, 16), (24, 32)], num_steps=3)
    >>> [len({size for _, size in batch}) for batch in sampler]
    [1, 1, 1]
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        resolutions: Sequence[tuple[int, int]],
        weights: Sequence[float] | None = None,
        num_steps: int = 1000,
        first_step: int = 0,
        seed: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ):
        weights = np.ones(len(resolutions)) if weights is None else np.asarray(weights, dtype=np.float64)
        if len(weights) != len(resolutions) or not len(weights) or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(
                f"Each resolution needs one weight of at least 0, not all 0, but got {len(resolutions)} resolutions "
                f"{list(resolutions)} and weights {weights.tolist()}."
            )
        if batch_size < 1 or batch_size % num_processes:
            raise ValueError(
                f"batch_size={batch_size} cannot be shared equally by {num_processes} processes: use a multiple of it."
            )
        if length < 1:
            raise ValueError("The data set holds no image.")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.resolutions, self.probabilities = list(resolutions), weights / weights.sum()
        self.num_steps, self.first_step, self.rank, self.num_processes = num_steps, first_step, rank, num_processes

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step)

    def resolution(self, step: int) -> tuple[int, int]:
        """(height, width) of a step."""
        draw = np.random.default_rng((self.seed, 1, step)).choice(len(self.resolutions), p=self.probabilities)
        return self.resolutions[draw]

    def __iter__(self) -> Iterator[list]:
        share = self.batch_size // self.num_processes
        epoch, order = -1, None
        for step in range(self.first_step, self.num_steps):
            start = step * self.batch_size + self.rank * share
            size, batch = self.resolution(step), []
            for position in range(start, start + share):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.length)
                batch.append((int(order[position % self.length]), size))
            yield batch


class ImageDataset(Dataset):
    """Images of a `datasets` table (a folder, a zip or a Hub data set), resized when asked for.

    An image is cropped around its centre to the aspect ratio asked for and resized with Pillow's antialiased Lanczos
    filter.

    Args:
        table: a map-style `datasets.Dataset` with an image column.
        image_column: its name.
        mode: Pillow mode, "RGB" or "L".
        flip: mirror every second image, chosen at random, left to right.

    An index is a pair (index, (height, width)); an item is {"image": (channels, height, width) float in [-1, 1]}.

    Raises:
        ValueError: no such column, or an image that cannot be read (it is named).
    """

    def __init__(self, table, image_column: str = "image", mode: str = "RGB", flip: bool = False):
        if image_column not in table.column_names:
            raise ValueError(f"The data set has no column {image_column!r}, only {table.column_names}: choose one.")
        self.table, self.image_column, self.mode, self.flip = table, image_column, mode, flip

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: tuple[int, tuple[int, int]]) -> dict[str, torch.Tensor]:
        index, (height, width) = index
        try:
            image = self.table[index][self.image_column].convert(self.mode)
        except OSError as error:
            raise ValueError(f"Image {index} of the data set cannot be read ({error}): repair or remove.") from error
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).view(height, width, -1).permute(2, 0, 1)
        pixels = pixels / 127.5 - 1
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return {"image": pixels}
