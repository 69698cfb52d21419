#!/usr/bin/env python
"""How much memory does a whole picture take, and how long, at sizes far beyond the training's?

    python benchmarks/large_images.py [--sizes 256 512 1024 2048] [--strategy direct]

Each picture is drawn by a process of its own, whose peak of resident memory is read at its end: torch, weights, noise,
sampler and network together. Keeps the pictures beside OUTPUT, with OUTPUT.csv and OUTPUT.md.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from dfu_diffusers import DFUPipeline
from dfu_diffusers.command_line import DTYPES
from dfu_diffusers.evaluation.tables import parse, report
from dfu_diffusers.pipelines.dfu import STRATEGIES
from measure import CHECKPOINT


def draw(size: int, args) -> dict:
    """In this process: one picture, its seconds and the process's peak."""
    pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype])
    start = time.perf_counter()
    options = dict(strategy=args.strategy, generator=torch.Generator().manual_seed(0))
    image = pipe(height=size, width=size, num_inference_steps=args.num_inference_steps, **options).images[0]
    seconds = time.perf_counter() - start
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        image.save(args.output.with_name(f"{args.output.name}_{size}.png"))
    return {"size": size, "s": seconds, "peak, MiB": peak_of_this_process() / 2**20}


def peak_of_this_process() -> int:
    """Bytes of resident memory. On Linux not from getrusage, in which a child begins with its parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--strategy", choices=STRATEGIES, help="default: octaves with a refiner, else direct")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--num_inference_steps", type=int, default=18)
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv, OUTPUT.md and the pictures")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parse(parser, argv)
    args.device = "cpu"
    if args.child:
        print(json.dumps(draw(args.sizes[0], args)))
        return []
    rows = []
    for size in args.sizes:
        words = [sys.executable, __file__, *args.words, "--child", "--sizes", str(size)]
        child = subprocess.run(words, stdout=subprocess.PIPE, text=True)
        if child.returncode:  # the child has said why
            raise SystemExit(f"No picture of {size}x{size} was drawn.")
        rows.append(json.loads(child.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    strategy = args.strategy or "the best strategy"
    title = f"One picture, {strategy}, {args.num_inference_steps} Heun steps in {args.dtype}."
    report(rows, title, "python benchmarks/large_images.py", args)
    return rows


if __name__ == "__main__":
    main()
