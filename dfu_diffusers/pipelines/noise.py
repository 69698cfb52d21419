# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Noise that is one function at all sizes, and moving images between grids."""

import math

import torch
import torch.nn.functional as F

from ..models.modes import transform

NOISE_LEVELS = 32  # octaves of frequency on an axis: room for sides of up to 2^31 pixels


def nested_noise(
    shape: tuple[int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """White unit noise that is the same function at every size: the counterpart of diffusers' `randn_tensor`.

    Every pixel is an independent N(0, 1). Every Fourier mode (in cycles per image, pixel j of N at (j + 1/2)/N) has
    the same coefficient at all sizes that resolve it (below the Nyquist frequency of both axes), in units of white
    noise (norm="ortho"). The noise is an orthogonal transform, `fourier_basis`, of the first H rows and W columns of
    an infinite array of independent normals; this is why it is white.

    The normals are drawn on the CPU in blocks, one octave of row frequencies by one octave of column frequencies, each
    with its own seed. Only the seeds come from `generator`, so it advances by the same amount at every size.

    Args:
        shape: (batch, channels, H, W), any H, W >= 1.
        generator: source of the seeds; a list has one generator per image. By default torch's own on the CPU.
        device, dtype: of the result. It is computed on the CPU, so it is the same on all devices.

    >>> small, large = (nested_noise((1, 3, n, n), torch.Generator().manual_seed(0)) for n in (32, 96))
    >>> torch.allclose(small.mean() * 32, large.mean() * 96, atol=1e-5)  # mode (0, 0) is the sum over sqrt(H W)
    True
    """
    batch, channels, height, width = map(int, shape)  # also of NumPy's integers
    generators = generator if isinstance(generator, list) else [generator] * batch
    normals = nested_normals((batch, channels, height, width), generators)
    rows, columns = (fourier_basis(n, n).to(normals) for n in (height, width))
    return transform(rows.T, normals, columns.T).to(device, dtype)


def nested_normals(shape: tuple[int, int, int, int], generators: list[torch.Generator | None]) -> torch.Tensor:
    """The first H rows and W columns, (batch, channels, H, W), float32 on the CPU, of infinite arrays of normals, one
    array for each generator."""
    _, channels, height, width = shape
    return torch.stack([_endless_normals(channels, height, width, each) for each in generators])


def _endless_normals(channels: int, height: int, width: int, generator: torch.Generator | None) -> torch.Tensor:
    """The first rows and columns, (channels, height, width), float32, of an infinite array of normals."""
    device = "cpu" if generator is None else generator.device
    table = (NOISE_LEVELS, NOISE_LEVELS)
    seeds = torch.randint(2**32, table, generator=generator, device=device).tolist()  # CPU seeds use 32 bits
    normals, source = torch.empty(channels, height, width, device="cpu", dtype=torch.float32), torch.Generator("cpu")
    for row_seeds, (top, bottom) in zip(seeds, _octaves(height)):
        for seed, (left, right) in zip(row_seeds, _octaves(width)):
            shape = (channels, bottom - top, right - left)
            source.manual_seed(seed)
            block = torch.randn(shape, generator=source, device="cpu", dtype=torch.float32)  # not torch's defaults
            normals[:, top:bottom, left:right] = block[:, : height - top, : width - left]
    return normals


def _octaves(side: int) -> list[tuple[int, int]]:
    """The ranges 0..1, 1..2, 2..4, 4..8 and so on, up to the one that includes `side`."""
    return [(0, 1)] + [(2**level, 2 ** (level + 1)) for level in range((side - 1).bit_length())]


def fourier_resample(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """x (batch, channels, H, W) on the grid `size`, with only the frequencies that both grids resolve.

    White noise stays white; if the grid shrinks to h, w, its standard deviation is multiplied by sqrt(h w / (H W)).
    Shrinking undoes enlarging.
    """
    rows, columns = (_resampling_matrix(old, new).to(x) for old, new in zip(x.shape[-2:], size))
    return transform(rows, x, columns)


def _resampling_matrix(old: int, new: int) -> torch.Tensor:
    count = min(old, new)
    return fourier_basis(count, new).T @ fourier_basis(count, old) * math.sqrt(new / old)


def fourier_basis(count: int, n: int) -> torch.Tensor:
    """The lowest `count` <= n functions of the real, pixel-centred Fourier basis on n pixels: (count, n), orthonormal.

    Row 0 is constant; rows 2k - 1 and 2k are the sine and cosine of k cycles per image. For even n the last row is the
    sine at the Nyquist frequency; its cosine is zero at all pixel centres. float64, on the CPU.
    """
    row = torch.arange(count, device="cpu")
    cycles = (row + 1) // 2
    phase = torch.outer(cycles, 2 * torch.arange(n, device="cpu") + 1) % (2 * n)  # integers: exact to the last bit
    angle = phase.double() * (math.pi / n)
    alone = (cycles == 0) | (2 * cycles == n)
    scale = torch.where(alone, 1, 2).double().div(n).sqrt()
    return scale[:, None] * torch.where((row % 2 == 1)[:, None], angle.sin(), angle.cos())


def resize_bicubic(
    x: torch.Tensor, size: tuple[int, int], periodic: tuple[bool, bool] = (False, False), antialias: bool = False
) -> torch.Tensor:
    """x (batch, channels, H, W) on the grid `size`; along `periodic` axes opposite edges are neighbours."""
    frames = []
    for dim, old, new, joined in zip((2, 3), x.shape[-2:], size, periodic):
        step = old // math.gcd(old, new)  # this many pixels are a whole number of new pixels
        frame = joined * step * math.ceil(2 * max(1, old / new) / step)  # as wide as the kernel reaches
        if joined:
            x = x.index_select(dim, torch.arange(-frame, old + frame, device=x.device) % old)
        frames.append(frame * new // old)
    (top, left), (height, width) = frames, size
    framed = (height + 2 * top, width + 2 * left)
    x = F.interpolate(x, framed, mode="bicubic", align_corners=False, antialias=antialias)
    return x[..., top : top + height, left : left + width]


def growing_sizes(small: tuple[int, int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes from `small` (exclusive) to `size`, growing by equal factors of at most 2, in as few steps as possible.

    >>> growing_sizes((64, 64), (192, 192)), growing_sizes((32, 64), (64, 128)), growing_sizes((64, 64), (64, 64))
    ([(111, 111), (192, 192)], [(64, 128)], [])
    """
    factor = max(large / little for large, little in zip(size, small))
    stages = math.ceil(math.log2(factor) - 1e-9)
    ratios = [(large / little) ** (1 / stages) for large, little in zip(size, small)] if stages else []
    return [tuple(round(side * ratio**i) for side, ratio in zip(small, ratios)) for i in range(1, stages + 1)]
