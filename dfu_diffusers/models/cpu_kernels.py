# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Operations whose own backward pass is faster on a CPU than autograd's."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.function import once_differentiable

LARGE_WEIGHT = 1 << 20  # numbers in a tensor that a CPU's cache should hold


def _is_plain_on_cpu(x: torch.Tensor) -> bool:
    """Whether the functions of this module can be used: not under compilers, tracers and `torch.func`, which trace the
    single operations, and not for subclasses of tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor:
        return False
    return x.device.type == "cpu" and torch._C._functorch.maybe_current_level() is None


class _MixModes(torch.autograd.Function):
    """x (rows * columns, 2b, in) times weight[first : first + rows, :columns], in the dtype of x.

    For large weights on a CPU. Autograd would keep a sliced or lower-precision copy of them for the backward pass, and
    write their gradient two to three times. Here weights and gradient are passed over once, in blocks of rows that
    stay in the cache.
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


def _normalise(x: torch.Tensor, weight, bias, groups: int, eps: float):
    """Group normalisation of channels-last x on a CPU, and the means and 1 / deviations (batch, groups).

    This is torch's own, except in half precision on maps below 1,024 pixels. There torch loops over the few channels
    of a group, and vectorised passes over the whole tensor are up to ten times as fast."""
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
    """Group normalisation of channels-last tensors on a CPU. Its backward is two to four times as fast as torch's:
    it makes four vectorised passes over the data instead of torch's loops."""

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
