"""What the experiments share: the shipped model, held-out portraits, and sheets of results."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.evaluation.sheets import contact_sheet
from dfu_diffusers.evaluation.sources import HELD_OUT_SERIES, to_bytes
from dfu_diffusers.models.resampling import resample

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"
HELD_OUT = 10_001  # a series of portraits that no training of ours draws from, for losses
FINEST = 512  # px, what is averaged to all sizes


def portraits(count: int, size: int) -> np.ndarray:
    """Held-out portraits (count, size, size, 3), 8 bits."""
    parts = torch.arange(count).split(16)  # of the finest ones: to bound memory
    fine = (render_portraits(portrait_parameters(part.tolist(), seed=HELD_OUT_SERIES), FINEST) for part in parts)
    return np.concatenate([to_bytes(resample(images, (size, size))) for images in fine])


def sheet(columns: dict[str, np.ndarray], shown: int = 6) -> Image.Image:
    """The first images of each column beside each other."""
    rows = zip(*(images[:shown] for images in columns.values()))
    return contact_sheet({f"{i}": images for i, images in enumerate(rows)}, columns=list(columns))
