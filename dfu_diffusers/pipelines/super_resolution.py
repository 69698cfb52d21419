# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Enlarge given images to any height and width.

With a refiner the given image is the coarse picture, and the refiner adds the modes beyond it, as in generation; only
the trunk is not needed. Without a refiner the image is resized, noise of a middle level of the schedule is added, and
a DFU model denoises it from there (SDEdit, arXiv 2108.01073).

With `consistency` denoised images are moved to the nearest ones whose area averages are the given pixels (null-space
projection, DDNM, arXiv 2212.00490, Equation 13). An average over a pixel mixes its finest modes with those beyond
(aliasing). So the refiner starts from four fifths of the modes and draws the others, too, given the averages.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from PIL import Image

from ..checks import real_number
from ..models.modes import Axes, average_pixels, cell_averages, from_modes, octave_sizes, to_modes, transform
from .checks import _check_count, _check_latents, _check_positive, _check_retired, _check_strength
from .dfu import DFUPipeline, Run
from .images import read_images
from .noise import resize_bicubic
from .octaves import NestedNoise, coefficients_of

logger = logging.get_logger(__name__)

TOLERANCE = 0.4 / 255  # of area averages before rounding to 8 bits, which adds at most 0.5 / 255; pixels in [0, 1]
CLEAN_MODES = 0.8  # share of the modes of an image, along each axis, that are hardly aliased
MAX_PROJECTIONS = 1000  # in a saturated cell of s x s pixels each one reduces the error by a share of about 1/s^2


class DFUSuperResolutionPipeline(DFUPipeline):
    """Enlarges images by any factor per side. Its components are those of `DFUPipeline`: `from_pipe` shares them.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`. None if there
            is a refiner, which needs no other model.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.
        guide: as in `DFUPipeline`.
        refiner: a `DFURefiner`, which adds the detail; without one `unet` does.

    >>> from dfu_diffusers import DFURefiner, EDMHeunScheduler
    >>> refiner = DFURefiner(hidden_channels=8, num_layers=1)
    >>> pipe = DFUSuperResolutionPipeline(None, EDMHeunScheduler(), refiner=refiner)
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe(Image.new("RGB", (12, 10)), scale=2.7, octave_steps=2).images[0].size
    (32, 27)
    """

    _optional_components = ["unet", "guide", "refiner"]

    def __init__(
        self,
        unet: ModelMixin | None,
        scheduler: SchedulerMixin,
        guide: ModelMixin | None = None,
        refiner: ModelMixin | None = None,
    ):
        super().__init__(unet, scheduler, guide, refiner)

    @staticmethod
    def _check_components(unet, refiner) -> None:
        if unet is None and refiner is None:
            raise ValueError("The pipeline needs a refiner or a unet: pass `refiner=DFURefiner.from_pretrained(...)`.")

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        height: int | None = None,
        width: int | None = None,
        scale: float | None = None,
        noise_level: float = 0.0,
        octave_steps: int = 6,
        consistency: bool | None = None,
        strength: float = 0.2,
        num_inference_steps: int = 18,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DFUPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the name and default of diffusers
        max_batch_size: int | None = None,
        tileable: str | None = None,
        **retired,
    ) -> ImagePipelineOutput | tuple:
        """Enlarge images.

        Args:
            image: what to enlarge, see `read_images`; all images of one call have one size.
            height, width: size of the result in pixels. If one of them is None, the aspect ratio stays the same.
            scale: instead of height and width, the factor of both sides, e.g. 2.7; sizes are rounded. 2 if all three
                are None.
            noise_level: standard deviation of the noise in the image, in [0, 2], where images are in [-1, 1]. The
                refiner then relies less on the finest modes of the image. About 0.02 to 0.1 for compressed images.
                Needs a refiner.
            octave_steps: network calls of the refiner in each doubling of the sides. 1 estimates the mean of all
                possible results: nearer to the truth in squared error than a sample, but blurred.
            consistency: True: the result, area-averaged to the size of the image, equals the image to 1/255 in each
                pixel, after clamping and rounding to 8 bits. If the factor is not an integer, there may be no such
                result in [0, 1]; a warning then says by how much it differs. False: the refiner takes the modes of
                the image as exact. None, which is nearest to the truth: with a refiner, the averages hold for the
                function that the result samples, and as with True where the factors are integers, unless a side
                shrinks; without a refiner, True if both sides at least double.
            strength: share of the sampler's steps to take, in (0, 1], without a refiner. Low values stay close to
                bicubic interpolation; 1 keeps only what `consistency` requires.
            num_inference_steps: steps of the whole schedule, without a refiner.
            class_labels, guidance_scale: as in `DFUPipeline`, without a refiner.
            generator: source of all noise, which is the same function at all sizes. With a list of one generator per
                image, each image does not depend on the others of the batch.
            latents: (images, channels, height, width) unit normal noise to use instead. With a refiner, height and
                width are at least those of the image.
            output_type: "pil" (1, 3 or 4 channels), "np" (batch, height, width, channels) or "pt" (batch, channels,
                height, width) in [0, 1], or "latent": the sample itself, neither clamped nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network call;
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: `["latents"]` or `[]`.
            max_batch_size: most images that the network processes at once, to limit memory. The images stay the same.
            tileable: axes along which the image tiles the plane, as in `DFUPipeline`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        _check_retired(retired)
        image = read_images(image, self._channels)
        batch_size, old_size = len(image), tuple(image.shape[-2:])
        size = _target_size(old_size, height, width, scale)
        strength = _check_strength(strength)
        noise_level = self._check_noise_level(noise_level)
        run = self._begin(
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            octave_steps=octave_steps,
            class_labels=class_labels,
            generator=generator,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_batch_size=max_batch_size,
            guidance_scale=guidance_scale,
            tileable=tileable,
        )
        at_steps, at_end = self._check_consistency(consistency, old_size, size)
        noise_size = size if self.refiner is None else tuple(map(max, size, old_size))
        _check_latents(latents, (batch_size, self._channels, *noise_size))

        # 2. Sample
        image = 2 * image.to(self._execution_device) - 1
        average = AreaAverage(image, size) if at_end else None
        if self.refiner is None:
            sample = self._denoise_resized(run, image, size, latents, strength, average)
        else:
            sample = self._add_octaves(run, image, size, latents, noise_level, at_steps)

        # 3. Images
        if average is not None:
            sample = average.project(sample)
            if output_type != "latent" and not self._interrupt:
                sample = average.project_into_range(sample)
        images = self._postprocess(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def _channels(self) -> int:
        return (self.refiner if self.unet is None else self.unet).config.in_channels

    def _add_octaves(self, run: Run, image, size, latents, noise_level: float, consistent: bool) -> torch.Tensor:
        """The image, enlarged, with the detail that the refiner adds beyond the image's modes; if `consistent`, beyond
        those that are hardly aliased, given the image's averages."""
        periodic, base = run.periodic, tuple(image.shape[-2:])
        noise = NestedNoise(run.batch_size, self._channels, run.generator, periodic, image.device)
        noise.normals = None if latents is None else coefficients_of(latents.to(image), periodic)
        project = None
        if consistent and size != base:
            base = tuple(max(1, round(CLEAN_MODES * side)) for side in base)
            project = ModeAverages(image, periodic).project
        octaves = octave_sizes(size, base)
        picture = from_modes(to_modes(image, base, periodic, averaged=True), base, periodic)
        with self._progress(run, self._refiner_calls(run, octaves)):
            picture = self._refine(run, picture, octaves, noise, noise_level, project)
        return average_pixels(picture if project is None else project(picture), periodic)

    def _denoise_resized(self, run: Run, image, size, latents, strength: float, average) -> torch.Tensor:
        """The image resized, noised and denoised by `unet`."""
        shrinks = size[0] < image.shape[-2] or size[1] < image.shape[-1]
        large = resize_bicubic(image, size, run.periodic, antialias=shrinks)
        large = large if average is None else average.project(large)
        project = None if average is None else average.project
        return self._sample_from_middle(run, large, latents, strength, project)

    def _class_labels(self, class_labels, batch_size: int) -> torch.Tensor | None:
        if self.refiner is None:
            return super()._class_labels(class_labels, batch_size)
        if class_labels is not None:
            raise ValueError(f"A refiner takes no classes, but got `class_labels` {class_labels!r}: leave them out.")
        return None

    def _check_noise_level(self, noise_level) -> float:
        number = real_number(noise_level)
        if number is None:
            raise TypeError(f"`noise_level` must be a number in [0, 2], but got {noise_level!r}.")
        if not 0 <= number <= 2:
            raise ValueError(f"`noise_level` must lie in [0, 2], 0 for a clean image, but got {noise_level!r}.")
        if number > 0 and self.refiner is None:
            raise ValueError(
                f"`noise_level` {noise_level!r} needs a refiner: load the pipeline with `refiner=DFURefiner."
                "from_pretrained(...)`, or raise `strength` instead."
            )
        return float(number)

    def _check_consistency(self, consistency: bool | None, old, size) -> tuple[bool, bool]:
        """Whether the averages hold at each step, and whether they hold to 1/255 at the end."""
        shrinks = any(new < side for side, new in zip(old, size))
        if consistency is None and self.refiner is None:
            consistency = all(new >= 2 * side for side, new in zip(old, size))
        if consistency is None:
            return not shrinks, all(new % side == 0 for side, new in zip(old, size))
        if consistency and shrinks:
            raise ValueError(
                f"With `consistency` no side may shrink, but {old[0]}x{old[1]} would become {size[0]}x{size[1]}: ask "
                "for a larger size, or leave `consistency` out."
            )
        return bool(consistency), bool(consistency)


class Averages:
    """The set of arrays x (batch, channels, H, W) whose averages, rows x columns^T, are a given image, and the
    projection onto it. With matrices A of full rank the pseudo-inverse along an axis is A^T (A A^T)^-1.

    Args:
        image: (batch, channels, h, w), the averages, in [-1, 1].
        rows, columns: (h, H) and (w, W) in float64, with H >= h and W >= w.
    """

    def __init__(self, image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor):
        self.image, self.rows, self.columns = image, rows.to(image), columns.to(image)
        self.inverse_rows, self.inverse_columns = (_pseudo_inverse(each).to(image) for each in (rows, columns))

    def error(self, x: torch.Tensor, of=slice(None)) -> torch.Tensor:
        """The given image minus the averages of x (images, channels, H, W): (images, channels, h, w). `of` selects
        the images of the batch to which x belongs."""
        return self.image[of] - transform(self.rows, x, self.columns)

    def project(self, x: torch.Tensor, of=slice(None)) -> torch.Tensor:
        """The arrays nearest to x, in squared error, that have the averages."""
        return x + transform(self.inverse_rows, self.error(x, of), self.inverse_columns)


def _pseudo_inverse(matrix: torch.Tensor) -> torch.Tensor:
    """A^T (A A^T)^-1. The small term serves the one case without full rank: an even tileable axis that does not grow,
    where the average of no mode is the wave at the Nyquist frequency."""
    product = matrix @ matrix.T
    product.diagonal().add_(1e-11 * product.diagonal().mean())
    return torch.linalg.solve(product, matrix).T


class ModeAverages:
    """Projections of pictures of any size onto those whose averages over the pixels of an image are the image. In
    modes the averages are exact at every factor.

    Args:
        image: (batch, channels, h, w), the averages, in [-1, 1].
        periodic: axes, (rows, columns), that tile.
    """

    def __init__(self, image: torch.Tensor, periodic: Axes):
        self.image, self.periodic, self._averages = image, periodic, {}

    def project(self, picture: torch.Tensor) -> torch.Tensor:
        """The picture (batch, channels, H, W), values at pixel centres, with the nearest modes that have the averages;
        as it is if it is smaller than the image."""
        size, cells = picture.shape[-2:], self.image.shape[-2:]
        if any(side < cell for side, cell in zip(size, cells)):
            return picture
        modes = to_modes(picture, periodic=self.periodic)
        if size not in self._averages:  # once an octave, not at each step
            matrices = (cell_averages(*each) for each in zip(cells, modes.shape[-2:], self.periodic))
            self._averages[size] = Averages(self.image, *matrices)
        return from_modes(self._averages[size].project(modes), size, self.periodic)


class AreaAverage(Averages):
    """The images of a larger size whose area averages are a given image, and projections onto them.

    Args:
        image: (batch, channels, h, w), the averages, in [-1, 1].
        size: (H, W) of the images, H >= h and W >= w.
    """

    def __init__(self, image: torch.Tensor, size: tuple[int, int]):
        super().__init__(image, *(area_matrix(*sides) for sides in zip(image.shape[-2:], size)))

    def project_into_range(self, x: torch.Tensor) -> torch.Tensor:
        """Project each image onto [-1, 1] and onto the averages in turn, until it has both."""
        x = x.clamp(-1, 1)
        left = torch.arange(len(x), device=x.device)  # images that are not done
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
    """(cells, pixels) float64: the weight of each pixel in the mean over each cell. Both divide the same interval.

    >>> area_matrix(2, 3)
    tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.3333, 0.6667]], dtype=torch.float64)
    """
    cell, pixel = (torch.arange(n, device="cpu") for n in (cells, pixels))
    cell = cell[:, None]  # in units of 1/(cells pixels): all are integers
    covered = torch.minimum((cell + 1) * pixels, (pixel + 1) * cells) - torch.maximum(cell * pixels, pixel * cells)
    return covered.clamp(min=0).double() / pixels


def _target_size(size: tuple[int, int], height, width, scale) -> tuple[int, int]:
    """(height, width) of the result."""
    if scale is not None and (height is not None or width is not None):
        raise ValueError(f"`scale` {scale} takes the place of `height` and `width`: give one or the other.")
    if height is None and width is None:
        scale = _check_positive("scale", 2 if scale is None else scale)
        return tuple(max(1, round(scale * side)) for side in size)
    height, width = (
        None if side is None else _check_count(name, side) for name, side in (("height", height), ("width", width))
    )
    if height is None:
        height = max(1, round(width * size[0] / size[1]))
    if width is None:
        width = max(1, round(height * size[1] / size[0]))
    return height, width
