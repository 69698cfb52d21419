"""What the experiments with given images share: held-out portraits, and sheets of results."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.evaluation.sources import HELD_OUT_SERIES, to_bytes
from dfu_diffusers.models.resampling import resample

FINEST = 512  # px, what is averaged to all sizes
SHOWN, CELL = 6, 128  # rows of the picture, and the side of one image in it


def portraits(count: int, size: int) -> np.ndarray:
    """Held-out portraits (count, size, size, 3), 8 bits."""
    parts = torch.arange(count).split(16)  # of the finest ones: to bound memory
    fine = (render_portraits(portrait_parameters(part.tolist(), seed=HELD_OUT_SERIES), FINEST) for part in parts)
    return np.concatenate([to_bytes(resample(images, (size, size))) for images in fine])


def sheet(columns: list[np.ndarray], path: Path) -> None:
    """Columns of images, enlarged to one size with their pixels as squares."""
    rows = min(SHOWN, len(columns[0]))
    picture = Image.new("RGB", (len(columns) * CELL, rows * CELL))
    for x, column in enumerate(columns):
        for y, pixels in enumerate(column[:rows]):
            image = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            picture.paste(image, (x * CELL, y * CELL))
    picture.save(path)
