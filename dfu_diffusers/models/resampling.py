# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Resampling of feature maps: area averages where they shrink, the nearest pixel centre where they grow."""

import torch
import torch.nn.functional as F


def _is_symbolic(*sizes) -> bool:
    return any(isinstance(n, torch.SymInt) for n in sizes)


def resample(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resample x (batch, channels, H, W) to the grid `size`: area average where it shrinks, nearest pixel centre where
    it grows. Aligned with `SpectralConv2d`: a pixel is a cell of the unit square."""
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
    # Averages of a single image come out in another layout, in which the next convolution is many times slower.
    return x.contiguous(memory_format=torch.channels_last)


def _area_resize(x: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    """Exact area average along `dim` onto n <= N cells: a pixel is weighted by the share of it that a cell covers."""
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
        # In float32, as in F.interpolate: some centres lie between two pixels, and both must round to the same one.
        scale = torch.full_like(cells, old, dtype=torch.float32) / n
        return x.index_select(dim, ((cells + 0.5) * scale).floor().long())
    pixels = torch.arange(old, device=x.device)
    ends = torch.minimum((cells[:, None] + 1) * old, (pixels + 1) * n)
    covered = (ends - torch.maximum(cells[:, None] * old, pixels * n)).clamp(min=0)
    return torch.tensordot(x, covered.to(x.dtype) / old, [[dim], [1]]).movedim(-1, dim)
