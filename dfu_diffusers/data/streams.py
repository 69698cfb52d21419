# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images of a table that is too large to download, read while they arrive."""

import itertools
import logging
import signal
from collections import deque
from collections.abc import Iterable, Iterator

import fsspec
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .dataset import _bad_label
from .folders import _check_column, _undecoded
from .images import (
    SmallImages,
    UnusableImage,
    _check_options,
    _fetch,
    _Framing,
    _to_tensor,
    _too_small,
    read_image,
    read_size,
)

logger = logging.getLogger(__name__)
NEARBY = 8  # records kept as replacements for a broken one


class ImageStream(IterableDataset):
    """Batches of images of a streamed table: `DataLoader(stream, batch_size=None, num_workers=...)`.

    The usable records are numbered through the whole run, over all epochs, each of which is shuffled anew; image
    `number` of a draw is the record of that number. So every number of processes and workers gives the same images. So
    does a resumed run, whose sampler starts at a later number: earlier records are read, but not decoded.

    The header of a record decides whether it is usable. If its body turns out to be broken, a warning names it, and it
    is replaced by the nearest usable one of the eight records before it, or else by one of the epoch's first eight.

    Args:
        table: a `datasets.IterableDataset`.
        sampler: iterating it yields this process's micro-batches, lists of (index, (height, width), number) of one
            size, in ascending order of numbers. The index is not used.
        shuffle_buffer: number of records among which the next one is drawn; 1 keeps the table's order.

    The other arguments are those of `ImageDataset`. Labels are ClassLabels or whole numbers. For the latter
    `class_names` and `num_classes` are None, because the classes are not known.

    Yields {"image": (batch, channels, height, width) float32 in [-1, 1]}, and with a label_column also "label":
    (batch,) int64.

    Raises:
        ValueError: as `ImageDataset`, but errors about images are raised when these are read.
    """

    def __init__(
        self,
        table,
        sampler: Iterable[list[tuple]],
        mode: str = "RGB",
        image_column: str = "image",
        label_column: str | None = None,
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
        small_images: SmallImages = "fail",
        min_size: tuple[int, int] | None = None,
        shuffle_buffer: int = 1000,
    ):
        _check_options(mode, small_images)
        table = table._resolve_features()  # which may be unknown until the first record is read
        for column in filter(None, (image_column, label_column)):
            _check_column(table, column)
        self.class_names = getattr(table.features[label_column], "names", None) if label_column else None
        if label_column and not (self.class_names or "int" in getattr(table.features[label_column], "dtype", "")):
            raise ValueError(
                f"Streamed labels are ClassLabels or whole numbers, but column {label_column!r} is "
                f"{table.features[label_column]}, whose classes are not known beforehand."
            )
        columns = [image_column] + ([label_column] if label_column else [])
        self.table, self.sampler, self.mode = _undecoded(table.select_columns(columns), image_column), sampler, mode
        self.image_column, self.label_column = image_column, label_column
        self.framing, self.shuffle_buffer = _Framing(random_crop, random_flip, seed), shuffle_buffer
        self.small_images, self.min_size, self._reported = small_images, min_size, set()

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a lock copied by fork would never be released
        batches, ahead = itertools.tee(itertools.islice(self.sampler, start, None, step))
        candidates = self._candidates(number for batch in ahead for _, _, number in batch)
        for batch in batches:
            loaded = [self._load(next(candidates), tuple(size), number) for _, size, number in batch]
            pixels, labels = zip(*loaded)
            item = {"image": _to_tensor(np.stack(pixels))}
            if self.label_column:
                item["label"] = torch.tensor(labels)
            yield item

    def _load(self, candidates: list[dict], size: tuple[int, int], number: int) -> tuple[np.ndarray, int]:
        """Pixels and label of the first candidate that can be decoded."""
        for row in candidates:
            try:
                image = read_image(row[self.image_column], self.mode)
            except UnusableImage as error:
                self._report(error, "Another image takes the place of")
                continue
            label = row[self.label_column] if self.label_column else 0
            if label is None or label < 0:
                raise _bad_label(self.label_column, label)
            return self.framing.apply(image, size, number), label
        raise ValueError(f"No image near number {number} of the stream can be decoded: the warnings above say why.")

    def _candidates(self, numbers: Iterator[int]) -> Iterator[list[dict]]:
        """For each of the ascending numbers the record, and those to take its place, nearest first."""
        wanted, epoch, first = next(numbers, None), 0, 0  # `first` is the number of the epoch's first record
        while wanted is not None:
            records = self._usable_records(epoch)
            head, recent = list(itertools.islice(records, NEARBY)), deque(maxlen=NEARBY + 1)
            for number, record in enumerate(itertools.chain(head, records), first):
                recent.appendleft(record)
                if number == wanted:
                    yield [*recent, *head]
                    wanted = next(numbers, None)
                    if wanted is None:
                        return
                    if wanted <= number:
                        raise ValueError(f"Images of a stream are numbered in order, but {wanted} follows {number}.")
            if not head:
                raise ValueError(
                    "The stream holds no image that can be used: the warnings above say why, if it has any."
                )
            length = number + 1 - first
            passed = (wanted - first) // length  # whole epochs; all have the same length
            epoch, first = epoch + passed, first + passed * length

    def _usable_records(self, epoch: int) -> Iterator[dict]:
        """Rows {column: value} of an epoch."""
        table = self.table
        if self.shuffle_buffer > 1:
            # Not `set_epoch`, whose number all workers share.
            generator = np.random.default_rng((self.framing.seed, 4, epoch))
            table = table.shuffle(generator=generator, buffer_size=self.shuffle_buffer)
        for columns in table.iter(batch_size=16):  # unlike iter(table), this is the whole table in every worker
            for values in zip(*columns.values()):
                row = dict(zip(columns, values))
                row[self.image_column] = _fetch(row[self.image_column])
                if self._is_usable(row[self.image_column]):
                    yield row

    def _is_usable(self, record: dict) -> bool:
        try:
            size = read_size(record)
        except UnusableImage as error:
            worker = get_worker_info()
            if worker is None or worker.id == 0:  # all workers see all headers
                self._report(error, "Left out of the stream:")
            return False
        small = self.min_size is not None and (size[0] < self.min_size[0] or size[1] < self.min_size[1])
        if small and self.small_images == "fail":
            raise _too_small(
                [f"{record['path'] or 'an image without a name'} ({size[0]}x{size[1]})"], 1, self.min_size
            )
        return not small or self.small_images == "upscale"

    def _report(self, error: UnusableImage, message: str) -> None:
        if str(error) not in self._reported:
            self._reported.add(str(error))
            logger.warning("%s %s", message, error)


def ignore_signals(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader. Ctrl-C and a launcher's SIGTERM reach all processes of a group. Only the main
    process handles them, and it needs its workers while it saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
