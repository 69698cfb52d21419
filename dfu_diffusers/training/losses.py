# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Denoising score matching as in EDM (Karras et al., arXiv 2206.00364, section 5 and table 1), reproducibly: of whole
images for a `DFUModel`, of the detail of octaves for a `DFURefiner`.

Everything random about an image of a run, its noise level, noise and augmentation, is a function of (seed, number of
the image in the run): the same for any number of processes and any micro-batches. Dropout is a function of (seed,
first image of the micro-batch). So a checkpoint needs no state of a random number generator.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..data.resolutions import Size, source_size
from ..models.modes import DETAIL_SIDE, from_modes, octave_std, share_beyond, to_modes
from ..models.resampling import resample
from ..schedulers.edm_heun import EDMHeunScheduler

TOLD_NOISE = 0.003, 0.3  # range of the noise on a refiner's coarse picture
SAMPLING_NOISE = 0.01  # the noise on it when pictures are generated
MIN_DETAIL_STD = 1e-3  # of images with detail; a level of 8 bits is 8e-3
LAW_SHARE = 0.5  # of the measured exponent of detail: the refiner itself sees that finer octaves have fewer edges


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


def refiner_loss(
    model,
    scheduler,
    modes: torch.Tensor,
    coarse: torch.Tensor,
    sigma: torch.Tensor,
    coarse_sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Weighted squared error of the denoised detail of pictures, that is of their modes beyond those of a coarse grid.

    Args:
        model: a `DFURefiner`, or a wrapper of one.
        scheduler: an `EDMHeunScheduler` whose sigma_data is the deviation of detail, see `octave_scalings`.
        modes: (batch, channels, height, width), `to_modes(images, averaged=True)`; one size per batch.
        coarse: (batch, 2) integers, rows and columns of each picture's coarse grid: at most height and width, and not
            both equal to them.
        sigma: (batch,) noise levels of the detail, positive.
        coarse_sigma: (batch,) noise levels of the coarse pictures, on their own grids, positive.
        noise: standard normal, of the shape of the modes: within the coarse ones the noise of the coarse picture,
            beyond them that of the detail.

    Returns:
        (batch,) losses, averaged over channels and new modes. A model that learned nothing scores about 1.
    """
    size = tuple(modes.shape[-2:])
    known, kept = _lowest(size, coarse), coarse.prod(1).view(-1, 1, 1, 1)
    sigma, told = sigma.view(-1, 1, 1, 1), coarse_sigma.view(-1, 1, 1, 1)
    condition = from_modes(known * (modes + told / kept.sqrt() * noise), size)
    detail = ~known * modes
    noisy = from_modes(detail + ~known * sigma / math.sqrt(math.prod(size)) * noise, size)
    output = model(
        scheduler.precondition_inputs(noisy, sigma), scheduler.precondition_noise(sigma.flatten()), condition,
        coarse_sigma,
    ).sample  # fmt: skip
    denoised = to_modes(scheduler.precondition_outputs(noisy, output.float(), sigma))
    error = ~known * (denoised - detail)
    share = 1 - kept / math.prod(size)
    return (scheduler.loss_weight(sigma) * error.square() / share).sum((2, 3)).mean(1)


def _lowest(size: Size, coarse: torch.Tensor) -> torch.Tensor:
    """Which of the modes of a grid of `size` the coarse grids (batch, 2) have: (batch, 1, height, width), booleans."""
    rows, columns = (torch.arange(side, device=coarse.device) < own[:, None] for side, own in zip(size, coarse.T))
    return rows[:, None, :, None] & columns[:, None, None, :]


def coarse_grids(size: Size, uniforms: torch.Tensor) -> torch.Tensor:
    """Coarse grids (batch, 2) below a grid of `size`, from uniforms (batch, 7): sides grow by factors from 1 to 2.

    A factor is 2 with probability 1/2, else 2^u. Both sides have the same in four of five cases. Else they have
    factors of their own, and half of the time one side does not grow.

    >>> coarse_grids((32, 24), torch.tensor([[0.1, 0.1, 0, 0, 0, 0, 0], [0.9, 0.9, 0.5, 0, 0, 0.9, 0.1]])).tolist()
    [[16, 12], [23, 24]]
    """
    same, choice, power, own_choice, own_power, grows, swap = uniforms.T
    first, second = (
        torch.where(pick < 0.5, 2.0, torch.exp2(u)) for pick, u in ((choice, power), (own_choice, own_power))
    )
    second = torch.where(same < 0.8, first, torch.where(grows < 0.5, second, 1.0))
    factors = torch.stack([first, second], 1)
    factors = torch.where(swap[:, None] < 0.5, factors, factors.flip(1))
    sides = torch.tensor(size, device=uniforms.device)
    coarse = (sides / factors).round().long().clamp(min=1)
    return torch.where((coarse == sides).all(1, keepdim=True), (sides + 1) // 2, coarse)


def octave_scalings(config, scheduler: EDMHeunScheduler | None = None) -> Callable[[Size], EDMHeunScheduler]:
    """The scalings of EDM around a refiner of this configuration, by the size of the picture: sigma_data is the
    deviation of its detail. All else is as in `scheduler`."""
    scheduler = EDMHeunScheduler() if scheduler is None else scheduler

    @functools.cache
    def scalings(size: Size) -> EDMHeunScheduler:
        return EDMHeunScheduler.from_config(scheduler.config, sigma_data=octave_std(config, size))

    return scalings


def detail_std(images: torch.Tensor) -> float:
    """Deviation of the detail of images beyond half their size, in units of white noise.

    Args:
        images: (batch, channels, height, width), averages over pixels, of at least 2 pixels.
    """
    size = tuple(images.shape[-2:])
    half = torch.tensor([[(side + 1) // 2 for side in size]])
    power = (to_modes(images, averaged=True) * ~_lowest(size, half)).double().square().sum((2, 3)).mean().item()
    return math.sqrt(power / share_beyond(size, tuple(half[0].tolist())))


def detail_law(images: torch.Tensor, share: float = LAW_SHARE) -> tuple[float, float]:
    """`detail_std` and `detail_exponent` for a refiner of such images, measured at their size, and averaged down to a
    half and a quarter of it.

    The exponent is a share of that of least squares in the logarithms, at most 1 in size. With all of it refiners drew
    too little detail beyond their training sizes, without it too much (docs/zero_shot.md).

    Args:
        images: (batch, channels, height, width), averages over pixels, of at least 2 pixels.
        share: of the measured exponent.

    Raises:
        ValueError: the images have no detail.
    """
    logs, stds = [], []
    for factor in (1, 2, 4):
        size = tuple(-(-side // factor) for side in images.shape[-2:])
        std = detail_std(resample(images, size)) if max(size) > 1 else 0
        if std > MIN_DETAIL_STD:
            logs.append(math.log(math.sqrt(math.prod(size)) / DETAIL_SIDE))
            stds.append(std)
        elif factor == 1:
            raise ValueError(f"the images have no detail to learn (deviation {std:.1g}): they are flat or enlarged")
    slope = np.polyfit(logs, np.log(stds), 1)[0] if np.ptp(logs) > 0 else 0.0
    exponent = float(np.clip(share * slope, -1, 1))
    return math.exp(np.mean(np.log(stds) - exponent * np.array(logs))), exponent


def fit_size(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Images (batch, channels, height, width), averages over pixels, at another size: larger ones are cut to its
    modes, smaller ones enlarged bilinearly (arXiv 2401.06144, section 4)."""
    old = tuple(images.shape[-2:])
    if old == tuple(size):
        return images
    if old[0] >= size[0] and old[1] >= size[1]:
        return from_modes(to_modes(images, size, averaged=True), size, averaged=True)
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


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


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class TrainingLoss:
    """The loss of the images of a run: each at its own noise level, augmented, and resized where asked for.

    Args:
        model, scheduler: as for `edm_loss`.
        seed: of the run.
        p_mean, p_std: mean and standard deviation of ln sigma.
        augment: a `GeometricAugment`, or None. Its labels need a model with as many `num_augment_labels`.
        label_dropout: probability of training an image with the label `no_class` in place of its own, for
            classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
        no_class: the label that stands for none; for `DFUPipeline` the last of the model's.

    Called with images (batch, channels, height, width), the numbers of these images in the run, the (height, width)
    to train at (images of another size are resized, see `fit_size`) and class labels, it returns (batch,) losses. It
    seeds torch's global generators, from which dropout draws.
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
    ):
        self.model, self.scheduler, self.seed = model, scheduler, seed
        self.p_mean, self.p_std, self.augment = p_mean, p_std, augment
        self.label_dropout, self.no_class = label_dropout, no_class

    def __call__(
        self,
        images: torch.Tensor,
        numbers: Sequence[int],
        size: tuple[int, int],
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        torch.manual_seed(_seed(self.seed, 4, numbers[0]))
        images = fit_size(images, size)
        extra, pixels = 1 if self.augment is None else 1 + self.augment.num_draws, images[0].numel()
        normals = image_normals(self.seed, numbers, extra + pixels + bool(self.label_dropout), images.device)
        augment_labels = None
        if self.augment is not None:
            images, augment_labels = self.augment(images, normals[:, 1:extra])
        if self.label_dropout:
            dropped = torch.special.ndtr(normals[:, -1]) < self.label_dropout
            class_labels = torch.where(dropped, self.no_class, class_labels)
        sigma = torch.exp(self.p_mean + self.p_std * normals[:, 0])
        noise = normals[:, extra : extra + pixels].reshape(images.shape)
        return edm_loss(self.model, self.scheduler, images, sigma, noise, class_labels, augment_labels)


class OctaveLoss:
    """The loss of a refiner on the images of a run: each image's octave, noise levels and noise are its own.

    Args:
        model: as for `refiner_loss`.
        scalings: `octave_scalings` of its configuration.
        seed: of the run.
        p_mean, p_std: mean and standard deviation of ln sigma.

    It is called as `TrainingLoss` is; class labels are not used.
    """

    def __init__(self, model, scalings, seed: int = 0, p_mean: float = -2.3, p_std: float = 1.4):
        self.model, self.scalings, self.seed, self.p_mean, self.p_std = model, scalings, seed, p_mean, p_std

    def __call__(
        self, images: torch.Tensor, numbers: Sequence[int], size: Size, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        modes = to_modes(fit_size(images, size), averaged=True)
        normals = image_normals(self.seed, numbers, 9 + modes[0].numel(), images.device)
        sigma = torch.exp(self.p_mean + self.p_std * normals[:, 0])
        uniforms = torch.special.ndtr(normals[:, 1:9])
        low, high = map(math.log, TOLD_NOISE)
        told = torch.exp(low + (high - low) * uniforms[:, 0])
        coarse, noise = coarse_grids(size, uniforms[:, 1:]), normals[:, 9:].reshape(modes.shape)
        return refiner_loss(self.model, self.scalings(tuple(size)), modes, coarse, sigma, told, noise)


class ValidationLoss:
    """The loss on held-out images with the same noise at every call, so that two snapshots of a model can be compared.

    The noise levels are equally spaced quantiles of the training distribution, and the noise is a function of (seed,
    image), so that the mean estimates the training loss with less variance than random levels would give. Labels are
    not dropped.

    Args:
        dataset: held-out images by (index, (height, width)): items {"image", optionally "label"}.
        resolutions: (height, width) pairs to evaluate at.
        scheduler, seed, p_mean, p_std: as for `TrainingLoss`.
        bins: equally likely ranges of sigma to report, at most as many as there are images.
        max_pixels: bound on images x height x width that go through the network together.
        source_resolution: images are loaded with as many pixels and cut to the modes of each resolution.
    """

    def __init__(
        self, dataset, resolutions, scheduler, seed=0, p_mean=-1.2, p_std=1.2, bins=4, max_pixels=2**18,
        source_resolution=None,
    ):  # fmt: skip
        self.source_resolution = source_resolution
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
        source = source_size(size, self.resolutions, self.source_resolution)
        for indices in torch.arange(len(self.dataset)).split(max(1, self.max_pixels // (size[0] * size[1]))):
            items = [self.dataset[i, source] for i in indices.tolist()]
            images = fit_size(torch.stack([item["image"] for item in items]).to(device), size)
            labels = torch.tensor([item["label"] for item in items], device=device) if "label" in items[0] else None
            # Noise from the CPU's generator, so that losses on different devices can be compared.
            noise = image_normals(self.seed + 1, indices.tolist(), images[0].numel()).view(images.shape).to(device)
            sigma = self.sigmas[indices].to(device)
            losses.append(self._loss(model, images, sigma, noise, labels).cpu())
        losses = torch.cat(losses)
        means = [losses[self.bin_of == bin].mean() for bin in range(self.bins)]
        return torch.stack([losses.mean(), *means])

    def _loss(self, model, images, sigma, noise, class_labels) -> torch.Tensor:
        return edm_loss(model, self.scheduler, images, sigma, noise, class_labels)


class OctaveValidationLoss(ValidationLoss):
    """The same for a refiner: at each resolution the loss of its last full octave, from half the size.

    The coarse pictures have the noise that they have in sampling. In place of a scheduler it takes `octave_scalings`.
    """

    def _loss(self, model, images, sigma, noise, class_labels) -> torch.Tensor:
        scheduler = self.scheduler(tuple(images.shape[-2:]))
        half = [(side + 1) // 2 for side in images.shape[-2:]]
        coarse = torch.tensor([half], device=images.device).expand(len(images), 2)
        told = torch.full_like(sigma, SAMPLING_NOISE)
        return refiner_loss(model, scheduler, to_modes(images, averaged=True), coarse, sigma, told, noise)
