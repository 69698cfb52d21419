# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Image generation at any height and width with a DFU model (arXiv 2401.06144) and an EDM sampler."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .checks import _check_count, _check_positive, _is_number
from .noise import fourier_resample, growing_sizes, nested_noise, resize_bicubic
from .remote_code import REMOTE, code_files

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRATEGIES = ("direct", "guided", "cascade")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class DFUPipeline(DiffusionPipeline):
    """Generates images of any height and width >= 1, also beyond the sizes the model was trained on.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.
        guide: a weaker model of the same images, such as an earlier snapshot of `unet` or a smaller network trained
            for less time: `guidance_scale` then leads away from what it gets wrong (autoguidance, arXiv 2406.02507).

    >>> from dfu_diffusers import DFUModel, EDMHeunScheduler
    >>> unet = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> pipe = DFUPipeline(unet, EDMHeunScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe(height=20, width=31, num_inference_steps=2).images[0].size
    (31, 20)
    """

    model_cpu_offload_seq = "unet->guide"
    _optional_components = ["guide"]
    _callback_tensor_inputs = ["latents"]
    _self_contained = False

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, guide: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guide=guide)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "DFUPipeline":
        """As in diffusers, from safetensors only, components of other classes included.

        diffusers would fall back on a `.bin`, a pickle, which may run code when it is opened.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: a component has no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                f"{cls.__name__} loads safetensors only (use_safetensors=False asks for pickles): convert the files, "
                f"or pass `unet` as you loaded it."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DFUPipeline":
        """A DFUPipeline that shares the components of another pipeline; `kwargs` replace some, as in diffusers.

        The weights keep their dtype unless `dtype` (`torch_dtype`) says otherwise; then both pipelines' change.
        """
        # diffusers hands a model on only if the type hint names its very class, and ours admits any denoiser.
        if hasattr(pipeline, "unet"):
            kwargs.setdefault("unet", pipeline.unet)
        if getattr(pipeline, "guide", None) is not None:
            kwargs.setdefault("guide", pipeline.guide)
        with warnings.catch_warnings():
            if not {"dtype", "torch_dtype"} & kwargs.keys():  # by default diffusers makes shared weights float32
                kwargs["torch_dtype"] = pipeline.dtype
                warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # the name that every release knows
            return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, which would warn of `auto_map`: the entry is AutoModel's, not ours."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(self, save_directory, *args, self_contained: bool = False, **kwargs) -> None:
        """Save as in diffusers; such a folder needs dfu_diffusers to be loaded.

        With `self_contained` our modules are saved along, and `DiffusionPipeline.from_pretrained(...,
        trust_remote_code=True)` needs nothing but diffusers. A pipeline that was loaded in that way is always saved
        in that way, for its classes exist nowhere else.
        """
        with self._with_code(self_contained):
            super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, self_contained: bool = False, **kwargs) -> str:
        """As in diffusers, with the option of `save_pretrained`; `dfu_diffusers.hub` does more for a saved folder."""
        with self._with_code(self_contained):
            return super().push_to_hub(repo_id, *args, **kwargs)

    @contextlib.contextmanager
    def _with_code(self, self_contained: bool):
        """Until it ends, pipelines are saved with code, if so asked here or further out."""
        before, self._self_contained = self._self_contained, self._self_contained or self_contained
        try:
            yield
        finally:
            self._self_contained = before

    def save_config(self, save_directory, *args, **kwargs) -> None:
        """As in diffusers, which calls it when the components are saved, and before it uploads them."""
        super().save_config(save_directory, *args, **kwargs)
        recorded = [library for library, _ in map(self.config.get, self.components) if library]
        if self._self_contained or any(name.split(".")[0] == REMOTE for name in (self.__module__, *recorded)):
            for path, text in code_files(save_directory, type(self)).items():
                Path(save_directory, path).write_text(text, encoding="utf-8")

    @property
    def num_timesteps(self) -> int:
        """Network calls of the current or last run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback stopped the current or last run."""
        return self._interrupt

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
        strategy: Literal["direct", "guided", "cascade"] = "direct",
        cascade_sigma: float = 0.25,
        cascade_hold: float = 0.25,
        guidance_scale: float = 1.0,
        nested_noise: bool = True,
        noise_shift: float = 0.0,
        tileable: Literal["x", "y", "xy"] | None = None,
        fixed_levels: bool = False,
        spectral_gain: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Beyond the model's `sample_size` there are three strategies. They differ in how the layout is found:

            strategy     the network's calls, of which N steps of Heun make C = 2 N - 1
            "direct"     C at the full size: the paper's zero-shot sampling
            "guided"     C at the full size and C small ones: at every step the low frequencies of the denoised image
                         are those that the network sees on a grid within `sample_size` (upsample guidance, arXiv
                         2404.01709). Of one seed they become exactly those of the small picture
            "cascade"    C small ones, then, for every doubling of the side or part of one, those of the steps from
                         `cascade_sigma` down, at that size: sampled small, enlarged (bicubic), and again noised and
                         denoised, to add the detail (as in DemoFusion, arXiv 2311.16973)

        Within `sample_size` they are one and the same. `docs/zero_shot.md` tells when to use which, with figures.

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
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there.
            callback_on_step_end_tensor_inputs: what the callback sees, of `["latents"]`.
            max_batch_size: the network sees at most so many images at once, to bound memory. The images stay the same.
            strategy: see above. A callback sees the cascade's sample at the size that it has reached.
            cascade_sigma: noise level to which the cascade takes enlarged images, positive; the nearest of the
                schedule. More of it redraws more.
            cascade_hold: share, in [0, 1], of the small image's frequencies on each axis, at least the mean unless it
                is 0, that stay as they are when a stage of the cascade denoises the enlarged one. More of it keeps the
                layout, less leaves more to draw.
            guidance_scale: weight w in D_weak + w (D - D_weak), a blend of denoised images; 1 switches it off. D_weak
                is that of `guide` if the pipeline has one. Otherwise it is that of no class (classifier-free guidance,
                arXiv 2207.12598): the last one, as in training with `--label_dropout`. Twice the network calls.
            nested_noise: one seed is the same picture at all sizes, as nearly as the model allows, for its noise is
                (see the function `nested_noise`). Otherwise noise is drawn pixel by pixel, as in other pipelines.
            noise_shift: the levels of noise are multiplied by (side / `sample_size`)^noise_shift, the side that of a
                square of as many pixels. At 1 low frequencies are as noisy at all sizes (simple diffusion, arXiv
                2301.11093), which suits models trained with this `--noise_shift`. Needs `EDMHeunScheduler`.
            tileable: axes along which the images tile the plane: "x" (left and right edges meet), "y" or "xy"; None
                for what the model was trained for. Takes a `DFUModel`, see its `use_tileable`.
            fixed_levels: beyond `sample_size` only the network's finest level grows with the image; the others keep
                the grids of the image shrunk to fit into `sample_size`. Direct samples become more coherent, and large
                ones cheaper. Takes a `DFUModel`, see its `use_fixed_levels`.
            spectral_gain: beyond `sample_size` the results of Fourier layers are multiplied by (side / `sample_size`)^
                spectral_gain, the side as for `noise_shift`. Direct samples become more coherent, for "direct" only.
                Takes a `DFUModel`, see its `use_spectral_gain`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        height, width = self._size(height, width)
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
            nested=nested_noise,
        )
        self._check_strategy(strategy, cascade_sigma, cascade_hold, noise_shift, spectral_gain)
        draw_noise = run["draw_noise"]

        # 2. Noise, in float32 throughout: at sigma 80 half precision would swallow the image
        if latents is None:
            latents = draw_noise((batch_size, self.unet.config.in_channels, height, width))
        latents = latents.to(self._execution_device, torch.float32)
        small = self._small_size(height, width) if strategy != "direct" else (height, width)
        if strategy == "cascade":  # begins with the low modes of the same noise
            latents = fourier_resample(latents, small) * math.sqrt(height * width / math.prod(small))
        self._set_timesteps(num_inference_steps, latents.shape, noise_shift)
        latents = latents * self.scheduler.init_noise_sigma

        # 3. Denoise
        timesteps, growth, project = self.scheduler.timesteps, {}, None
        if strategy == "guided" and small != (height, width):
            project = partial(self._replace_low_frequencies, small, run["predict"])
        elif strategy == "cascade":
            set_timesteps = partial(self._set_timesteps, num_inference_steps, noise_shift=noise_shift)
            grow = partial(self._start_stage, set_timesteps, draw_noise, cascade_hold)
            timesteps, growth = self._cascade(small, (height, width), cascade_sigma, set_timesteps, grow)
        switches = {
            "use_tileable": tileable,
            "use_fixed_levels": self._small_size(height, width, "fixed_levels") if fixed_levels else None,
            "use_spectral_gain": None,
        }
        if spectral_gain:
            factor = self._relative_side((height, width), "spectral_gain")
            switches["use_spectral_gain"] = max(1.0, factor) ** spectral_gain
        with self._models(switches):
            latents = self._denoise(latents, timesteps, **run, project=project, growth=growth)

        # 4. Images
        images = self._postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextlib.contextmanager
    def _models(self, switches: dict):
        """Until it ends, the models are in these contexts of theirs, by name; a value of None changes nothing."""
        with contextlib.ExitStack() as stack:
            for model in (self.unet, self.guide):
                for switch, value in switches.items():
                    if model is None or value is None:
                        continue
                    if not hasattr(model, switch):
                        name, kind = switch.removeprefix("use_"), type(model).__name__
                        raise ValueError(f"`{name}` needs a DFUModel, but got a {kind}: leave it out.")
                    stack.enter_context(getattr(model, switch)(value))
            yield

    @property
    def _periodic(self) -> tuple[bool, bool]:
        """For (rows, columns) whether the images tile the plane."""
        return getattr(self.unet, "periodic", (False, False))

    def _begin(
        self,
        *,
        batch_size,
        class_labels,
        generator,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        max_batch_size,
        guidance_scale,
        nested=True,
        **others,
    ) -> dict:
        """Check what the pipelines of this package have in common; how to run, as `_denoise` takes it."""
        callback_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self.check_inputs(
            batch_size=batch_size,
            generator=generator,
            callback_inputs=callback_inputs,
            max_batch_size=max_batch_size,
            **others,
        )
        class_labels = self._class_labels(class_labels, batch_size)
        self._check_guidance(guidance_scale)
        self._interrupt = False
        return {
            "predict": partial(
                self._predict,
                class_labels=class_labels,
                max_batch_size=max_batch_size or batch_size,
                guidance_scale=guidance_scale,
            ),
            "generator": generator,
            "draw_noise": partial(self._draw_noise, generator=generator, nested=nested),
            "callback": callback_on_step_end,
            "callback_inputs": callback_inputs,
        }

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        generator: torch.Generator | list[torch.Generator] | None,
        draw_noise: Callable[[tuple], torch.Tensor],
        callback: Callable | None,
        callback_inputs: list[str],
        project: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        growth: dict[int, Callable[[torch.Tensor], tuple[torch.Tensor, Callable]]] | None = None,
    ) -> torch.Tensor:
        """Take noisy images through `timesteps`.

        Args:
            predict: the network's output for the scaled images at a timestep.
            generator, draw_noise: whichever of them the scheduler takes its noise from.
            project: replaces each denoised image by another one; called with it and the noisy images.
            growth: by number of a network call, what turns the images into others before it, and the `project` from
                there on.
        """
        noise = {"generator": generator, "noise_sampler": draw_noise}
        accepted = inspect.signature(self.scheduler.step).parameters
        noise = {name: source for name, source in noise.items() if name in accepted}
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                if growth and i in growth:
                    latents, project = growth[i](latents)
                output = predict(self.scheduler.scale_model_input(latents, t), t)
                if project is not None:
                    output = self._projected(output, latents, project)
                latents = self.scheduler.step(output, t, latents, **noise, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, i, t, dict.fromkeys(callback_inputs, latents))
                    latents = (changed or {}).get("latents", latents)
                progress_bar.update()
        return latents

    def _projected(self, output: torch.Tensor, latents: torch.Tensor, project: Callable) -> torch.Tensor:
        """The network output F' whose denoised image c_skip x + c_out F' is the projection of that of `output`."""
        sigma = self.scheduler.sigmas[self.scheduler.step_index].item()
        denoised = self.scheduler.precondition_outputs(latents, output, sigma)
        c_out = self.scheduler.precondition_outputs(0.0, 1.0, sigma)
        return output + (project(denoised, latents) - denoised) / c_out

    def _predict(self, sample, timestep, class_labels, max_batch_size: int, guidance_scale: float) -> torch.Tensor:
        """The network's output (batch, channels, height, width), float32, guided unless the scale is 1."""
        output = self._evaluate(sample.to(self.unet.dtype), timestep, class_labels, max_batch_size).float()
        if guidance_scale == 1:
            return output
        if self.guide is not None:
            sample = sample.to(self.guide.dtype)
            weak = self._evaluate(sample, timestep, class_labels, max_batch_size, self.guide)
        else:
            no_class = torch.full_like(class_labels, self.unet.config.num_class_embeds - 1)
            weak = self._evaluate(sample.to(self.unet.dtype), timestep, no_class, max_batch_size)
        return weak.float().lerp(output, guidance_scale)  # at one noise level D is linear in the output

    def _evaluate(self, sample, timestep, class_labels, max_batch_size: int, model=None) -> torch.Tensor:
        """The output of `model`, by default `unet`, for at most `max_batch_size` images at a time."""
        outputs, model = [], self.unet if model is None else model
        for start in range(0, len(sample), max_batch_size):
            part = slice(start, start + max_batch_size)
            labels = None if class_labels is None else class_labels[part]
            outputs.append(model(sample[part], timestep, labels, return_dict=False)[0])
        return torch.cat(outputs)

    # --- Beyond the training size ---

    def _replace_low_frequencies(
        self, size: tuple[int, int], predict: Callable, denoised: torch.Tensor, latents: torch.Tensor
    ):
        """`denoised` with the low frequencies of what the network makes of `latents` on the grid `size`.

        Cut to these frequencies the sample is an image on the small grid with noise that is white there, too, of a
        lower level: by the ratio of the sides, as the image keeps its amplitude.
        """
        scheduler = self.scheduler
        ratio = math.sqrt(math.prod(size) / math.prod(latents.shape[-2:]))
        sigma = scheduler.sigmas[scheduler.step_index].to(latents.device) * ratio
        small = fourier_resample(latents, size)
        output = predict(scheduler.precondition_inputs(small, sigma), scheduler.precondition_noise(sigma))
        layout = scheduler.precondition_outputs(small, output, sigma)
        return denoised + fourier_resample(layout - fourier_resample(denoised, size), denoised.shape[-2:])

    def _cascade(self, small, size, sigma: float, set_timesteps: Callable, grow: Callable) -> tuple:
        """Timesteps of all stages from `small` to `size`, and by number of the first network call of each but the
        first what leads to it: the `growth` of `_denoise`."""
        scheduler, timesteps, growth = self.scheduler, self.scheduler.timesteps, {}
        for stage in growing_sizes(small, size):
            set_timesteps(stage)
            levels = scheduler.sigmas[: len(scheduler.timesteps) : scheduler.order]
            begin = scheduler.order * int((levels / sigma).log().abs().argmin())
            growth[len(timesteps)] = partial(grow, stage, begin)
            timesteps = torch.cat([timesteps, scheduler.timesteps[begin:]])
        set_timesteps(small)
        return timesteps, growth

    def _start_stage(
        self, set_timesteps, draw_noise, hold: float, size: tuple, begin: int, images: torch.Tensor
    ) -> tuple:
        """Enlarge `images` and give them the noise of network call `begin`, where the scheduler now starts.

        Returns the noisy images, and what holds the low frequencies of the denoised ones at those of `images`.
        """
        set_timesteps(size)
        self.scheduler.set_begin_index(begin)
        large = resize_bicubic(images, size, self._periodic)
        held = tuple(max(1, round(hold * side)) for side in images.shape[-2:])

        def project(denoised, latents):
            return denoised + fourier_resample(fourier_resample(large - denoised, held), size)

        noisy = self.scheduler.add_noise(large, draw_noise(large.shape), self.scheduler.timesteps[begin : begin + 1])
        return noisy, project if hold > 0 else None

    def _set_timesteps(self, steps: int, shape: tuple[int, ...], noise_shift: float) -> None:
        """The schedule for images of `shape` (..., height, width)."""
        scale = {}
        if noise_shift:
            scale["noise_scale"] = self._relative_side(shape[-2:], "noise_shift") ** noise_shift
        self.scheduler.set_timesteps(steps, device=self._execution_device, **scale)
        if hasattr(self.scheduler, "set_begin_index"):  # spares a search for the first timestep, a wait for the device
            self.scheduler.set_begin_index(0)

    def _relative_side(self, size: tuple[int, int], argument: str) -> float:
        """Of a square of as many pixels as `size`, over that of the model's `sample_size`, which `argument` needs."""
        return math.sqrt(math.prod(size) / math.prod(self._sample_size(argument)))

    def _small_size(self, height: int, width: int, argument: str = "strategy") -> tuple[int, int]:
        """The size shrunk, in its own shape, to fit into the model's `sample_size`, which `argument` needs."""
        limits = self._sample_size(argument)
        scale = min(1, limits[0] / height, limits[1] / width)
        return max(1, round(scale * height)), max(1, round(scale * width))

    def _sample_size(self, argument: str) -> tuple[int, int]:
        """That of the model's config, which `argument` needs."""
        size = self._size(None, None)
        if None in size:
            raise ValueError(f"`{argument}` needs a model with a `sample_size` in its config, but this one has none.")
        return size

    def _draw_noise(self, shape, generator, nested: bool) -> torch.Tensor:
        draw = nested_noise if nested else randn_tensor
        return draw(tuple(shape), generator=generator, device=self._execution_device, dtype=torch.float32)

    def _postprocess(self, sample: torch.Tensor, output_type: str, do_denormalize: bool = True):
        """Images of a sample, which is in [-1, 1], or in [0, 1] already if not `do_denormalize`."""
        do_denormalize = [do_denormalize] * len(sample)
        if output_type == "pil" and sample.shape[1] == 1:
            # By way of RGB: diffusers squeezes grey images, and a side of one pixel would be lost with the channel.
            images = self.image_processor.postprocess(sample.expand(-1, 3, -1, -1), "pil", do_denormalize)
            return [image.getchannel(0) for image in images]
        return self.image_processor.postprocess(sample, output_type, do_denormalize)

    # --- Inputs ---

    def _size(self, height, width) -> tuple[int, int]:
        """Height and width, each from the model's `sample_size` if it is None."""
        default = getattr(self.unet.config, "sample_size", None)
        default = default if isinstance(default, (tuple, list)) else (default, default)
        return tuple(given if given is not None else fallback for given, fallback in zip((height, width), default))

    def check_inputs(
        self,
        batch_size,
        height,
        width,
        num_inference_steps,
        generator,
        latents,
        output_type,
        callback_inputs,
        max_batch_size,
    ) -> None:
        """Raise a ValueError or TypeError that names the argument, what was given and what is allowed."""
        counts = {
            "batch_size": batch_size,
            "height": height,
            "width": width,
            "num_inference_steps": num_inference_steps,
        }
        counts |= {} if max_batch_size is None else {"max_batch_size": max_batch_size}
        for name, value in counts.items():
            _check_count(name, value)

        channels, out_channels = self.unet.config.in_channels, self.unet.config.out_channels
        if channels != out_channels:
            raise ValueError(
                f"The model must make as many channels as it takes, but it has `in_channels` {channels} and "
                f"`out_channels` {out_channels}: load another one."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but got {output_type!r}.")
        if output_type == "pil" and channels not in (1, 3, 4):
            raise ValueError(
                f"`output_type='pil'` needs 1, 3 or 4 channels, but this model makes {channels}: use 'np' or 'pt'."
            )

        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
            raise TypeError(
                f"`generator` must be a torch.Generator or a list of one per image, but got {generator!r}."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` must be one generator, or a list with one for each of the {batch_size} images "
                f"(`batch_size`), but got a list of {len(generator)}."
            )

        if latents is not None and not (torch.is_tensor(latents) and latents.is_floating_point()):
            got = latents.dtype if torch.is_tensor(latents) else type(latents).__name__
            raise TypeError(f"`latents` must be a floating point tensor of unit normal noise, but got {got}.")
        expected = (batch_size, channels, height, width)
        if latents is not None and latents.shape != expected:
            raise ValueError(
                f"`latents` must have shape (batch_size, channels, height, width) = {expected}, but got "
                f"{tuple(latents.shape)}: pass the matching `batch_size`, `height` and `width`."
            )

        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, but got {unknown}."
            )

    def _check_strategy(self, strategy, cascade_sigma, cascade_hold, noise_shift, spectral_gain) -> None:
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, but got {strategy!r}.")
        if strategy != "direct" and not hasattr(self.scheduler, "precondition_outputs"):
            raise ValueError(
                f"`strategy={strategy!r}` needs a scheduler that knows EDM's noise levels, but "
                f"{type(self.scheduler).__name__} does not: use `EDMHeunScheduler`, `EDMEulerScheduler` or "
                "`EDMDPMSolverMultistepScheduler`, or the strategy 'direct'."
            )
        _check_positive("cascade_sigma", cascade_sigma)
        if not _is_number(cascade_hold):
            raise TypeError(f"`cascade_hold` must be a number in [0, 1], but got {cascade_hold!r}.")
        if not 0 <= cascade_hold <= 1:
            raise ValueError(f"`cascade_hold` must be a number in [0, 1], but got {cascade_hold!r}.")
        if not _is_number(noise_shift) or not math.isfinite(noise_shift):
            raise TypeError(f"`noise_shift` must be a finite number, 0 for no shift, but got {noise_shift!r}.")
        if not _is_number(spectral_gain):
            raise TypeError(f"`spectral_gain` must be a number, 0 for no gain, but got {spectral_gain!r}.")
        if not -8 <= spectral_gain <= 8:
            raise ValueError(f"`spectral_gain` must lie in [-8, 8], 0 for no gain, but got {spectral_gain!r}.")
        if spectral_gain and strategy != "direct":
            raise ValueError(
                f"`spectral_gain` is for strategy='direct', but got {strategy!r}, which also samples at small sizes."
            )
        if noise_shift and "noise_scale" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(
                f"`noise_shift` {noise_shift} needs `EDMHeunScheduler`, but got {type(self.scheduler).__name__}: "
                "change the scheduler, or leave `noise_shift` at 0."
            )

    def _check_guidance(self, guidance_scale) -> None:
        _check_positive("guidance_scale", guidance_scale)
        if guidance_scale != 1 and self.guide is None and getattr(self.unet.config, "num_class_embeds", None) is None:
            raise ValueError(
                f"`guidance_scale` {guidance_scale} needs a class-conditional model, or a weaker one beside this: "
                "load the pipeline with `guide=`, or leave `guidance_scale` at 1."
            )
        if guidance_scale != 1 and self.guide is not None:
            names = ("in_channels", "out_channels", "num_class_embeds")
            own, weak = ([getattr(each.config, name, None) or 0 for name in names] for each in (self.unet, self.guide))
            if own[:2] != weak[:2] or own[2] > weak[2] or (own[2] == 0) != (weak[2] == 0):
                raise ValueError(
                    f"`guide` must take the images and class labels of `unet`, {dict(zip(names, own))}, but it has "
                    f"{dict(zip(names, weak))}: load the pipeline with another, or leave `guidance_scale` at 1."
                )

    def _class_labels(self, class_labels, batch_size: int) -> torch.Tensor | None:
        """Checked labels (batch_size,) on the execution device; None for an unconditional model."""
        classes = getattr(self.unet.config, "num_class_embeds", None)
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
        return labels.to(self._execution_device, torch.long)
