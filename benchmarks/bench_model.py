#!/usr/bin/env python
"""What does the network cost: beside its twin without spectral paths, its factorised twin, and diffusers' UNet2DModel?

    python benchmarks/bench_model.py [--config ffhq-96] [--cases forward:64:4 training:64:4] [--compile] [--profile]
    python benchmarks/bench_model.py --device cuda --dtypes float32 tf32 bfloat16 --compile --rfft2 --profile \
        --cases forward:64:64 forward:96:64 forward:256:8 training:64:32 training:96:32

A case is KIND:SIZE:BATCH with KIND forward or training (forward and backward). Contenders, in turns, all built from
one preset of examples/configs: the dual model, `spatial` (conv_type="spatial"), `compact` (spectral_rank=--rank) and
diffusers' UNet2DModel with as many channels, blocks and attention levels; --compile adds the dual model with its
blocks compiled, --rfft2 the dual model with textbook Fourier layers. In bfloat16 a forward pass runs in bfloat16
throughout (FFTs in float32), training in autocast; tf32 is float32 whose products a GPU may round. Dual models of all
--dtypes take turns with each other.

Columns: times; how many times the dual model's time is the others'; operations a second as a share of this machine's
in a large matrix product; nanoseconds for each pixel; most memory held, without the weights. --profile prints the
operators that the dual model spends most time in.
"""

import statistics

import torch
from diffusers import UNet2DModel

from dfu_diffusers import DFUModel
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.models.layers import DualConv2d
from measure import (
    CONFIGS,
    allow_tf32,
    gemm_peak,
    milliseconds,
    operations,
    parse_case,
    parser,
    peak_bytes,
    race,
    ratio,
)
from textbook import RfftSpectralConv2d

CASES = ["forward:32:1", "forward:32:4", "forward:64:4", "forward:96:4", "forward:128:4", "forward:256:1"]
CASES += ["forward:512:1", "training:32:4", "training:64:4"]


def build(config: dict, args) -> dict[str, torch.nn.Module]:
    models = {"dual": DFUModel.from_config(config)}
    if not args.alone:
        models["spatial"] = DFUModel.from_config(config, conv_type="spatial")
        models["compact"] = DFUModel.from_config(config, spectral_rank=args.rank)
        models["UNet2DModel"] = unet2d(config)
    if args.compile:
        models["compiled"] = DFUModel.from_config(config)
        models["compiled"].compile_repeated_blocks()
    if args.rfft2:
        models["rfft2"] = with_textbook_layers(DFUModel.from_config(config))
    return {name: model.to(args.device) for name, model in models.items()}


class TextbookLayer(RfftSpectralConv2d):
    """In the place of a SpectralConv2d, in any precision; FFTs know float32."""

    def forward(self, x, size=None, residual=None):
        with torch.autocast(x.device.type, enabled=False):
            y = super().forward(x.float(), size).to(x.dtype)
        return y if residual is None else residual.add_(y)


def with_textbook_layers(model: DFUModel) -> DFUModel:
    for module in list(model.modules()):
        if isinstance(module, DualConv2d) and module.spectral is not None:
            layer = module.spectral
            module.spectral = TextbookLayer(layer.in_channels, layer.out_channels, layer.modes)
    return model


def data_type(name: str) -> torch.dtype:
    """torch's type of a name in --dtypes."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


def unet2d(config: dict) -> UNet2DModel:
    """Diffusers' model of equal width, depth and attention."""
    levels = range(len(config["block_out_channels"]))
    kinds = ["Attn" if level in config["attention_levels"] else "" for level in levels]
    return UNet2DModel(
        sample_size=config["sample_size"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        block_out_channels=config["block_out_channels"],
        layers_per_block=config["layers_per_block"],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=None,  # one head, as ours
        norm_num_groups=min(32, config["block_out_channels"][0] // 4),
    )


def runner(model, kind: str, shape: tuple, precision: str, device: str):
    """A call without arguments: the model's forward, or forward and backward."""
    dtype = data_type(precision)
    x = torch.randn(shape, device=device, dtype=dtype if kind == "forward" else torch.float32)
    timestep = torch.full(shape[:1], 0.5, device=device)
    if kind == "forward":

        @torch.inference_mode()
        def run():
            allow_tf32(precision == "tf32")
            model(x, timestep)

        return run

    def run():
        allow_tf32(precision == "tf32")
        with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
            loss = model(x, timestep).sample.float().square().mean()
        loss.backward()
        model.zero_grad()

    return run


def rows_of(case: str, models: dict, peaks: dict, args) -> list[dict]:
    """A row for each dtype, all contenders of all of them in turns."""
    kind, size, batch = parse_case(case, args.device)
    shape = batch, 3, size, size
    runs = {}
    for dtype, built in models.items():
        for name, model in built.items():
            model.to(data_type(dtype) if kind == "forward" else torch.float32)
            model.train(kind == "training")
            runs[dtype, name] = runner(model, kind, shape, dtype, args.device)
    times = race(runs, args.turns, args.device)
    rows, first = [], next(iter(models))
    for dtype, built in models.items():
        row = {"case": kind, "dtype": dtype, "size": size, "batch": batch}
        seconds = times[dtype, "dual"]
        row |= {f"{name}, ms": milliseconds(times[dtype, name]) for name in built}
        row |= {f"dual / {name}": ratio(seconds, times[dtype, name]) for name in built if name != "dual"}
        row[f"{first} / this"] = ratio(times[first, "dual"], seconds)
        dual, median = runs[dtype, "dual"], statistics.median(seconds)
        row["share of GEMM peak"] = operations(dual) / median / peaks[dtype]
        row["ns per pixel"] = median * 1e9 / (batch * size * size)
        row["peak, MiB"] = peak_bytes(dual, args.device) / 2**20
        rows.append(row)
        if args.profile:
            print(case, dtype, *profile(dual), sep="\n")
    return rows


def profile(run, count: int = 8) -> list[str]:
    """The operators that take most time, with their shares."""
    with torch.profiler.profile() as profiler:
        run()

    def own(event):
        return event.self_cpu_time_total + getattr(event, "self_device_time_total", 0)

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))
    return [f"    {own(event) / total:6.1%} {event.key} ({event.count} calls)" for event in events[:count]]


def main(argv=None) -> list[dict]:
    options = parser(__doc__, turns=5)
    options.add_argument("--config", default="ffhq-96", help="a preset of examples/configs")
    options.add_argument("--cases", nargs="+", default=CASES)
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--rank", type=float, default=0.4, help="spectral_rank of `compact`")
    options.add_argument("--alone", action="store_true", help="only the dual model")
    options.add_argument("--compile", action="store_true", help="one more contender: its repeated blocks compiled")
    options.add_argument("--rfft2", action="store_true", help="one more contender: textbook Fourier layers")
    options.add_argument("--profile", action="store_true")
    args = parse(options, argv)
    config = {**DFUModel.load_config(CONFIGS / f"{args.config}.json"), "num_augment_labels": 0, "dropout": 0.0}
    if args.rfft2 and (config.get("spectral_rank") or config.get("spectral_boundary", "periodic") != "periodic"):
        options.error(f"--rfft2 has full weights and periodic waves, --config {args.config} has not: take another")
    if args.compile:  # fail rather than measure what is not compiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    peaks = {}
    for dtype in args.dtypes:
        allow_tf32(dtype == "tf32")
        peaks[dtype] = gemm_peak(args.device, data_type(dtype))
    models = {dtype: build(config, args) for dtype in args.dtypes}
    rows = []
    for case in args.cases:
        torch.compiler.reset()  # or graphs of other sizes and precisions would count against the limit
        rows += rows_of(case, models, peaks, args)
        print(f"{case} done", flush=True)
    numbers = ", ".join(f"{name} {m.num_parameters() / 1e6:.1f} M" for name, m in models[args.dtypes[0]].items())
    title = f"Preset {args.config}: {numbers} parameters; {args.turns} turns."
    report(rows, title, f"python benchmarks/bench_model.py --config {args.config}", args)
    return rows


if __name__ == "__main__":
    main()
