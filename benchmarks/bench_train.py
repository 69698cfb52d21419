#!/usr/bin/env python
"""What does the training script cost beside the step that it runs? And does loading keep up with the model?

python benchmarks/bench_train.py [--sizes 32 64 96] [--batch_size 32] [--steps 12] [--output OUTPUT]

For each size: images per second of examples/train_dfu.py's own step (data, noise, average, logs and all) and of a
bare one (forward, backward, Adam, on the same images again and again), which take turns, and of the loader alone.
Options unknown here go to train_dfu.py. Prints a Markdown table; --output writes the rows, too. Rates are medians,
the ratio the median over pairs of steps.

python benchmarks/bench_train.py --freed_memory ffhq-96:64:4 portraits:64:32 [--turns 3]

On a CPU: the time of a step that gives freed memory back to the system over that of one that keeps it, as train_dfu.py
does, for PRESET:SIZE:BATCH under bfloat16 autocast. Processes of both kinds take turns.
"""

import argparse
import contextlib
import io
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState

from dfu_diffusers.evaluation.tables import report
from measure import ratio

train_dfu = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "train_dfu.py")))


def prepare(size: int, batch_size: int, steps: int, folder: str, options: list[str]):
    """The script, up to its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--resolutions", size, "--batch_size", batch_size, "--max_train_steps", steps, "--output_dir", folder]
    argv += ["--report_to", "none", "--num_validation_images", 0, *options]
    return train_dfu.Run(train_dfu.parse_args(list(map(str, argv)), train_dfu.CONFIGS))


def step_seconds(run, size: int) -> list[tuple[float, float]]:
    """Seconds of a bare step and of the script's own, in turns, the first two pairs left out."""
    images = torch.randn(run.args.batch_size, 3, size, size, device=run.accelerator.device)
    # A target like the real one: from zeros, gradients would soon be so small that the processor slows down.
    target, timesteps = torch.randn_like(images), torch.zeros(len(images), device=images.device)

    def bare(_):
        run.accelerator.backward((run.model(images, timesteps).sample - target).square().mean())
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    def script(done):
        loss, grad_norm, _ = run.step(done - 1, batches)
        run.lr_scheduler.step()
        run.average.step()
        run.reporter.log(done, (size, size), loss, grad_norm, run.lr_scheduler.get_last_lr()[0])

    def seconds(function, done):
        started = time.perf_counter()
        function(done)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with contextlib.redirect_stdout(io.StringIO()), run.open() as (batches, _):
        return [(seconds(bare, n), seconds(script, n)) for n in range(1, run.args.max_train_steps + 1)][2:]


def loader_rate(run) -> float:
    """Images per second that the loader delivers when nothing else is done."""
    started, count = time.perf_counter(), 0
    for batch in run.loader:
        count += len(batch["image"])
    return count / (time.perf_counter() - started)


STEP = """if True:
    import sys, time, torch
    from dfu_diffusers import DFUModel
    from dfu_diffusers.training.step import keep_freed_memory
    config, size, batch, keep = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "keep"
    if keep:
        assert keep_freed_memory()
    model, images = DFUModel.from_config(DFUModel.load_config(config)).train(), torch.randn(batch, 3, size, size)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, 0.0).sample.float().square().mean()
        loss.backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(min(seconds[2:]))  # by then the memory is there
"""


def freed_memory(case: str, turns: int) -> dict:
    preset, size, batch = case.split(":")
    config = train_dfu.CONFIGS / f"{preset}.json"
    seconds = {"give back": [], "keep": []}
    for _ in range(turns):
        for how, values in seconds.items():
            command = [sys.executable, "-c", STEP, str(config), size, batch, how]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {f"{how}, s": statistics.median(values) for how, values in seconds.items()}
    row = {"preset": preset, "size": int(size), "batch": int(batch)} | medians
    return row | {"give back / keep": ratio(seconds["give back"], seconds["keep"])}


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--batch_size", type=int, default=32, help="the default of train_dfu.py")
    parser.add_argument("--steps", type=int, default=12, help="pairs of steps; the first two do not count")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.md")
    parser.add_argument("--freed_memory", nargs="+", metavar="PRESET:SIZE:BATCH", help="measure only this")
    parser.add_argument("--turns", type=int, default=3, help="with --freed_memory")
    args, options = parser.parse_known_args(argv)  # the others go to train_dfu.py
    if args.freed_memory:
        args.device = "cpu"
        rows = [freed_memory(case, args.turns) for case in args.freed_memory]
        report(rows, "Steps under bfloat16 autocast.", "python benchmarks/bench_train.py --freed_memory", args)
        return rows

    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = prepare(size, args.batch_size, args.steps, folder, options)
            pairs = step_seconds(run, size)
            loader = loader_rate(prepare(size, args.batch_size, args.steps, folder, options))
        bare, script = (args.batch_size / statistics.median(column) for column in zip(*pairs))
        row = {"size": size, "batch_size": args.batch_size, "script": script, "bare": bare}
        row["script_over_bare"] = statistics.median(bare / script for bare, script in pairs)
        rows.append(row | {"loader": loader, "loader_over_bare": loader / bare})
        print(f"{size} px done", flush=True)
    args.device = run.accelerator.device.type
    command = " ".join(["python benchmarks/bench_train.py", *options])
    report(rows, "Images a second.", command, args)
    return rows


if __name__ == "__main__":
    main()
