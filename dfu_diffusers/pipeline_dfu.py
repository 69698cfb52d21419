# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Image generation at any height and width with a DFU model (arXiv 2401.06144) and an EDM sampler.

This file imports torch, diffusers and the standard library only, so that it can travel inside a Hub repository.
"""

import json
import operator
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REMOTE = "diffusers_modules"  # where diffusers puts code that came with a repository


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
    _self_contained = False

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DFUPipeline":
        """A DFUPipeline that shares the components of another pipeline; `kwargs` replace some, as in diffusers."""
        # diffusers hands a model on only if the type hint names its very class, and ours admits any denoiser.
        if hasattr(pipeline, "unet"):
            kwargs.setdefault("unet", pipeline.unet)
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
        self._self_contained = self_contained
        super().save_pretrained(save_directory, *args, **kwargs)

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
                may return a dict with new `latents`, and may set `pipe._interrupt = True` to stop there.
            callback_on_step_end_tensor_inputs: what the callback sees, of `["latents"]`.
            max_batch_size: the network sees at most so many images at once, to bound memory. The images stay the same.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError, TypeError: an argument that does not fit; the message says what would.
        """
        # 1. Inputs
        height, width = self._size(height, width)
        callback_inputs = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self.check_inputs(
            batch_size,
            height,
            width,
            num_inference_steps,
            generator,
            latents,
            output_type,
            callback_inputs,
            max_batch_size,
        )
        class_labels = self._class_labels(class_labels, batch_size)
        device = self._execution_device
        self._interrupt = False

        # 2. Noise, in float32 throughout: at sigma 80 half precision would swallow the image
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            shape = (batch_size, self.unet.config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

        # 3. Denoise
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self._interrupt:
                    break
                model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
                output = self._evaluate(model_input, t, class_labels, max_batch_size or batch_size).float()
                latents = self.scheduler.step(output, t, latents, generator=generator, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, i, t, dict.fromkeys(callback_inputs, latents))
                    latents = (changed or {}).get("latents", latents)
                progress_bar.update()

        # 4. Images
        images = self._postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _evaluate(self, sample, timestep, class_labels, max_batch_size: int) -> torch.Tensor:
        """The network's output (batch, channels, height, width), at most `max_batch_size` images at a time."""
        outputs = []
        for start in range(0, len(sample), max_batch_size):
            part = slice(start, start + max_batch_size)
            labels = None if class_labels is None else class_labels[part]
            outputs.append(self.unet(sample[part], timestep, labels, return_dict=False)[0])
        return torch.cat(outputs)

    def _postprocess(self, sample: torch.Tensor, output_type: str):
        if output_type == "pil" and sample.shape[1] == 1:
            # By way of RGB: diffusers squeezes grey images, and a side of one pixel would be lost with the channel.
            images = self.image_processor.postprocess(sample.expand(-1, 3, -1, -1), output_type="pil")
            return [image.getchannel(0) for image in images]
        return self.image_processor.postprocess(sample, output_type=output_type)

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


def code_files(folder: str | Path, pipeline_class: type) -> dict[str, str]:
    """What makes a saved pipeline self-contained: the modules of our classes, and a model_index.json that names them.

    Args:
        folder: the pipeline as diffusers saved it.
        pipeline_class: its class.

    Returns:
        The text of each file by its path in the folder.
    """
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    files = {}

    def add(cls: type, place: str = "") -> list[str]:
        source = Path(sys.modules[cls.__module__].__file__)
        files[place + source.name] = source.read_text(encoding="utf-8")
        return [source.stem, cls.__name__]

    packages = (__name__.split(".")[0], REMOTE)
    ours = [
        name for name, value in index.items() if isinstance(value, list) and str(value[0]).split(".")[0] in packages
    ]
    for name in ours:
        library, class_name = index[name]
        index[name] = add(getattr(sys.modules[library], class_name), f"{name}/")
    index["_class_name"] = add(pipeline_class)
    if "unet" in ours:  # AutoModel asks here, not in unet/config.json
        index["auto_map"] = {"AutoModel": ".".join(index["unet"])}
    files["model_index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return files


def _check_count(name: str, value) -> None:
    """Python's and NumPy's integers pass; booleans, although integers to Python and to NumPy before 2.3, do not."""
    try:
        count = None if type(value).__name__ in ("bool", "bool_") else operator.index(value)
    except TypeError:
        count = None
    wrong = f"`{name}` must be an integer of at least 1, but got {value!r}: pass one, or leave it out for the default."
    if count is None:
        raise TypeError(wrong)
    if count < 1:
        raise ValueError(wrong)
