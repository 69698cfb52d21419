# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Training images from a folder, a zip or the Hub: one source image serves every resolution.

`load_table` opens the source with `datasets`. `ImageDataset` gives random access to its images, by way of the files
of `build_cache` if wanted; `ImageStream` reads what is too large to download. Both take draws (index, (height, width),
number), as `dfu_diffusers.resolutions` makes them, and all that is random about an image is a function of
(seed, number): the same image comes out of every process, worker and resumed run.

An image is turned as its EXIF data say, laid over white where it is transparent, cropped to the aspect ratio asked for
and resized with Pillow's antialiased Lanczos filter, in 8 bit. Those that cannot be used are named in a warning of
this module's logger and left out.
"""

import copy
import errno
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import signal
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import fsspec
import numpy as np
import torch
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

logger = logging.getLogger(__name__)

CHANNELS = {"L": 1, "RGB": 3}
SmallImages = Literal["fail", "skip", "upscale"]


# --- The source ---


def load_table(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
):
    """A `datasets` table whose images are left encoded, as records {"path": str | None, "bytes": bytes | None}.

    Args:
        dataset_name: id of a data set on the Hub, or a folder in one of the formats that `datasets` knows.
        dataset_config, split: which part of it.
        streaming: read while training instead of downloading first; gives an `IterableDataset`.
        data_dir: instead of a name, a folder of images, nested as one likes, or a zip of one. All of it is taken, and
            each image is labelled by the folder that it lies in: column "label". A metadata.csv replaces the labels.
        cache_dir: where `datasets` keeps its tables, and we unpacked zips; None for its usual place.

    Raises:
        ValueError: there is no such source, or no image in it.
    """
    datasets = _require_datasets()
    if (dataset_name is None) == (data_dir is None):
        raise ValueError(
            f"Either dataset_name or data_dir names the images, but got {dataset_name!r} and {data_dir!r}."
        )
    if data_dir is None:
        source, arguments = dataset_name, dict(path=dataset_name, name=dataset_config)
        remedy = "check its id, configuration and split, and the connection to the Hub"
    else:
        if split != "train":
            raise ValueError(f"A folder has no split {split!r}: give the folder of that split as data_dir.")
        source, folder = data_dir, _image_folder(Path(data_dir).expanduser(), cache_dir)
        # Named as a pattern, the whole folder is one split; left to itself, `datasets` would take files and folders
        # with "test" or "validation" in their names for other splits, and drop them from this one.
        pattern = glob.escape(str(folder.resolve())) + "/**"
        arguments = dict(path="imagefolder", data_files={"train": pattern}, drop_labels=False)
        remedy = "give a folder or zip with images in it"
    try:
        table = datasets.load_dataset(**arguments, split=split, streaming=streaming, cache_dir=_text(cache_dir))
        if streaming:
            table = table._resolve_features()
    except Exception as error:  # besides its own, `datasets` lets through those of huggingface_hub, httpx and pyarrow
        raise ValueError(f"{source} cannot be loaded ({_reason(error.__cause__ or error)}): {remedy}.") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = _undecoded(table, column)
    if data_dir is not None and next(iter(table), None) is None:
        raise ValueError(f"{source} holds no image: {remedy}.")
    return table


def _require_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Image data sets need datasets: pip install "dfu_diffusers[train]"') from error
    return datasets


def _text(path) -> str | None:
    return None if path is None else str(path)


def _image_folder(path: Path, cache_dir) -> Path:
    """The folder itself, or the folder that a zip is unpacked to."""
    if path.is_file() and zipfile.is_zipfile(path):
        return _unzip(path, Path(cache_dir or _require_datasets().config.HF_DATASETS_CACHE) / "unzipped")
    if not path.is_dir():
        raise ValueError(f"{path} is {'no zip' if path.exists() else 'no folder and no zip'}: give one with images.")
    archive = next(path.rglob("*.[zZ][iI][pP]"), None)
    if archive:  # `datasets` would mix its content, text files included, with the images
        raise ValueError(f"{path} holds an archive, {archive.name}: unpack it or move it away.")
    return path


def _unzip(path: Path, folder: Path) -> Path:
    """Unpack into a folder of the zip's name, once for each of its versions.

    `datasets` can read zips itself, but then takes every file for an image, loses the labels, and looks for each image
    anew in the table of contents.
    """
    stat = path.stat()
    target = folder / _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns) / path.stem
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target.parent}.lock"):
        partial = Path(f"{target.parent}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(partial)
                partial.rename(target)
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path} cannot be unpacked to {target} ({_reason(error)}).") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _digest(*values) -> str:
    """A short name for a list of strings and numbers."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def _undecoded(table, column: str):
    """The table with records in place of decoded images. A column of file names or of encoded bytes will do, too."""
    _check_column(table, column)
    return table.cast_column(column, _require_datasets().Image(decode=False))


def _check_column(table, column: str) -> None:
    if column not in table.column_names:
        raise ValueError(f"The data set has no column {column!r}, only {table.column_names}: choose one.")


# --- One image ---


class UnusableImage(ValueError):
    """An image that cannot be used: its `name`, where it has one, and the `reason`."""

    def __init__(self, name: str | None, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name or 'an image without a name'}: {self.reason}"


def read_image(record: dict | None, mode: str) -> Image.Image:
    """The picture of a record {"path": ..., "bytes": ...} in Pillow mode "L" or "RGB", upright and opaque.

    Raises:
        UnusableImage: it is missing, empty, damaged, no image, larger than Pillow's limit against decompression bombs
            (twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 megapixels), or has numbers without a stated range.
    """
    return _with_image(record, lambda image: _upright_picture(image, mode))


def read_size(record: dict | None) -> tuple[int, int]:
    """(height, width) of the upright picture of a record, from its header. Raises UnusableImage."""
    return _with_image(record, _upright_size)


def _with_image(record: dict | None, function: Callable):
    record = _fetch(record)
    name = record["path"] if record else None
    try:
        with _open(record) as file, Image.open(file) as image:
            return function(image)
    except Exception as error:  # Pillow's readers fail on damaged files in every way that Python has
        raise UnusableImage(name, _reason(error)) from error


def _fetch(record: dict | None) -> dict | None:
    """The record with its bytes, if its file lies elsewhere: at the Hub, or in an archive there.

    The errors of the network are raised as they are: an outage must not make images unusable.
    """
    if not record or record["bytes"] is not None or "://" not in (record["path"] or ""):
        return record
    with fsspec.open(record["path"]) as file:
        return {**record, "bytes": file.read()}


def _open(record: dict | None):
    if not record or (record["bytes"] is None and record["path"] is None):
        raise ValueError("there is no file")
    return open(record["path"], "rb") if record["bytes"] is None else io.BytesIO(record["bytes"])


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has the address of a buffer
        return "empty, or no image"
    if isinstance(error, FileNotFoundError) and error.strerror:
        return "no such file"
    return str(error) or type(error).__name__


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # Pillow has turned the size already
        return image.size[::-1]
    # The method of the base class: that of PNG files would decode the picture to look for EXIF data behind it.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if turned else image.size[::-1]


def _upright_picture(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range: store them in 8 or 16 bit")
    if image.mode.startswith("I"):  # 16 bit, which Pillow's own conversion clips at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"32-bit pixels, {pixels.min()} to {pixels.max()}: store them in 8 or 16 bit")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


class _Framing(NamedTuple):
    """Which part of an image is seen and which way round: a function of (seed, number)."""

    random_crop: bool
    random_flip: bool
    seed: int

    def draw(self, number: int) -> tuple[tuple[float, float], bool]:
        """Where in the free space the crop lies, (x, y) from 0 to 1, and whether to mirror."""
        if not (self.random_crop or self.random_flip):
            return (0.5, 0.5), False
        x, y, mirror = np.random.default_rng((self.seed, 2, number)).random(3)
        return (x, y) if self.random_crop else (0.5, 0.5), bool(self.random_flip and mirror < 0.5)

    def apply(self, image: Image.Image, size: tuple[int, int], number: int) -> np.ndarray:
        """(height, width, channels) uint8."""
        place, mirror = self.draw(number)
        pixels = _fit(image, size, place)
        return pixels[:, ::-1] if mirror else pixels


def _fit(image: Image.Image, size: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    fitted = ImageOps.fit(image, size[::-1], method=Image.Resampling.LANCZOS, centering=place)
    return np.asarray(fitted).reshape(*size, -1)


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(batch, height, width, channels) uint8 to (batch, channels, height, width) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)


def _check_options(mode: str, small_images: str) -> None:
    if mode not in CHANNELS:
        raise ValueError(f"mode={mode!r}: images are read as one of {list(CHANNELS)}.")
    if small_images not in get_args(SmallImages):
        raise ValueError(f"small_images={small_images!r}: choose one of {list(get_args(SmallImages))}.")


def _too_small(names: Sequence[str], count: int, min_size: tuple[int, int]) -> ValueError:
    height, width = min_size
    return ValueError(
        f"{count} of the images would have to be enlarged to {height}x{width} pixels: {_listed(names, count)}. "
        f"Lower the resolution, or set small_images to 'skip' (leave them out) or 'upscale' (take them as they are)."
    )


def _listed(names: Sequence[str], count: int) -> str:
    return "; ".join(names) + (f"; and {count - len(names)} more" if count > len(names) else "")


# --- Random access ---


class ImageDataset(Dataset):
    """Images of a `datasets` table, cropped and resized when asked for.

    When it is made, the header of every image is read: those without a readable one are named and left out. An image
    whose body then turns out to be broken is named when it is met, once in each worker, and the next usable one takes
    its place.

    Args:
        table: a map-style `datasets.Dataset`.
        mode: Pillow mode, "RGB" or "L".
        image_column, label_column: names of columns. Labels are ClassLabels, whole numbers from 0, or strings, which
            are numbered in alphabetical order.
        random_crop: crop at a random position instead of the centre.
        random_flip: mirror half of the images left to right.
        seed: of crops and flips.
        small_images: what to do with images that would have to be enlarged to fill `min_size`: fail, skip (leave them
            out) or upscale (take them).
        min_size: the (height, width) that images are checked against; None for any size.
        indices: rows of the table to use; None for all.
        cache: of `build_cache`, for this table and mode. Other sizes than it holds are made from the images.

    An index is (index, (height, width)) or (index, (height, width), number), where `number` is that of the image in
    the whole run, by default `index`. An item is {"image": (channels, height, width) float32 in [-1, 1]}, and with a
    label_column also "label": int.

    Raises:
        ValueError: an argument out of its range, no such column, small images, or no usable image.

    >>> from dfu_diffusers.portraits import portraits_to_datasets
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
        cache: "ImageCache | None" = None,
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
        """Names the source: files by relative paths and sizes, the same wherever they lie; others as `datasets` does.

        A file that changes, but not in size, is not noticed.
        """
        paths = []
        for start in range(0, len(self.records), BLOCK):
            for record in self.records[start : start + BLOCK][self.image_column]:
                if not record or record["bytes"] is not None or record["path"] is None or "://" in record["path"]:
                    return _digest(self.source._fingerprint)
                paths.append(record["path"])
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
        return _digest([Path(os.path.relpath(path, root)).as_posix() for path in paths], sizes)

    def split(self, count: int, seed: int = 0) -> tuple["ImageDataset", "ImageDataset"]:
        """(The others, `count` images chosen at random), the latter never mirrored and cropped around the centre."""
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
        """Row and picture of an image, or of the next usable one."""
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
        # An image is cropped along one side only, so it is large enough if both of its sides are.
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


BLOCK = 64  # images that are at once in memory while all of a table are gone through


def _for_each(dataset: ImageDataset, function: Callable, threads: int, title: str) -> Iterator:
    """function(row, record), or the UnusableImage that it raised, for all of the table, in order."""

    def attempt(row: int, record: dict):
        try:
            return function(row, record)
        except UnusableImage as error:
            return error.with_traceback(None)

    records, total = dataset.records, len(dataset.records)
    bar = tqdm(total=total, desc=title, unit=" images", delay=1, leave=False)  # quick ones need no bar
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
    if all(isinstance(value, str) for value in values):
        names, numbers = np.unique(values, return_inverse=True)
        return numbers, names.tolist()
    if all(isinstance(value, int) and value >= 0 for value in values):
        names = getattr(feature, "names", None) or [str(number) for number in range(max(values, default=-1) + 1)]
        return np.array(values), names
    raise _bad_label(column, next(value for value in values if not isinstance(value, int) or value < 0))


def _bad_label(column: str, value) -> ValueError:
    return ValueError(f"Labels are strings or whole numbers from 0, but column {column!r} holds {value!r}.")


# --- Cache ---


class ImageCache:
    """Resized images of one source on disk, as `build_cache` leaves them; see there."""

    def __init__(self, folder: Path, source: str, mode: str):
        self.folder, self.source, self.mode, self._arrays = folder, source, mode, {}
        self.sizes = np.load(folder / "sizes.npy")

    def __contains__(self, size: tuple[int, int]) -> bool:
        return size in self._arrays or _array_path(self.folder, size).exists()

    def __getstate__(self) -> dict:  # a spawned worker opens the files itself
        return {**self.__dict__, "_arrays": {}}

    def read(self, size: tuple[int, int], rows: Sequence[int]) -> np.ndarray:
        """A copy of the images in these rows of the table: (batch, height, width, channels) uint8."""
        if size not in self._arrays:
            self._arrays[size] = np.load(_array_path(self.folder, size), mmap_mode="r")
        return np.asarray(self._arrays[size][rows])

    def check(self, dataset: ImageDataset) -> None:
        """Raise ValueError unless it holds this data set's images."""
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

    The folder below `cache_dir` is named after the source's fingerprint, the mode and the filter. It has sizes.npy,
    the (height, width) of each row's image, (0, 0) for those that cannot be used, and for each resolution an array to
    memory-map, HEIGHTxWIDTH.npy (rows, height, width, channels) uint8. A file takes its name once it is complete, and
    is not built again. Where several processes ask, one builds and the others wait.

    Args:
        dataset: its table is cached in full, whatever images it leaves out as too small or held out.
        resolutions: (height, width) pairs.
        num_workers: threads that decode and resize.

    Raises:
        OSError: the disk has too little room, or cannot be written to.
    """
    folder = Path(cache_dir) / _digest(dataset.fingerprint, dataset.mode, "lanczos")
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
        _save_sizes(sizes, folder)  # before the arrays: where these are complete, it is known which rows are broken
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

    Plain writes, for on a full disk a memory-mapped file ends the process instead of raising an error.
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


# --- Streaming ---

NEARBY = 8  # records kept to take the place of one that turns out broken


class ImageStream(IterableDataset):
    """Batches of images of a streamed table: `DataLoader(stream, batch_size=None, num_workers=...)`.

    The usable records are numbered through the whole run, epoch after epoch, each epoch shuffled anew; image `number`
    of a draw is the record of that number. So other process and worker counts give the same images, and so does a
    resumed run, whose sampler starts at a later number: records before it are read, but not decoded.

    Whether a record is usable is decided from its header. If its body then turns out to be broken, it is named, and
    the nearest of the eight records before it takes its place, or else one of the epoch's first eight.

    Args:
        table: a `datasets.IterableDataset`.
        sampler: iterating it yields this process's micro-batches, lists of (index, (height, width), number) of one
            size, numbers ascending. The index is not used.
        shuffle_buffer: records that each is drawn from; 1 keeps the table's order.

    The other arguments are those of `ImageDataset`; labels are ClassLabels or whole numbers, and of the latter
    `class_names` and `num_classes` are None, for the classes are not known.

    Yields {"image": (batch, channels, height, width) float32 in [-1, 1]}, and with a label_column also "label":
    (batch,) int64.

    Raises:
        ValueError: as `ImageDataset`, but about images only when they are met.
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
            fsspec.asyn.reset_lock()  # the lock of the process that was forked would never open
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
            passed = (wanted - first) // length  # whole epochs: all are of one length
            epoch, first = epoch + passed, first + passed * length

    def _usable_records(self, epoch: int) -> Iterator[dict]:
        """Rows {column: value} of an epoch."""
        table = self.table
        if self.shuffle_buffer > 1:
            # `set_epoch` would not do: all workers share its number.
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
    """`worker_init_fn` of a DataLoader: Ctrl-C and a launcher's SIGTERM reach all processes of a group, and are for
    the main one to handle, which needs its workers while it saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
