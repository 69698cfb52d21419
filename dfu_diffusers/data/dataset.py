# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Random access to the images of a table, cropped and resized for each draw."""

import copy
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..files import digest_of
from .folders import _check_column, _undecoded
from .images import (
    SmallImages,
    UnusableImage,
    _check_options,
    _Framing,
    _listed,
    _to_tensor,
    _too_small,
    read_image,
    read_size,
)

logger = logging.getLogger(__name__)
BLOCK = 64  # images in memory at once while a whole table is read


class ImageDataset(Dataset):
    """Images of a `datasets` table, cropped and resized on access.

    The constructor reads the header of every image. Images without a readable header are named in a warning and left
    out. If the body of an image turns out to be broken on access, a warning names it (once in each worker), and the
    next usable image replaces it.

    Args:
        table: a map-style `datasets.Dataset`.
        mode: Pillow mode, "RGB" or "L".
        image_column, label_column: names of columns. Labels are ClassLabels, whole numbers from 0, or strings, which
            are numbered in alphabetical order.
        random_crop: crop at a random position instead of the centre.
        random_flip: mirror half of the images left to right.
        seed: of crops and flips.
        small_images: what to do with images that would have to be enlarged to fill `min_size`: "fail", "skip" (leave
            them out) or "upscale" (use them).
        min_size: the smallest allowed (height, width); None for any size.
        indices: rows of the table to use; None for all.
        cache: result of `build_cache` for this table and mode. Sizes that it lacks are made from the images.

    An index is (index, (height, width)) or (index, (height, width), number), where `number` is the number of the image
    in the whole run, by default `index`. An item is {"image": (channels, height, width) float32 in [-1, 1]}, and with
    a label_column also "label": int.

    Raises:
        ValueError: an argument out of its range, no such column, small images, or no usable image.

    >>> from dfu_diffusers.data.portraits import portraits_to_datasets
    >>> dataset = ImageDataset(portraits_to_datasets(3, size=32), min_size=(16, 24))
    >>> len(dataset), dataset[2, (16, 24)]["image"].shape
    (3, torch.Size([3, 16, 24]))
    """

    def __init__(
        self,
        table,
        mode: str = "RGB",
        image_column: str = "image",
        label_column: str | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        small_images: SmallImages = "fail",
        min_size: tuple[int, int] | None = None,
        indices: Sequence[int] | None = None,
        cache=None,
    ):
        _check_options(mode, small_images)
        if cache is not None and random_crop:
            raise ValueError("Cached images are cropped already: random_crop works without a cache only.")
        table = table if indices is None else table.select(indices)
        self.mode, self.image_column = mode, image_column
        self.source, self.records = table, _undecoded(table, image_column).select_columns([image_column])
        self.labels, self.class_names = _read_labels(table, label_column) if label_column else (None, None)
        self.framing, self.cache, self._broken = _Framing(random_crop, random_flip, seed), cache, set()
        if cache is None:
            self.sizes = self._scan()
        else:
            cache.check(self)
            self.sizes = cache.sizes
        self.rows = self._choose_rows(small_images, min_size)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """A digest that identifies the source: of relative paths and sizes for files, so that it does not change when
        the folder moves; otherwise that of `datasets`.

        A changed file of the same size is not noticed.
        """
        paths = []
        for start in range(0, len(self.records), BLOCK):
            for record in self.records[start : start + BLOCK][self.image_column]:
                if not record or record["bytes"] is not None or record["path"] is None or "://" in record["path"]:
                    return digest_of(self.source._fingerprint)
                paths.append(record["path"])
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
        return digest_of([Path(os.path.relpath(path, root)).as_posix() for path in paths], sizes)

    def split(self, count: int, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """Two data sets: all but `count` images, and `count` random ones, which are cropped around the centre and
        never mirrored."""
        if not 0 < count < len(self):
            raise ValueError(f"{count} of {len(self)} images cannot be held out: choose 1 to {len(self) - 1}.")
        order = np.random.default_rng((seed, 3)).permutation(self.rows)
        rest, held_out = copy.copy(self), copy.copy(self)
        rest.rows, held_out.rows = np.sort(order[count:]), np.sort(order[:count])
        rest._broken, held_out._broken = set(), set()
        held_out.framing = _Framing(False, False, 0)
        return rest, held_out

    def __getitem__(self, draw: tuple) -> dict:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[tuple]) -> list[dict]:
        """Items for a list of draws, converted together per size; `DataLoader` calls this for each batch."""
        items, groups = [None] * len(draws), {}
        for place, (index, size, *number) in enumerate(draws):
            index = range(len(self))[index]  # counts from the end if negative, IndexError beyond it
            groups.setdefault(tuple(size), []).append((place, index, *(number or [index])))
        for size, members in groups.items():
            places, indices, numbers = zip(*members)
            rows, pixels = self._load(list(indices), size, numbers)
            for place, row, image in zip(places, rows, _to_tensor(pixels)):
                items[place] = {"image": image}
                if self.labels is not None:
                    items[place]["label"] = int(self.labels[row])
        return items

    def _load(self, indices: list[int], size: tuple[int, int], numbers: Sequence[int]):
        """Rows of the table, and their pixels (batch, height, width, channels) uint8."""
        if self.cache is not None and size in self.cache:
            rows = self.rows[indices]
            pixels = self.cache.read(size, rows)
            mirrored = [self.framing.draw(number)[1] for number in numbers]
            pixels[mirrored] = pixels[mirrored, :, ::-1]
            return rows, pixels
        rows, images = zip(*map(self._read, indices))
        return rows, np.stack([self.framing.apply(image, size, n) for image, n in zip(images, numbers)])

    def _read(self, index: int) -> tuple[int, Image.Image]:
        """Row and picture of an image, or of the next usable image."""
        for row in itertools.chain(self.rows[index:], self.rows[:index]):
            if row not in self._broken:
                try:
                    return row, read_image(self.records[int(row)][self.image_column], self.mode)
                except UnusableImage as error:
                    self._broken.add(row)
                    logger.warning("Another image takes the place of %s", _named(error, row))
        raise ValueError(f"None of the {len(self)} images can be decoded: the warnings above say why.")

    def _scan(self) -> np.ndarray:
        """(height, width) of each row of the table from its header, (0, 0) if unusable: (rows, 2) ints."""
        sizes, problems = np.zeros((len(self.records), 2), dtype=np.int64), []
        found = _for_each(self, lambda row, record: read_size(record), os.cpu_count() or 1, "Reading headers")
        for row, size in enumerate(found):
            if isinstance(size, UnusableImage):
                problems.append(_named(size, row))
            else:
                sizes[row] = size
        _warn_left_out(problems, len(sizes))
        return sizes

    def _choose_rows(self, small_images: str, min_size: tuple[int, int] | None) -> np.ndarray:
        readable = self.sizes.all(axis=1)
        # An image is cropped along one side only, so it is large enough if both sides are.
        small = readable & (self.sizes < (min_size or (0, 0))).any(axis=1) & (small_images != "upscale")
        if small.any() and small_images == "fail":
            names = [
                "{} ({}x{})".format(
                    self.records[int(row)][self.image_column]["path"] or f"image {row}", *self.sizes[row]
                )
                for row in np.flatnonzero(small)[:5]
            ]
            raise _too_small(names, small.sum(), min_size)
        if small.any():
            logger.warning("%d of %d images are smaller than %dx%d: left out.", small.sum(), len(small), *min_size)
        rows = np.flatnonzero(readable & ~small)
        if not len(rows):
            unreadable = (~readable).sum()
            raise ValueError(
                f"None of the {len(small)} images can be used: {unreadable} unreadable, {small.sum()} too small."
            )
        return rows


def _for_each(dataset: ImageDataset, function: Callable, threads: int, title: str) -> Iterator:
    """function(row, record), or the UnusableImage that it raised, for all of the table, in order."""

    def attempt(row: int, record: dict):
        try:
            return function(row, record)
        except UnusableImage as error:
            return error.with_traceback(None)

    records, total = dataset.records, len(dataset.records)
    bar = tqdm(total=total, desc=title, unit=" images", delay=1, leave=False)  # shown after one second
    with ThreadPoolExecutor(max(1, threads)) as pool, bar:
        for start in range(0, total, BLOCK):
            block = records[start : start + BLOCK][dataset.image_column]
            yield from pool.map(attempt, range(start, start + len(block)), block)
            bar.update(len(block))


def _named(error: UnusableImage, row: int) -> str:
    return f"{error.name or f'image {row}'}: {error.reason}"


def _warn_left_out(problems: list[str], total: int) -> None:
    if problems:
        logger.warning("%d of %d images are left out: %s", len(problems), total, _listed(problems[:5], len(problems)))


def _read_labels(table, column: str) -> tuple[np.ndarray, list[str]]:
    """The class of each row, and the names of the classes."""
    _check_column(table, column)
    values, feature = table.select_columns([column])[:][column], table.features[column]
    for row, value in enumerate(values):
        if value is None or value == "":
            raise ValueError(f"Image {row} has no label, but column {column!r} is to label all: give it one.")
    if all(isinstance(value, str) for value in values):
        names, numbers = np.unique(values, return_inverse=True)
        return numbers, names.tolist()
    if all(isinstance(value, int) and value >= 0 for value in values):
        names = getattr(feature, "names", None) or [str(number) for number in range(max(values, default=-1) + 1)]
        return np.array(values), names
    raise _bad_label(column, next(value for value in values if not isinstance(value, int) or value < 0))


def _bad_label(column: str, value) -> ValueError:
    return ValueError(f"Labels are strings or whole numbers from 0, but column {column!r} holds {value!r}.")
