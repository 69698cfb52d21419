# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checks of arguments that networks, schedulers and pipelines share."""

import numbers

import torch

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # without booleans


def real_number(value) -> int | float | None:
    """The Python number of a real number of Python, NumPy or torch, zero-dimensional arrays and tensors included.
    None for anything else, also for booleans.

    >>> real_number(3), real_number(torch.tensor(0.5)), real_number(True), real_number("3")
    (3, 0.5, None, None)
    """
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None


def check_tileable(tileable: str | None) -> None:
    if tileable not in (None, "x", "y", "xy"):
        raise ValueError(f"`tileable` must be 'x', 'y', 'xy' or None, but got {tileable!r}.")
