"""Slow, obvious twin of `SpectralConv2d`: a direct sum over every pixel and mode in complex128."""

import torch


def coefficient(x: torch.Tensor, k: int, l: int) -> torch.Tensor:  # noqa: E741
    """c(k, l) of x (batch, channels, H, W), pixel centres at (j + 1/2) / N: (batch, channels)."""
    return (x.to(torch.complex128) * wave(*x.shape[-2:], -k, -l)).mean((-2, -1))


def wave(height: int, width: int, k: int, l: int) -> torch.Tensor:  # noqa: E741
    """exp(2 pi i (k y + l x)) at the pixel centres of the grid: (H, W)."""
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    return torch.exp(2j * torch.pi * (k * y[:, None] + l * x[None, :]))


def spectral_conv2d(x: torch.Tensor, weight: torch.Tensor, modes: tuple, size: tuple | None = None) -> torch.Tensor:
    """x (batch, in, H, W), weight (2r * c, in, 2 * out) as [real | imaginary] -> (batch, out, *size) in float64."""
    (r, c), (height, width) = modes, x.shape[-2:]
    new_height, new_width = size or (height, width)
    real, imaginary = weight.double().chunk(2, dim=-1)
    matrices = torch.complex(real, imaginary).view(2 * r, c, *real.shape[1:])
    out = torch.zeros(x.shape[0], real.shape[-1], new_height, new_width, dtype=torch.float64)
    for k in range(-r, r):
        for l in range(c):  # noqa: E741
            if 2 * abs(k) >= min(height, new_height) or 2 * l >= min(width, new_width):
                continue  # at or beyond the Nyquist frequency of one of the grids
            y = coefficient(x, k, l) @ matrices[k + r, l]  # complex (batch, out)
            twice = 1 if l == 0 else 2  # column -l of a real signal is the conjugate of column l
            out += twice * (y[:, :, None, None] * wave(new_height, new_width, k, l)).real
    return out


def mirror_conv2d(x: torch.Tensor, weight: torch.Tensor, modes: tuple, size: tuple | None, axes: tuple):
    """`spectral_conv2d` on x followed by its mirror image along `axes` (2: rows, 3: columns), and cut back."""
    new_height, new_width = size = size or x.shape[-2:]
    for axis in axes:
        x = torch.cat([x, x.flip(axis)], axis)
    size = tuple(2 * n if axis in axes else n for axis, n in zip((2, 3), size))
    return spectral_conv2d(x, weight, modes, size)[:, :, :new_height, :new_width]


def band_limited(height: int, width: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """One fixed real function with |k| <= rows, |l| <= columns, sampled on the grid: (1, 3, H, W) float64."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(1, 3, height, width, dtype=torch.float64)
    for k in range(-rows, rows + 1):
        for l in range(columns + 1):  # noqa: E741
            amplitude = torch.randn(3, dtype=torch.complex128, generator=generator)
            out += (amplitude[None, :, None, None] * wave(height, width, k, l)).real
    return out


def band_limited_cosines(height: int, width: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """One fixed function of cos(pi k y) cos(pi l x) with k <= rows, l <= columns: (1, 3, H, W) float64."""
    amplitudes = torch.randn(3, rows + 1, columns + 1, generator=torch.Generator().manual_seed(seed)).double()

    def cosines(frequencies, n):
        k, y = torch.arange(frequencies + 1, dtype=torch.float64), (torch.arange(n, dtype=torch.float64) + 0.5) / n
        return (torch.pi * k[:, None] * y).cos()

    return torch.einsum("okl,ky,lx->oyx", amplitudes, cosines(rows, height), cosines(columns, width))[None]
