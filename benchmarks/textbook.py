"""The Fourier layer as textbooks have it, to compare with."""

import torch


class RfftSpectralConv2d(torch.nn.Module):
    """The textbook Fourier layer: full rfft2, complex einsum over the kept modes, full irfft2, onto the grid `size`.
    Grids that do not hold all modes take part in fewer."""

    def __init__(self, in_channels: int, out_channels: int, modes: tuple[int, int]):
        super().__init__()
        self.out_channels, (self.r, self.c) = out_channels, modes
        weight = torch.randn(2, in_channels, out_channels, self.r, self.c, dtype=torch.complex64)
        self.weight = torch.nn.Parameter(torch.view_as_real(weight / in_channels**0.5))

    def forward(self, x: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        size = tuple(size or x.shape[-2:])
        height, width = map(min, x.shape[-2:], size)
        r, c = min(self.r, max(1, height // 2)), min(self.c, width // 2 + 1)
        modes = torch.fft.rfft2(x, norm="forward")
        out = modes.new_zeros(x.shape[0], self.out_channels, size[0], size[1] // 2 + 1)
        for rows, weight in zip((slice(r), slice(-r, None)), torch.view_as_complex(self.weight.float())):
            kept = (..., rows, slice(c))
            out[kept] = torch.einsum("bikl,iokl->bokl", modes[kept], weight[kept])
        return torch.fft.irfft2(out, s=size, norm="forward")
