# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checks of what pipelines take. Each raises a ValueError or TypeError that names the value and the remedy."""

import inspect
import math

import torch

from ..checks import INTEGERS, check_tileable, real_number

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SCHEDULERS = "`EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`"
RETIRED = {
    "nested_noise": "noise is always nested now; pass other noise as `latents`",
    "noise_shift": "it gained nothing at any size; load the pipeline with a `refiner` for sizes beyond training",
    "fixed_levels": "load the pipeline with a `refiner` for sizes beyond training",
    "spectral_gain": "load the pipeline with a `refiner` for sizes beyond training",
    "cascade_sigma": "it is 0.25 now",
    "cascade_hold": "it is 0.25 now",
    "tile_size": "large pictures are sampled in strips; see `enable_tiling`",
    "tile_overlap": "large pictures are sampled in strips; see `enable_tiling`",
}


def _check_retired(arguments: dict) -> None:
    for name in arguments:
        if name in RETIRED:
            raise TypeError(f"`{name}` was retired: {RETIRED[name]} (see CHANGELOG.md).")
        raise TypeError(f"The pipeline has no argument `{name}`.")


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


def _check_channels(channels: int, out_channels: int | None, refiner) -> None:
    """Whether the networks make the images that they take. `channels` and `out_channels` are those of `unet`, if there
    is one."""
    if out_channels not in (None, channels):
        raise ValueError(
            f"The model must make as many channels as it takes, but it has `in_channels` {channels} and "
            f"`out_channels` {out_channels}: load another one."
        )
    if refiner is not None and refiner.config.in_channels != channels:
        raise ValueError(
            f"`refiner` must take the images of `unet`, of {channels} channels, but it takes "
            f"{refiner.config.in_channels}: load the pipeline with another refiner."
        )


def _check_coarse_size(refiner, height: int, width: int) -> None:
    """Whether the refiner was trained on coarse pictures as small as height x width, the grid of `unet`."""
    least = refiner.config.coarse_size
    if min(height, width) < least:
        raise ValueError(
            f"`refiner` adds detail to pictures of at least {least} pixels a side, but `unet` draws {height}x{width} "
            "(`sample_size` or `coarse_sizes`): load the pipeline with another refiner, or use strategy='direct'."
        )


def _check_guide(unet, guide) -> None:
    names = ("in_channels", "out_channels", "num_class_embeds")
    own, weak = ([getattr(each.config, name, None) or 0 for name in names] for each in (unet, guide))
    if own[:2] != weak[:2] or own[2] > weak[2] or (own[2] == 0) != (weak[2] == 0):
        raise ValueError(
            f"`guide` must take the images and class labels of `unet`, {dict(zip(names, own))}, but it has "
            f"{dict(zip(names, weak))}: load the pipeline with another, or leave `guidance_scale` at 1."
        )


def _check_output_type(output_type: str, channels: int) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but got {output_type!r}.")
    if output_type == "pil" and channels not in (1, 3, 4):
        raise ValueError(
            f"`output_type='pil'` needs 1, 3 or 4 channels, but this model makes {channels}: use 'np' or 'pt'."
        )


def _check_generator(generator, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        raise TypeError(f"`generator` must be a torch.Generator or a list of one per image, but got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must be one generator, or a list with one for each of the {batch_size} images "
            f"(`batch_size`), but got a list of {len(generator)}."
        )


def _check_latents(latents, expected: tuple[int, int, int, int]) -> None:
    if latents is None:
        return
    if not (torch.is_tensor(latents) and latents.is_floating_point()):
        got = latents.dtype if torch.is_tensor(latents) else type(latents).__name__
        raise TypeError(f"`latents` must be a floating point tensor of unit normal noise, but got {got}.")
    if latents.shape != expected:
        raise ValueError(
            f"`latents` must have shape (batch_size, channels, height, width) = {expected}, but got "
            f"{tuple(latents.shape)}: pass the matching `batch_size`, `height` and `width`."
        )


def _read_class_labels(class_labels, classes: int | None, batch_size: int) -> torch.Tensor | None:
    """Labels (batch_size,) int64 of a model with this many classes; None for an unconditional model."""
    if classes is None and class_labels is None:
        return None
    if classes is None:
        raise ValueError(f"This model is unconditional, but got `class_labels` {class_labels!r}: leave them out.")
    allowed = f"one integer in [0, {classes}), or one for each of the {batch_size} images"
    if class_labels is None:
        raise ValueError(f"This model is class-conditional: `class_labels` must be {allowed}.")
    try:
        labels = torch.as_tensor(class_labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`class_labels` must be {allowed}, but got {class_labels!r}.") from error
    if labels.dtype not in INTEGERS:
        raise TypeError(f"`class_labels` must be {allowed}, but got {class_labels!r}.")
    if labels.ndim == 0:
        labels = labels.expand(batch_size)
    if labels.shape != (batch_size,) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"`class_labels` must be {allowed}, but got {class_labels!r}.")
    return labels.long()


def _periodic_axes(tileable: str | None, models: list) -> tuple[bool, bool]:
    """Whether (rows, columns) tile: as `tileable` says, or else the first of the models that has a setting."""
    check_tileable(tileable)
    models = [model for model in models if model is not None]
    axes = tileable or next(filter(None, (getattr(model.config, "tileable", None) for model in models)), "")
    for model in models:
        if axes and "tileable" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"`tileable={axes!r}` needs models that take it, but got a {type(model).__name__}: leave it out."
            )
    return "y" in axes, "x" in axes
