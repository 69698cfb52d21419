# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Image generation at any height and width with a DFU model (arXiv 2401.06144) and an EDM sampler.

This file imports torch and diffusers only, so that it can travel inside a Hub repository.
"""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DFUPipeline(DiffusionPipeline):
    """Generates images of any height and width >= 1, also beyond the sizes the model was trained on.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.

    >>> from dfu_diffusers import DFUModel, EDMHeunScheduler
    >>> unet = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> pipe = DFUPipeline(unet, EDMHeunScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe(height=20, width=31, num_inference_steps=2).images[0].size
    (31, 20)
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @property
    def num_timesteps(self) -> int:
        """Network calls of the current or last run."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 18,
        class_labels: int | list[int] | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DFUPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the name and default of diffusers
        max_batch_size: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            batch_size: number of images.
            height, width: size in pixels, at least 1 each; one that is None is taken from the model's `sample_size`.
            num_inference_steps: steps of the sampler; a Heun step takes two network calls, the last one only one.
            class_labels: class of each image, or one for all, if the model is class-conditional.
            generator: source of all noise. A list has one per image, and then each image is the same whatever its
                neighbours. A CPU generator gives the same noise on every device.
            latents: (batch_size, channels, height, width) unit normal noise to start from.
            output_type: "pil" (1, 3 or 4 channels), "np" (batch, height, width, channels) or "pt" (batch, channels,
                height, width) in [0, 1], or "latent": the sample itself, neither clamped nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network call;
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop early.
            callback_on_step_end_tensor_inputs: what the callback sees, of `["latents"]`.
            max_batch_size: evaluate at most so many images at once, to bound memory. With a single generator and
                churn, the churn noise of an image depends on this number.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        height, width = self._size(height, width)
        self.check_inputs(
            batch_size, height, width, generator, latents, output_type, callback_on_step_end_tensor_inputs, max_batch_size
        )
        class_labels = self._class_labels(class_labels, batch_size)
        device = self._execution_device
        self._interrupt = False

        # 2. Noise of the whole batch, in float32: at sigma 80 half precision would swallow the image
        if latents is None:
            shape = (batch_size, self.unet.config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)

        # 3. Denoise, some images at a time
        chunk = max_batch_size or batch_size
        starts = range(0, batch_size, chunk)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        samples = []
        with self.progress_bar(total=len(starts) * self._num_timesteps) as progress_bar:
            for start in starts:
                part = slice(start, start + chunk)
                self.scheduler.set_timesteps(num_inference_steps, device=device)  # forgets the part before
                samples.append(
                    self._denoise(
                        latents[part],
                        None if class_labels is None else class_labels[part],
                        generator[part] if isinstance(generator, list) else generator,
                        callback_on_step_end,
                        callback_on_step_end_tensor_inputs,
                        progress_bar,
                    )
                )

        # 4. Images
        images = self._postprocess(torch.cat(samples), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(self, latents, class_labels, generator, callback, callback_inputs, progress_bar) -> torch.Tensor:
        """Unit noise -> samples, both (batch, channels, height, width), float32."""
        latents = latents * self.scheduler.init_noise_sigma
        step_kwargs = {"generator": generator, "return_dict": False}
        self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                break
            model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
            output = self.unet(model_input, t, class_labels, return_dict=False)[0]
            latents = self.scheduler.step(output.float(), t, latents, **step_kwargs)[0]
            if callback is not None:
                outputs = callback(self, i, t, {name: latents for name in callback_inputs})
                latents = (outputs or {}).get("latents", latents)
            progress_bar.update()
        return latents

    def _postprocess(self, sample: torch.Tensor, output_type: str):
        if output_type == "latent":
            return sample
        return self.image_processor.postprocess(sample, output_type=output_type)

    # --- Inputs ---

    def _size(self, height, width) -> tuple[int, int]:
        default = self.unet.config.sample_size
        default = (default, default) if isinstance(default, int) else tuple(default)
        return tuple(given if given is not None else fallback for given, fallback in zip((height, width), default))

    def check_inputs(
        self, batch_size, height, width, generator, latents, output_type, callback_inputs, max_batch_size
    ) -> None:
        """Raise a ValueError or TypeError that names the argument, its value and the remedy."""
        counts = {"batch_size": batch_size, "height": height, "width": width, "max_batch_size": max_batch_size or 1}
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` must be an integer of at least 1, but got {value!r}: round it yourself.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but got {value}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but got {output_type!r}.")
        channels = self.unet.config.out_channels
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(
                f"`output_type='pil'` needs 1, 3 or 4 channels, but this model makes {channels}: use 'np' or 'pt'."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator, or a list with one for each of the {batch_size} images, but got a "
                f"list of {len(generator)}."
            )
        expected = (batch_size, self.unet.config.in_channels, height, width)
        if latents is not None and tuple(latents.shape) != expected:
            raise ValueError(
                f"`latents` must have shape (batch_size, channels, height, width) = {expected}, but got "
                f"{tuple(latents.shape)}: pass the matching `batch_size`, `height` and `width`."
            )
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, but got {unknown}."
            )

    def _class_labels(self, class_labels, batch_size: int) -> torch.Tensor | None:
        """Checked labels (batch_size,) on the execution device; None for an unconditional model."""
        classes = getattr(self.unet.config, "num_class_embeds", None)
        if classes is None and class_labels is None:
            return None
        if classes is None:
            raise ValueError(f"`class_labels` {class_labels} were given, but this model is unconditional: leave them out.")
        allowed = f"one integer in [0, {classes}), or one for each of the {batch_size} images"
        if class_labels is None:
            raise ValueError(f"This model is class-conditional: `class_labels` must be {allowed}.")
        labels = torch.as_tensor(class_labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"`class_labels` must be {allowed}, but got {class_labels}.")
        if labels.ndim == 0:
            labels = labels.expand(batch_size)
        if labels.shape != (batch_size,) or labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"`class_labels` must be {allowed}, but got {class_labels}.")
        return labels.to(self._execution_device, torch.long)
