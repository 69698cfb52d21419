# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Denoising score matching as in EDM (Karras et al., arXiv 2206.00364, section 5 and table 1)."""

import torch


def edm_loss(
    model,
    scheduler,
    images: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
) -> torch.Tensor:
    """Weighted squared error of the denoised image at a random noise level, ln sigma ~ N(p_mean, p_std^2).

    Args:
        model: a `DFUModel`, or a wrapper of one.
        scheduler: an `EDMHeunScheduler`, which holds the scalings and the weight.
        images: (batch, channels, height, width) in [-1, 1], any size; one size per batch.
        class_labels: (batch,) integers for a class-conditional model.
        generator: source of noise levels and noise, on the device of the images.
        p_mean, p_std: mean and standard deviation of ln sigma.

    Returns:
        (batch,) losses, averaged over pixels and channels. A model that learned nothing scores about 1.
    """
    shape, device = images.shape, images.device
    sigma = torch.randn(shape[0], 1, 1, 1, device=device, generator=generator).mul(p_std).add(p_mean).exp()
    noisy = images + sigma * torch.randn(shape, device=device, generator=generator)
    output = model(
        scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma.flatten()), class_labels
    ).sample
    denoised = scheduler.precondition_outputs(noisy, output.float(), sigma)
    return (scheduler.loss_weight(sigma) * (denoised - images).square()).mean((1, 2, 3))
