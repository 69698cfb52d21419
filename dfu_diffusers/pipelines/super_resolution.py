# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Enlarge given images to any height and width with a DFU model, whose data never were pairs of small and large ones.

An image is resized, noised to a middle level of the sampler's schedule and denoised from there (SDEdit, arXiv
2108.01073). With `consistency` every denoised image on the way is moved to the nearest one whose area averages are the
given pixels (null-space projection, DDNM, arXiv 2212.00490, Equation 13).
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import logging
from PIL import Image

from .checks import _check_count, _is_number
from .dfu import DFUPipeline
from .images import middle_of_schedule, read_images
from .noise import resize_bicubic

logger = logging.get_logger(__name__)
TOLERANCE = 0.4 / 255  # of area averages before rounding to 8 bits, which adds at most 0.5 / 255; pixels in [0, 1]
MAX_PROJECTIONS = 1000  # a saturated cell of s x s pixels closes a share of about 1/s^2 of its gap in each


class DFUSuperResolutionPipeline(DFUPipeline):
    """Enlarges images by any factor per side. Its components are those of `DFUPipeline`: `from_pipe` shares them.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.

    >>> from dfu_diffusers import DFUModel, EDMHeunScheduler
    >>> unet = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> pipe = DFUSuperResolutionPipeline(unet, EDMHeunScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe(Image.new("RGB", (12, 10)), scale=2.7, num_inference_steps=4).images[0].size
    (32, 27)
    """

    _tiles: tuple[int, int] | None = None  # side and overlap during a run in tiles

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        height: int | None = None,
        width: int | None = None,
        scale: float | None = None,
        strength: float = 0.2,
        num_inference_steps: int = 18,
        consistency: bool | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DFUPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the name and default of diffusers
        max_batch_size: int | None = None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Enlarge images.

        Args:
            image: what to enlarge, see `read_images`; all images of one call have one size.
            height, width: size of the result in pixels. One that is None keeps the proportions of the image.
            scale: instead of these, the factor of both sides, e.g. 2.7; sizes are rounded. 2 if all three are None.
            strength: share of the sampler's steps to take, in (0, 1]. `round(strength * num_inference_steps)` of them,
                at least one, are left when the image comes in, noised to the level at which they begin. Low values
                keep what bicubic interpolation makes of the image; 1 keeps what `consistency` asks for, nothing more.
            num_inference_steps: steps of the whole schedule.
            consistency: the result, area-averaged to the size of the image (`resample` of models), is the image:
                to 1/255 in each pixel after clamping and rounding to 8 bits. Under a factor that is no integer there
                may be no such image in [0, 1]; then a warning says by how much it is missed. Below a factor of 2 that
                is common, unless the image was made from one of the new size by averaging, and the attempt does harm:
                the more, the nearer to 1. Hence None is True if both sides at least double, and False otherwise.
            class_labels: class of each image, or one for all, if the model is class-conditional.
            generator: source of all noise (`nested_noise`, which is one function at all sizes). A list has one per
                image, and then each image is the same whatever its neighbours.
            latents: (images, channels, height, width) unit normal noise to take instead.
            tile_size: the network sees squares of at most this side, one at a time, to bound memory: it is called on
                each at every step and its answers are blended. To the network's Fourier modes a tile is a whole
                image, so what they know of the layout does not fit; with little noise that matters less.
            tile_overlap: pixels that neighbouring tiles share at least, in [0, tile_size); a quarter if None.
            output_type: "pil" (1, 3 or 4 channels), "np" (batch, height, width, channels) or "pt" (batch, channels,
                height, width) in [0, 1], or "latent": the sample itself, neither clamped nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network call;
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there.
            callback_on_step_end_tensor_inputs: what the callback sees, of `["latents"]`.
            max_batch_size: the network sees at most so many images at once, to bound memory. The images stay the same.
            guidance_scale: as of `DFUPipeline`; 1 switches it off.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        image = read_images(image, self.unet.config.in_channels)
        batch_size, old_size = len(image), tuple(image.shape[-2:])
        height, width = _target_size(old_size, height, width, scale)
        run = self._begin(
            batch_size=batch_size,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            class_labels=class_labels,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_batch_size=max_batch_size,
            guidance_scale=guidance_scale,
        )
        shrinks = height < old_size[0] or width < old_size[1]
        if consistency is None:
            consistency = height >= 2 * old_size[0] and width >= 2 * old_size[1]
        if consistency and shrinks:
            raise ValueError(
                f"With `consistency` no side may shrink, but {old_size[0]}x{old_size[1]} would become {height}x"
                f"{width}: ask for a larger size, or leave `consistency` out."
            )
        tiles = _checked_tiles(tile_size, tile_overlap)
        if tiles is not None and any(self._periodic):
            raise ValueError(
                "In tiles an image cannot tile the plane, for the model would join the edges of each tile: leave out "
                "`tile_size`, or call the pipeline within `unet.use_tileable(None)`."
            )
        device = self._execution_device
        timesteps = middle_of_schedule(self.scheduler, num_inference_steps, strength, device)
        self._tiles = tiles

        # 2. The image at the new size, with noise
        image = 2 * image.to(device) - 1
        average = AreaAverage(image, (height, width)) if consistency else None
        large = resize_bicubic(image, (height, width), self._periodic, antialias=shrinks)
        if average is not None:
            large = average.project(large)
        latents = run["draw_noise"](large.shape) if latents is None else latents
        latents = self.scheduler.add_noise(large, latents.to(device, torch.float32), timesteps[:1])

        # 3. Denoise
        project = None if average is None else lambda denoised, latents: average.project(denoised)
        latents = self._denoise(latents, timesteps, **run, project=project)

        # 4. Images
        if average is not None and output_type != "latent" and not self._interrupt:
            latents = average.project_into_range(latents)
        images = self._postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _evaluate(self, sample, timestep, class_labels, max_batch_size: int, model=None) -> torch.Tensor:
        """As in DFUPipeline; with tiles, a pixel's output is the weighted mean over the tiles that cover it."""
        if self._tiles is None:
            return super()._evaluate(sample, timestep, class_labels, max_batch_size, model)
        output = torch.zeros(sample.shape, device=sample.device)
        rows, columns = (tile_windows(side, *self._tiles) for side in sample.shape[-2:])
        for y, row_weights in rows:
            for x, column_weights in columns:
                tile = super()._evaluate(sample[..., y, x], timestep, class_labels, max_batch_size, model)
                output[..., y, x] += torch.outer(row_weights, column_weights).to(output) * tile
        return output


class AreaAverage:
    """The images of another size whose area averages are the given ones, and how to get to the nearest of them.

    Averaging rows and columns are matrices A of full rank, one for each axis, so that the pseudo-inverse of both
    together is the pair of A^T (A A^T)^-1.

    Args:
        image: (batch, channels, h, w), the averages, in [-1, 1].
        size: (H, W) of the images, H >= h and W >= w.
    """

    def __init__(self, image: torch.Tensor, size: tuple[int, int]):
        matrices = [area_matrix(*sides) for sides in zip(image.shape[-2:], size)]
        self.image = image
        self.rows, self.columns = (matrix.to(image) for matrix in matrices)
        self.inverse_rows, self.inverse_columns = (
            torch.linalg.solve(matrix @ matrix.T, matrix).T.to(image) for matrix in matrices
        )

    def error(self, x: torch.Tensor, of=slice(None)) -> torch.Tensor:
        """What the averages of x (images, channels, H, W) lack: (images, channels, h, w); `of` which of the batch."""
        return self.image[of] - self.rows @ x @ self.columns.T

    def project(self, x: torch.Tensor, of=slice(None)) -> torch.Tensor:
        """The images nearest to x, in squared error, that have the averages."""
        return x + self.inverse_rows @ self.error(x, of) @ self.inverse_columns.T

    def project_into_range(self, x: torch.Tensor) -> torch.Tensor:
        """Alternate between the images in [-1, 1] and those that have the averages, each image until it is both."""
        x = x.clamp(-1, 1)
        left = torch.arange(len(x), device=x.device)  # to be done
        for _ in range(MAX_PROJECTIONS):
            missed = self.error(x[left], left).abs().amax((1, 2, 3)) / 2
            left = left[missed > TOLERANCE]
            if len(left) == 0:
                return x
            x[left] = self.project(x[left], left).clamp(-1, 1)
        logger.warning(
            f"No image of {x.shape[-2]}x{x.shape[-1]} in [0, 1] was found whose averages are the given image: the "
            f"nearest misses a pixel by {255 * missed.max():.1f}/255. An integer factor always has one."
        )
        return x


def area_matrix(cells: int, pixels: int) -> torch.Tensor:
    """(cells, pixels) float64: the share of each pixel in the mean over each cell, both dividing the same interval.

    >>> area_matrix(2, 3)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.6667]], dtype=torch.float64)
    """
    cell, pixel = torch.arange(cells)[:, None], torch.arange(pixels)  # in units of 1/(cells pixels): all are integers
    covered = torch.minimum((cell + 1) * pixels, (pixel + 1) * cells) - torch.maximum(cell * pixels, pixel * cells)
    return covered.clamp(min=0).double() / pixels


def tile_windows(side: int, tile: int, overlap: int) -> list[tuple[slice, torch.Tensor]]:
    """Places of tiles along a side of an image, evenly spread, and the weights of their pixels, which sum to one.

    >>> [(place.start, place.stop) for place, _ in tile_windows(10, tile=4, overlap=1)]
    [(0, 4), (3, 7), (6, 10)]
    """
    tile = min(tile, side)
    count = 1 if tile == side else math.ceil((side - overlap) / (tile - overlap))
    starts = [round(i * (side - tile) / max(1, count - 1)) for i in range(count)]
    places = [slice(start, start + tile) for start in starts]
    distance = torch.arange(tile) + 0.5  # of a pixel's centre from the tile's edge
    ramp = (torch.minimum(distance, tile - distance) / max(1, overlap)).clamp(max=1)
    total = torch.zeros(side)
    for place in places:
        total[place] += ramp
    return [(place, ramp / total[place]) for place in places]


def _checked_tiles(tile_size: int | None, tile_overlap: int | None) -> tuple[int, int] | None:
    if tile_size is None:
        if tile_overlap is not None:
            raise ValueError(f"`tile_overlap` {tile_overlap!r} means nothing without `tile_size`: pass that, too.")
        return None
    _check_count("tile_size", tile_size)
    tile_overlap = tile_size // 4 if tile_overlap is None else tile_overlap
    if isinstance(tile_overlap, bool) or not isinstance(tile_overlap, (int, np.integer)):
        raise TypeError(f"`tile_overlap` must be an integer in [0, {tile_size}), but got {tile_overlap!r}.")
    if not 0 <= tile_overlap < tile_size:
        raise ValueError(f"`tile_overlap` must lie in [0, {tile_size}), below `tile_size`, but got {tile_overlap}.")
    return int(tile_size), int(tile_overlap)


def _target_size(size: tuple[int, int], height, width, scale) -> tuple[int, int]:
    """(height, width) of the result; if both are given they are returned unchecked."""
    if scale is None and height is None and width is None:
        scale = 2
    if scale is None:
        proportion = size[1] / size[0]
        if height is None:
            _check_count("width", width)
            height = max(1, round(width / proportion))
        if width is None:
            _check_count("height", height)
            width = max(1, round(height * proportion))
        return height, width
    if height is not None or width is not None:
        raise ValueError(f"`scale` {scale} takes the place of `height` and `width`: give one or the other.")
    if not _is_number(scale):
        raise TypeError(f"`scale` must be a number, e.g. 2 or 2.7, but got {scale!r}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` must be positive and finite, but got {scale}.")
    return tuple(max(1, round(scale * side)) for side in size)
