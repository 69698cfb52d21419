# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""How pictures are read in training, in the pipelines, in scripts and on the Gradio page: the same everywhere."""

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has more, some run other programs


def open_picture(file, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Pillow's `Image.open`, for these formats only.

    Args:
        file: a path, or a file opened in binary mode.

    Raises:
        OSError: no such file, or no picture in one of the formats (PIL.UnidentifiedImageError).
    """
    Image.init()
    return Image.open(file, formats=[name for name in formats if name in Image.OPEN])  # older Pillows lack AVIF


def convert_picture(image: Image.Image, mode: str) -> Image.Image:
    """A copy of a picture, upright and in 8 bits: rotated as its EXIF data say, 16-bit values divided by 257, and laid
    over white where it is transparent, unless `mode` has transparency.

    Args:
        image: a Pillow image of any mode.
        mode: of the result: "L", "RGB" or "RGBA".

    Raises:
        ValueError: values without a stated range (floats, or integers outside of 16 bits), or a colour space that
            Pillow does not convert.
    """
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range: store them in 8 or 16 bit")
    if image.mode.startswith("I"):  # Pillow's own conversion clips them at 255
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"32-bit pixels, {pixels.min()} to {pixels.max()}: store them in 8 or 16 bit")
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data and mode != "RGBA":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
