# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Metrics that compare a collection of images with another one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from ..data.resolutions import Size, format_resolution
from . import metrics
from .collections import Collection
from .sheets import contact_sheet


class Compared(NamedTuple):
    """The collections from which the figures of one row are computed."""

    samples: Collection
    references: Collection
    coarse_references: Collection | None  # at samples.features.coarse_size; None at sizes within those of training
    training_samples: Collection | None  # the same seeds at the training size; None for real images
    seed: int


class Metric(NamedTuple):
    """Columns of the table, and how they are computed; `compute` returns None if a metric does not apply."""

    columns: dict[str, str]  # names in results.json -> headings
    better: str  # "lower", "higher" or "real": as near as possible to the value of real images
    uses_features: bool
    compute: Callable[[Compared], Sequence[float] | None]


def _frechet(kind: str):
    def compute(row: Compared):
        references = row.coarse_references if kind == "coarse" else row.references
        if references is None:
            return None
        real = references.statistics("whole" if kind == "coarse" else kind)
        return (metrics.frechet_distance(row.samples.statistics(kind), real),)

    return compute


def _kernel(row: Compared):
    real, fake = row.references.matrix("whole"), row.samples.matrix("whole")
    return metrics.kernel_distance(real, fake, seed=row.seed)


def _precision_recall(row: Compared):
    real, fake = row.references.matrix("whole"), row.samples.matrix("whole")
    return metrics.precision_recall(real, fake)


def _agreement(row: Compared):
    if row.training_samples is None or row.samples.size == row.training_samples.size:
        return None
    size = tuple(map(min, row.samples.size, row.training_samples.size))
    small, large = (metrics.box_downsample(each.images, size) for each in (row.training_samples, row.samples))
    return (metrics.agreement(small, large).clamp(max=100),)  # infinite where they are equal


def _spectrum(row: Compared):
    real, fake = (metrics.radial_spectrum(each.images) for each in (row.references, row.samples))
    return (metrics.spectrum_distance(real, fake),)


def _power(row: Compared):
    """log10 of drawn to true power in the octave in which they differ most."""
    real, fake = (metrics.octave_power(each.images).clamp(min=1e-15) for each in (row.references, row.samples))
    errors = (fake / real).log10()
    return (errors[errors.abs().argmax()],)


def _wasserstein(row: Compared):
    return (metrics.sliced_wasserstein(row.references.images, row.samples.images, row.seed)[1],)


METRICS = {
    "fd": Metric({"fd": "FD"}, "lower", True, _frechet("whole")),
    "kid": Metric({"kid": "KID", "kid_low": "KID low", "kid_high": "KID high"}, "lower", True, _kernel),
    "coherence": Metric({"coherence": "coherence FD"}, "lower", True, _frechet("coarse")),
    "patch": Metric({"patch_fd": "patch FD"}, "lower", True, _frechet("patch")),
    "precision": Metric({"precision": "precision", "recall": "recall"}, "higher", True, _precision_recall),
    "spectrum": Metric({"spectrum": "spectrum"}, "lower", False, _spectrum),
    "power": Metric({"power": "power, worst octave"}, "real", False, _power),
    "wasserstein": Metric({"wasserstein": "sliced W"}, "lower", False, _wasserstein),
    "repetition": Metric(
        {"repetition": "repetition"}, "real", False, lambda row: (metrics.repetition_score(row.samples.images),)
    ),
    "agreement": Metric({"agreement": "agreement, dB"}, "higher", False, _agreement),
    "seam": Metric({"seam": "wrap seam"}, "real", False, lambda row: (metrics.wrap_seam(row.samples.images),)),
}  # fmt: skip


COLUMNS = {column: heading for metric in METRICS.values() for column, heading in metric.columns.items()}
FLOOR = "real"  # the method of rows of real images
ARROWS = {"lower": " ↓", "higher": " ↑", "real": ""}  # which way is better; or as in real images
HEADINGS = {
    column: heading + ARROWS[metric.better]
    for metric in METRICS.values()
    for column, heading in metric.columns.items()
    if column not in ("kid_low", "kid_high")  # shown with KID
}


def measure(row: Compared, names: Sequence[str]) -> dict[str, float]:
    """The figures of a row by column."""
    figures = {}
    for name in names:
        values = METRICS[name].compute(row)
        if values is not None:
            figures |= {column: _number(value) for column, value in zip(METRICS[name].columns, values)}
    return figures


def _number(value) -> float:
    """One figure; the mean if a metric gives one per image."""
    return torch.as_tensor(value).double().mean().item()


@dataclass
class Row:
    """One line of the table."""

    model: str
    method: str  # "model", "lanczos", "fourier" or "real"
    compared: Compared
    figures: dict[str, float] | None = None

    @property
    def name(self) -> str:
        return self.model if self.method in ("model", FLOOR) else f"{self.model}, {self.method}"

    @property
    def size(self) -> Size:
        return self.compared.samples.size


def sheet(rows: list[Row], number: int = 6) -> Image.Image:
    """The first images of each row of the table."""
    samples = {f"{format_resolution(row.size)} {row.name}": row.compared.samples for row in rows}
    return contact_sheet({label: list(each.pixels(each.indices[:number])) for label, each in samples.items()})
