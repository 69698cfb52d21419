# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The refiner: a network that draws the next octave of detail of a picture, with the same weights for every octave."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..checks import check_tileable
from .loading import SafetensorsMixin
from .lora import LoRAMixin

NOISE_CHANNELS = 64  # sinusoids that encode a noise level
EMBEDDING_CHANNELS = 256
PICTURE_STD = 0.5  # standard deviation of the coarse picture


@dataclass
class DFURefinerOutput(BaseOutput):
    """sample: (batch, channels, height, width), the network output F of EDM."""

    sample: torch.Tensor


class PixelNorm(nn.Module):
    """Divides the channels of each pixel by their root mean square. Unlike a group norm it does not depend on the size
    of the picture."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps).to(x.dtype)
        return x * (scale * self.weight.view(-1, 1, 1).to(x.dtype))


class RefinerBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the noise levels scale and shift its features."""

    def __init__(self, channels: int, embedding_channels: int):
        super().__init__()
        self.norm1, self.norm2 = PixelNorm(channels), PixelNorm(channels)
        self.conv1 = _convolution(channels, channels)
        self.conv2 = _convolution(channels, channels, scale=1e-5)
        self.embedding = _init(nn.Linear(embedding_channels, 2 * channels), scale=1e-5)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return x + self.conv2(F.silu(h))


class DFURefiner(SafetensorsMixin, ModelMixin, ConfigMixin, LoRAMixin):
    """Takes a coarse picture on a larger grid and the noisy detail to add to it; returns the network output F of EDM
    (arXiv 2206.00364) for the detail.

    Its task is local and the same in every octave: what do the next finer modes look like here? It has no attention,
    no group norm and no position, because these would reveal the size of the picture. So it works at sizes that it was
    not trained at. An output pixel depends on the input within `reach` pixels.

    Args:
        in_channels: channels of the picture.
        hidden_channels: channels of the features, on a grid of half the size.
        num_layers: residual blocks of two 3x3 convolutions.
        detail_std: standard deviation of the coefficients of detail of a picture of 64 px, in units of white noise:
            the sigma_data of EDM for this model.
        detail_exponent: exponent of the power law by which this deviation follows the side of the picture,
            sqrt(height * width): negative where detail gets weaker from octave to octave, 0 for one deviation.
        sigma_max: noise level from which detail is sampled.
        sample_size: side, in px, that pipelines generate by default: the largest training size.
        coarse_size: side, in px, of the smallest coarse picture in training.
        tileable: axes along which opposite edges are neighbours: "x", "y", "xy" or None.

    Raises:
        ValueError: an argument out of its range.

    >>> refiner = DFURefiner(hidden_channels=8, num_layers=1)
    >>> refiner(torch.randn(2, 3, 13, 7), timestep=-0.5, coarse=torch.randn(2, 3, 13, 7)).sample.shape
    torch.Size([2, 3, 13, 7])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["RefinerBlock"]
    _repeated_blocks = ["RefinerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        hidden_channels: int = 96,
        num_layers: int = 5,
        detail_std: float = 0.15,
        detail_exponent: float = 0.0,
        sigma_max: float = 8.0,
        sample_size: int = 64,
        coarse_size: int = 16,
        tileable: str | None = None,
    ):
        super().__init__()
        self._check_config()
        self.noise_embedding = _init(nn.Linear(NOISE_CHANNELS, EMBEDDING_CHANNELS))
        self.coarse_noise_embedding = _init(nn.Linear(NOISE_CHANNELS, EMBEDDING_CHANNELS))
        self.embedding_out = _init(nn.Linear(EMBEDDING_CHANNELS, EMBEDDING_CHANNELS))
        self.conv_in = _convolution(8 * in_channels, hidden_channels)
        self.blocks = nn.ModuleList(RefinerBlock(hidden_channels, EMBEDDING_CHANNELS) for _ in range(num_layers))
        self.norm_out = PixelNorm(hidden_channels)
        self.conv_out = _convolution(hidden_channels, 4 * in_channels, scale=1e-5)
        self.gradient_checkpointing = False

    def _check_config(self) -> None:
        config = self.config
        for name in ("in_channels", "hidden_channels", "num_layers", "sample_size", "coarse_size"):
            value = config[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
        for name in ("detail_std", "sigma_max"):
            value = config[name]
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a positive number, but got {value!r}.")
        exponent = config.detail_exponent
        if not isinstance(exponent, (int, float)) or isinstance(exponent, bool) or not abs(exponent) <= 2:
            raise ValueError(f"`detail_exponent` must be a number in [-2, 2], but got {exponent!r}.")
        check_tileable(config.tileable)

    @property
    def reach(self) -> int:
        """Pixels on each side that an output pixel may depend on; even, as pixels are taken two by two."""
        return 2 * (2 * self.config.num_layers + 3)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: float | torch.Tensor,
        coarse: torch.Tensor,
        coarse_noise: float | torch.Tensor = 0.01,
        tileable: Literal["x", "y", "xy"] | None = None,
        return_dict: bool = True,
    ) -> DFURefinerOutput | tuple[torch.Tensor]:
        """The network output F of EDM for the detail.

        Args:
            sample: (batch, channels, height, width), c_in times the noisy detail, at least one pixel.
            timestep: ln(sigma) / 4 of the noise in the detail, a number or (batch,).
            coarse: (batch, channels, height, width), the coarse picture on the same grid, in [-1, 1], with noise.
            coarse_noise: standard deviation of this noise on the coarse picture's own grid, positive, a number or
                (batch,).
            tileable: axes along which opposite edges are neighbours; None takes those of the config.
            return_dict: return a `DFURefinerOutput` rather than a tuple.

        Raises:
            ValueError: an input of a wrong shape or type.
        """
        # 1. Inputs
        tileable = self.config.tileable if tileable is None else tileable
        self._check_inputs(sample, timestep, coarse, coarse_noise, tileable)
        x = torch.cat([sample, coarse.to(sample.dtype) / PICTURE_STD], dim=1)
        height, width = x.shape[-2:]
        embedding = self._embed(timestep, coarse_noise, x)

        # 2. Along a tileable axis the picture is continued periodically; an odd side gets one more pixel
        top, left = (self.reach if tileable and axis in tileable else 0 for axis in "yx")
        x = _wrap(_wrap(x, top, 2), left, 3)
        x = _even(_even(x, 2), 3)

        # 3. Residual blocks on half the grid
        x = F.pixel_unshuffle(x, 2)
        if not torch.compiler.is_exporting():
            x = x.contiguous(memory_format=torch.channels_last)  # the faster layout
        x = self.conv_in(x)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, embedding)
            else:
                x = block(x, embedding)
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = _crop(_crop(F.pixel_shuffle(x, 2), top, height, 2), left, width, 3)
        return DFURefinerOutput(sample=x) if return_dict else (x,)

    def _embed(self, timestep, coarse_noise, x: torch.Tensor) -> torch.Tensor:
        levels = [
            torch.as_tensor(value, dtype=torch.float32, device=x.device).expand(x.shape[0])
            for value in (timestep, coarse_noise)
        ]
        detail, coarse = (
            get_timestep_embedding(value, NOISE_CHANNELS, flip_sin_to_cos=True).to(x.dtype)
            for value in (levels[0], levels[1].log() / 4)
        )
        embedding = F.silu(self.noise_embedding(detail) + self.coarse_noise_embedding(coarse))
        return F.silu(self.embedding_out(embedding))

    def _check_inputs(self, sample, timestep, coarse, coarse_noise, tileable) -> None:
        channels = self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels or 0 in sample.shape:
            raise ValueError(
                f"`sample` must have shape (batch, {channels}, height, width) without empty dimensions, but got "
                f"{tuple(sample.shape)}."
            )
        if coarse.shape != sample.shape:
            raise ValueError(
                f"`coarse` must have the shape of `sample`, {tuple(sample.shape)}, but got {tuple(coarse.shape)}: "
                "resize it first (`resize_modes`)."
            )
        if torch.is_tensor(timestep) and not timestep.is_floating_point():
            raise ValueError(f"`timestep` is ln(sigma) / 4, a float, but got an integer tensor, {timestep.dtype}.")
        if not torch.is_tensor(coarse_noise) and not 0 < coarse_noise < math.inf:
            raise ValueError(f"`coarse_noise` must be positive, but got {coarse_noise!r}: 0.01 for a clean picture.")
        check_tileable(tileable)


def _wrap(x: torch.Tensor, margin: int, dim: int) -> torch.Tensor:
    """x with `margin` pixels more on each side of `dim`, continued periodically."""
    if margin == 0:
        return x
    n = x.shape[dim]
    return x.index_select(dim, torch.arange(-margin, n + margin, device=x.device) % n)


def _even(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with the last row of `dim` repeated if their number is odd."""
    n = x.shape[dim]
    if not isinstance(n, torch.SymInt) and n % 2 == 0:  # `torch.export` cannot branch on a size
        return x
    return x.index_select(dim, torch.arange(2 * ((n + 1) // 2), device=x.device).clamp(max=n - 1))


def _crop(x: torch.Tensor, start: int, length: int, dim: int) -> torch.Tensor:
    if isinstance(length, torch.SymInt):  # `torch.export` cannot prove that a slice fits
        return x.index_select(dim, start + torch.arange(length, device=x.device))
    return x.narrow(dim, start, length)


def _convolution(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    return _init(nn.Conv2d(in_channels, out_channels, 3, padding=1), scale)


def _init(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Xavier-uniform weights times `scale` and zero bias, as in DFUModel."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(scale)
    nn.init.zeros_(layer.bias)
    return layer
