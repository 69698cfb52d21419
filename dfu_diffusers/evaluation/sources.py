# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sources of images: a model, upsampling, real images; and how pixels are resized and kept."""

import inspect
import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..data.portraits import portrait_parameters, render_portraits
from ..data.resolutions import Size, format_resolution
from ..files import digest

HELD_OUT_SERIES = 20_002  # of portraits: neither trained on (--seed) nor validated on (--seed + 10_001)


class EvaluationError(ValueError):
    """Why something cannot be measured, and what to do, in one line."""


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """(n, c, h, w) in [-1, 1] to (n, h, w, c) uint8, clipped to the range."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_floats(pixels: np.ndarray) -> torch.Tensor:
    """The inverse of `to_bytes`, in colour: (n, h, w, 1 or 3) uint8 to (n, 3, h, w) float32 in [-1, 1]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return images.expand(-1, 3, -1, -1).contiguous()


def fourier_resize(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Resample (n, c, h, w) by zero-padding or cutting its spectrum: the band-limited function through its pixels,
    evaluated at the new pixel centres.

    Pixel j of N is the cell around (j + 1/2)/N of a periodic function, as everywhere in this package.

    >>> wave = torch.cos(2 * torch.pi * (torch.arange(8) + 0.5) / 8).expand(1, 1, 8, 8)
    >>> expected = torch.cos(2 * torch.pi * (torch.arange(12) + 0.5) / 12).expand(1, 1, 12, 12)
    >>> torch.allclose(fourier_resize(wave, (12, 12)), expected, atol=1e-6)
    True
    """
    rows, columns = (_fourier_matrix(*sides).to(images) for sides in zip(images.shape[-2:], size))
    return rows @ images @ columns.T


def _fourier_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old): the sum over the modes k of both grids of exp(2 pi i k (y - x)) / old, in float64."""
    x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (old, new))
    k = torch.arange(1, (min(old, new) - 1) // 2 + 1, dtype=torch.float64)
    matrix = 1 + 2 * torch.cos(2 * torch.pi * k * (y[:, None] - x)[..., None]).sum(-1)
    if old % 2 == 0 and new >= old:  # the wave at the Nyquist frequency is a sine at the pixel centres
        matrix += torch.sin(torch.pi * old * y)[:, None] * torch.sin(torch.pi * old * x)
    return matrix / old


def lanczos_resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's Lanczos filter, antialiased where it shrinks: (n, h, w, c) uint8 at another size."""
    images = [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in pixels]
    resized = [np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)) for image in images]
    return np.stack(resized).reshape(len(pixels), *size, -1)


class ModelSource:
    """Images of a pipeline: number i from seed i, noise drawn on the CPU, classes in turn.

    Args:
        pipe: a `DFUPipeline`, its scheduler included.
        classes: those of a class-conditional model to draw; by default all of them.
        options: more arguments of the pipeline, such as `strategy` or `num_inference_steps`.
    """

    def __init__(self, pipe, classes: Sequence[int] | None = None, **options):
        defaults = inspect.signature(type(pipe).__call__).parameters
        steps = ("num_inference_steps", "octave_steps") if pipe.refiner else ("num_inference_steps",)
        self.pipe, self.options = pipe, {name: defaults[name].default for name in steps} | options
        every = list(range(pipe.unet.config.num_class_embeds or 0))
        self.classes = classes or every
        self.chosen = {} if self.classes == every else {"classes": self.classes}
        models = {"": pipe.unet, " guided by ": pipe.guide, " refined by ": pipe.refiner}
        self.digest = "".join(name + weights_digest(model) for name, model in models.items() if model is not None)

    def key(self, size: Size) -> dict:
        config = {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")}
        name = f"{type(self.pipe.scheduler).__name__} {digest(json.dumps(config, sort_keys=True).encode())}"
        return {"weights": self.digest, "scheduler": name, **self.chosen, **self.options}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        """(n, h, w, c) uint8."""
        height, width = size
        classes = self.classes
        images = self.pipe(
            batch_size=len(indices), height=height, width=width,
            class_labels=[classes[seed % len(classes)] for seed in indices] if classes else None,
            generator=[torch.Generator().manual_seed(seed) for seed in indices], output_type="latent", **self.options,
        ).images  # fmt: skip
        if not images.isfinite().all():
            raise EvaluationError(f"The model gives pixels that are not finite at {format_resolution(size)} px.")
        return to_bytes(images)


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's configuration and weights, independent of its files and their place."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    parts = [json.dumps(config, sort_keys=True).encode()]
    for name, tensor in sorted(model.state_dict().items()):
        parts += [name.encode(), tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


class Resized:
    """The images of a collection resized by "lanczos" or "fourier": the baseline of upsampling."""

    def __init__(self, samples, method: str):
        self.samples, self.method = samples, method

    def key(self, size: Size) -> dict:
        return {**self.samples.source.key(size), "from": format_resolution(self.samples.size), "method": self.method}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        pixels = self.samples.pixels(indices)
        if self.method == "lanczos":
            return lanczos_resize(pixels, size)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double().div(127.5).sub(1)
        return to_bytes(fourier_resize(images, size))


class Portraits:
    """Procedural portraits that training and validation with the usual seeds never use, rendered at each size."""

    length = 2**31

    def key(self, size: Size) -> dict:
        return {"data": f"portraits-{HELD_OUT_SERIES}", "filter": "rendered"}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        return to_bytes(render_portraits(portrait_parameters(indices, HELD_OUT_SERIES), *size))


class Pictures:
    """Images of an `ImageDataset` in random order, centre-cropped and shrunk by antialiased Lanczos."""

    def __init__(self, dataset, seed: int = 0):
        self.dataset, self.length = dataset, len(dataset)
        self.order = np.random.default_rng((seed, 4)).permutation(self.length)

    def key(self, size: Size) -> dict:
        return {"data": f"{self.dataset.fingerprint}, {self.length} images", "filter": "lanczos"}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        items = self.dataset.__getitems__([(int(self.order[i]), size) for i in indices])
        return to_bytes(torch.stack([item["image"] for item in items]))
