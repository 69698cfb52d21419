# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Denoising score matching as in EDM (Karras et al., arXiv 2206.00364, section 5 and table 1), reproducibly.

Everything random about an image of a run, its noise level, noise and augmentation, is a function of (seed, number of
the image in the run): the same for any number of processes and any micro-batches. Dropout is a function of (seed,
first image of the micro-batch). So a checkpoint needs no state of a random number generator.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F


def edm_loss(
    model,
    scheduler,
    images: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    augment_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted squared error of the denoised image, EDM's equations 7 and 8.

    Args:
        model: a `DFUModel`, or a wrapper of one.
        scheduler: an `EDMHeunScheduler`, which holds the scalings and the weight.
        images: (batch, channels, height, width) in [-1, 1], any size; one size per batch.
        sigma: (batch,) noise levels, positive; training draws ln sigma ~ N(-1.2, 1.2^2).
        noise: standard normal, of the shape of the images.
        class_labels: (batch,) integers for a class-conditional model.
        augment_labels: (batch, num_augment_labels) for a model trained with augmentation.

    Returns:
        (batch,) losses, averaged over pixels and channels. A model that learned nothing scores about 1.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    noisy = images + sigma * noise
    output = model(
        scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma.flatten()), class_labels,
        augment_labels=augment_labels,
    ).sample  # fmt: skip
    denoised = scheduler.precondition_outputs(noisy, output.float(), sigma)
    return (scheduler.loss_weight(sigma) * (denoised - images).square()).mean((1, 2, 3))


def image_normals(seed: int, numbers: Sequence[int], count: int, device="cpu") -> torch.Tensor:
    """`count` standard normals for each image of a run, a function of (seed, number of the image) alone.

    They are drawn on the device: the same on every run and for every way of batching, but not the same on CPU and GPU.

    >>> both = image_normals(seed=0, numbers=[5, 6], count=20)
    >>> bool((both[1] == image_normals(seed=0, numbers=[6], count=20)[0]).all())
    True
    """
    generator, normals = torch.Generator(device), torch.empty(len(numbers), count, device=device)
    for row, number in zip(normals, numbers):
        generator.manual_seed(_seed(seed, 3, number))
        row.normal_(generator=generator)
    return normals


def shift_of_noise(size: tuple[int, int], noise_shift: float, noise_size: float) -> float:
    """What is added to ln sigma at `size`, (height, width): noise_shift ln(side / noise_size)."""
    return noise_shift * math.log(math.sqrt(math.prod(size)) / noise_size)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class TrainingLoss:
    """The loss of the images of a run: each at its own noise level, augmented, and upsampled where asked for.

    Args:
        model, scheduler: as for `edm_loss`.
        seed: of the run.
        p_mean, p_std: mean and standard deviation of ln sigma.
        augment: a `GeometricAugment`, or None. Its labels need a model with as many `num_augment_labels`.
        label_dropout: probability of training an image with the label `no_class` in place of its own, for
            classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
        no_class: the label that stands for none; for `DFUPipeline` the last of the model's.
        noise_shift: the levels of noise are multiplied by (side / noise_size)^noise_shift, the side that of a square
            of as many pixels: at 1 low frequencies are as noisy at all sizes (simple diffusion, arXiv 2301.11093).
        noise_size: the side at which p_mean holds; for `DFUPipeline` that of the model's `sample_size`.

    Called with images (batch, channels, height, width), the numbers of these images in the run, the (height, width)
    to train at (images of another size are enlarged bilinearly, arXiv 2401.06144, section 4) and class labels, it
    returns (batch,) losses. It seeds torch's global generators, from which dropout draws.
    """

    def __init__(
        self,
        model,
        scheduler,
        seed: int = 0,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        augment=None,
        label_dropout: float = 0.0,
        no_class: int | None = None,
        noise_shift: float = 0.0,
        noise_size: float = 1.0,
    ):
        self.model, self.scheduler, self.seed = model, scheduler, seed
        self.p_mean, self.p_std, self.augment = p_mean, p_std, augment
        self.label_dropout, self.no_class = label_dropout, no_class
        self.noise_shift, self.noise_size = noise_shift, noise_size

    def __call__(
        self,
        images: torch.Tensor,
        numbers: Sequence[int],
        size: tuple[int, int],
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        torch.manual_seed(_seed(self.seed, 4, numbers[0]))
        if tuple(images.shape[-2:]) != tuple(size):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        extra, pixels = 1 if self.augment is None else 1 + self.augment.num_draws, images[0].numel()
        normals = image_normals(self.seed, numbers, extra + pixels + bool(self.label_dropout), images.device)
        augment_labels = None
        if self.augment is not None:
            images, augment_labels = self.augment(images, normals[:, 1:extra])
        if self.label_dropout:
            dropped = torch.special.ndtr(normals[:, -1]) < self.label_dropout
            class_labels = torch.where(dropped, self.no_class, class_labels)
        p_mean = self.p_mean + shift_of_noise(size, self.noise_shift, self.noise_size)
        sigma = torch.exp(p_mean + self.p_std * normals[:, 0])
        noise = normals[:, extra : extra + pixels].reshape(images.shape)
        return edm_loss(self.model, self.scheduler, images, sigma, noise, class_labels, augment_labels)


class ValidationLoss:
    """The loss on held-out images with the same noise at every call, so that two snapshots of a model can be compared.

    The noise levels are equally spaced quantiles of the training distribution, and the noise is a function of (seed,
    image), so that the mean estimates the training loss with less variance than random levels would give. They are the
    same at all sizes: a `noise_shift` of the training has no part in them, nor has label dropout.

    Args:
        dataset: held-out images by (index, (height, width)): items {"image", optionally "label"}.
        resolutions: (height, width) pairs to evaluate at.
        scheduler, seed, p_mean, p_std: as for `TrainingLoss`.
        bins: equally likely ranges of sigma to report, at most as many as there are images.
        max_pixels: bound on images x height x width that go through the network together.
    """

    def __init__(
        self, dataset, resolutions, scheduler, seed=0, p_mean=-1.2, p_std=1.2, bins=4, max_pixels=2**18
    ):  # fmt: skip
        self.dataset, self.resolutions, self.scheduler, self.seed = dataset, resolutions, scheduler, seed
        self.max_pixels, count = max_pixels, len(dataset)
        self.bins = min(bins, count)
        # Image i takes quantile order[i]: any order will do, as long as the level has nothing to do with the image.
        order = np.random.default_rng((seed, 5)).permutation(count)
        quantiles = torch.from_numpy((order + 0.5) / count)
        self.sigmas = torch.exp(p_mean + p_std * torch.special.ndtri(quantiles)).float()
        self.bin_of = torch.from_numpy(order * self.bins // count)
        edges = torch.exp(p_mean + p_std * torch.special.ndtri(torch.arange(self.bins + 1) / self.bins))
        self.bin_names = [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:])]

    @torch.no_grad()
    def __call__(self, model) -> dict[tuple[int, int], torch.Tensor]:
        """For each resolution (1 + bins,) losses: the mean over all images, then the mean in each bin of sigma."""
        return {size: self._at(model, size) for size in self.resolutions}

    def _at(self, model, size: tuple[int, int]) -> torch.Tensor:
        device, losses = next(model.parameters()).device, []
        for indices in torch.arange(len(self.dataset)).split(max(1, self.max_pixels // (size[0] * size[1]))):
            items = [self.dataset[i, size] for i in indices.tolist()]
            images = torch.stack([item["image"] for item in items]).to(device)
            labels = torch.tensor([item["label"] for item in items], device=device) if "label" in items[0] else None
            # Noise from the CPU's generator, so that losses on different devices can be compared.
            noise = image_normals(self.seed + 1, indices.tolist(), images[0].numel()).view(images.shape).to(device)
            sigma = self.sigmas[indices].to(device)
            losses.append(edm_loss(model, self.scheduler, images, sigma, noise, labels).cpu())
        losses = torch.cat(losses)
        means = [losses[self.bin_of == bin].mean() for bin in range(self.bins)]
        return torch.stack([losses.mean(), *means])
