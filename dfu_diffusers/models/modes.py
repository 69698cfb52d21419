# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Modes: how pictures of different sizes are related.

Along an axis of n pixels a picture is a sum of n cosine modes, cos(pi k y) with y = (j + 1/2) / n and k = 0 .. n-1
(the DCT-II). Along an axis that tiles it is a sum of Fourier modes instead. Coefficients do not depend on the size:
the k-th is the mean of the picture times the k-th mode (times sqrt(2) for k > 0). So a small picture has the lowest
modes of a large one: the spaces of pictures are nested.

A pixel holds the mean of the picture over its area, not its value at the centre. This multiplies mode k by
sinc(k / 2n), down to 0.64 for the highest. With `averaged`, `to_modes` divides by this factor and `from_modes`
multiplies by it.

White noise of deviation s on h x w pixels has independent coefficients of deviation s / sqrt(h w).
"""

import contextlib
import math

import torch

from .cache import TensorCache

Axes = tuple[bool, bool]
DETAIL_SIDE = 64  # px, the side of the pictures for which the `detail_std` of a refiner is given


def num_modes(n: int, periodic: bool = False) -> int:
    """Number of modes of n pixels that larger grids have, too. On a periodic axis an even number of pixels also has a
    sine at the Nyquist frequency, without its cosine: it is left out.

    >>> num_modes(16), num_modes(16, periodic=True), num_modes(15, periodic=True)
    (16, 15, 15)
    """
    return n - 1 if periodic and n % 2 == 0 else n


def mode_basis(n: int, periodic: bool = False, count: int | None = None) -> torch.Tensor:
    """The lowest `count` (by default all n) modes on n pixels, (count, n), orthonormal rows, float32 on the CPU.

    Row k of the cosine basis is cos(pi k (j + 1/2) / n). In the Fourier basis row 0 is constant, and rows 2k - 1 and
    2k are the sine and cosine of k cycles. All rows are scaled to unit length.
    """
    return _cached_basis(n, periodic, n if count is None else count)


def _basis(n: int, periodic: bool, count: int) -> torch.Tensor:
    waves, half_cycles = _waves(n, periodic, count)
    alone = (half_cycles == 0) | (half_cycles == n)  # n half cycles: the sine at the Nyquist frequency
    return (waves * torch.where(alone, 1, 2).double().div(n).sqrt()[:, None]).float()


def _waves(n: int, periodic: bool, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The waves of the lowest modes at the centres of n pixels, (count, n) in float64, and their half cycles."""
    row = torch.arange(count, device="cpu")
    half_cycles = (row + 1) // 2 * 2 if periodic else row
    # The phase pi h (2j + 1) / 2n is reduced as an integer, so that it is exact.
    phase = torch.outer(half_cycles, 2 * torch.arange(n, device="cpu") + 1) % (4 * n)
    angle = phase.double() * (math.pi / (2 * n))
    waves = torch.where((row % 2 == 1)[:, None], angle.sin(), angle.cos()) if periodic else angle.cos()
    return waves, half_cycles


def cell_averages(cells: int, count: int, periodic: bool = False) -> torch.Tensor:
    """The mean of each of the lowest `count` modes over each of the cells of an axis, (cells, count), float64.

    Modes beyond those that the cells have are aliased: their means look like those of lower modes.

    >>> cell_averages(2, 2)  # of 1 and sqrt(2) cos(pi y)
    tensor([[ 1.0000,  0.9003],
            [ 1.0000, -0.9003]], dtype=torch.float64)
    """
    waves, half_cycles = _waves(cells, periodic, count)
    half_cycles = half_cycles.double()
    scale = torch.where(half_cycles == 0, 1, 2).sqrt() * torch.sinc(half_cycles / (2 * cells))
    return (waves * scale[:, None]).T


_cached_basis = TensorCache(_basis, max_bytes=2**29)  # room for a picture of 8192 pixels a side


def pixel_response(count: int, n: int, periodic: bool = False, device="cpu") -> torch.Tensor:
    """The factor, (count,), by which averaging over the pixels of an axis of n weakens each mode."""
    row = torch.arange(count, device=device, dtype=torch.float32)
    half_cycles = (row + 1).div(2, rounding_mode="floor") * 2 if periodic else row
    return torch.sinc(half_cycles / (2 * n))


def transform(rows: torch.Tensor, x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """rows x columns^T for each picture x (..., H, W), in the precision of x also under `torch.autocast`."""
    knows_autocast = torch.amp.is_autocast_available(x.device.type)  # not the meta device
    with torch.autocast(x.device.type, enabled=False) if knows_autocast else contextlib.nullcontext():
        return rows @ x @ columns.T


def to_modes(
    x: torch.Tensor, size: tuple[int, int] | None = None, periodic: Axes = (False, False), averaged: bool = False
) -> torch.Tensor:
    """Coefficients of the modes of x that a grid of `size` has, too; by default all modes of x.

    Args:
        x: (..., H, W).
        size: (height, width); the result has `num_modes` of min(height, H) rows, and columns likewise.
        periodic: axes, (rows, columns), that tile.
        averaged: x holds averages over pixels: divide by their damping of each mode.
    """
    (height, width), (new_height, new_width) = x.shape[-2:], size or x.shape[-2:]
    rows, columns = num_modes(min(height, new_height), periodic[0]), num_modes(min(width, new_width), periodic[1])
    x = x if x.dtype == torch.float64 else x.float()
    basis_h, basis_w = (
        mode_basis(n, axis, count).to(x) for n, axis, count in zip((height, width), periodic, (rows, columns))
    )
    modes = transform(basis_h, x, basis_w) / math.sqrt(height * width)
    return modes / _response((rows, columns), (height, width), periodic, x.device) if averaged else modes


def from_modes(
    modes: torch.Tensor, size: tuple[int, int], periodic: Axes = (False, False), averaged: bool = False
) -> torch.Tensor:
    """The picture (..., height, width) of `size` with these modes and no others; with `averaged` the mean over each
    pixel rather than the value at its centre."""
    rows, columns = modes.shape[-2:]
    if averaged:
        modes = modes * _response((rows, columns), size, periodic, modes.device)
    basis_h, basis_w = (mode_basis(n, axis, k).to(modes) for n, axis, k in zip(size, periodic, (rows, columns)))
    return transform(basis_h.T, modes * math.sqrt(math.prod(size)), basis_w.T)


def resize_modes(x: torch.Tensor, size: tuple[int, int], periodic: Axes = (False, False)) -> torch.Tensor:
    """x (..., H, W) on the grid `size`. Modes that both grids have are kept; all others are zero."""
    return from_modes(to_modes(x, size, periodic), size, periodic)


def beyond(x: torch.Tensor, coarse: tuple[int, int], periodic: Axes = (False, False)) -> torch.Tensor:
    """The part of x (..., H, W) in modes that the grid `coarse` does not have."""
    return from_modes(to_modes(x, coarse, periodic), x.shape[-2:], periodic).neg_().add_(x)  # in place: x can be large


def average_pixels(x: torch.Tensor, periodic: Axes = (False, False)) -> torch.Tensor:
    """The mean over each pixel of the picture whose values at pixel centres are x (..., H, W)."""
    return from_modes(to_modes(x, periodic=periodic), x.shape[-2:], periodic, averaged=True)


def unaverage_pixels(x: torch.Tensor, periodic: Axes = (False, False)) -> torch.Tensor:
    """The inverse of `average_pixels`: values at pixel centres from the means over pixels, x (..., H, W)."""
    return from_modes(to_modes(x, periodic=periodic, averaged=True), x.shape[-2:], periodic)


def share_beyond(size: tuple[int, int], coarse: tuple[int, int], periodic: Axes = (False, False)) -> float:
    """The share of the modes of the grid `size` that the grid `coarse` does not have.

    >>> share_beyond((32, 32), (16, 16)), share_beyond((32, 16), (16, 16))
    (0.75, 0.5)
    """
    kept = math.prod(num_modes(min(n, c), axis) for n, c, axis in zip(size, coarse, periodic))
    return 1 - kept / math.prod(size)


def octave_sizes(size: tuple[int, int], base: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids from `base` to `size`: sides double until they reach those of `size`. A side that is smaller in `size`
    than in `base` shrinks in the second grid.

    >>> octave_sizes((97, 512), (16, 16))
    [(16, 16), (32, 32), (64, 64), (97, 128), (97, 256), (97, 512)]
    >>> octave_sizes((9, 40), (16, 16)), octave_sizes((16, 16), (16, 16))
    ([(16, 16), (9, 32), (9, 40)], [(16, 16)])
    """
    sizes = [tuple(base)]
    while sizes[-1] != tuple(size):
        sizes.append(tuple(min(2 * last, side) for last, side in zip(sizes[-1], size)))
    return sizes


def octave_std(config, size: tuple[int, int]) -> float:
    """The deviation that a refiner of this configuration expects of the detail of a picture of (height, width), in
    units of white noise: `detail_std` at 64 px, and a power law of the side. Edges alone have an exponent of -1/2:
    their share of the pixels halves from octave to octave.

    >>> octave_std({"detail_std": 0.1, "detail_exponent": -0.25}, (1024, 1024))
    0.05
    """
    side = math.sqrt(math.prod(size))
    return config["detail_std"] * (side / DETAIL_SIDE) ** config.get("detail_exponent", 0)


def _response(counts, size, periodic, device) -> torch.Tensor:
    rows, columns = (pixel_response(k, n, axis, device) for k, n, axis in zip(counts, size, periodic))
    return rows[:, None] * columns
