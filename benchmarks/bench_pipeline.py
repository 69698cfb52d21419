#!/usr/bin/env python
"""How long does a picture take, at each size and precision, and does the precision show?

    python benchmarks/bench_pipeline.py [--model checkpoints/dfu-portraits] [--sizes 32 64 128 256 512]

Pipelines in all --variants draw the same seeds, in turns: a precision, followed by any of `+direct` and `+cascade` for
these strategies in place of the pipeline's own, `+compiled` for torch.compile of the networks' blocks, and `+graphs`
for one of the whole networks that replays CUDA graphs on a GPU (mode "reduce-overhead").
Columns: seconds for an image in batches of --batch_size; how many times as fast as the first variant; nanoseconds for
each pixel, and the same beside the size of --reference_size; the PSNR of the pictures to those of the
first variant; most memory held, without the weights. On a GPU also how often the sampler waits for the device: the
final copy to the CPU aside it never should. Writes the pictures beside each other with --output.
"""

import statistics
import warnings

import torch

from dfu_diffusers import DFUPipeline
from dfu_diffusers.evaluation.metrics import psnr
from dfu_diffusers.evaluation.sheets import contact_sheet
from dfu_diffusers.evaluation.sources import to_bytes
from dfu_diffusers.evaluation.tables import parse, report
from measure import CHECKPOINT, allow_tf32, parser, peak_bytes, race, ratio

PRECISIONS = ("float32", "bfloat16", "float16")
ADDITIONS = ("direct", "cascade", "compiled", "graphs")


def runner(pipe: DFUPipeline, size: int, strategy: str | None, steps: int, args):
    """Draws the images of seeds 0, 1, ...: (batch, 3, size, size) in [-1, 1]."""

    def run():
        generators = [torch.Generator().manual_seed(seed) for seed in range(args.batch_size)]
        options = dict(batch_size=args.batch_size, generator=generators, output_type="latent", strategy=strategy)
        return pipe(height=size, width=size, num_inference_steps=steps, **options).images.clamp(-1, 1)

    return run


def count_waits(run) -> int:
    """How often a call makes the CPU wait for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def rows_of(size: int, pipes: dict[str, DFUPipeline], args) -> tuple[list[dict], dict[str, torch.Tensor]]:
    def runner_of(variant: str, steps: int):
        strategy = next((name for name in ("direct", "cascade") if name in variant.split("+")), None)
        return runner(pipes[variant], size, strategy, steps, args)

    runs = {variant: runner_of(variant, args.num_inference_steps) for variant in pipes}
    images = {variant: run().float().cpu() for variant, run in runs.items()}
    times = race(runs, args.turns, args.device)
    first = args.variants[0]
    rows = []
    for variant, run in runs.items():
        row = {"size": size, "variant": variant, "s per image": statistics.median(times[variant]) / args.batch_size}
        row[f"{first} / this"] = ratio(times[first], times[variant])
        row["ns per pixel"] = row["s per image"] * 1e9 / size**2
        row[f"PSNR to {first}, dB"] = None if variant == first else psnr(images[variant], images[first]).mean().item()
        row["peak, MiB"] = peak_bytes(runner_of(variant, 2), args.device) / 2**20  # as many steps as it takes to see
        if args.device.startswith("cuda"):
            row["waits"] = count_waits(run)
        rows.append(row)
    return rows, images


def add_cost(rows: list[dict], reference_size: int) -> None:
    """Cost of a pixel beside that at the reference size, in the same precision."""
    costs = {(row["size"], row["variant"]): row["ns per pixel"] for row in rows}
    for row in rows:
        reference = costs.get((reference_size, row["variant"]))
        row[f"beside {reference_size} px"] = row["ns per pixel"] / reference if reference else None


def main(argv=None) -> list[dict]:
    options = parser(__doc__, turns=3)
    options.add_argument("--model", default=str(CHECKPOINT))
    options.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    options.add_argument("--reference_size", type=int, default=128)
    options.add_argument("--variants", nargs="+", default=["float32", "bfloat16", "float32+direct"])
    options.add_argument("--batch_size", type=int, default=1)
    options.add_argument("--num_inference_steps", type=int, default=18)
    args = parse(options, argv)
    parts = {variant: variant.split("+") for variant in args.variants}
    for variant, (dtype, *additions) in parts.items():
        if dtype not in PRECISIONS or not set(additions) <= set(ADDITIONS):
            options.error(
                f"--variants {variant}: one of {', '.join(PRECISIONS)}, then any of +{', +'.join(ADDITIONS)}"
            )
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than measure what is not compiled
    allow_tf32(False)
    pipes = {}
    for variant, (dtype, *additions) in parts.items():
        pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, dtype)).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        for name in ("unet", "refiner"):
            model = getattr(pipe, name)
            if model is not None and "compiled" in additions:
                model.compile_repeated_blocks()
            if model is not None and "graphs" in additions:
                setattr(pipe, name, torch.compile(model, mode="reduce-overhead"))
        pipes[variant] = pipe
    rows, images = [], {}
    for size in args.sizes:
        torch.compiler.reset()  # or graphs of other sizes would count against the limit
        at_size, images[size] = rows_of(size, pipes, args)
        rows += at_size
        print(f"{size} px done", flush=True)
    add_cost(rows, args.reference_size)
    title = f"{args.num_inference_steps} Heun steps, batches of {args.batch_size}; {args.turns} turns."
    report(rows, title, "python benchmarks/bench_pipeline.py", args)
    if args.output:
        shown = {name: [to_bytes(at_size[name][:1])[0] for at_size in images.values()] for name in pipes}
        contact_sheet(shown, columns=[f"{size} px" for size in images]).save(args.output.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main()
