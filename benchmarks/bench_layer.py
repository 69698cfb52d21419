#!/usr/bin/env python
"""What does a dual convolution cost beside its 3x3 convolution, and its spectral part beside other Fourier layers?

    python benchmarks/bench_layer.py [--cases forward:64:16 training:64:4] [--dtypes float32 bfloat16]
    PYTHONPATH=DFU python benchmarks/bench_layer.py --official_layer training.networks:SpectralConv2d   # the authors'

A case is KIND:SIZE:BATCH with KIND forward or training (forward and backward), for layers of --channels and --modes.
Contenders, in turns:
    spectral         SpectralConv2d
    rfft2            the textbook: rfft2, einsum over the kept modes, irfft2; on grids that hold the modes
    neuraloperator   its SpectralConv, if it is installed (`pip install neuraloperator`)
    official         --official_layer, made as Layer(in, out, rows, columns)
    convolution      3x3
    dual             DualConv2d: the 3x3 convolution, and the spectral part accumulated into it
Columns: their times; how many times as long the others take as ours; dual / convolution; operations a second of the
dual convolution as a share of this machine's in a large matrix product; most memory that the dual convolution holds.

In bfloat16 ours and the convolution have weights and images of it in a forward pass, and autocast in training. The
others keep float32 weights: forward passes in bfloat16 go without them, and in training they stay in float32.
"""

import importlib

import torch

from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.layers import DualConv2d
from dfu_diffusers.models.spectral import SpectralConv2d
from measure import gemm_peak, milliseconds, operations, parse_case, parser, peak_bytes, race, ratio
from textbook import RfftSpectralConv2d

OURS = ("spectral", "convolution", "dual")
CASES = ["forward:32:1", "forward:33:4", "forward:64:1", "forward:64:16", "forward:160:4", "forward:256:1"]
CASES += ["forward:512:1", "training:32:4", "training:64:4"]


def neuraloperator_layer(channels: int, modes: tuple[int, int]):
    """Its layer with the same modes, or None where it is not installed."""
    try:
        from neuralop.layers.spectral_convolution import SpectralConv
    except ImportError:
        return None
    return SpectralConv(channels, channels, (2 * modes[0], 2 * (modes[1] - 1)))


def official_layer(args, modes: tuple[int, int]):
    if not args.official_layer:
        return None
    module, name = args.official_layer.split(":")
    return getattr(importlib.import_module(module), name)(args.channels, args.channels, *modes)


def contenders(args, modes: tuple[int, int]) -> dict[str, torch.nn.Module]:
    channels = args.channels
    layers = {
        "spectral": SpectralConv2d(channels, channels, modes),
        "rfft2": RfftSpectralConv2d(channels, channels, modes),
        "neuraloperator": neuraloperator_layer(channels, modes),
        "official": official_layer(args, modes),
        "convolution": DualConv2d(channels, channels, None),
        "dual": DualConv2d(channels, channels, modes),
    }
    return {name: layer.to(args.device) for name, layer in layers.items() if layer is not None}


def runner(name: str, layer, kind: str, shape: tuple, dtype: torch.dtype, device: str):
    """A call without arguments: the layer's forward, or forward and backward. As in the model, ours and convolutions
    find their input channels-last; FFTs prefer it the other way."""
    x = torch.randn(shape, device=device, dtype=dtype if kind == "forward" else torch.float32)
    if name in OURS:
        x = x.contiguous(memory_format=torch.channels_last)
        layer.to(dtype if kind == "forward" else torch.float32)
    if kind == "forward":

        @torch.inference_mode()
        def run():
            layer(x)

        return run
    x, dy = x.requires_grad_(), torch.randn(shape, device=device)

    def run():
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
            y = layer(x)
        torch.autograd.backward(y, dy.to(y.dtype))
        layer.zero_grad()
        x.grad = None

    return run


def runs_at_all(run) -> bool:
    try:
        run()
    except (RuntimeError, NotImplementedError):  # a dtype that it does not know
        return False
    return True


def row_of(case: str, dtype: str, layers: dict, modes: tuple[int, int], peak: float, args) -> dict:
    kind, size, batch = parse_case(case, args.device)
    shape = batch, args.channels, size, size
    runs = {name: runner(name, layers[name], kind, shape, getattr(torch, dtype), args.device) for name in layers}
    if size < 2 * modes[0] or size < 2 * modes[1]:
        runs.pop("rfft2")
    runs = {name: run for name, run in runs.items() if name in OURS or dtype == "float32" or runs_at_all(run)}
    times = race(runs, args.turns, args.device)
    row = {"case": kind, "dtype": dtype, "size": size, "batch": batch}
    row |= {f"{name}, ms": milliseconds(times[name]) if name in times else None for name in layers}
    for name in layers.keys() & {"rfft2", "neuraloperator", "official"}:
        row[f"{name} / ours"] = ratio(times[name], times["spectral"]) if name in times else None
    row["dual / convolution"] = ratio(times["dual"], times["convolution"])
    dual = runs["dual"]
    row["share of GEMM peak"] = operations(dual) / (milliseconds(times["dual"]) / 1e3) / peak
    row["peak, MiB"] = peak_bytes(dual, args.device) / 2**20
    return row


def main(argv=None) -> list[dict]:
    options = parser(__doc__, turns=11)
    options.add_argument("--cases", nargs="+", default=CASES)
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--channels", type=int, default=128)
    options.add_argument("--modes", type=int, nargs=2, default=(16, 9))
    options.add_argument("--official_layer", metavar="MODULE:CLASS", help="of the authors' code, found by PYTHONPATH")
    args = parse(options, argv)
    modes = tuple(args.modes)
    layers = {dtype: contenders(args, modes) for dtype in args.dtypes}
    peaks = {dtype: gemm_peak(args.device, getattr(torch, dtype)) for dtype in args.dtypes}
    rows = []
    for case in args.cases:
        for dtype in args.dtypes:
            rows.append(row_of(case, dtype, layers[dtype], modes, peaks[dtype], args))
        print(f"{case} done", flush=True)
    title = f"One layer of {args.channels} channels with modes {modes}; medians of {args.turns} turns."
    report(rows, title, "python benchmarks/bench_layer.py", args)
    return rows


if __name__ == "__main__":
    main()
