# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checks of what pipelines take: numbers, and a scheduler that can sample."""

import math

import torch

from ..checks import real_number

SCHEDULERS = "`EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`"


def _is_number(value) -> bool:
    return real_number(value) is not None


def _check_positive(name: str, value) -> float:
    """The Python number of a positive, finite number."""
    number = real_number(value)
    if number is None:
        raise TypeError(f"`{name}` must be a positive number, but got {value!r}.")
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be a positive number, but got {value!r}.")
    return float(number)


def _check_count(name: str, value) -> int:
    """The Python integer of an integer of at least 1."""
    count = real_number(value)
    wrong = f"`{name}` must be an integer of at least 1, but got {value!r}: pass one, or leave it out for the default."
    if not isinstance(count, int):
        raise TypeError(wrong)
    if count < 1:
        raise ValueError(wrong)
    return count


def _check_strength(strength) -> float:
    number = real_number(strength)
    if number is None:
        raise TypeError(f"`strength` must be a number in (0, 1], but got {strength!r}.")
    if not 0 < number <= 1:
        raise ValueError(f"`strength` must lie in (0, 1], but got {strength!r}: 1 takes all steps, less the last.")
    return float(number)


def _check_scheduler(scheduler) -> None:
    """Raise a ValueError unless the scheduler preconditions the network as EDM does (arXiv 2206.00364, Table 1). With
    any other scheduler the pictures would be noise."""
    name, config = type(scheduler).__name__, scheduler.config
    remedy = f"use {SCHEDULERS}, e.g. `EDMHeunScheduler()`."
    sigma = torch.tensor(2.0, dtype=torch.float32, device="cpu")
    knows_edm = hasattr(scheduler, "precondition_outputs") and hasattr(scheduler, "precondition_noise")
    if not knows_edm or abs(float(scheduler.precondition_noise(sigma)) - math.log(2) / 4) > 1e-6:
        raise ValueError(f"The scheduler must precondition the network as EDM does, but {name} does not: {remedy}")
    if config.get("prediction_type") not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"The scheduler's `prediction_type` must be 'epsilon' or 'v_prediction', but {name} has "
            f"{config.get('prediction_type')!r}: {remedy}"
        )
    sigma_data = real_number(config.get("sigma_data"))
    if sigma_data is None or not 0 < sigma_data < math.inf:
        raise ValueError(
            f"The scheduler's `sigma_data` must be a positive number, but {name} has {config.get('sigma_data')!r}: "
            f"{remedy}"
        )
