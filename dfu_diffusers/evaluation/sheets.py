# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Contact sheets: images of any sizes, shown at one height."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest

import numpy as np
from PIL import Image, ImageDraw

LABEL, GAP = 16, 2  # px: height of a line of text, and distance between images


def contact_sheet(rows: Mapping[str, Sequence], height: int = 128, columns: Sequence[str] = ()) -> Image.Image:
    """A sheet with rows of images, aligned in columns.

    Args:
        rows: images of each row by its label, which is printed above the row: PIL images, or arrays (h, w) or (h, w,
            1 or 3) of bytes. If the only label is empty, no label is printed. None instead of an image leaves a gap.
        height: of each image in px. Pixels of smaller images stay visible as squares, larger ones are averaged.
        columns: headings.

    >>> contact_sheet({"a": [np.zeros((8, 16), np.uint8)], "b": [Image.new("RGB", (4, 4))]}, height=32).size
    (66, 100)
    """
    shown = [[_fit(image, height) for image in images] for images in rows.values()]
    widths = [GAP + max(image.width for image in column if image) for column in zip_longest(*shown)]
    left = list(accumulate(widths, initial=0))
    label, top = LABEL if any(rows) else 0, LABEL if columns else 0
    sheet = Image.new("RGB", (left[-1], top + len(shown) * (height + label + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, text in zip(left, columns):
        draw.text((x + 2, 2), text, fill="black")
    for text, images in zip(rows, shown):
        draw.text((2, top + 2), text, fill="black")
        for x, image in zip(left, images):
            if image:
                sheet.paste(image, (x, top + label))
        top += height + label + GAP
    return sheet


def _fit(image, height: int) -> Image.Image | None:
    """An RGB image of that height."""
    if image is None:
        return None
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.squeeze(image, 2) if np.shape(image)[2:] == (1,) else image)
    how = Image.Resampling.BOX if image.height > height else Image.Resampling.NEAREST
    return image.convert("RGB").resize((max(1, round(height * image.width / image.height)), height), how)
