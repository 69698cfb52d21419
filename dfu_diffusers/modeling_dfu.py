# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The Dual-FNO UNet (DFU): a denoiser whose weights mean the same at every height and width.

Havrilla, Rojas, Liao, Tao, "DFU: scale-robust diffusion model for zero-shot super-resolution image generation",
arXiv 2401.06144. Each layer joins a 3x3 convolution, fixed in pixels, with a Fourier layer (Li et al., arXiv
2010.08895), fixed in cycles per image; around them stands the DDPM++ UNet of EDM (Karras et al., arXiv 2206.00364).

Conventions, held by tests/test_layers.py and the slow twins in tests/reference:
    grid          pixel j of N is the cell around (j + 1/2) / N of the unit interval
    coefficients  c(k, l) = 1/(HW) sum v(i, j) exp(-2 pi i (k y_i + l x_j)), the same on every grid that resolves v
    modes (r, c)  rows k = -r .. r-1, columns l = 0 .. c-1; only those below the Nyquist frequency take part
    boundary      "periodic": waves of period 1; "mirror": of period 2, for the image continued by its mirror image

This file imports torch, diffusers and the standard library only, so that it can travel inside a Hub repository.
"""

import importlib
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import get_adapter_name
from torch import nn
from torch.autograd.function import once_differentiable

SQRT_HALF = math.sqrt(0.5)
NEAR_ZERO = 1e-5  # scale of the initial weights of layers that should start as if they were absent
LARGE_WEIGHT = 1 << 20  # numbers in a tensor that a CPU's cache should hold
BOUNDARIES = ("periodic", "mirror")
Boundary = Literal["periodic", "mirror"] | tuple[Literal["periodic", "mirror"], Literal["periodic", "mirror"]]


# ---------------------------------------------------------------------------------------------------------------------
# Spectral convolution


def _fourier_matrices(size: tuple, new_size: tuple, modes: tuple, periods: tuple, device, dtype):
    """Real matrices of the truncated, pixel-centred DFT from grid `size` and its inverse onto grid `new_size`.

    With K rows and L columns of modes kept, the matrices act on channels-last data, axis by axis:
        forward_w (2L, W)     real signal       -> [real | imaginary] of columns l
        forward_h (2K, 2H)    (h, real/imag)    -> [real | imaginary] of rows k
        inverse_h (2H', 4K)   [rr | ri | ir | ii] products of data and weight parts -> (h', real/imag)
        inverse_w (W', 2L)    [real | imaginary] of columns l -> real signal
    The 1/(HW), the half-pixel phases, the rule of complex multiplication and the double weight of columns l > 0 (each
    stands for its conjugate twin, too) are all folded in. Where sizes are symbols (`torch.export`), no shape may
    depend on how many modes they resolve: all are kept, and those that take no part are zero in the matrices.

    `periods` are 1 or, along an axis where the image goes on as its mirror image, 2. The doubled image is even, so its
    coefficients are sums of cosines over the first half, and of the result only the first half is evaluated.

    Returns the four matrices, the first row of the weights that takes part, K and L.
    """
    (height, width), (new_height, new_width), (r, c), (period_h, period_w) = size, new_size, modes, periods
    # Strictly below the Nyquist frequency of both grids: 2|k| < N, where N counts the pixels of a period.
    symbolic = _is_symbolic(*size, *new_size)
    if symbolic:
        first, last, columns = -r, r - 1, c
    else:
        limit_h = (period_h * min(height, new_height) - 1) // 2
        limit_w = (period_w * min(width, new_width) - 1) // 2
        first, last, columns = -min(r, limit_h), min(r - 1, limit_h), min(c, limit_w + 1)
    k = torch.arange(first, last + 1, device=device)
    l = torch.arange(columns, device=device)

    def cos_sin(frequencies, pixels, period):
        # 2 pi f (j + 1/2) / n = pi f (2j + 1) / n; reduced as integers, so that float32 is exact to its last bit.
        phase = torch.outer(frequencies, 2 * torch.arange(pixels, device=device) + 1)
        n = period * pixels
        phase = phase % torch.full_like(phase, 2 * n)  # ONNX has no remainder by a number that is a symbol
        angle = phase.to(torch.float64 if dtype == torch.float64 else torch.float32) * (math.pi / n)
        resolved = 2 * frequencies.abs()[:, None] < n if symbolic else 1
        return angle.cos() * resolved, angle.sin() * resolved

    odd_h, odd_w = 2 - period_h, 2 - period_w  # 0 where the image has no odd part
    cos, sin = cos_sin(l, width, period_w)  # (L, W)
    forward_w = torch.cat([cos, -sin * odd_w]) / width
    cos, sin = cos_sin(k, height, period_h)  # (K, H)
    sin = sin * odd_h
    forward_h = torch.cat([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)]).flatten(1) / height
    cos, sin = (part.T for part in cos_sin(k, new_height, period_h))  # (H', K)
    real, imaginary = torch.cat([cos, -sin, -sin, -cos], 1), torch.cat([sin, cos, cos, -sin], 1)
    inverse_h = torch.stack([real, imaginary], 1).flatten(0, 1)
    cos, sin = (part.T for part in cos_sin(l, new_width, period_w))  # (W', L)
    twice = torch.where(l > 0, 2, 1)
    inverse_w = torch.cat([cos * twice, -sin * twice], 1)
    matrices = tuple(matrix.to(dtype) for matrix in (forward_w, forward_h, inverse_h, inverse_w))
    return matrices, first + r, last + 1 - first, columns


def _is_symbolic(*sizes) -> bool:
    return any(isinstance(n, torch.SymInt) for n in sizes)


@lru_cache(maxsize=256)
def _cached_fourier_matrices(*key):
    with torch.inference_mode(False):  # a tensor made in inference mode could never serve training
        return _fourier_matrices(*key)


class _MixModes(torch.autograd.Function):
    """x (rows * columns, 2b, in) times weight[first : first + rows, :columns], in the dtype of x.

    For large weights on a CPU: autograd would keep the sliced or lowered copy of them for the backward pass, and there
    write their gradient two to three times. Here both pass once, in blocks of rows that stay in the cache.
    """

    @staticmethod
    def forward(ctx, x, weight, first: int, rows: int, columns: int):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.band = first, rows, columns
        y = x.new_empty(*x.shape[:2], weight.shape[-1])
        for modes, block in _MixModes.blocks(weight, *ctx.band):
            torch.bmm(x[modes], weight[block, :columns].flatten(0, 1).to(x.dtype), out=y[modes])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        first, rows, columns = ctx.band
        wants_dx, wants_dw, *_ = ctx.needs_input_grad
        dx = dy.new_empty(*dy.shape[:2], weight.shape[2]) if wants_dx else None
        dw = torch.empty_like(weight) if wants_dw else None
        if wants_dw:
            for other in (dw[:first], dw[first + rows :], dw[first : first + rows, columns:]):
                other.zero_()
        for modes, block in _MixModes.blocks(weight, *ctx.band):
            if wants_dx:
                transposed = weight[block, :columns].flatten(0, 1).to(dy.dtype).transpose(1, 2)
                torch.bmm(dy[modes], transposed, out=dx[modes])
            if wants_dw:
                dw[block, :columns] = torch.bmm(x[modes].transpose(1, 2), dy[modes]).unflatten(0, (-1, columns))
        return dx, dw, None, None, None

    @staticmethod
    def blocks(weight, first: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Slices of the modes and of the weight's rows."""
        step = max(1, LARGE_WEIGHT // weight[0].numel())
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start * columns, stop * columns), slice(first + start, first + stop)


class SpectralConv2d(nn.Module):
    """Learned complex channel mixing of the lowest Fourier modes, y(k, l) = R(k, l) x(k, l) (Li et al., eq. 4-5).

    The kept modes are found, mixed and evaluated on the output grid by small real matrix products, never by a full
    FFT; evaluating them on another grid *is* the resampling. Works at every size from 1x1, in any floating dtype.

    Args:
        in_channels, out_channels: channels of input and output.
        modes: (r, c): rows k = -r .. r-1 and columns l = 0 .. c-1, in cycles per image. An int k means (k, k + 1), the
            same band on both axes.
        init_scale: factor on the initial weights. At 1 a band-limited input keeps its power.
        boundary: "periodic", where the waves that leave at one edge come in at the opposite one; "mirror", where they
            are reflected, and opposite edges do not know of each other; or a pair for (rows, columns). Mirror means
            the periodic layer on the image continued by its mirror image, to twice the size, and cut back to it.
            Modes then count half cycles per image: twice as many span the same band.
        rank: None for a full matrix in each mode; a share of the channels in (0, 1) for R = U S(k, l) V with U (in, p)
            and V (q, out) the same in all modes, a Tucker decomposition: p, q = `reduced(channels, rank)`.

    Attributes:
        weight: (2r * c, in_channels, 2 * out_channels), real: for each mode, row by row, [real | imaginary] of R; with
            `rank` that of S, (2r * c, p, 2q).
        reduce, expand: U and V, real, of a layer with `rank`; otherwise None.
        gain: factor on the result, 1 unless `DFUModel.use_spectral_gain` sets another.

    Raises:
        ValueError: modes that are not one or two positive integers, channels below 1, an unknown boundary, a rank
            outside (0, 1), an input of another shape.

    Shape: (batch, in_channels, H, W) -> (batch, out_channels, H', W'); H', W' = `size`, by default H, W.

    >>> layer = SpectralConv2d(3, 8, modes=(4, 3))
    >>> layer(torch.randn(2, 3, 17, 23)).shape, layer(torch.randn(2, 3, 1, 5), size=(9, 4)).shape
    (torch.Size([2, 8, 17, 23]), torch.Size([2, 8, 9, 4]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: int | tuple[int, int],
        init_scale: float = 1.0,
        boundary: Boundary = "periodic",
        rank: float | None = None,
    ):
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"Channels must be positive, but got {in_channels} and {out_channels}.")
        self.in_channels, self.out_channels, self.modes = in_channels, out_channels, _parse_modes(modes)
        self.boundary, self.rank, self.gain = _parse_boundary(boundary), rank, 1.0
        r, c = self.modes
        p, q = (self.reduced(channels, rank) for channels in (in_channels, out_channels))
        self.weight = nn.Parameter(torch.empty(2 * r * c, p, 2 * q))
        nn.init.normal_(self.weight, std=init_scale / math.sqrt(2 * p))
        self.reduce = self.expand = None
        if rank is not None:
            self.reduce = nn.Parameter(torch.randn(in_channels, p) / math.sqrt(in_channels))
            self.expand = nn.Parameter(torch.randn(q, out_channels) / math.sqrt(q))

    @staticmethod
    def reduced(channels: int, rank: float | None) -> int:
        """Channels in which the modes are mixed: a share `rank` of them, but at least eight, or all if they are fewer.

        >>> [SpectralConv2d.reduced(channels, 0.4) for channels in (3, 16, 128)]
        [3, 8, 51]
        """
        return channels if _parse_rank(rank) is None else max(round(rank * channels), min(channels, 8))

    @torch.no_grad()
    def factorized(self, rank: float) -> "SpectralConv2d":
        """A layer with `rank` near this one: U and V span what matters most to the weights of all modes together (a
        higher-order singular value decomposition, De Lathauwer et al. 2000).

        Raises:
            ValueError: a rank outside (0, 1), or a layer that has one.
        """
        if self.rank is not None:
            raise ValueError(f"This layer is factorised already, with rank={self.rank}: begin with a full one.")
        weight = self.weight.double().unflatten(2, (2, self.out_channels))  # (modes, in, real/imag, out)
        layer = SpectralConv2d(self.in_channels, self.out_channels, self.modes, 1.0, self.boundary, rank)
        layer.to(self.weight)
        gram_in, gram_out = (torch.einsum(sum, weight, weight) for sum in ("mipo,mjpo->ij", "mipo,mipu->ou"))
        p, q = layer.reduce.shape[1], layer.expand.shape[0]
        u, v = torch.linalg.eigh(gram_in)[1][:, -p:], torch.linalg.eigh(gram_out)[1][:, -q:]  # in ascending order
        layer.weight.copy_(torch.einsum("mipo,ia,ob->mapb", weight, u, v).flatten(2))
        layer.reduce.copy_(u)
        layer.expand.copy_(v.T)
        return layer

    def forward(
        self, x: torch.Tensor, size: tuple[int, int] | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Args: x (batch, in_channels, H, W); size (H', W'); residual (batch, out_channels, H', W'), a tensor that
        nobody else needs: the result is accumulated into it, which saves a pass over memory."""
        new_height, new_width = size = _check_layer_input(x, self.in_channels, size)
        batch, _, height, width = x.shape
        x = x.to(_compute_dtype(x))
        periods = tuple(2 if kind == "mirror" else 1 for kind in self.boundary)
        key = ((height, width), size, self.modes, periods, x.device, x.dtype)
        # A compiled graph holds the construction itself: cached tensors would be inputs that force recompilation. And
        # what a fake tensor leads to is fake, too, of no use to later calls.
        cacheable = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        fourier_matrices = _cached_fourier_matrices if cacheable else _fourier_matrices
        (forward_w, forward_h, inverse_h, inverse_w), first, rows, columns = fourier_matrices(*key)

        # 1. Kept modes of the input: along W, then along H.
        x = x.permute(0, 2, 3, 1).reshape(batch * height, width, self.in_channels)
        x = torch.bmm(forward_w.expand(batch * height, -1, -1), x)  # (b h, 2L, in)
        x = x.view(batch, 2 * height, columns * self.in_channels)
        x = torch.bmm(forward_h.expand(batch, -1, -1), x)  # (b, 2K, L in)
        # 2. Channel mixing: one real matrix product per mode gives all four products of real and imaginary parts.
        x = x.view(batch, 2, rows, columns, self.in_channels).permute(2, 3, 1, 0, 4)
        x = x.reshape(rows * columns, 2 * batch, self.in_channels)
        x = self._mix(x, first, rows, columns)  # (modes, 2b, 2 out)
        if self.gain != 1:
            x = x * self.gain
        # 3. Onto the output grid: along H', then along W'.
        x = x.view(rows, columns, 2, batch, 2, self.out_channels).permute(3, 2, 4, 0, 1, 5)
        x = x.reshape(batch, 4 * rows, columns * self.out_channels)
        x = torch.bmm(inverse_h.expand(batch, -1, -1), x)  # (b, 2H', L out)
        x = x.view(batch * new_height, 2 * columns, self.out_channels)
        inverse_w = inverse_w.expand(batch * new_height, -1, -1)
        if residual is None:
            x = torch.bmm(inverse_w, x)
        else:
            residual = residual.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            x = residual.reshape(batch * new_height, new_width, self.out_channels).baddbmm_(inverse_w, x)
        return x.view(batch, new_height, new_width, self.out_channels).permute(0, 3, 1, 2)

    def _mix(self, x: torch.Tensor, first: int, rows: int, columns: int) -> torch.Tensor:
        """Product of x (rows * columns, 2b, in) with the weights of these modes, (rows * columns, 2b, 2 out), in the
        dtype of x."""
        if self.rank is None:
            return self._mix_modes(x, first, rows, columns)
        x = self._mix_modes(x @ self.reduce.to(x.dtype), first, rows, columns)
        return (x.unflatten(2, (2, -1)) @ self.expand.to(x.dtype)).flatten(2)

    def _mix_modes(self, x: torch.Tensor, first: int, rows: int, columns: int) -> torch.Tensor:
        r, c = self.modes
        whole = (rows, columns) == (2 * r, c)
        if whole and self.weight.dtype == x.dtype:
            return torch.bmm(x, self.weight)
        weight = self.weight.unflatten(0, (2 * r, c))
        if weight.numel() >= LARGE_WEIGHT and _is_plain_on_cpu(x):
            return _MixModes.apply(x, weight, first, rows, columns)
        return torch.bmm(x, weight[first : first + rows, :columns].flatten(0, 1).to(x.dtype))

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"{self.in_channels}, {self.out_channels}, modes={self.modes}, boundary={self.boundary}{rank}"


def _check_layer_input(x: torch.Tensor, channels: int, size) -> tuple[int, int]:
    """Size of a layer's output: `size`, or that of x (batch, channels, H, W) if it is None."""
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(
            f"The layer takes (batch, {channels}, height, width) without empty dimensions, but got {tuple(x.shape)}."
        )
    if size is None:
        return tuple(x.shape[-2:])
    if not isinstance(size, (tuple, list)) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"`size` must be (height, width), two integers of at least 1, but got {size!r}.")
    return tuple(size)


def _is_integer(n) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


def _parse_modes(modes) -> tuple[int, int]:
    pair = (modes, modes + 1) if _is_integer(modes) else tuple(modes) if isinstance(modes, (list, tuple)) else ()
    if len(pair) != 2 or not all(_is_integer(n) and n >= 1 for n in pair):
        raise ValueError(
            f"Fourier modes must be (rows, columns), two integers of at least 1, or one integer k for (k, k + 1), "
            f"but got {modes!r}. Use None for a level without a spectral path."
        )
    return pair


def _parse_boundary(boundary) -> tuple[str, str]:
    pair = (boundary, boundary) if isinstance(boundary, str) else boundary
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(kind in BOUNDARIES for kind in pair):
        raise ValueError(
            f"A spectral boundary must be one of {BOUNDARIES}, or a pair of them for (rows, columns), but got "
            f"{boundary!r}."
        )
    return tuple(pair)


def _parse_rank(rank) -> float | None:
    if rank is not None and not (isinstance(rank, float) and 0 < rank < 1):
        raise ValueError(
            f"A spectral rank is a share of the channels, between 0 and 1, or None for full weights, but got {rank!r}."
        )
    return rank


def _is_plain_on_cpu(x: torch.Tensor) -> bool:
    """Whether functions with a backward pass of our own will do: not for compilers, tracers and `torch.func`, which
    look inside, nor for tensors of another class."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    return x.device.type == "cpu" and torch._C._functorch.maybe_current_level() is None


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product on x runs: autocast lowers everything but float64."""
    device = x.device.type
    # torch.compile in torch 2.6 cannot look into `is_autocast_available`, and needs not: it is for meta tensors.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if x.dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


# ---------------------------------------------------------------------------------------------------------------------
# Spatial resampling and the dual convolution


def _area_resize(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """Exact area average along `dim` onto n <= N cells: each pixel counts by the share of it that a cell covers."""
    old = x.shape[dim]
    if old == n:
        return x
    if old % n == 0:
        return x.unflatten(dim, (n, old // n)).mean(dim + 1)
    cells = torch.arange(n, device=x.device)
    first = cells * old // n  # a cell covers [i N/n, (i+1) N/n), counted in units of 1/n pixel below
    total = 0
    for step in range(old // n + 2):
        pixel = first + step
        covered = torch.minimum((cells + 1) * old, (pixel + 1) * n) - torch.maximum(cells * old, pixel * n)
        share = covered.clamp(min=0).to(x.dtype) / old
        shape = [n if d == dim else 1 for d in range(x.ndim)]
        total = total + x.index_select(dim, pixel.clamp(max=old - 1)) * share.view(shape)
    return total


def _resize_symbolic(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """One dimension of `resample` by one formula for all sizes: `torch.export` cannot branch on their values."""
    old = x.shape[dim]
    cells = torch.arange(n, device=x.device)
    if n > old:
        # As F.interpolate does it, in float32: some centres lie between two pixels, and both must take the same.
        scale = torch.full_like(cells, old, dtype=torch.float32) / n
        return x.index_select(dim, ((cells + 0.5) * scale).floor().long())
    pixels = torch.arange(old, device=x.device)
    ends = torch.minimum((cells[:, None] + 1) * old, (pixels + 1) * n)
    covered = (ends - torch.maximum(cells[:, None] * old, pixels * n)).clamp(min=0)
    return torch.tensordot(x, covered.to(x.dtype) / old, [[dim], [1]]).movedim(-1, dim)


def resample(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Move x (batch, channels, H, W) to the grid `size`: area average where it shrinks, nearest pixel centre where it
    grows. Aligned with `SpectralConv2d`: a pixel is a cell, and cells keep their place on the unit square."""
    height, width = x.shape[-2:]
    if (height, width) == tuple(size):
        return x
    if _is_symbolic(height, width, *size):
        return _resize_symbolic(_resize_symbolic(x, size[0], 2), size[1], 3)
    if height == 2 * size[0] and width == 2 * size[1]:
        return F.avg_pool2d(x, 2)
    x = _area_resize(_area_resize(x, min(height, size[0]), 2), min(width, size[1]), 3)
    if x.shape[-2:] != tuple(size):
        x = F.interpolate(x, size, mode="nearest-exact")
    # The averages of one image come out in another layout, in which the convolution behind them is many times slower.
    return x.contiguous(memory_format=torch.channels_last)


class DualConv2d(nn.Module):
    """u = conv3x3(v) + spectral(v): one part fixed in pixels, one in cycles per image (arXiv 2401.06144, section 3).

    Args:
        in_channels, out_channels: channels of input and output.
        modes: Fourier modes of the spectral part, see `SpectralConv2d`. None leaves it out.
        conv_type: "dual", or only one part: "spatial" or "spectral".
        init_scale: factor on the initial weights.
        spectral_boundary, spectral_rank: of the spectral part, see `SpectralConv2d`.

    Attributes:
        periodic: for (rows, columns) whether the 3x3 convolution takes the opposite edge for a neighbour, rather than
            zeros. No parameter depends on it.

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
        self.periodic = (False, False)
        self.spatial = self.spectral = None
        if conv_type != "spectral":
            self.spatial = _init_linear(nn.Conv2d(in_channels, out_channels, 3, padding=1), init_scale)
        if conv_type != "spatial" and modes is not None:
            self.spectral = SpectralConv2d(
                in_channels, out_channels, modes, init_scale, spectral_boundary, spectral_rank
            )

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Args: x (batch, in_channels, H, W); size (H', W') of the output."""
        size = _check_layer_input(x, self.in_channels, size)
        if self.spatial is None:
            return self.spectral(x, size)
        out = self._convolve(resample(x, size))
        return out if self.spectral is None else self.spectral(x, size, residual=out)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The 3x3 convolution; along periodic axes of an image one pixel larger on each side, cut back afterwards."""
        if not any(self.periodic):
            return self.spatial(x)
        height, width = x.shape[-2:]
        frame_h, frame_w = map(int, self.periodic)
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


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def _normalise(x: torch.Tensor, weight, bias, groups: int, eps: float):
    """Group normalisation of channels-last x on a CPU, and the means and 1 / deviations (batch, groups).

    Torch's own, but for half precision on maps below 1,024 pixels: there its loops go along the few channels of a
    group, and whole passes of vectorised code are up to ten times as fast."""
    batch, channels, height, width = x.shape
    if x.dtype.itemsize > 2 or height * width >= 1024 or channels >= 16 * groups or x.numel() < 2**14:
        return torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)

    def of_groups(pixels):  # mean over each group: (batch, groups, 1)
        return pixels.mean((2, 3)).view(batch, groups, -1).mean(-1, keepdim=True)

    def of_channels(values):
        return values.expand(batch, groups, channels // groups).reshape(batch, channels, 1, 1)

    y = x.float()
    mean = of_groups(y)
    y = y - of_channels(mean)
    rstd = (of_groups(y.square()) + eps).rsqrt()
    scale = of_channels(rstd) * weight.float().view(-1, 1, 1)
    y = torch.addcmul(bias.float().view(-1, 1, 1), y, scale).to(x.dtype)
    return y, mean[..., 0], rstd[..., 0]


class _GroupNormOnCPU(torch.autograd.Function):
    """Group normalisation of channels-last tensors on a CPU with a backward two to four times as fast as torch's:
    whole passes of vectorised code over the data, four of them, in place of its loops."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float):
        y, mean, rstd = _normalise(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # With x^ = (x - mean) rstd and y = weight x^ + bias:
        # dx = rstd (weight dy - <weight dy> - x^ <weight dy x^>), where <> is the mean over a group.
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels, height, width = x.shape
        precise = mean.dtype if mean.dtype == torch.float64 else torch.float32
        mean, rstd = mean.to(precise)[..., None], rstd.to(precise)[..., None]  # (batch, groups, 1)

        def of_groups(per_channel):  # (batch or 1, groups, channels of a group)
            return per_channel.to(precise).view(-1, mean.shape[1], channels // mean.shape[1])

        def of_pixels(coefficient):  # (batch, groups, channels of a group or 1) -> (batch, channels, 1, 1)
            return coefficient.expand(batch, *of_groups(weight).shape[1:]).reshape(batch, channels, 1, 1).to(x.dtype)

        dy = dy.contiguous(memory_format=torch.channels_last)
        sum_dy = of_groups(dy.sum((2, 3), dtype=precise))
        sum_dy_x = (of_groups((dy * x).sum((2, 3), dtype=precise)) - mean * sum_dy) * rstd
        pixels, scale = height * width, of_groups(weight)
        slope = -(scale * sum_dy_x).mean(-1, keepdim=True) / pixels * rstd.square()
        offset = -(scale * sum_dy).mean(-1, keepdim=True) / pixels * rstd - slope * mean
        dx = torch.addcmul(of_pixels(offset), x, of_pixels(slope)).addcmul_(dy, of_pixels(scale * rstd))
        sums = (total.sum(0).flatten().to(weight.dtype) for total in (sum_dy_x, sum_dy))
        return dx, *sums, None, None


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_plain_on_cpu(x) or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        arguments = x, self.weight, self.bias, self.num_groups, self.eps
        return _GroupNormOnCPU.apply(*arguments) if torch.is_grad_enabled() else _normalise(*arguments)[0]


def _group_norm(channels: int, max_groups: int, eps: float) -> nn.GroupNorm:
    """At least four channels to a group, at most `max_groups` groups, and a number that divides the channels."""
    limit = max(1, min(max_groups, channels // 4))
    return _GroupNorm(next(groups for groups in range(limit, 0, -1) if channels % groups == 0), channels, eps=eps)


def _norm_silu(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """SiLU of the normalised x; in place where no gradient needs both, which saves a copy of the largest tensors."""
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
        level: index of the resolution level the block works on (0 is the full image); for those who freeze by level.
        resample: "down" or "up" if the block joins two levels.
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

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Args: x (batch, in_channels, H, W); embedding (batch, embedding_channels); size (H', W') to resample to."""
        size = tuple(size or x.shape[-2:])
        h = self.conv1(_norm_silu(self.norm1, x), size)
        h = h + self.embedding(embedding)[:, :, None, None]
        h = F.dropout(_norm_silu(self.norm2, h), self.dropout, self.training)
        h = self.conv2(h)
        # A 1x1 convolution commutes with resampling: it runs where there are fewer pixels.
        if self.skip is None:
            x = resample(x, size)
        elif self.resample == "up":
            x = resample(self.skip(x), size)
        else:
            x = self.skip(resample(x, size))
        x = (x + h).mul_(SQRT_HALF)
        return x if self.attention is None else self.attention(x)


# ---------------------------------------------------------------------------------------------------------------------
# The network


# What a file's metadata may say of a LoRA, of all that PEFT has options for: where it is, its size and its scale.
LORA_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "use_dora", "target_modules", "target_parameters",
    "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
# And what is not heeded: the origin, and how to begin where no values are given.
LORA_REMARKS = (
    "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights",
)  # fmt: skip
HUB_ARGUMENTS = (
    "weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies",
)  # fmt: skip


def _peft():
    """PEFT, an option. An import statement, wherever it stood, would make diffusers demand it of all who load this
    file from a repository."""
    return importlib.import_module("peft")


def _lora_config(state_dict: dict, metadata: dict | None):
    """PEFT's LoraConfig of a saved LoRA; one without metadata tells its layers and ranks by names and shapes."""
    from diffusers.utils.peft_utils import _create_lora_config

    if metadata is None:
        ranks = {f"^{key}": value.shape[1] for key, value in state_dict.items() if "lora_B" in key and value.ndim > 1}
        return _create_lora_config(state_dict, None, None, ranks)
    lora_config = _peft().LoraConfig
    default = lora_config().to_dict()
    odd = [
        key for key, value in metadata.items()
        if value and key not in LORA_OPTIONS + LORA_REMARKS and value != default.get(key)
    ]  # fmt: skip
    if odd:
        raise TypeError(
            f"`LoraConfig` class could not be instantiated: the LoRA's metadata ask for {', '.join(sorted(odd))}, and "
            f"DFUModel reads {', '.join(LORA_OPTIONS)} only."
        )
    return lora_config(**{key: value for key, value in metadata.items() if key in LORA_OPTIONS})


class DFUModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Dual-FNO UNet: takes a noisy image of any height and width >= 1 and returns the network output F of EDM.

    A drop-in for `diffusers.UNet2DModel`. Each level halves both sides, rounding up; the decoder restores the exact
    sizes. Non-square images are functions on the same unit square: modes count cycles per image on each axis.
    The defaults are the FFHQ model of arXiv 2401.06144 without augmentation labels (630.6 M parameters, 569 M of them
    spectral); smaller presets are in `examples/configs`.

    LoRA (needs PEFT): `add_adapter(LoraConfig(target_modules=["qkv", "proj", "skip", "spatial"], target_parameters=
    ["spectral.weight"]))` reaches the attention, the 1x1, 3x3 and spectral convolutions; for the latter PEFT has
    neither dropout nor DoRA, and such an adapter must be fused before `torch.compile` or `torch.export`.

    Args:
        sample_size: height and width, or one integer for both, that pipelines generate by default.
        in_channels, out_channels: channels of the image.
        block_out_channels: channels of each level, finest first; the first is even and at least 4.
        layers_per_block: residual blocks of a level in the encoder; the decoder has one more.
        fourier_modes: for each level (rows, columns) of modes, see `SpectralConv2d`, an int k for (k, k + 1), or None
            for no spectral path. Modes that a grid cannot resolve take no part there.
        conv_type: "dual"; "spatial" leaves out every spectral path (the paper's UNet baseline), "spectral" every 3x3
            convolution (its FNO-UNet baseline; each level needs modes).
        attention_levels: levels with self-attention in their encoder blocks and their last decoder block. The middle
            block always has it.
        dropout: probability in [0, 1) of zeroing a feature before a block's second convolution, while training.
        norm_num_groups: most groups of a GroupNorm; a group has at least four channels.
        norm_eps: epsilon of the GroupNorms.
        num_class_embeds: number of classes, or None for an unconditional model.
        num_augment_labels: number of augmentation labels (EDM's non-leaking augmentation has 9), zero at sampling.
        spectral_boundary: whether waves pass from edge to opposite edge, "periodic", or are reflected, "mirror", or a
            pair for (rows, columns). With "mirror" modes count half cycles per image, see `SpectralConv2d`.
        tileable: axes along which the 3x3 convolutions take the opposite edge for a neighbour, for images that tile
            the plane: "x" (left and right edges meet), "y", "xy" or None. A model trained without is switched by
            `use_tileable`.
        spectral_rank: None for full matrices in each Fourier mode, or the share of the channels, in (0, 1), to which
            factors that all modes share reduce them, see `SpectralConv2d`: spectral weights shrink with its square.
            `factorized` turns a trained model into one of these.

    Raises:
        ValueError: an argument out of its range, or lists of levels that do not fit together.

    >>> model = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> model(torch.randn(2, 3, 13, 7), timestep=-0.5).sample.shape
    torch.Size([2, 3, 13, 7])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DFUBlock", "DualConv2d"]
    _repeated_blocks = ["DFUBlock"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 96,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        fourier_modes: tuple[int | tuple[int, int] | None, ...] = ((16, 9), (8, 5), (4, 3), None),
        conv_type: Literal["dual", "spatial", "spectral"] = "dual",
        attention_levels: tuple[int, ...] = (2,),
        dropout: float = 0.1,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        num_class_embeds: int | None = None,
        num_augment_labels: int = 0,
        spectral_boundary: Boundary = "periodic",
        tileable: Literal["x", "y", "xy"] | None = None,
        spectral_rank: float | None = None,
    ):
        super().__init__()
        self._check_config()
        channels, levels = block_out_channels, range(len(block_out_channels))
        noise_channels, embedding_channels = channels[0], 4 * channels[0]

        def conv(in_channels, out_channels, init_scale=1.0):
            return DualConv2d(
                in_channels, out_channels, fourier_modes[0], conv_type, init_scale, spectral_boundary, spectral_rank
            )

        def block(in_channels, level, out_channels=None, resample=None, attention=False):
            return DFUBlock(
                in_channels, out_channels or channels[level], embedding_channels, fourier_modes[level], conv_type,
                level, resample, attention, dropout, norm_num_groups, norm_eps, spectral_boundary, spectral_rank,
            )  # fmt: skip

        # 1. embedding of noise level and labels
        self.class_embedding = nn.Embedding(num_class_embeds, noise_channels) if num_class_embeds else None
        self.augment_embedding = None
        if num_augment_labels:
            self.augment_embedding = _init_linear(nn.Linear(num_augment_labels, noise_channels, bias=False))
        self.embedding_in = _init_linear(nn.Linear(noise_channels, embedding_channels))
        self.embedding_out = _init_linear(nn.Linear(embedding_channels, embedding_channels))

        # 2. encoder: every block leaves a skip connection of `skips[-1]` channels
        self.conv_in = conv(in_channels, channels[0])
        skips = [channels[0]]
        self.down_blocks = nn.ModuleList()
        for level in levels:
            if level > 0:
                self.down_blocks.append(block(skips[-1], level, out_channels=skips[-1], resample="down"))
                skips.append(skips[-1])
            for _ in range(layers_per_block):
                self.down_blocks.append(block(skips[-1], level, attention=level in attention_levels))
                skips.append(channels[level])

        # 3. middle
        current = channels[-1]
        self.mid_blocks = nn.ModuleList(block(current, levels[-1], attention=attention) for attention in (True, False))

        # 4. decoder: every block but the upsampling ones takes one skip connection
        self.up_blocks = nn.ModuleList()
        for level in reversed(levels):
            if level < levels[-1]:
                self.up_blocks.append(block(current, level + 1, resample="up"))
            for layer in range(layers_per_block + 1):
                attention = level in attention_levels and layer == layers_per_block
                self.up_blocks.append(block(current + skips.pop(), level, attention=attention))
                current = channels[level]

        # 5. output
        self.norm_out = _group_norm(current, norm_num_groups, norm_eps)
        self.conv_out = conv(current, out_channels, NEAR_ZERO)
        self.gradient_checkpointing, self._checkpointed_levels = False, tuple(levels)
        self._fixed_size = None
        self._set_periodic(self._periodic_axes(tileable))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        augment_labels: torch.Tensor | None = None,
    ) -> UNet2DOutput | tuple:
        """Evaluate the network.

        Args:
            sample: (batch, in_channels, height, width), scaled by the scheduler (c_in of EDM).
            timestep: c_noise = ln(sigma) / 4, often negative, or the timestep of any other scheduler: a number, a
                scalar tensor or one value per image. Never rounded.
            class_labels: (batch,) integers in [0, num_class_embeds), for a class-conditional model.
            return_dict: return a `UNet2DOutput` rather than a tuple.
            augment_labels: (batch, num_augment_labels), None for zeros (an image that was not augmented).

        Returns:
            `UNet2DOutput` with `sample` (batch, out_channels, height, width), or a tuple of it.

        Raises:
            TypeError: a sample that is not a floating point tensor, a timestep or labels of a wrong type.
            ValueError: a wrong number of dimensions or channels, missing, unexpected or out-of-range labels.
        """
        self._check_inputs(sample, timestep, class_labels, augment_labels)

        # 1. noise level and labels
        embedding = self._embed(sample, timestep, class_labels, augment_labels)

        # 2. encoder
        sample = self.conv_in(sample.contiguous(memory_format=torch.channels_last))
        skips = [sample]
        for block in self.down_blocks:
            height, width = sample.shape[-2:]
            size = self._coarser(height, width, block.level) if block.resample else (height, width)
            sample = self._run(block, sample, embedding, size)
            skips.append(sample)

        # 3. middle
        for block in self.mid_blocks:
            sample = self._run(block, sample, embedding)

        # 4. decoder
        for block in self.up_blocks:
            if not block.resample:  # rebound before the call, during which the parts would stay alive
                sample = torch.cat([sample, skips.pop()], dim=1)
            sample = self._run(block, sample, embedding, skips[-1].shape[-2:] if block.resample else None)

        # 5. output
        sample = self.conv_out(_norm_silu(self.norm_out, sample)).contiguous()
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    @contextmanager
    def use_tileable(self, axes: Literal["x", "y", "xy"] | None) -> Iterator[None]:
        """A context in which images tile the plane along `axes`, whatever the model was trained for.

        The Fourier layers are periodic, and here the 3x3 convolutions are, too. Where all levels halve the size
        without a rest, the output follows shifts of the input by whole pixels of the last level. None keeps the edges
        apart. With gradient checkpointing the backward pass belongs inside, too.

        Raises:
            ValueError: other axes, or one whose `spectral_boundary` is "mirror".

        >>> model = DFUModel(block_out_channels=(8,), layers_per_block=1, fourier_modes=(4,), attention_levels=())
        >>> x = torch.randn(1, 3, 8, 9)
        >>> with model.use_tileable("x"):
        ...     shifted = model(x.roll(1, 3), 0.1).sample
        ...     torch.testing.assert_close(shifted, model(x, 0.1).sample.roll(1, 3))
        """
        periodic, before = self._periodic_axes(axes), self.periodic
        self._set_periodic(periodic)
        try:
            yield
        finally:
            self._set_periodic(before)

    @contextmanager
    def use_fixed_levels(self, size: tuple[int, int] | None) -> Iterator[None]:
        """A context in which only the finest level grows with the image: the others keep, at most, the grids that they
        have for an image of `size` (height, width); None changes nothing.

        Beyond the training sizes the 3x3 convolutions and the attention of these levels then go on seeing what they
        were trained on, and cost no more (after the resolution-aware UNet of HiDiffusion, arXiv 2311.17528).

        Raises:
            ValueError: a size that is not two integers of at least 1.

        >>> model = DFUModel(block_out_channels=(8, 8), layers_per_block=1, fourier_modes=(4, 2), attention_levels=())
        >>> grids = []
        >>> hook = model.mid_blocks[0].register_forward_pre_hook(lambda _, args: grids.append(args[0].shape[-2:]))
        >>> with model.use_fixed_levels((16, 16)):
        ...     for side in (12, 16, 31):
        ...         _ = model(torch.randn(1, 3, side, 40), 0.1)
        >>> [tuple(grid) for grid in grids]
        [(6, 8), (8, 8), (8, 8)]
        """
        is_pair = isinstance(size, (tuple, list)) and len(size) == 2
        if size is not None and not (is_pair and all(_is_integer(side) and side >= 1 for side in size)):
            raise ValueError(f"Levels are fixed for a size (height, width), two integers of at least 1, not {size!r}.")
        before, self._fixed_size = self._fixed_size, size
        try:
            yield
        finally:
            self._fixed_size = before

    @contextmanager
    def use_spectral_gain(self, gain: float) -> Iterator[None]:
        """A context in which the results of all Fourier layers are multiplied by `gain`.

        The larger the image, the less noise of a given level is in a Fourier mode, for it averages over more pixels,
        whereas each pixel has as much as in training: next to the 3x3 convolutions Fourier layers grow faint. A gain
        somewhat above 1 makes up for that. With gradient checkpointing the backward pass belongs inside, too.

        Raises:
            ValueError: a gain that is not a positive number.
        """
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
            raise ValueError(f"A spectral gain must be a positive number, but got {gain!r}.")
        layers = [module for module in self.modules() if isinstance(module, SpectralConv2d)]
        before = [layer.gain for layer in layers]
        for layer in layers:
            layer.gain = gain
        try:
            yield
        finally:
            for layer, value in zip(layers, before):
                layer.gain = value

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func=None, levels: Iterable[int] | None = None
    ) -> None:
        """As in diffusers: blocks keep their inputs only, and run again in the backward pass.

        Args:
            gradient_checkpointing_func: in place of torch's.
            levels: only the blocks of these levels, 0 being the full image, which holds most; None for all.

        Raises:
            ValueError: no levels, or one that the model does not have.
        """
        there = range(len(self.config.block_out_channels))
        levels = tuple(there if levels is None else [levels] if _is_integer(levels) else levels)
        if not levels or not all(level in there for level in levels):
            raise ValueError(f"This model has the levels 0 to {there[-1]}, but got levels={levels}.")
        super().enable_gradient_checkpointing(gradient_checkpointing_func)
        self._checkpointed_levels = levels

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in diffusers, from safetensors only, and with weights at aligned addresses: a loaded model repeats the
        saved one bit for bit.

        A `.bin` is never opened: it is a pickle. Weights mapped from a file begin at any address, where a CPU's matrix
        products take other paths and round differently; a copy in memory of their own puts that right.

        Raises:
            ValueError: `use_safetensors=False`.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "DFUModel loads safetensors only (use_safetensors=False asks for pickles): convert the file."
            )
        loaded = super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # (model, info) with output_loading_info=True
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | os.PathLike | dict,
        config: str | os.PathLike | dict | None = None,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **hub_arguments,
    ) -> "DFUModel":
        """Load one file of weights, in eval mode: for files that lie apart from their config.json.

        Not by way of diffusers' `FromOriginalModelMixin`, whose list of classes is closed and which would take the
        missing config of an unknown file for Stable Diffusion's.

        Args:
            pretrained_model_link_or_path_or_dict: a .safetensors file, a link to one on the Hub
                ("https://huggingface.co/<id>/blob/main/<file>.safetensors"), or a state dict.
            config: the model's configuration: a dict, a folder or file, or the id of a Hub repository. By default the
                config.json beside a local file.
            subfolder: where in the folder or repository the configuration is.
            torch_dtype: of the weights; None for that of the file.
            hub_arguments: `token`, `revision`, `cache_dir`, `local_files_only` and `force_download` for the Hub.

        Raises:
            ValueError: another kind of file, no configuration, or weights that are not of this configuration.
        """
        source = pretrained_model_link_or_path_or_dict
        if not isinstance(source, dict):
            source = str(source)
            if not source.endswith(".safetensors"):
                raise ValueError(f"Weights come from a .safetensors file or a state dict, but got {source!r}.")
            if config is None and os.path.isfile(source):
                config = os.path.dirname(os.path.abspath(source))
        if config is None:
            raise ValueError("Give `config`, a dict, folder or Hub id: only a local file has a folder to find it in.")
        if not isinstance(config, dict):
            config = cls.load_config(config, subfolder=subfolder, **hub_arguments)
        if not isinstance(source, dict):
            source = load_single_file_checkpoint(source, **hub_arguments)
        with torch.device("meta"):
            model = cls.from_config(config)
        try:
            # Copies: a state dict stays its owner's, and the file's values get aligned, see `from_pretrained`.
            model.load_state_dict({name: tensor.clone() for name, tensor in source.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"These weights are of another configuration than the one given: {error}") from error
        return model.to(dtype=torch_dtype).eval()

    def factorized(self, spectral_rank: float) -> "DFUModel":
        """A smaller model near this one, to be trained on: with its weights, those of the Fourier layers factorised by
        `SpectralConv2d.factorized`. All its parameters train, and nothing is checkpointed.

        Raises:
            ValueError: a rank outside (0, 1), a model that is factorised already, has no spectral path, or adapters.

        >>> model = DFUModel(block_out_channels=(32, 32), fourier_modes=(5, None), attention_levels=())
        >>> [round(m.num_parameters() / 1e6, 2) for m in (model, model.factorized(0.4))]
        [3.49, 1.14]
        """
        if not any(isinstance(module, SpectralConv2d) for module in self.modules()):
            raise ValueError("This model has no spectral weights that could be factorised.")
        if getattr(self, "peft_config", None):
            raise ValueError("This model has LoRA adapters: fuse them and unload them, or delete them, first.")
        with torch.device("meta"):
            model = self.from_config(self.config, spectral_rank=spectral_rank)
        state = dict(self.state_dict())
        for name, module in self.named_modules():
            if isinstance(module, SpectralConv2d):
                layer = module.factorized(spectral_rank).state_dict()
                state |= {f"{name}.{key}": value for key, value in layer.items()}
        model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
        return model.train(self.training)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict,
        prefix: None = None,
        adapter_name: str | None = None,
        metadata: dict | None = None,
        use_safetensors: bool = True,
        **hub_arguments,
    ) -> None:
        """As in diffusers, for what `save_lora_adapter` wrote: a .safetensors file or a state dict, without a prefix.

        Not by way of diffusers' method, which hands PEFT the state dict, and that refuses adapters of plain parameters
        such as the spectral weights. Of the file's metadata only what describes the layers is used. A LoRA that is
        refused leaves the model as it was.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, the id of a Hub repository, or a state dict.
            adapter_name: a new name; None makes one up.
            metadata: the LoRA's configuration, for a state dict or in place of the file's.
            hub_arguments: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download` and `proxies`.

        Raises:
            TypeError: an unknown argument (`hotswap` is one), or metadata that ask for more than LoRA layers.
            ValueError: a prefix, pickles, a name in use, or a LoRA for a model of another configuration.
        """
        # Imported here because it is private: should diffusers move it, nothing else may break.
        from diffusers.loaders.lora_base import _fetch_state_dict

        if prefix is not None or use_safetensors is False:
            raise ValueError(
                f"DFUModel loads LoRAs from safetensors and without a prefix, but got prefix={prefix!r} and "
                f"use_safetensors={use_safetensors!r}: save the LoRA with DFUModel.save_lora_adapter."
            )
        if unknown := sorted(hub_arguments.keys() - set(HUB_ARGUMENTS)):
            raise TypeError(f"load_lora_adapter takes no {', '.join(unknown)}; it takes {HUB_ARGUMENTS}.")
        adapters = getattr(self, "peft_config", {})
        name = adapter_name or get_adapter_name(self)
        if name in adapters:
            raise ValueError(f"This model has an adapter {name!r} already: give another `adapter_name`.")

        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
            **{**dict.fromkeys(HUB_ARGUMENTS), **hub_arguments},
        )
        config = _lora_config(state_dict, metadata)
        with torch.device("meta"):  # a twin without memory shows which weights belong to it
            twin = self.from_config(self.config)
            for other, its_config in {**adapters, name: config}.items():
                twin.add_adapter(its_config, other)
        expected = _peft().get_peft_model_state_dict(twin, adapter_name=name)
        if {key: p.shape for key, p in expected.items()} != {key: p.shape for key, p in state_dict.items()}:
            raise ValueError("This LoRA was made for a model of another configuration.")
        self.add_adapter(config, name)
        _peft().set_peft_model_state_dict(self, state_dict, name)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Regional compilation: as in diffusers, one graph for each kind of block (channels and size).

        A UNet has more kinds than torch allows graphs for one piece of code by default, so this raises that limit
        (`torch._dynamo.config.recompile_limit`) to four for each block: room for several image sizes.
        """
        blocks = sum(isinstance(module, DFUBlock) for module in self.modules())
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 4 * blocks)
        super().compile_repeated_blocks(*args, **kwargs)

    @property
    def periodic(self) -> tuple[bool, bool]:
        """For (rows, columns) whether images tile the plane at present: by configuration or in `use_tileable`."""
        return self.conv_in.periodic

    def _set_periodic(self, periodic: tuple[bool, bool]) -> None:
        for module in self.modules():
            if isinstance(module, DualConv2d):
                module.periodic = periodic

    def _periodic_axes(self, tileable: str | None) -> tuple[bool, bool]:
        """Whether rows and columns are periodic, from the names of the axes."""
        if tileable not in (None, "x", "y", "xy"):
            raise ValueError(f"tileable must be 'x', 'y', 'xy' or None, but got {tileable!r}.")
        periodic = tuple(axis in (tileable or "") for axis in "yx")
        boundary = _parse_boundary(self.config.spectral_boundary)
        if any(joined and kind == "mirror" for joined, kind in zip(periodic, boundary)):
            raise ValueError(
                f"tileable={tileable!r} joins edges that this model's spectral_boundary="
                f"{self.config.spectral_boundary!r} (rows, columns) keeps apart: it takes a model whose boundary is "
                f"'periodic' along these axes."
            )
        return periodic

    def _coarser(self, height: int, width: int, level: int) -> tuple[int, int]:
        """The grid of a level below one of (height, width): half, rounded up, or what `use_fixed_levels` allows."""
        sides = (height + 1) // 2, (width + 1) // 2
        if self._fixed_size is None:
            return sides
        return tuple(min(side, -(-fixed // 2**level)) for side, fixed in zip(sides, self._fixed_size))

    def _run(self, block: DFUBlock, *args) -> torch.Tensor:
        if self.gradient_checkpointing and block.level in self._checkpointed_levels and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _embed(self, sample, timestep, class_labels, augment_labels) -> torch.Tensor:
        """Embedding (batch, 4 * block_out_channels[0]) of noise level and labels."""
        timestep = torch.as_tensor(timestep, device=sample.device).to(torch.float32).expand(sample.shape[0])
        channels = self.config.block_out_channels[0]
        embedding = get_timestep_embedding(timestep, channels, flip_sin_to_cos=True).to(sample.dtype)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels).to(sample.dtype)
        if self.augment_embedding is not None:
            if augment_labels is None:  # zeros, and with them a gradient of zero: DDP waits for one of every parameter
                augment_labels = embedding.new_zeros(len(embedding), self.config.num_augment_labels)
            embedding = embedding + self.augment_embedding(augment_labels.to(sample.dtype))
        return F.silu(self.embedding_out(F.silu(self.embedding_in(embedding))))

    def _check_config(self) -> None:
        config = self.config
        channels, modes = config.block_out_channels, config.fourier_modes
        for name in ("block_out_channels", "fourier_modes", "attention_levels"):
            if not isinstance(config[name], (list, tuple)):
                raise ValueError(f"{name} must be a list or tuple, but got {config[name]!r}.")
        if not channels or not all(_is_integer(n) and n >= 1 for n in channels) or channels[0] < 4 or channels[0] % 2:
            raise ValueError(
                f"block_out_channels must be positive integers, one per level, the first even and at least 4, "
                f"but got {channels}."
            )
        if len(modes) != len(channels):
            raise ValueError(
                f"fourier_modes must have one entry, (rows, columns), int or None, for each of the {len(channels)} "
                f"levels of block_out_channels={channels}, but got {modes}."
            )
        sides = config.sample_size if isinstance(config.sample_size, (list, tuple)) else [config.sample_size] * 2
        if len(sides) != 2 or not all(_is_integer(side) and side >= 1 for side in sides):
            raise ValueError(
                f"sample_size must be a positive integer or (height, width), but got {config.sample_size!r}."
            )
        _check_conv_type(config.conv_type)
        _parse_boundary(config.spectral_boundary)
        _parse_rank(config.spectral_rank)
        for level, entry in enumerate(modes):
            if entry is not None:
                _parse_modes(entry)
            elif config.conv_type == "spectral":
                raise ValueError(
                    f"conv_type='spectral' needs Fourier modes on every level, but fourier_modes[{level}] is None. "
                    f"Give it modes, or use conv_type='dual', where such a level keeps its 3x3 convolutions."
                )
        if not all(level in range(len(channels)) for level in config.attention_levels):
            raise ValueError(
                f"attention_levels must be indices of levels, from 0 to {len(channels) - 1}, but got "
                f"{config.attention_levels}."
            )
        if not isinstance(config.dropout, (int, float)) or not 0 <= config.dropout < 1:
            raise ValueError(f"dropout must be a number in [0, 1), but got {config.dropout!r}.")
        for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "num_augment_labels"):
            lowest = 0 if name == "num_augment_labels" else 1
            if not _is_integer(config[name]) or config[name] < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, but got {config[name]!r}.")
        if not isinstance(config.norm_eps, (int, float)) or not config.norm_eps > 0:
            raise ValueError(f"norm_eps must be a positive number, but got {config.norm_eps!r}.")
        classes = config.num_class_embeds
        if classes is not None and (not _is_integer(classes) or classes < 1):
            raise ValueError(f"num_class_embeds must be a positive integer or None, but got {classes!r}.")

    def _check_inputs(self, sample, timestep, class_labels, augment_labels) -> None:
        if not torch.is_tensor(sample) or not sample.is_floating_point():
            got = sample.dtype if torch.is_tensor(sample) else type(sample).__name__
            raise TypeError(f"`sample` must be a floating point tensor, but got {got}.")
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or 0 in sample.shape:
            raise ValueError(
                f"`sample` must have shape (batch, {self.config.in_channels}, height, width) without empty "
                f"dimensions, as in_channels={self.config.in_channels}, but got {tuple(sample.shape)}."
            )
        if not torch.is_tensor(timestep) and not isinstance(timestep, (int, float)):
            raise TypeError(f"`timestep` must be a number or a tensor, but got {type(timestep).__name__}.")
        if torch.is_tensor(timestep) and tuple(timestep.shape) not in ((), (1,), (sample.shape[0],)):
            raise ValueError(
                f"`timestep` must be a number, a scalar tensor or one value for each of the {sample.shape[0]} images, "
                f"but got shape {tuple(timestep.shape)}."
            )
        for name, labels in (("class_labels", class_labels), ("augment_labels", augment_labels)):
            if labels is not None and not torch.is_tensor(labels):
                raise TypeError(f"`{name}` must be a tensor (or None), not {type(labels).__name__}.")
        self._check_labels(sample.shape[0], class_labels)
        expected = (sample.shape[0], self.config.num_augment_labels)
        if augment_labels is not None and tuple(augment_labels.shape) != expected:
            raise ValueError(
                f"`augment_labels` must have shape (batch, num_augment_labels) = {expected}, but got "
                f"{tuple(augment_labels.shape)}."
            )

    def _check_labels(self, batch: int, class_labels) -> None:
        classes = self.config.num_class_embeds
        if classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given to an unconditional model (num_class_embeds is None).")
            return
        if class_labels is None:
            raise ValueError(f"This model is class-conditional: give `class_labels`, integers in [0, {classes}).")
        if tuple(class_labels.shape) != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` must be {batch} integers, one per image, but got shape {tuple(class_labels.shape)} "
                f"and dtype {class_labels.dtype}."
            )
        # Looking at values on an accelerator would stop the queue; there the pipeline checks them once.
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling():
            if class_labels.min() < 0 or class_labels.max() >= classes:
                raise ValueError(f"`class_labels` must lie in [0, {classes}), but got {class_labels.tolist()}.")
