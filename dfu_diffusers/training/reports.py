# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What people look at while a model trains: tables of losses, their curves, and sheets of samples."""

import copy
import csv
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from ..data.resolutions import Size
from ..files import write_atomically
from ..models.refiner import DFURefiner

logger = logging.getLogger(__name__)
STEPS = 18  # of the sampler, for each image of a sheet


class Table:
    """A CSV file that grows by rows; `column` names the one that counts steps.

    Args:
        path: the file.
        fields: names of the columns, "step" first.
        start_step: rows up to this step are kept from an earlier run, later ones dropped: they will be made again.
            Damaged rows are dropped, too, with a warning.
    """

    def __init__(self, path: Path, fields: Sequence[str], start_step: int = 0):
        self.path, self.fields, self.rows = path, list(fields), []
        if start_step and path.exists():
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                rows = list(csv.DictReader(line.replace("\0", "\ufffd") for line in file))
            # A process killed while it wrote leaves half a row, the last one.
            if damaged := sum(not self._is_whole(row) for row in rows[:-1]):
                logger.warning("%d damaged rows of %s are left out.", damaged, path)
            self.rows = [row for row in rows if self._is_whole(row) and int(row["step"]) <= start_step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(path, text.getvalue())

    def _is_whole(self, row: dict) -> bool:
        """Whether the row has a number in each column but that of the resolution."""
        if list(row) != self.fields or None in row.values():
            return False
        try:
            [float(value) for name, value in row.items() if name != "resolution"]
            return int(row["step"]) > 0
        except ValueError:
            return False

    def append(self, *values) -> None:
        self.rows.append(dict(zip(self.fields, values)))
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.fields).writerow(self.rows[-1])


def plot_losses(path: Path, training: Table, validation: Table) -> None:
    """loss.png: training (thin, averaged over about fifty groups of steps) and validation (dots) per resolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(8, 4.5))
    names = {row["resolution"] for row in training.rows} | {row["resolution"] for row in validation.rows}
    for index, name in enumerate(sorted(names, key=lambda name: [int(side) for side in name.split("x")])):
        rows, colour = [row for row in training.rows if row["resolution"] == name], f"C{index % 10}"
        window = max(1, len(rows) // 50)
        groups = [rows[i : i + window] for i in range(0, len(rows) - window + 1, window)]
        means = [sum(float(row["loss"]) for row in group) / window for group in groups]
        axes.plot([int(group[-1]["step"]) for group in groups], means, colour, linewidth=1, label=name)
        held_out = [row for row in validation.rows if row["resolution"] == name]
        steps, losses = [int(row["step"]) for row in held_out], [float(row["loss"]) for row in held_out]
        axes.plot(steps, losses, colour, marker="o", linestyle="--", markersize=4)
    axes.set(xlabel="step", ylabel="EDM loss (line: training, dots: held out)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))  # plain numbers, also within one decade
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if names:
        axes.legend(title="resolution", ncols=2)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def sample_sheet(pipe, sizes: Sequence[Size], seed: int = 0, count: int = 6, cell: int = 128) -> Image.Image:
    """Samples of a pipeline: a row for each size, the same `count` seeds in each, shown at one scale.

    Args:
        pipe: a `DFUPipeline`; a class-conditional one shows its first classes.
        sizes: (height, width) pairs.
        seed: the columns use seed, seed + 1, ...
        cell: height in pixels at which each sample is shown; pixels stay visible.
    """
    classes, rows = pipe.unet.config.num_class_embeds, []
    labels = None if classes is None else torch.arange(count) % classes
    for height, width in sizes:
        images = pipe(
            batch_size=count,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            class_labels=labels,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        ).images
        rows.append((f"{height}x{width}", images))
    return _sheet(rows, cell)


def enlargement_sheet(pipe, images: torch.Tensor, seed: int = 0, cell: int = 128) -> Image.Image:
    """Images enlarged by a refiner: a row for each of 1, 2, 4 and 8 times their size, all shown at one scale.

    Args:
        pipe: a `DFUSuperResolutionPipeline`.
        images: (count, channels, height, width) in [-1, 1].
        seed: the columns use seed, seed + 1, ...
        cell: height in pixels at which each image is shown; pixels stay visible.
    """
    pictures = VaeImageProcessor(vae_scale_factor=1).postprocess(images, output_type="pil")
    rows = [("1x", pictures)]
    for factor in (2, 4, 8):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(pictures))]
        rows.append((f"{factor}x", pipe(pictures, scale=factor, consistency=False, generator=generators).images))
    return _sheet(rows, cell)


def _sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int) -> Image.Image:
    """Rows of images, with their names before them."""
    margin = 56
    shown = [[_enlarge(image, cell) for image in images] for _, images in rows]
    widest = max(image.width for images in shown for image in images)
    sheet = Image.new("RGB", (margin + len(shown[0]) * (widest + 2), len(rows) * (cell + 2)), "white")
    for row, ((name, _), images) in enumerate(zip(rows, shown)):
        ImageDraw.Draw(sheet).text((4, row * (cell + 2) + cell // 2 - 6), name, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image, (margin + column * (widest + 2), row * (cell + 2)))
    return sheet


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    size = round(cell * image.width / image.height), cell
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def sheet_sizes(resolutions: Sequence[Size]) -> list[Size]:
    """What a sheet shows: each training size, from the smallest up, then 1.5 and 2 times the largest.

    >>> sheet_sizes([(24, 24), (16, 24)])
    [(16, 24), (24, 24), (36, 36), (48, 48)]
    """
    sizes = sorted(set(resolutions), key=lambda size: (size[0] * size[1], size))
    height, width = sizes[-1]
    return sizes + [(round(factor * height), round(factor * width)) for factor in (1.5, 2)]


def activation_bytes(model, batch_size: int, size: Size) -> int:
    """Bytes that a forward pass in float32 keeps for the backward one, counted on tensors without contents."""
    twin, kept = copy.deepcopy(model).to("meta").train(), {}
    weights = {p.untyped_storage()._cdata for p in twin.parameters()}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    sample = torch.empty(batch_size, twin.config.in_channels, *size, device="meta")
    if isinstance(twin, DFURefiner):
        condition = sample  # the coarse picture
    else:
        condition = torch.zeros(batch_size, dtype=torch.long, device="meta") if twin.config.num_class_embeds else None
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        twin(sample, torch.zeros(batch_size, device="meta"), condition)
    return sum(kept.values())
