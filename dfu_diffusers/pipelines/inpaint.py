# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Repaint a part of given images with a DFU model that was trained without masks.

In every denoised image the known pixels are replaced by the given ones, so that the sample has exactly the noise of
the step there (the projection of DDNM, arXiv 2212.00490, with the mask as operator; churn adds fresh noise at each
step as in RePaint, arXiv 2201.09865). The difference between given and denoised image at the rim of the hole is
interpolated over the hole and added, so that colours continue across the edge (the harmonic interpolation of Poisson
image editing, Perez et al. 2003, at each network call instead of once at the end).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput
from PIL import Image

from .checks import _check_latents, _check_strength
from .dfu import DFUPipeline
from .images import read_images, read_mask

SWEEPS = 10  # over each grid of a `HarmonicInterpolation`


class DFUInpaintPipeline(DFUPipeline):
    """Repaints the part of images that a mask marks, at any size. Its components are those of `DFUPipeline`:
    `from_pipe` shares them.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`. Churn (`s_churn` of
            the first) returns to a higher noise level before each step; RePaint calls this resampling.

    >>> from dfu_diffusers import DFUModel, EDMHeunScheduler
    >>> unet = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> pipe = DFUInpaintPipeline(unet, EDMHeunScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> image, mask = Image.new("RGB", (13, 10), "teal"), Image.new("L", (13, 10))
    >>> mask.paste(255, (4, 3, 9, 7))  # left, upper, right, lower
    >>> result = pipe(image, mask, num_inference_steps=4).images[0]
    >>> result.getpixel((3, 3)) == image.getpixel((3, 3)), result.getpixel((4, 3)) == image.getpixel((4, 3))
    (True, False)
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | torch.Tensor | list,
        mask_image: Image.Image | np.ndarray | torch.Tensor | list,
        strength: float = 1.0,
        num_inference_steps: int = 18,
        octave_steps: int = 6,
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DFUPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the name and default of diffusers
        max_batch_size: int | None = None,
        guidance_scale: float = 1.0,
        seamless: bool | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Repaint images. Pixels outside the mask are returned as they came, bit for bit.

        Args:
            image: what to repaint, see `read_images`; all images of one call have one size.
            mask_image: white (at least 0.5) where to repaint, black elsewhere. One mask for all images, or one for
                each, of the images' size. A PIL image of any mode, or an array or tensor with one channel, of bytes,
                booleans, integers 0 and 1, or floats in [0, 1].
            strength: share of the sampler's steps to take, in (0, 1]. With 1 the result does not depend on the pixels
                under the mask. A lower value keeps some of them: the image gets noise of a middle level, from which
                `round(strength * num_inference_steps)` steps, at least one, are left. The refiner is not used then.
            num_inference_steps: steps of `unet`; with a refiner it works on its own grid.
            octave_steps: network calls of the refiner in each octave, if `strength` is 1.
            class_labels: class of each image, or one for all, if the model is class-conditional.
            generator: source of all noise (`nested_noise`, the same function at all sizes). With a list of one
                generator per image, each image does not depend on the others of the batch.
            latents: (images, channels, height, width) unit normal noise to use instead.
            output_type: "pil" (1, 3 or 4 channels), "np" (batch, height, width, channels) or "pt" (batch, channels,
                height, width) in [0, 1], or "latent": the sample itself, neither clamped nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network call;
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: `["latents"]` or `[]`.
            max_batch_size: most images that the network processes at once, to limit memory. The images stay the same.
            guidance_scale: as in `DFUPipeline`; 1 switches it off.
            seamless: correct each denoised image inside the hole by the `HarmonicInterpolation` of its error at the
                rim. None is True where `unet` works at the full size, and False in octaves, where it does harm
                (`docs/upscale.md`).

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        image = read_images(image, self._channels)
        hole = _read_mask(mask_image, image)
        batch_size, _, height, width = image.shape
        strength = _check_strength(strength)
        octaves = self._goes_through_octaves(strength)
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
        )
        strategy = "octaves" if octaves else "direct"
        _check_latents(latents, (batch_size, *self._noise_size((height, width), strategy)))

        # 2. Sample. Known pixels of each denoised image are replaced by the given ones
        image, hole = image.to(self._execution_device), hole.to(self._execution_device)
        known = 2 * image - 1
        seamless = not octaves if seamless is None else seamless
        fill = HarmonicInterpolation(hole, run.periodic) if seamless else None

        def replace(denoised):
            if fill is not None:
                denoised = denoised + fill(known - denoised)
            return torch.where(hole, denoised, known)

        if octaves:
            latents = self._sample_octaves(run, (height, width), latents, replace)
        else:
            start = known.masked_fill(hole, 0) if strength == 1 else known
            latents = self._sample_from_middle(run, start, latents, strength, replace)

        # 3. Images; the known pixels are taken from the input, where no rescaling has touched them
        if output_type == "latent":
            images = torch.where(hole, latents, known)
        else:
            pixels = torch.where(hole, (latents / 2 + 0.5).clamp(0, 1), image)
            images = self._postprocess(pixels, output_type, do_denormalize=False)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _goes_through_octaves(self, strength: float) -> bool:
        """Whether the refiner is used: not if `strength` keeps some of the image under the mask."""
        if self.refiner is None:
            return False
        if strength == 1:
            self._strategy("octaves")
        return strength == 1


class HarmonicInterpolation:
    """Fills the holes of an image from the known pixels at their rims, so that each filled pixel is nearly the mean of
    its neighbours.

    The grids of a pyramid are relaxed from the coarsest to the finest, `SWEEPS` times each (cascadic multigrid). The
    result differs from the exact interpolation by about a tenth of the latter's deviation, more if a hole reaches a
    corner.

    Args:
        hole: (1 or batch, 1, H, W) booleans, on the device of the images.
        periodic: axes, vertical and horizontal, along which opposite edges are neighbours.

    >>> slope = torch.arange(6.0).expand(1, 1, 6, 6)
    >>> hole = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    >>> hole[..., 2:4, 2:4] = True
    >>> torch.allclose(HarmonicInterpolation(hole)(slope.masked_fill(hole, 99)), slope, atol=1e-3)
    True
    """

    def __init__(self, hole: torch.Tensor, periodic: tuple[bool, bool] = (False, False)):
        self.hole, self.periodic = hole, periodic
        rim = ~hole & (self._mean_of_neighbours(hole.float()) > 0)
        self.shares = [rim.float()]  # of each cell of a grid that is rim, finest grid first
        while self.shares[-1].shape[-2:] != (1, 1):
            self.shares.append(_halve((self.shares[-1] > 0).float()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (batch, channels, H, W), floating point, with its holes filled. Zero in images without known pixels."""
        values = [torch.where(self.shares[0] > 0, x, 0)]  # the means of the rim in each cell
        for share in self.shares[1:]:
            values.append(torch.where(share > 0, _halve(values[-1]) / share, 0))
        spanned = torch.zeros_like(values[-1])
        for value, share in zip(reversed(values), reversed(self.shares)):
            spanned = F.interpolate(spanned, value.shape[-2:], mode="bilinear")
            spanned = torch.where(share > 0, value, spanned)
            for _ in range(SWEEPS):
                spanned = torch.where(share > 0, value, self._mean_of_neighbours(spanned))
        return torch.where(self.hole, spanned, x)

    def _mean_of_neighbours(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of the four neighbours of each pixel, (batch, channels, H, W). Beyond an edge the pixel itself
        counts as the neighbour."""
        vertical, horizontal = ("circular" if joined else "replicate" for joined in self.periodic)
        rows = F.pad(x, (0, 0, 1, 1), mode=vertical)
        columns = F.pad(x, (1, 1, 0, 0), mode=horizontal)
        return (rows[..., 2:, :] + rows[..., :-2, :] + columns[..., 2:] + columns[..., :-2]) / 4


def _halve(x: torch.Tensor) -> torch.Tensor:
    """Means over blocks of 2x2 pixels; an odd last row or column forms smaller blocks."""
    return F.avg_pool2d(x, [min(2, side) for side in x.shape[-2:]], ceil_mode=True, count_include_pad=False)


def _read_mask(mask, image: torch.Tensor) -> torch.Tensor:
    """(1 or batch, 1, H, W) booleans, true where to repaint `image` (batch, channels, H, W)."""
    mask = read_mask(mask)
    if mask.shape[-2:] != image.shape[-2:] or len(mask) not in (1, len(image)):
        raise ValueError(
            f"`mask_image` must be one mask, or one for each of the {len(image)} images, of their size "
            f"{image.shape[-2]}x{image.shape[-1]}, but got {len(mask)} of {mask.shape[-2]}x{mask.shape[-1]}: "
            "resize it."
        )
    return mask >= 0.5
