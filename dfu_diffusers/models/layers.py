# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The layers of a DFU: the dual convolution, attention and the residual block."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_kernels import _GroupNorm
from .resampling import resample
from .spectral import Boundary, SpectralConv2d, _check_layer_input

SQRT_HALF = math.sqrt(0.5)
NEAR_ZERO = 1e-5  # scale of the initial weights of layers that should start as if they were absent


class DualConv2d(nn.Module):
    """u = conv3x3(v) + spectral(v): one part fixed in pixels, one in cycles per image (arXiv 2401.06144, section 3).

    Args:
        in_channels, out_channels: channels of input and output.
        modes: Fourier modes of the spectral part, see `SpectralConv2d`. None leaves it out.
        conv_type: "dual", or only one part: "spatial" or "spectral".
        init_scale: factor on the initial weights.
        spectral_boundary, spectral_rank: of the spectral part, see `SpectralConv2d`.

    Raises:
        ValueError: an unknown `conv_type` or `spectral_boundary`, a rank outside (0, 1), or "spectral" without modes.

    Shape: (batch, in_channels, H, W) -> (batch, out_channels, H', W'); H', W' = `size`, by default H, W. Both parts
    resample to another size themselves: the spatial one before its convolution, by area average or nearest pixel.

    >>> DualConv2d(3, 8, modes=4)(torch.randn(2, 3, 17, 23), size=(9, 12)).shape
    torch.Size([2, 8, 9, 12])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int | tuple[int, int] | None,
        conv_type: Literal["dual", "spatial", "spectral"] = "dual",
        init_scale: float = 1.0,
        spectral_boundary: Boundary = "periodic",
        spectral_rank: float | None = None,
    ):
        super().__init__()
        _check_conv_type(conv_type)
        if conv_type == "spectral" and modes is None:
            raise ValueError("conv_type='spectral' needs Fourier modes, but got None: give modes or use 'dual'.")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.spatial = self.spectral = None
        if conv_type != "spectral":
            self.spatial = _init_linear(nn.Conv2d(in_channels, out_channels, 3, padding=1), init_scale)
        if conv_type != "spatial" and modes is not None:
            self.spectral = SpectralConv2d(
                in_channels, out_channels, modes, init_scale, spectral_boundary, spectral_rank
            )

    def forward(
        self, x: torch.Tensor, size: tuple[int, int] | None = None, periodic: tuple[bool, bool] = (False, False)
    ) -> torch.Tensor:
        """Args: x (batch, in_channels, H, W); size (H', W') of the output; periodic, whether beyond an edge along
        (rows, columns) the 3x3 convolution sees the opposite edge instead of zeros."""
        size = _check_layer_input(x, self.in_channels, size)
        if self.spatial is None:
            return self.spectral(x, size)
        out = self._convolve(resample(x, size), periodic)
        return out if self.spectral is None else self.spectral(x, size, residual=out)

    def _convolve(self, x: torch.Tensor, periodic: tuple[bool, bool]) -> torch.Tensor:
        """The 3x3 convolution. Along periodic axes one pixel is added on each side first and cut off afterwards."""
        if not any(periodic):
            return self.spatial(x)
        height, width = x.shape[-2:]
        frame_h, frame_w = map(int, periodic)
        if frame_h:
            x = torch.cat([x[:, :, -1:], x, x[:, :, :1]], dim=2)
        if frame_w:
            x = torch.cat([x[..., -1:], x, x[..., :1]], dim=3)
        return self.spatial(x)[:, :, frame_h : frame_h + height, frame_w : frame_w + width]


def _check_conv_type(conv_type: str) -> None:
    if conv_type not in ("dual", "spatial", "spectral"):
        raise ValueError(f"conv_type must be 'dual', 'spatial' or 'spectral', but got {conv_type!r}.")


def _init_linear(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Xavier-uniform weights times `scale` and zero bias, as in EDM's DDPM++ (arXiv 2206.00364, appendix F)."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _group_norm(channels: int, max_groups: int, eps: float) -> nn.GroupNorm:
    """At least four channels per group, at most `max_groups` groups, in a number that divides the channels."""
    limit = max(1, min(max_groups, channels // 4))
    return _GroupNorm(next(groups for groups in range(limit, 0, -1) if channels % groups == 0), channels, eps=eps)


def _norm_silu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """SiLU of the normalised x; in place if no gradients are needed, which saves a copy of the largest tensors."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class DFUAttention(nn.Module):
    """One-head self-attention over all pixels, added to its input (DDPM++)."""

    def __init__(self, channels: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.norm = _group_norm(channels, norm_num_groups, norm_eps)
        self.qkv = _init_linear(nn.Linear(channels, 3 * channels))
        self.proj = _init_linear(nn.Linear(channels, channels), NEAR_ZERO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)  # (b, 1 head, hw, c)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        tokens = self.proj(F.scaled_dot_product_attention(query, key, value))
        return (x + tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)) * SQRT_HALF


class DFUBlock(nn.Module):
    """Residual block of two dual convolutions, the first of which may resample (DDPM++).

    Args:
        in_channels, out_channels, embedding_channels: channels of input, output and noise-level embedding.
        modes, conv_type, spectral_boundary, spectral_rank: of the dual convolutions, see `DualConv2d`.
        level: index of the resolution level on which the block works (0 is the full image), used to freeze by level.
        resample: "down" or "up" if the block leads from one level to the next.
        attention: end with self-attention.
        dropout: probability of zeroing a feature before the second convolution, while training.
        norm_num_groups, norm_eps: of the GroupNorms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        modes,
        conv_type: str,
        level: int,
        resample: Literal["down", "up"] | None,
        attention: bool,
        dropout: float,
        norm_num_groups: int,
        norm_eps: float,
        spectral_boundary: Boundary = "periodic",
        spectral_rank: float | None = None,
    ):
        super().__init__()
        spectral = spectral_boundary, spectral_rank
        self.level, self.resample, self.dropout = level, resample, dropout
        self.norm1 = _group_norm(in_channels, norm_num_groups, norm_eps)
        self.conv1 = DualConv2d(in_channels, out_channels, modes, conv_type, 1.0, *spectral)
        self.embedding = _init_linear(nn.Linear(embedding_channels, out_channels))
        self.norm2 = _group_norm(out_channels, norm_num_groups, norm_eps)
        self.conv2 = DualConv2d(out_channels, out_channels, modes, conv_type, NEAR_ZERO, *spectral)
        self.skip = None
        if in_channels != out_channels or resample is not None:
            self.skip = _init_linear(nn.Conv2d(in_channels, out_channels, 1))
        self.attention = DFUAttention(out_channels, norm_num_groups, norm_eps) if attention else None

    def forward(
        self,
        x: torch.Tensor,
        embedding: torch.Tensor,
        size: tuple[int, int] | None = None,
        periodic: tuple[bool, bool] = (False, False),
    ) -> torch.Tensor:
        """Args: x (batch, in_channels, H, W); embedding (batch, embedding_channels); size (H', W') to resample to;
        (rows, columns) along which opposite edges are neighbours."""
        size = tuple(size or x.shape[-2:])
        h = self.conv1(_norm_silu(self.norm1, x), size, periodic)
        h = h + self.embedding(embedding)[:, :, None, None]
        h = F.dropout(_norm_silu(self.norm2, h), self.dropout, self.training)
        h = self.conv2(h, periodic=periodic)
        # A 1x1 convolution commutes with resampling: it runs where there are fewer pixels.
        if self.skip is None:
            x = resample(x, size)
        elif self.resample == "up":
            x = resample(self.skip(x), size)
        else:
            x = self.skip(resample(x, size))
        x = (x + h).mul_(SQRT_HALF)
        return x if self.attention is None else self.attention(x)
