# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Reading, rotating, cropping and resizing of one training image."""

import io
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..decode import FORMATS, convert_picture, open_picture

CHANNELS = {"L": 1, "RGB": 3}
SmallImages = Literal["fail", "skip", "upscale"]


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
        UnusableImage: it is missing, empty, damaged, not in one of `dfu_diffusers.decode.FORMATS`, larger than
            Pillow's limit against decompression bombs (twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 megapixels), or its
            range of values is unknown.
    """
    return _with_image(record, lambda image: convert_picture(image, mode))


def read_size(record: dict | None) -> tuple[int, int]:
    """(height, width) of the upright picture of a record, from its header. Raises UnusableImage."""
    return _with_image(record, _upright_size)


def _with_image(record: dict | None, function: Callable):
    record = _fetch(record)
    name = record["path"] if record else None
    try:
        with _open(record) as file, open_picture(file) as image:
            return function(image)
    except Exception as error:  # Pillow's readers raise exceptions of all kinds on damaged files
        raise UnusableImage(name, _reason(error)) from error


def _fetch(record: dict | None) -> dict | None:
    """The record with its bytes, which are downloaded if its file is on the Hub or in an archive there.

    Network errors are raised unchanged: an outage must not mark images as unusable.
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
    if isinstance(error, UnidentifiedImageError):  # its text contains the address of a buffer
        return f"empty, or no image of type {', '.join(FORMATS)}"
    if isinstance(error, FileNotFoundError) and error.strerror:
        return "no such file"
    return str(error) or type(error).__name__


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # Pillow has rotated the size already
        return image.size[::-1]
    # The method of the base class: that of PNG files decodes the whole picture to look for EXIF data after it.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
    return image.size if turned else image.size[::-1]


class _Framing(NamedTuple):
    """Crop and mirroring of an image: a function of (seed, number)."""

    random_crop: bool
    random_flip: bool
    seed: int

    def draw(self, number: int) -> tuple[tuple[float, float], bool]:
        """Position of the crop in the free space, (x, y) from 0 to 1, and whether to mirror."""
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
