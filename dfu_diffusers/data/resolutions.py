# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The schedule of mixed-resolution training: which images make up step n, at which resolution, in which micro-batches.

All of it is a pure function of (seed, n). So processes agree without communication, a resumed run repeats and skips
nothing, and the schedule does not depend on the number of processes.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

Size = tuple[int, int]  # (height, width)


def parse_resolution(text: str) -> Size:
    """(height, width) from "64" or "64x96".

    >>> parse_resolution("64"), parse_resolution("64x96")
    ((64, 64), (64, 96))
    """
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(text))
    if match is None:
        raise ValueError(f"A resolution is HEIGHT or HEIGHTxWIDTH in whole pixels, such as 64 or 64x96, not {text!r}.")
    height, width = match.groups()
    return int(height), int(width or height)


def format_resolution(size: Size) -> str:
    """The inverse of `parse_resolution`, always with both sides: "64x64"."""
    return "x".join(map(str, size))


def source_size(size: Size, resolutions: Sequence[Size], source: Size | None = None) -> Size:
    """(height, width) at which images are loaded for training at `size`.

    If `size` is one of the resolutions, images are loaded at this size. Otherwise they are loaded at the same aspect
    ratio with as many pixels as the largest resolution has, and enlarged later. With `source` images of a resolution
    are loaded with as many pixels as `source` has, and later cut to the modes of the resolution.

    >>> source_size((48, 48), [(48, 48), (96, 96)]), source_size((160, 80), [(48, 48), (96, 96)])
    ((48, 48), (136, 68))
    >>> source_size((16, 16), [(16, 16), (12, 24)], (64, 64)), source_size((12, 24), [(16, 16), (12, 24)], (64, 64))
    ((64, 64), (45, 91))
    """
    known = size in resolutions
    if known and source is None:
        return size
    largest = max(map(math.prod, [*resolutions, source or (1, 1)]))
    scale = math.sqrt(largest / math.prod(size))
    return tuple(max(1, round((scale if known else min(scale, 1)) * side)) for side in size)


class Draw(NamedTuple):
    """One image of a batch, the index type of the data sets."""

    index: int  # of the image in the data set
    size: Size  # at which it is loaded
    number: int  # of the image in the whole run: all its randomness is a function of (seed, number)


class MixedResolutionBatchSampler(Sampler):
    """Batches at mixed resolutions: step n takes the next `batch_size` images, all at one random resolution.

    Every epoch visits each image once, in an order drawn from (seed, epoch). A batch may span two epochs, so that no
    image is dropped. Iterating yields this process's micro-batches, lists of `Draw`, one after another.

    Args:
        length: number of images, or None for a stream, whose image number n is its n-th.
        batch_size: images per step over all processes together.
        resolutions: (height, width) pairs.
        weights: relative probability of each resolution; None for equal ones.
        upsample_resolutions: larger sizes, trained on images loaded at the same aspect ratio with about as many pixels
            as the largest of `resolutions` and enlarged by the trainer (section 4 of arXiv 2401.06144).
        upsample_weight: probability, in [0, 1), that a step uses one of these, each equally often.
        max_pixels: limit for images x height x width of a micro-batch; None for no limit.
        num_steps, first_step: steps first_step .. num_steps - 1 are yielded.
        seed: of orders and resolutions.
        rank, num_processes: this process takes its equal share of each batch.
        source_resolution: images are loaded with as many pixels as this size has, to be cut to the modes of the
            resolution.

    Raises:
        ValueError: an argument out of its range, or a batch that cannot be shared equally.

    >>> sampler = MixedResolutionBatchSampler(10, 2, resolutions=[(16, 16), (24, 32)], num_steps=3)
    >>> [len({draw.size for draw in batch}) for batch in sampler]
    [1, 1, 1]
    """

    def __init__(
        self,
        length: int | None,
        batch_size: int,
        resolutions: Sequence[Size],
        weights: Sequence[float] | None = None,
        upsample_resolutions: Sequence[Size] = (),
        upsample_weight: float = 0.0,
        max_pixels: int | None = None,
        num_steps: int = 1000,
        first_step: int = 0,
        seed: int = 0,
        rank: int = 0,
        num_processes: int = 1,
        source_resolution: Size | None = None,
    ):
        weights = np.ones(len(resolutions)) if weights is None else np.asarray(weights, dtype=np.float64)
        if len(weights) != len(resolutions) or not len(weights) or not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(
                f"Each resolution needs one weight of at least 0, not all 0, but got {len(resolutions)} resolutions "
                f"{list(resolutions)} and weights {weights.tolist()}."
            )
        if bool(upsample_resolutions) != (upsample_weight > 0) or not 0 <= upsample_weight < 1:
            raise ValueError(
                f"upsample_weight={upsample_weight} must lie between 0 and 1 with upsample_resolutions, and be 0 "
                f"without, but these are {list(upsample_resolutions)}."
            )
        if batch_size < 1 or batch_size % num_processes:
            raise ValueError(
                f"batch_size={batch_size} cannot be shared equally by {num_processes} processes: use a multiple of it."
            )
        if length is not None and length < 1:
            raise ValueError("The data set holds no image.")
        largest = max(map(math.prod, [*resolutions, *upsample_resolutions]))
        if max_pixels is not None and max_pixels < largest:
            raise ValueError(f"max_pixels={max_pixels} is less than one image of the largest size, {largest} pixels.")
        self.length, self.batch_size, self.seed, self.max_pixels = length, batch_size, seed, max_pixels
        self.num_steps, self.first_step, self.rank, self.num_processes = num_steps, first_step, rank, num_processes
        self.resolutions, self.upsample_resolutions = list(resolutions), list(upsample_resolutions)
        real = (1 - upsample_weight) * weights / weights.sum()
        upsampled = [upsample_weight / len(upsample_resolutions) for _ in upsample_resolutions]
        self.sizes, probabilities = self.resolutions + self.upsample_resolutions, np.append(real, upsampled)
        self.probabilities, self.source_resolution = probabilities / probabilities.sum(), source_resolution
        self._epoch, self._order = None, None

    def __len__(self) -> int:
        steps = range(self.first_step, self.num_steps)
        return sum(len(self.micro_batch_sizes(self.resolution(step))) for step in steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.first_step, self.num_steps):
            yield from self.micro_batches(step)

    def resolution(self, step: int) -> Size:
        """Training size (height, width) of a step, the same for all processes."""
        draw = np.random.default_rng((self.seed, 1, step)).choice(len(self.sizes), p=self.probabilities)
        return self.sizes[draw]

    def expected_steps(self) -> dict[Size, float]:
        """Mean number of steps at each resolution that can be drawn."""
        expected = Counter()
        for size, share in zip(self.sizes, self.probabilities.tolist()):
            expected[size] += share * (self.num_steps - self.first_step)
        return +expected

    def micro_batch_sizes(self, size: Size) -> list[int]:
        """Number of images in each micro-batch of this process: as few batches as `max_pixels` allows, of nearly equal
        size."""
        share = self.batch_size // self.num_processes
        per_batch = share if self.max_pixels is None else self.max_pixels // math.prod(size)
        count = -(-share // per_batch)
        return [share // count + (i < share % count) for i in range(count)]

    def micro_batches(self, step: int) -> list[list[Draw]]:
        """This process's micro-batches of a step: lists of images that go through the network together."""
        number = step * self.batch_size + self.rank * (self.batch_size // self.num_processes)
        resolution, batches = self.resolution(step), []
        size = source_size(resolution, self.resolutions, self.source_resolution)
        for count in self.micro_batch_sizes(resolution):
            batches.append([Draw(self._index(n), size, n) for n in range(number, number + count)])
            number += count
        return batches

    def _index(self, number: int) -> int:
        if self.length is None:
            return number
        epoch, position = divmod(number, self.length)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.length)
            self._epoch = epoch
        return int(self._order[position])
