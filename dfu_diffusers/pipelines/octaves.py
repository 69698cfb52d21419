# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Parts of sampling octave by octave: noise that is the same at every size, and the refiner in strips."""

import math
from collections.abc import Callable

import torch
from diffusers import EDMDPMSolverMultistepScheduler

from ..models.modes import Axes, from_modes, mode_basis, num_modes, octave_std, to_modes, transform
from .noise import nested_normals

COARSE_NOISE = 0.01  # standard deviation of the noise added to the coarse picture; the refiner is told this value
MAX_PIXELS = 2**20  # pixels that the refiner processes at once, by default


class NestedNoise:
    """Unit normal coefficients of modes, the same for every size of a picture and for every batch.

    Each picture has its own generator, seeded from the user's: its k-th draw depends on that seed alone.

    Args:
        pictures: number of pictures.
        channels: channels of each.
        generator: the user's; a list has one generator per picture.
        periodic: axes, (rows, columns), that tile.

    Attributes:
        normals: coefficients of the octaves' noise, at least as many as the picture's; None to draw them for each.
    """

    def __init__(self, pictures: int, channels: int, generator, periodic: Axes, device):
        given = generator if isinstance(generator, list) else [generator] * pictures
        seeds = [_draw_seed(each) for each in given]
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.channels, self.periodic, self.device, self.normals = channels, periodic, device, None

    def coefficients(self, size: tuple[int, int]) -> torch.Tensor:
        """(pictures, channels, height, width) of the lowest modes; every call draws anew."""
        return nested_normals((len(self.generators), self.channels, *size), self.generators).to(self.device)

    def beyond(self, size: tuple[int, int], coarse: tuple[int, int], last: bool = False) -> torch.Tensor:
        """White unit noise of an octave: on the grid `size`, without the modes of the grid `coarse`. After the `last`
        octave `normals`, as large as the picture, are given up."""
        normals = self.coefficients(size) if self.normals is None else self.normals
        normals = normals[..., : size[0], : size[1]].clone()
        self.normals = None if last else self.normals
        rows, columns = (num_modes(min(n, c), axis) for n, c, axis in zip(size, coarse, self.periodic))
        normals[..., :rows, :columns] = 0
        return self.white(normals)

    def white(self, normals: torch.Tensor) -> torch.Tensor:
        """White unit noise with these coefficients."""
        size = normals.shape[-2:]
        return from_modes(normals / math.sqrt(math.prod(size)), size, self.periodic)


def coefficients_of(noise: torch.Tensor, periodic: Axes) -> torch.Tensor:
    """The coefficients from which `NestedNoise.white` would make this noise (..., H, W)."""
    rows, columns = (mode_basis(n, axis).to(noise) for n, axis in zip(noise.shape[-2:], periodic))
    return transform(rows, noise, columns)


def replace_on_grid(
    picture: torch.Tensor, replace: Callable, size: tuple[int, int], periodic: Axes, averaged: bool = False
) -> torch.Tensor:
    """The picture (..., h, w) of a coarser grid, enlarged to `size`, replaced there, and cut back to its modes.

    Args:
        replace: takes and returns pictures of the full size, whose pixels are averages.
        averaged: whether the pixels of `picture` are averages rather than values at pixel centres.
    """
    grid = picture.shape[-2:]
    full = replace(from_modes(to_modes(picture, size, periodic, averaged), size, periodic, averaged=True))
    return from_modes(to_modes(full, grid, periodic, averaged=True), grid, periodic, averaged)


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**62, (), generator=generator, device=device, dtype=torch.int64).item()


def octave_scheduler(
    scheduler, refiner, size: tuple[int, int], steps: int, device="cpu"
) -> EDMDPMSolverMultistepScheduler:
    """The sampler of the refiner's detail of a picture of `size`, set to its start: one network call per step.

    The method is always DPM-Solver++(2M) (arXiv 2211.01095): the coarse picture determines much of the detail, so six
    calls are as good as 19 with Heun's method, which leaves noise with fewer calls. Of the pipeline's scheduler only
    `prediction_type`, which belongs to the networks, is taken: its noise levels are for whole pictures.
    """
    config = refiner.config
    with torch.device("cpu"):  # where diffusers would make its tensors depends on the default device
        sampler = EDMDPMSolverMultistepScheduler(
            sigma_data=octave_std(config, size),
            sigma_max=config.sigma_max,
            prediction_type=scheduler.config["prediction_type"],
        )
        sampler.set_timesteps(steps, device=device)
    sampler.set_begin_index(0)
    return sampler


def refine_in_strips(
    refiner, sample: torch.Tensor, timestep, coarse: torch.Tensor, coarse_noise, tileable: str | None, max_pixels: int
) -> torch.Tensor:
    """The refiner's output. If the batch has more than `max_pixels` pixels, the refiner runs on one picture and one
    strip of rows at a time. Each strip includes the rows around it on which its output depends, so the result is the
    same."""
    batch, _, height, width = sample.shape

    def refine(x, below):
        x, below = x.to(refiner.dtype), below.to(refiner.dtype)
        return refiner(x, timestep, below, coarse_noise, tileable, return_dict=False)[0].float()

    if batch * height * width <= max_pixels:
        return refine(sample, coarse)
    rows = max(2, max_pixels // width // 2 * 2)  # even, for the refiner takes pixels two by two
    output, halo, wraps = torch.empty_like(sample), refiner.reach, "y" in (tileable or "")
    for picture in range(batch):
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = (top - halo, bottom + halo) if wraps else (max(0, top - halo), min(height, bottom + halo))
            index = torch.arange(first, last, device=sample.device) % height
            strip, below = (x[picture : picture + 1].index_select(2, index) for x in (sample, coarse))
            output[picture, :, top:bottom] = refine(strip, below)[0, :, top - first : bottom - first]
    return output
