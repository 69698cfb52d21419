#!/usr/bin/env python
"""What does the spectral path cost? Two ratios, each measured side by side in one run.

    python benchmarks/bench_dual_conv.py                      # the authors' small model: 5 GB of memory, minutes
    python benchmarks/bench_dual_conv.py --config tiny --sizes 32 64 --repeats 1

model   forward of the dual model / forward of its conv_type="spatial" twin; of 1 would be free
layer   forward of a plain rfft2 spectral layer (einsum over the kept modes) / forward of SpectralConv2d

The contenders take turns, and a ratio is the median over turns of the ratio within one turn: on a shared machine the
times wander, the ratios much less. Prints a Markdown table; --output writes the rows as CSV.
"""

import argparse
import csv
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from dfu_diffusers import DFUModel
from dfu_diffusers.modeling_dfu import SpectralConv2d

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


class RfftSpectralConv2d(torch.nn.Module):
    """The textbook Fourier layer: full rfft2, complex einsum over the kept modes, full irfft2; H >= 2r, W >= 2c."""

    def __init__(self, in_channels: int, out_channels: int, modes: tuple[int, int]):
        super().__init__()
        self.out_channels, (self.r, self.c) = out_channels, modes
        weight = torch.randn(2, in_channels, out_channels, self.r, self.c, dtype=torch.complex64)
        self.weight = torch.nn.Parameter(weight / in_channels**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        modes = torch.fft.rfft2(x, norm="forward")
        out = modes.new_zeros(x.shape[0], self.out_channels, *modes.shape[-2:])
        top, bottom = (..., slice(self.r), slice(self.c)), (..., slice(-self.r, None), slice(self.c))
        for rows, weight in zip((top, bottom), self.weight):
            out[rows] = torch.einsum("bikl,iokl->bokl", modes[rows], weight)
        return torch.fft.irfft2(out, s=x.shape[-2:], norm="forward")


def race(contenders: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn of each contender, taking turns after one warm-up each."""
    seconds = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ffhq-96", help="a preset of examples/configs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96, 128, 256, 512])
    parser.add_argument("--batch_size", type=int, default=4, help="images up to 128 px; larger ones go one by one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV file")
    args = parser.parse_args(argv)

    config = DFUModel.load_config(CONFIGS / f"{args.config}.json")
    models = {name: DFUModel.from_config(config, conv_type=name).eval() for name in ("dual", "spatial")}
    channels, modes = config["block_out_channels"][0], config["fourier_modes"][0]
    layers = {
        "ours": SpectralConv2d(channels, channels, modes),
        "rfft2": RfftSpectralConv2d(channels, channels, modes),
    }
    rows = []
    for size in args.sizes:
        batch = args.batch_size if size <= 128 else 1
        image = torch.randn(batch, config["in_channels"], size, size)
        features = torch.randn(batch, channels, size, size)
        # As in the model, ours finds its input channels-last; the FFT prefers it the other way.
        inputs = {"ours": features.contiguous(memory_format=torch.channels_last), "rfft2": features}
        with torch.inference_mode():
            model_times = race({name: partial(model, image, -0.5) for name, model in models.items()}, args.repeats)
            layer_times = race({name: partial(layers[name], inputs[name]) for name in layers}, max(args.repeats, 5))
        rows.append(
            {
                "size": size,
                "batch": batch,
                "dual_ms": statistics.median(model_times["dual"]) * 1e3,
                "spatial_ms": statistics.median(model_times["spatial"]) * 1e3,
                "dual_over_spatial": median_ratio(model_times["dual"], model_times["spatial"]),
                "layer_ms": statistics.median(layer_times["ours"]) * 1e3,
                "rfft2_ms": statistics.median(layer_times["rfft2"]) * 1e3,
                "rfft2_over_layer": median_ratio(layer_times["rfft2"], layer_times["ours"]),
            }
        )
        print(f"{size} px done", flush=True)
    report(rows, args)
    return rows


def median_ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others))


def report(rows: list[dict], args) -> None:
    threads = torch.get_num_threads()
    print(f"\n{args.config}, fp32, torch {torch.__version__}, {threads} thread(s), {cpu_name()}\n")
    heads = ["size", "batch", "dual model, ms", "spatial twin, ms", "dual / spatial"]
    heads += ["layer, ms", "rfft2 layer, ms", "rfft2 / ours"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print(
            "| {size} | {batch} | {dual_ms:.0f} | {spatial_ms:.0f} | {dual_over_spatial:.2f} | {layer_ms:.1f} | "
            "{rfft2_ms:.1f} | {rfft2_over_layer:.1f} |".format(**row)
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "w", newline="") as file:
            run = {"config": args.config, "torch": torch.__version__, "threads": threads, "cpu": cpu_name()}
            writer = csv.DictWriter(file, [*rows[0], *run])
            writer.writeheader()
            writer.writerows({**row, **run} for row in rows)


def cpu_name() -> str:
    """What Linux calls the processor, or Python's word for it elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
