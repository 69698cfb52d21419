# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Resized images in memory-mapped files."""

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..files import digest_of
from .dataset import ImageDataset, _for_each, _named, _warn_left_out
from .images import CHANNELS, UnusableImage, _fit, read_image


class ImageCache:
    """Resized images of one source on disk, written by `build_cache`."""

    def __init__(self, folder: Path, source: str, mode: str):
        self.folder, self.source, self.mode, self._arrays = folder, source, mode, {}
        self.sizes = self._load(folder / "sizes.npy")

    def __contains__(self, size: tuple[int, int]) -> bool:
        return size in self._arrays or _array_path(self.folder, size).exists()

    def __getstate__(self) -> dict:  # a spawned worker opens the files itself
        return {**self.__dict__, "_arrays": {}}

    def read(self, size: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
        """A copy of the images in these rows of the table: (batch, height, width, channels) uint8."""
        if size not in self._arrays:
            self._arrays[size] = self._load(_array_path(self.folder, size), mmap_mode="r")
        return np.asarray(self._arrays[size][rows])

    def _load(self, path: Path, **options) -> np.ndarray:
        try:
            return np.load(path, **options)
        except (OSError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} is damaged ({reason}): remove {self.folder}, to have it built again.") from error

    def check(self, dataset: ImageDataset) -> None:
        """Raise ValueError if the cache was built from other images."""
        if (self.source, self.mode) != (dataset.fingerprint, dataset.mode):
            raise ValueError(
                f"The cache in {self.folder} holds source {self.source} in mode {self.mode}, but the data set is "
                f"{dataset.fingerprint} in {dataset.mode}: build it for this data set."
            )


def _array_path(folder: Path, size: tuple[int, int]) -> Path:
    return folder / "{}x{}.npy".format(*size)


def build_cache(
    dataset: ImageDataset, resolutions: Iterable[tuple[int, int]], cache_dir: str | os.PathLike, num_workers: int = 0
) -> ImageCache:
    """Crop and resize all images of a data set's table once: `ImageDataset(table, ..., cache=build_cache(...))`.

    The folder below `cache_dir` is named after the source's fingerprint, the mode and the filter. It holds sizes.npy,
    the (height, width) of each row's image, (0, 0) for images that cannot be used; and for each resolution an array to
    memory-map, HEIGHTxWIDTH.npy (rows, height, width, channels) uint8. A file gets its name when it is complete, and
    is not built again. If several processes call this, one builds and the others wait.

    Args:
        dataset: its whole table is cached, with the images that the data set leaves out as too small or held out.
        resolutions: (height, width) pairs.
        num_workers: threads that decode and resize.

    Raises:
        OSError: the disk has too little room, or cannot be written to.
    """
    folder = Path(cache_dir) / digest_of(dataset.fingerprint, dataset.mode, "lanczos")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        missing = [size for size in dict.fromkeys(map(tuple, resolutions)) if not _array_path(folder, size).exists()]
        if missing:
            _fill_cache(dataset, missing, folder, num_workers)
    return ImageCache(folder, dataset.fingerprint, dataset.mode)


def _fill_cache(dataset: ImageDataset, resolutions: list, folder: Path, num_workers: int) -> None:
    shapes = [(len(dataset.records), *size, CHANNELS[dataset.mode]) for size in resolutions]
    needed, free = sum(int(np.prod(shape)) for shape in shapes), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"The image cache needs {needed:,} bytes, but only {free:,} are free", str(folder))
    partial = [folder / (_array_path(folder, size).name + ".partial") for size in resolutions]
    try:
        sizes = _write_arrays(dataset, resolutions, shapes, partial, num_workers)
        _save_sizes(sizes, folder)  # before the arrays: complete arrays need the list of broken rows
        for size, path in zip(resolutions, partial):
            os.replace(path, _array_path(folder, size))
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror or error}: the image cache needs {needed:,} bytes", str(folder)
        ) from error
    finally:
        for path in partial:
            path.unlink(missing_ok=True)


def _write_arrays(dataset: ImageDataset, resolutions: list, shapes: list, paths: list[Path], num_workers: int):
    """Write one .npy file per resolution, row by row, and return the sizes, with (0, 0) for rows found broken.

    Plain writes are used because on a full disk a memory-mapped file kills the process instead of raising an error.
    """

    def resize(row: int, record: dict) -> list[bytes] | None:
        if not dataset.sizes[row].all():
            return None
        image = read_image(record, dataset.mode)
        return [_fit(image, size).tobytes() for size in resolutions]

    sizes, problems = dataset.sizes.copy(), []
    files = [open(path, "wb") for path in paths]
    try:
        for file, shape in zip(files, shapes):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for row, images in enumerate(_for_each(dataset, resize, num_workers, "Resizing images")):
            if isinstance(images, UnusableImage):
                problems.append(_named(images, row))
                sizes[row] = 0
            usable = isinstance(images, list)
            for place, (file, shape) in enumerate(zip(files, shapes)):
                file.write(images[place] if usable else bytes(int(np.prod(shape[1:]))))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files:
            file.close()
    _warn_left_out(problems, len(sizes))
    return sizes


def _save_sizes(sizes: np.ndarray, folder: Path) -> None:
    partial = folder / "partial-sizes.npy"
    np.save(partial, sizes)
    os.replace(partial, folder / "sizes.npy")
