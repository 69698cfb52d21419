# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Reading given images and masks."""

import numpy as np
import torch
from PIL import Image, ImageOps

from ..checks import INTEGERS
from ..decode import convert_picture

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by number of channels


def read_images(images, channels: int, name: str = "image") -> torch.Tensor:
    """Images in any of diffusers' forms as (batch, channels, H, W) float32 in [0, 1].

    Args:
        images: a PIL image; an array (H, W), (H, W, channels) or (batch, H, W, channels); a tensor (H, W), (channels,
            H, W) or (batch, channels, H, W); or a list of these. Arrays and tensors hold bytes, or floats in [0, 1].
        channels: number of channels to return. PIL images are converted as in training (`convert_picture`): rotated
            upright, 16 bits scaled to 8, and laid over white where they are transparent, unless there are four
            channels.
        name: of the argument, for error messages.

    Raises:
        ValueError, TypeError: another number of channels, different sizes, no pixels, values outside [0, 1], or PIL
            images whose range of values is unknown.
    """
    batches = [_read(part, channels, name) for part in (images if isinstance(images, (list, tuple)) else [images])]
    sizes = sorted({f"{batch.shape[-2]}x{batch.shape[-1]}" for batch in batches})
    if len(sizes) != 1:
        raise ValueError(
            f"`{name}` must be at least one image, and all of one size, but got {', '.join(sizes) or 'none'}: call "
            "the pipeline once for each size."
        )
    return torch.cat(batches)


def read_mask(masks) -> torch.Tensor:
    """Masks in the forms of `read_images` as (batch, 1, H, W) float32 in [0, 1]; colours are converted to luminance.

    Integers with a maximum of 1, as in segmentation masks, are read as booleans.

    Raises:
        ValueError, TypeError: as `read_images`, masks with transparent pixels, and masks without a white pixel (at
            least 0.5) that are not all black.
    """
    masks = [_booleans(each) for each in (masks if isinstance(masks, (list, tuple)) else [masks])]
    for mask in masks:
        if isinstance(mask, Image.Image) and mask.has_transparency_data:
            if mask.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                raise ValueError(
                    "`mask_image` is transparent somewhere, which says neither to keep nor to repaint: draw it in "
                    'black and white, or pass its own transparency, `mask.getchannel("A")`.'
                )
    read = read_images(masks, 1, "mask_image")
    deep = [np.asarray(mask) for mask in masks if isinstance(mask, Image.Image) and mask.mode.startswith("I")]
    highest = max(read.max().item(), *(values.max() / 65535 for values in deep), 0)  # 16 bits may round to black
    if 0 < highest < 0.5:
        raise ValueError(
            f"`mask_image` marks no pixel: white is at least a half, 128 as a byte, but its highest value is "
            f"{highest:.4g}, {255 * highest:.3g} as a byte: scale it, or pass booleans."
        )
    return read


def _booleans(mask):
    """A mask of integers of which the greatest is 1 as booleans; any other as it is."""
    values = mask
    if isinstance(mask, Image.Image) and (mask.mode == "L" or mask.mode.startswith("I")):
        values = np.asarray(ImageOps.exif_transpose(mask))
    elif torch.is_tensor(mask) and mask.dtype in INTEGERS:
        values = mask.numpy(force=True)
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.size:
        if values.min() >= 0 and values.max() == 1:
            return mask == 1 if torch.is_tensor(mask) else values == 1
    return mask


def _read(image, channels: int, name: str) -> torch.Tensor:
    if isinstance(image, Image.Image):
        image = _pixels(image, channels, name)
    if isinstance(image, np.ndarray):
        image = np.ascontiguousarray(image[..., None] if image.ndim == 2 else image)  # torch knows no negative strides
        image = torch.from_numpy(image).movedim(-1, -3)
    if not torch.is_tensor(image):
        raise TypeError(
            f"`{name}` must be a PIL image, an array, a tensor or a list of these, but got {type(image).__name__}."
        )
    batch = image[(None,) * max(0, 4 - image.ndim)]
    if batch.ndim != 4 or batch.shape[1] != channels or batch.numel() == 0:
        raise ValueError(
            f"`{name}` must have {channels} channels and at least one pixel, but has shape {tuple(image.shape)} (with "
            "the channels before height and width, as in tensors): convert it, or use a model for such images."
        )
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    if not (batch.is_floating_point() or batch.dtype == torch.bool):
        raise TypeError(
            f"`{name}` must hold bytes (uint8) or floats in [0, 1], but holds {batch.dtype}: divide it by the value "
            "of white."
        )
    if not (batch.min() >= 0 and batch.max() <= 1):  # this form also rejects NaN
        raise ValueError(
            f"`{name}` must hold floats in [0, 1], but they reach from {batch.min():.4g} to {batch.max():.4g}, or are "
            "not all numbers: scale them."
        )
    return batch.float()


def _pixels(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """(H, W) or (H, W, channels) uint8."""
    if channels not in MODES:
        return np.array(image)
    try:
        return np.array(convert_picture(image, MODES[channels]))
    except ValueError as error:
        raise ValueError(f"`{name}` cannot be read, mode {image.mode}: {error}, or pass an array.") from error
