# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Spectral convolution: learned mixing of the lowest Fourier modes (Li et al., arXiv 2010.08895).

Conventions, held by tests/test_layers.py and the slow twins in tests/reference:
    grid          pixel j of N is the cell around (j + 1/2) / N of the unit interval
    coefficients  c(k, l) = 1/(HW) sum v(i, j) exp(-2 pi i (k y_i + l x_j)), the same on every grid that resolves v
    modes (r, c)  rows k = -r .. r-1, columns l = 0 .. c-1; only those below the Nyquist frequency are used
    boundary      "periodic": waves of period 1; "mirror": of period 2, on the image together with its mirror image
"""

import math
from typing import Literal

import torch
from torch import nn

from .cache import TensorCache
from .cpu_kernels import LARGE_WEIGHT, _is_plain_on_cpu, _MixModes
from .resampling import _is_symbolic

BOUNDARIES = ("periodic", "mirror")
Boundary = Literal["periodic", "mirror"] | tuple[Literal["periodic", "mirror"], Literal["periodic", "mirror"]]


def _fourier_matrices(size: tuple, new_size: tuple, modes: tuple, periods: tuple, device, dtype):
    """Real matrices of the truncated, pixel-centred DFT from grid `size` and its inverse onto grid `new_size`.

    With K rows and L columns of modes kept, the matrices act on channels-last data, axis by axis:
        forward_w (2L, W)     real signal       -> [real | imaginary] of columns l
        forward_h (2K, 2H)    (h, real/imag)    -> [real | imaginary] of rows k
        inverse_h (2H', 4K)   [rr | ri | ir | ii] products of data and weight parts -> (h', real/imag)
        inverse_w (W', 2L)    [real | imaginary] of columns l -> real signal
    The 1/(HW), the half-pixel phases, the rule of complex multiplication and the double weight of columns l > 0 (each
    stands for its conjugate twin, too) are all folded in. If sizes are symbolic (`torch.export`), no shape may depend
    on how many modes they resolve: all modes are kept, and the matrices are zero for those that are not resolved.

    `periods` are 1, or 2 along an axis where the image is continued by its mirror image. The doubled image is even, so
    its coefficients are sums of cosines over the first half. The result is evaluated on the first half only.

    Returns the four matrices, the first row of the weights that is used, K and L.
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


_cached_fourier_matrices = TensorCache(_fourier_matrices, max_bytes=2**28)


class SpectralConv2d(nn.Module):
    """Learned complex channel mixing of the lowest Fourier modes, y(k, l) = R(k, l) x(k, l) (Li et al., eq. 4-5).

    Small real matrix products compute the kept modes, mix their channels and evaluate them on the output grid, which
    may have another size. No full FFT is computed. Works at every size from 1x1, in any floating dtype.

    Args:
        in_channels, out_channels: channels of input and output.
        modes: (r, c): rows k = -r .. r-1 and columns l = 0 .. c-1, in cycles per image. An int k means (k, k + 1), the
            same band on both axes.
        init_scale: factor on the initial weights. At 1 a band-limited input keeps its power.
        boundary: "periodic": waves continue at the opposite edge. "mirror": waves are reflected, so opposite edges do
            not affect each other. Or a pair of these for (rows, columns). Mirror applies the periodic layer to the
            image together with its mirror image, twice the size, and keeps the original part. Modes then count half
            cycles per image: the same band needs twice as many.
        rank: None for a full matrix in each mode. A share of the channels in (0, 1) means R = U S(k, l) V, where
            U (in, p) and V (q, out) are the same in all modes (a Tucker decomposition) and p, q =
            `reduced(channels, rank)`.

    Attributes:
        weight: (2r * c, in_channels, 2 * out_channels), real: for each mode, row by row, [real | imaginary] of R; with
            `rank` those of S, (2r * c, p, 2q).
        reduce, expand: U and V, real, of a layer with `rank`; otherwise None.

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
        self.boundary, self.rank = _parse_boundary(boundary), rank
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
        """Number of channels in which modes are mixed: the share `rank`, but at least eight (or all, if fewer).

        >>> [SpectralConv2d.reduced(channels, 0.4) for channels in (3, 16, 128)]
        [3, 8, 51]
        """
        return channels if _parse_rank(rank) is None else max(round(rank * channels), min(channels, 8))

    @torch.no_grad()
    def factorized(self, rank: float) -> "SpectralConv2d":
        """A layer with `rank` that approximates this one. U and V span the leading singular vectors of the weights of
        all modes together (a higher-order singular value decomposition, De Lathauwer et al. 2000).

        Raises:
            ValueError: a rank outside (0, 1), or a layer that is factorised already.
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
        """Args: x (batch, in_channels, H, W); size (H', W') of the output; residual (batch, out_channels, H', W'), to
        which the result is added in place, which saves a pass over memory: it is overwritten."""
        new_height, new_width = size = _check_layer_input(x, self.in_channels, size)
        batch, _, height, width = x.shape
        x = x.to(_compute_dtype(x))
        periods = tuple(2 if kind == "mirror" else 1 for kind in self.boundary)
        key = ((height, width), size, self.modes, periods, x.device, x.dtype)
        # A compiled graph contains the construction: cached tensors would be inputs that force recompilation. Matrices
        # made under fake tensors would be fake, too, and useless to later calls.
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


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product on x runs: autocast lowers everything but float64."""
    device = x.device.type
    # torch.compile in torch 2.6 cannot trace `is_autocast_available`; only meta tensors need that check.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if x.dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
