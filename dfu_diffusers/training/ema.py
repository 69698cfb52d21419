# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Moving average of weights with a half-life in images (EDM: Karras et al., arXiv 2206.00364, appendix F.2)."""

from collections.abc import Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import nn


class HalfLifeEMA(EMAModel):
    """Exponential moving average in which weights count half after so many more images.

    The decay of step n is 0.5^(batch_size / h) with h = min(halflife_images, rampup_ratio * images of earlier steps):
    early on, the average forgets faster, so that it is of use long before one half-life has passed. The first step
    copies the weights, so that the initial ones leave no trace. Averages of half-precision parameters are kept in
    float32: a decay of 0.9999 would be lost in less.

    Args:
        parameters: of the model, in the order in which every step gives them.
        batch_size: images per step, over all processes together.
        halflife_images: half-life, in images.
        rampup_ratio: half-life as a fraction of the training so far; None for the full half-life from the start.

    Raises:
        ValueError: an argument that is not positive.

    >>> layer = nn.Linear(2, 2)
    >>> ema = HalfLifeEMA(layer.parameters(), batch_size=100, halflife_images=1000, rampup_ratio=None)
    >>> ema.step(layer.parameters())
    >>> round(ema.get_decay(2) ** 10, 6)
    0.5
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        batch_size: int,
        halflife_images: float,
        rampup_ratio: float | None = 0.05,
    ):
        for name, value in (("batch_size", batch_size), ("halflife_images", halflife_images)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, in images, but got {value!r}.")
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f"rampup_ratio must be positive, or None for no ramp-up, but got {rampup_ratio!r}.")
        super().__init__(parameters)
        half = (torch.float16, torch.bfloat16)
        self.shadow_params = [shadow.float() if shadow.dtype in half else shadow for shadow in self.shadow_params]
        self.batch_size, self.halflife_images, self.rampup_ratio = batch_size, halflife_images, rampup_ratio

    def get_decay(self, optimization_step: int) -> float:
        if optimization_step <= 1:
            return 0.0
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * (optimization_step - 1) * self.batch_size)
        return 0.5 ** (self.batch_size / halflife)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the parameters in, in one pass; EMAModel's own step takes three, and a copy of the model."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        parameters = [p.to(shadow.dtype) for p, shadow in zip(parameters, self.shadow_params)]
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)
