# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Image generation at any height and width with a DFU model (arXiv 2401.06144) and an EDM sampler."""

import contextlib
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from diffusers import ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models.modes import (
    average_pixels,
    beyond,
    from_modes,
    octave_sizes,
    resize_modes,
    share_beyond,
    to_modes,
    unaverage_pixels,
)
from .base import DFUPipelineBase
from .checks import (
    _check_channels,
    _check_coarse_size,
    _check_count,
    _check_generator,
    _check_guide,
    _check_latents,
    _check_output_type,
    _check_positive,
    _check_retired,
    _check_scheduler,
    _periodic_axes,
    _read_class_labels,
)
from .noise import fourier_resample, growing_sizes, nested_noise, resize_bicubic
from .octaves import (
    COARSE_NOISE,
    MAX_PIXELS,
    NestedNoise,
    coefficients_of,
    octave_scheduler,
    refine_in_strips,
    replace_on_grid,
)

STRATEGIES = ("octaves", "direct", "cascade")
CASCADE_SIGMA = 0.25  # the cascade adds noise of this level to enlarged images; the schedule's nearest level is taken
CASCADE_HOLD = 0.25  # share of the small image's frequencies, on each axis, that each cascade stage keeps fixed


@dataclass
class Run:
    """What the steps of one call of a pipeline need to know."""

    batch_size: int
    num_inference_steps: int
    octave_steps: int
    generator: torch.Generator | list[torch.Generator] | None
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # the output of `unet` for a sample at a timestep
    draw_noise: Callable[[tuple], torch.Tensor]  # unit noise of a shape
    callback: Callable | None
    callback_inputs: list[str]
    periodic: tuple[bool, bool]  # (rows, columns) that tile
    tileable: str | None  # the same, as the networks take it
    parts: list[slice]  # parts of the batch, each of which the networks process at once
    calls: int = 0
    bar: object = field(default=None, repr=False)


class DFUPipeline(DFUPipelineBase):
    """Generates images of any height and width >= 1, also beyond the sizes the model was trained on.

    The pipeline sets its models to evaluation mode: call `train()` on a model before you train it further. Several
    pipelines may share a network and run at the same time, if each has its own scheduler.

    Args:
        unet: a `DFUModel`, or another denoiser called as `unet(sample, timestep, class_labels).sample`.
        scheduler: an `EDMHeunScheduler`, `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler`.
        guide: a weaker model of the same images, such as an earlier snapshot of `unet` or a smaller network trained
            for less time. `guidance_scale` then moves away from its errors (autoguidance, arXiv 2406.02507).
        refiner: a `DFURefiner`, which adds detail to the picture that `unet` draws on its own grid (`sample_size`).
            With it one seed is one picture at every size. It has a sampler of its own, see `octave_steps`. If `unet`
            has `coarse_sizes` in its config, it draws on the grid of the nearest aspect ratio.

    Raises:
        ValueError: no unet.

    >>> from dfu_diffusers import DFUModel, EDMHeunScheduler
    >>> unet = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> pipe = DFUPipeline(unet, EDMHeunScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> pipe(height=20, width=31, num_inference_steps=2).images[0].size
    (31, 20)
    """

    model_cpu_offload_seq = "unet->guide->refiner"
    _optional_components = ["guide", "refiner"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        guide: ModelMixin | None = None,
        refiner: ModelMixin | None = None,
    ):
        super().__init__()
        self._check_components(unet, refiner)
        self.register_modules(unet=unet, scheduler=scheduler, guide=guide, refiner=refiner)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._max_pixels = MAX_PIXELS
        self._num_timesteps = 0
        self._guidance_scale = 1.0
        self._interrupt = False

    @staticmethod
    def _check_components(unet, refiner) -> None:
        if unet is None:
            raise ValueError("DFUPipeline needs a unet: pass `unet=DFUModel.from_pretrained(...)`.")

    @property
    def num_timesteps(self) -> int:
        """Network calls of the current or last run."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Of the current or last run. A callback may set `_guidance_scale`; 0 and 1 switch guidance off."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next call of `unet` is guided."""
        return self._guidance_scale not in (0, 1)

    @property
    def interrupt(self) -> bool:
        """Whether a callback stopped the current or last run, by setting `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 18,
        octave_steps: int = 6,
        class_labels: int | list[int] | torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DFUPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006  the name and default of diffusers
        max_batch_size: int | None = None,
        strategy: Literal["octaves", "direct", "cascade"] | None = None,
        tileable: Literal["x", "y", "xy"] | None = None,
        **retired,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        With a refiner one seed is one picture at every size: `unet` draws it on its own grid, `sample_size`, and the
        refiner adds detail, one doubling of the sides after another. Without one, `unet` draws the full size directly
        (the paper's zero-shot sampling), which is good up to the sizes it was trained at.

        Args:
            batch_size: number of images.
            height, width: size in pixels, at least 1 each; by default the `sample_size` of the refiner, or of `unet`.
            num_inference_steps: steps of `unet`; a Heun step takes two network calls, the last step only one.
            octave_steps: network calls of the refiner in each octave; its sampler is always DPM-Solver++(2M). With 1
                the detail is a mean, and looks blurred.
            class_labels: class of each image, or one for all, if the model is class-conditional.
            guidance_scale: weight w in D_weak + w (D - D_weak), a combination of denoised images; 1 switches it off.
                D_weak comes from `guide` if the pipeline has one. Otherwise it is `unet`'s for "no class", the last
                class, as in training with `--label_dropout` (classifier-free guidance, arXiv 2207.12598). Guidance
                doubles the number of network calls of `unet`.
            generator: source of all noise. With a list of one generator per image, each image does not depend on the
                others of the batch. A CPU generator gives the same noise on every device.
            latents: unit normal noise to start from, (batch_size, channels, height, width). With a refiner, height and
                width are at least those of `unet`'s grid. `generator` still draws the noise of the refiner's condition
                and of churn.
            output_type: "pil" (1, 3 or 4 channels), "np" (batch, height, width, channels) or "pt" (batch, channels,
                height, width) in [0, 1], or "latent": the sample itself, neither clamped nor rescaled.
            return_dict: return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": ...})` after each network call;
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there. In an octave
                `latents` is the noisy detail, at the size of the octave.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets: `["latents"]` or `[]`.
            max_batch_size: most images that the networks process at once, to limit memory. The images stay the same.
            strategy: None means "octaves" with a refiner and "direct" without. "cascade" (without a refiner) samples
                within `sample_size`, then enlarges by a factor of at most 2, adds noise and denoises, again and again
                (as in DemoFusion, arXiv 2311.16973). `docs/zero_shot.md` has figures.
            tileable: axes along which the images tile the plane: "x" (left and right edges meet), "y" or "xy". None
                takes the setting in the models' configurations.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        _check_retired(retired)
        height, width = self._size(height, width)
        strategy = self._strategy(strategy)
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
        _check_latents(latents, (run.batch_size, *self._noise_size((height, width), strategy)))

        # 2. Sample, in float32 throughout: at sigma 80 half precision would swallow the image
        sample_at = {"octaves": self._sample_octaves, "direct": self._sample_direct, "cascade": self._sample_cascade}
        sample = sample_at[strategy](run, (height, width), latents)

        # 3. Images
        images = self._postprocess(sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- Strategies ---

    def _sample_direct(self, run: Run, size: tuple[int, int], latents: torch.Tensor | None) -> torch.Tensor:
        """The sample (batch, channels, height, width) of `unet` at the full size."""
        scheduler = self._scheduler_of(run.num_inference_steps)
        noise = run.draw_noise((run.batch_size, self._channels, *size)) if latents is None else latents
        noise = noise.to(self._execution_device, torch.float32)
        with self._progress(run, len(scheduler.timesteps)):
            return self._denoise(run, noise * scheduler.init_noise_sigma, scheduler, run.predict)

    def _sample_octaves(self, run: Run, size, latents: torch.Tensor | None, replace=None) -> torch.Tensor:
        """The sample of `unet` on its grid, with the detail that the refiner adds.

        `replace` maps denoised images of the full size, (batch, channels, height, width), to others, see
        `replace_on_grid` for those on coarser grids.
        """
        base, device = self._coarse_size(size), self._execution_device
        noise = NestedNoise(run.batch_size, self._channels, run.generator, run.periodic, device)
        if latents is None:
            noise.normals = noise.coefficients(self._noise_size(size, "octaves")[1:])
        else:
            noise.normals = coefficients_of(latents.to(device, torch.float32), run.periodic)
        scheduler = self._scheduler_of(run.num_inference_steps)
        octaves, project, project_start = octave_sizes(size, base), None, None
        if replace is not None:
            project = partial(replace_on_grid, replace=replace, size=size, periodic=run.periodic)
            project_start = partial(project, averaged=True)
        with self._progress(run, len(scheduler.timesteps) + self._refiner_calls(run, octaves)):
            start = noise.white(noise.normals[..., : base[0], : base[1]]) * scheduler.init_noise_sigma
            run.draw_noise = lambda shape: noise.white(noise.coefficients(shape[-2:]))
            picture = self._denoise(run, start, scheduler, run.predict, project_start)
            picture = unaverage_pixels(picture, run.periodic)
            picture = self._refine(run, picture, octaves, noise, project=project)
        return average_pixels(picture, run.periodic)

    def _sample_cascade(self, run: Run, size: tuple[int, int], latents: torch.Tensor | None) -> torch.Tensor:
        """The sample of `unet` at a small size, enlarged, noised and denoised again and again."""
        small = self._small_size(*size)
        if latents is None:
            latents = run.draw_noise((run.batch_size, self._channels, *size))
        # Begins with the low modes of the same noise.
        latents = fourier_resample(latents.to(self._execution_device, torch.float32), small)
        latents = latents * math.sqrt(math.prod(size) / math.prod(small))
        scheduler = self._scheduler_of(run.num_inference_steps)
        levels = scheduler.sigmas[: len(scheduler.timesteps) : scheduler.order]
        begin = scheduler.order * int((levels / CASCADE_SIGMA).log().abs().argmin())
        stages, calls = growing_sizes(small, size), len(scheduler.timesteps)
        with self._progress(run, calls + len(stages) * (calls - begin)):
            sample = self._denoise(run, latents * scheduler.init_noise_sigma, scheduler, run.predict)
            for stage in stages:
                sample = self._enlarge(run, sample, stage, begin)
        return sample

    def _enlarge(self, run: Run, images: torch.Tensor, size: tuple[int, int], begin: int) -> torch.Tensor:
        """The images enlarged to `size`, noised and denoised with their lowest frequencies kept fixed."""
        large = resize_bicubic(images, size, run.periodic)
        held = tuple(max(1, round(CASCADE_HOLD * side)) for side in images.shape[-2:])

        def hold(denoised):
            return denoised + fourier_resample(fourier_resample(large - denoised, held), size)

        return self._noise_and_denoise(run, large, begin, hold)

    def _noise_and_denoise(
        self, run: Run, images: torch.Tensor, begin: int, project: Callable | None = None, noise=None
    ) -> torch.Tensor:
        """The images with noise of the level of network call `begin`, denoised by `unet` from there. `noise` is unit
        normal; None to draw it."""
        scheduler = self._scheduler_of(run.num_inference_steps)
        scheduler.set_begin_index(begin)
        noise = run.draw_noise(tuple(images.shape)) if noise is None else noise
        noisy = scheduler.add_noise(images, noise.to(images), scheduler.timesteps[begin : begin + 1])
        return self._denoise(run, noisy, scheduler, run.predict, project, begin)

    def _sample_from_middle(self, run: Run, images, noise, strength: float, project: Callable | None) -> torch.Tensor:
        """The images noised and denoised by the last share `strength` of the steps of `unet`, at least one."""
        steps, order = run.num_inference_steps, self.scheduler.order  # Heun has two network calls to a step
        begin = order * (steps - max(1, round(strength * steps)))
        with self._progress(run, len(self._scheduler_of(steps).timesteps) - begin):
            return self._noise_and_denoise(run, images, begin, project, noise)

    def _refine(
        self,
        run: Run,
        picture: torch.Tensor,
        octaves: list[tuple[int, int]],
        noise: NestedNoise,
        noise_level: float = 0.0,
        project: Callable | None = None,
    ) -> torch.Tensor:
        """Add the octaves of detail to a picture, whose own grid is the first of `octaves`.

        Args:
            picture: (batch, channels, height, width), values at pixel centres.
            noise: source of all noise.
            noise_level: standard deviation of the noise that the picture already has.
            project: replaces each estimate of a picture, (batch, channels, height, width), by another one.
        """
        periodic, told = run.periodic, math.hypot(COARSE_NOISE, noise_level)
        for coarse, size in zip(octaves, octaves[1:]):
            if self._interrupt:  # the unfinished picture, on the requested grid
                return resize_modes(picture, octaves[-1], periodic)
            if project is not None:
                picture = project(picture)
            modes = to_modes(picture, size, periodic)
            if share_beyond(size, coarse, periodic) == 0:
                picture = from_modes(modes, size, periodic)
                continue
            unit = to_modes(noise.white(noise.coefficients(coarse)), size, periodic)
            condition = from_modes(unit.mul_(COARSE_NOISE).add_(modes), size, periodic)
            del unit
            draw_noise = partial(noise.beyond, size, coarse, last=size == octaves[-1])
            picture = self._sample_octave(run, modes, coarse, condition, told, draw_noise, project)
        return picture

    def _sample_octave(self, run, modes, coarse, condition, told, draw_noise, project) -> torch.Tensor:
        """The picture that has `modes`, those of the grid `coarse`, and detail beyond them. `condition` is the picture
        without this detail, with noise of deviation `told`. `project` as in `_refine`."""
        size, periodic = condition.shape[-2:], run.periodic
        scheduler = octave_scheduler(self.scheduler, self.refiner, size, run.octave_steps, condition.device)

        def predict(sample, timestep):  # the sample has no coarse modes, so the denoised detail must have none
            options = dict(coarse_noise=told, tileable=run.tileable, max_pixels=self._max_pixels)
            output = [
                refine_in_strips(self.refiner, sample[part], timestep, condition[part], **options)
                for part in run.parts
            ]
            return beyond(output[0] if len(output) == 1 else torch.cat(output), coarse, periodic)

        def complete(detail):
            return from_modes(modes, size, periodic).add_(detail)

        def replace(detail):
            return beyond(project(complete(detail)), coarse, periodic)

        detail = self._denoise(  # which alone holds the noise: tensors as large as the picture are given up early
            run, draw_noise().mul_(scheduler.init_noise_sigma), scheduler, predict, project and replace,
            network="refiner",
        )  # fmt: skip
        return complete(beyond(detail, coarse, periodic))

    def enable_tiling(self, max_pixels: int = MAX_PIXELS) -> None:
        """Run the refiner on strips of at most about `max_pixels` pixels, to limit memory; the picture stays the same.
        By default this happens for pictures of more than 2^20 pixels."""
        self._max_pixels = _check_count("max_pixels", max_pixels)

    def disable_tiling(self) -> None:
        """Run the refiner on whole pictures of any size."""
        self._max_pixels = sys.maxsize

    # --- Steps ---

    def _begin(
        self,
        *,
        batch_size,
        num_inference_steps,
        octave_steps,
        class_labels,
        guidance_scale,
        generator,
        output_type,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        max_batch_size,
        tileable=None,
    ) -> Run:
        """Check the arguments that all pipelines of this package share, and collect them in a `Run`."""
        batch_size = _check_count("batch_size", batch_size)
        num_inference_steps = _check_count("num_inference_steps", num_inference_steps)
        octave_steps = _check_count("octave_steps", octave_steps)
        step = batch_size if max_batch_size is None else _check_count("max_batch_size", max_batch_size)
        callback_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs) or []
        self.check_inputs(batch_size, generator, output_type, callback_inputs)
        class_labels = self._class_labels(class_labels, batch_size)
        guidance_scale = self._check_guidance(guidance_scale)
        periodic = _periodic_axes(tileable, [self.unet, self.guide, self.refiner])
        tileable = "".join(axis for axis, joined in zip("xy", reversed(periodic)) if joined) or None
        self._guidance_scale, self._interrupt = guidance_scale, False
        return Run(
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            octave_steps=octave_steps,
            generator=generator,
            predict=partial(self._predict, class_labels=class_labels, step=step, tileable=tileable),
            draw_noise=partial(nested_noise, generator=generator, device=self._execution_device),
            callback=callback_on_step_end,
            callback_inputs=callback_inputs,
            periodic=periodic,
            tileable=tileable,
            parts=[slice(start, start + step) for start in range(0, batch_size, step)],
        )

    @contextlib.contextmanager
    def _progress(self, run: Run, calls: int):
        """One progress bar for all network calls of a run."""
        self._num_timesteps, run.calls = calls, 0
        with self.progress_bar(total=calls) as run.bar:
            yield

    def _check_finite(self, sums: list[torch.Tensor], stage: str, scheduler, begin: int) -> None:
        """Raise a ValueError that names the first step whose output was not finite. This is the only place where a run
        waits for an accelerator: once for `unet`, and once per octave.

        Args:
            sums: sums of the outputs of all network calls from `begin` on.
            stage: name of the network and its size, for the message.
        """
        finite = torch.stack(sums).isfinite().tolist() if sums else []
        if not all(finite):
            step = (begin + finite.index(False)) // scheduler.order + 1  # Heun has two calls to a step
            raise ValueError(
                f"{stage} gave values that are not finite in step {step} of {scheduler.num_inference_steps}: its "
                "weights are damaged, or float16 overflows: load the model again, in bfloat16 or float32."
            )

    def _refiner_calls(self, run: Run, octaves: list[tuple[int, int]]) -> int:
        grown = sum(share_beyond(size, coarse, run.periodic) > 0 for coarse, size in zip(octaves, octaves[1:]))
        return grown * run.octave_steps

    def _scheduler_of(self, steps: int):
        """The pipeline's scheduler, set to the start of a run of `steps`."""
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        if hasattr(self.scheduler, "set_begin_index"):  # saves a search, which waits for the device
            self.scheduler.set_begin_index(0)
        return self.scheduler

    def _denoise(
        self,
        run: Run,
        latents: torch.Tensor,
        scheduler,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        project: Callable[[torch.Tensor], torch.Tensor] | None = None,
        begin: int = 0,
        network: str = "unet",
    ) -> torch.Tensor:
        """Take noisy images through the timesteps of `scheduler`, from network call `begin` on.

        Args:
            predict: the network's output for the scaled images at a timestep.
            project: replaces each denoised image by another one.
            network: name of the component that predicts, for messages.
        """
        sums = []
        noise = {"generator": run.generator, "noise_sampler": run.draw_noise}
        accepted = inspect.signature(scheduler.step).parameters
        noise = {name: source for name, source in noise.items() if name in accepted}
        for t in scheduler.timesteps[begin:]:
            if self._interrupt:
                break
            output = [predict(scheduler.scale_model_input(latents, t), t)]
            sums.append(output[0].sum())
            if project is not None:
                output = [_projected(scheduler, output.pop(), latents, project)]
            with torch.device(latents.device):  # on which diffusers' schedulers make their numbers
                # The scheduler alone holds the output, which is as large as the picture, and gives it up early.
                latents = scheduler.step(output.pop(), t, latents, **noise, return_dict=False)[0]
            if run.callback is not None:
                latents = self._call_back(run, t, latents)
            run.calls += 1
            run.bar.update()
        height, width = latents.shape[-2:]
        self._check_finite(sums, f"`{network}` at {height}x{width}", scheduler, begin)
        return latents

    def _call_back(self, run: Run, timestep, latents: torch.Tensor) -> torch.Tensor:
        """The latents that the user's callback leaves."""
        changed = run.callback(self, run.calls, timestep, dict.fromkeys(run.callback_inputs, latents))
        if self.do_classifier_free_guidance:  # it may have been switched on
            self._check_guidance(self._guidance_scale)
        if changed is None:
            return latents
        if not isinstance(changed, dict):
            raise TypeError(f"`callback_on_step_end` must return a dict or None, but returned {changed!r}.")
        return changed.get("latents", latents)

    def _predict(self, sample, timestep, class_labels, step: int, tileable) -> torch.Tensor:
        """The network's output (batch, channels, height, width), float32, with guidance if it is on."""
        evaluate = partial(self._evaluate, timestep=timestep, step=step, tileable=tileable)
        output = evaluate(self.unet, sample, class_labels=class_labels)
        if not self.do_classifier_free_guidance:
            return output
        if self.guide is not None:
            weak = evaluate(self.guide, sample, class_labels=class_labels)
        else:
            no_class = torch.full_like(class_labels, self.unet.config.num_class_embeds - 1)
            weak = evaluate(self.unet, sample, class_labels=no_class)
        return weak.lerp(output, self._guidance_scale)  # at one noise level D is linear in the output

    def _evaluate(self, model, sample, timestep, class_labels, step: int, tileable) -> torch.Tensor:
        """The output of `model`, float32, for at most `step` images at a time."""
        sample, outputs = sample.to(model.dtype), []
        options = {} if tileable is None else {"tileable": tileable}
        for start in range(0, len(sample), step):
            part = slice(start, start + step)
            labels = None if class_labels is None else class_labels[part]
            outputs.append(model(sample[part], timestep, labels, return_dict=False, **options)[0])
        return torch.cat(outputs).float()

    def _postprocess(self, sample: torch.Tensor, output_type: str, do_denormalize: bool = True):
        """Images of a sample, which is in [-1, 1], or in [0, 1] already if not `do_denormalize`."""
        do_denormalize = [do_denormalize] * len(sample)
        if output_type == "pil" and sample.shape[1] == 1:
            # Through RGB: diffusers squeezes grey images, which would also drop a side of one pixel.
            images = self.image_processor.postprocess(sample.expand(-1, 3, -1, -1), "pil", do_denormalize)
            return [image.getchannel(0) for image in images]
        return self.image_processor.postprocess(sample, output_type, do_denormalize)

    # --- Inputs ---

    @property
    def _channels(self) -> int:
        return self.unet.config.in_channels

    def _config_of_unet(self, name: str):
        """A value of its configuration, or None where it has none."""
        return None if self.unet is None else getattr(self.unet.config, name, None)

    def _size(self, height, width) -> tuple[int, int]:
        """Height and width, each from the `sample_size` of the refiner or of `unet` if it is None."""
        size = self._config_of_unet("sample_size") if self.refiner is None else self.refiner.config.sample_size
        given = {"height": height, "width": width}
        return tuple(
            _check_count(name, fallback if side is None else side)
            for (name, side), fallback in zip(given.items(), _pair(size))
        )

    def _sample_size(self, purpose: str) -> tuple[int, int]:
        """The `sample_size` of `unet` as (height, width), which `purpose` needs."""
        size = _pair(self._config_of_unet("sample_size"))
        if None in size:
            raise ValueError(f"{purpose} needs a model with a `sample_size` in its config, but this one has none.")
        return size

    @property
    def _coarse_sizes(self) -> list[tuple[int, int]]:
        """Grids on which `unet` draws the start of octaves."""
        several = self._config_of_unet("coarse_sizes")
        return list(map(tuple, several)) if several else [self._sample_size("strategy='octaves'")]

    def _coarse_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The one for pictures of this size: of the nearest aspect ratio, and the largest of these."""

        def mismatch(grid):
            return abs(math.log(grid[0] * size[1] / (grid[1] * size[0]))), -math.prod(grid)

        return min(self._coarse_sizes, key=mismatch)

    def _small_size(self, height: int, width: int) -> tuple[int, int]:
        """The size shrunk, in its own shape, to fit into the model's `sample_size`."""
        limits = self._sample_size("strategy='cascade'")
        scale = min(1, limits[0] / height, limits[1] / width)
        return max(1, round(scale * height)), max(1, round(scale * width))

    def _noise_size(self, size: tuple[int, int], strategy: str) -> tuple[int, int, int]:
        """Channels, height and width of the noise from which a strategy starts."""
        if strategy == "octaves":  # `unet` always draws its whole grid
            size = tuple(map(max, size, self._coarse_size(size)))
        return self._channels, *size

    def _strategy(self, strategy: str | None) -> str:
        if strategy is None:
            strategy = "direct" if self.refiner is None else "octaves"
        if strategy not in STRATEGIES:
            raise ValueError(f"`strategy` must be one of {STRATEGIES}, or None for the best, but got {strategy!r}.")
        if strategy == "octaves":
            if self.refiner is None:
                raise ValueError(
                    "strategy='octaves' needs a refiner: load the pipeline with `refiner=DFURefiner.from_pretrained"
                    "(...)`."
                )
            for size in self._coarse_sizes:
                _check_coarse_size(self.refiner, *size)
        return strategy

    def check_inputs(self, batch_size: int, generator, output_type, callback_inputs) -> None:
        """Raise a ValueError or TypeError that names the argument, the value given and the values allowed."""
        _check_scheduler(self.scheduler)
        _check_channels(self._channels, self._config_of_unet("out_channels"), self.refiner)
        _check_output_type(output_type, self._channels)
        _check_generator(generator, batch_size)
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, but got {unknown}."
            )

    def _check_guidance(self, guidance_scale) -> float:
        guidance_scale = _check_positive("guidance_scale", guidance_scale)
        if guidance_scale == 1:
            return guidance_scale
        if self.guide is not None:
            _check_guide(self.unet, self.guide)
        elif self._config_of_unet("num_class_embeds") is None:
            raise ValueError(
                f"`guidance_scale` {guidance_scale} needs a class-conditional model, or a weaker one beside this: "
                "load the pipeline with `guide=`, or leave `guidance_scale` at 1."
            )
        return guidance_scale

    def _class_labels(self, class_labels, batch_size: int) -> torch.Tensor | None:
        """Checked labels (batch_size,) on the execution device; None for an unconditional model."""
        labels = _read_class_labels(class_labels, self._config_of_unet("num_class_embeds"), batch_size)
        return None if labels is None else labels.to(self._execution_device)


def _pair(size) -> tuple:
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


def _projected(scheduler, output: torch.Tensor, latents: torch.Tensor, project: Callable) -> torch.Tensor:
    """The network output F' whose denoised image c_skip x + c_out F' is the projection of that of `output`."""
    sigma = scheduler.sigmas[scheduler.step_index].item()
    denoised = scheduler.precondition_outputs(latents, output, sigma)
    c_out = scheduler.precondition_outputs(0.0, 1.0, sigma)
    return output + (project(denoised) - denoised) / c_out
