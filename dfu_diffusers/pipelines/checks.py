# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checks of numbers that pipelines take as arguments."""

import math
import numbers
import operator


def _is_number(value) -> bool:
    """Python's and NumPy's real numbers are; booleans are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_positive(name: str, value) -> None:
    if not _is_number(value):
        raise TypeError(f"`{name}` must be a positive number, but got {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number, but got {value!r}.")


def _check_count(name: str, value) -> None:
    """Python's and NumPy's integers pass; booleans, although integers to Python and to NumPy before 2.3, do not."""
    try:
        count = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        count = None
    wrong = f"`{name}` must be an integer of at least 1, but got {value!r}: pass one, or leave it out for the default."
    if count is None:
        raise TypeError(wrong)
    if count < 1:
        raise ValueError(wrong)
