"""What test_faults.py needs: a small run with its checkpoint, files that run code if unpickled, and a training that is
interrupted again and again.
"""

import contextlib
import csv
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import torch
import training_runs
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from forks import forked

from dfu_diffusers import DFUModel
from dfu_diffusers.training.checkpoints import (
    CheckpointError,
    find_checkpoints,
    find_corruption,
    load_state,
    readable,
    save_checkpoint,
    save_state,
)
from dfu_diffusers.training.ema import HalfLifeEMA
from dfu_diffusers.training.step import WeightAverage

# --- A run and its checkpoint ---


class SmallRun:
    """Accelerator, model, optimizer and average of a run that has taken some steps."""

    def __init__(self, steps: int = 3):
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        levels = dict(block_out_channels=(8, 12), fourier_modes=(2, None), attention_levels=())
        model = DFUModel(layers_per_block=1, **levels)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3))
        self.average = WeightAverage(self.accelerator, self.model, lambda p: HalfLifeEMA(p, 4, 100))
        for _ in range(steps):
            sum(p.square().sum() for p in self.model.parameters()).backward()
            self.optimizer.step(), self.optimizer.zero_grad(), self.average.step()

    def write(self, folder: Path) -> None:
        save_state(self.accelerator, self.model, self.optimizer, folder)
        self.average.save(folder)

    def save(self, output: Path, step: int) -> Path:
        return save_checkpoint(self.accelerator, output, step, self.write, 9)

    def load(self, folder: Path) -> None:
        with readable(folder):
            load_state(self.accelerator, self.model, self.optimizer, folder)
            self.average.load(folder)


# --- Files of an attacker ---

READ = ["model.safetensors", "optimizer.safetensors", "optimizer.json", "average-ema.safetensors"]
# All others that Accelerate's `load_state` looks for, for two processes.
NOT_READ = [
    "pytorch_model.bin", "optimizer.bin", "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt",
    "random_states_0.pkl", "random_states_1.pkl", "custom_checkpoint_0.pkl", "pytorch_model_fsdp.bin",
]  # fmt: skip


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trap: Path):
        self.trap = str(trap)

    def __reduce__(self):
        return os.system, (f"touch {self.trap}",)


def attack(run: SmallRun, checkpoint: Path, name: str, zipped: bool, trap: Path) -> tuple[bool, bool]:
    """Resume from a copy of a checkpoint with a hostile file under a name, a bare pickle or one in torch's zip.

    Where Accelerate would take a name only for want of another one, that other one is missing.

    Returns:
        Whether the checkpoint was refused, and whether code ran.
    """
    copy = checkpoint.with_name(f"{checkpoint.name}-attacked-{os.getpid()}")
    shutil.copytree(checkpoint, copy)
    if name.startswith("pytorch_model"):
        (copy / "model.safetensors").unlink()
    if zipped:
        torch.save(Hostile(trap), copy / name)
    else:
        (copy / name).write_bytes(pickle.dumps(Hostile(trap)))
    try:
        run.load(copy)
        refused = False
    except CheckpointError:
        refused = True
    shutil.rmtree(copy)
    return refused, trap.exists()


def attack_everywhere(folder: Path) -> list:
    """(name, zipped, refused, ran) for each name, both forms, in this process of several."""
    run = SmallRun()
    checkpoint = run.save(folder, 3)
    run.accelerator.wait_for_everyone()  # the main process names it last
    trap = folder / f"ran-{os.getpid()}"
    return [
        (name, zipped, *attack(run, checkpoint, name, zipped, trap))
        for name in READ + NOT_READ
        for zipped in (False, True)
    ]


def write_attacks(folder: Path) -> None:
    """Of all processes, to attacks.json."""
    results, state = gather_object(attack_everywhere(folder)), PartialState()
    if state.is_main_process:
        told = {"processes": state.num_processes, "kind": state.distributed_type, "results": results}
        (folder / "attacks.json").write_text(json.dumps(told))


# --- A training that is interrupted ---


def train_and_tell(options: list[str], told: Path) -> None:
    """Train, and write how it ended."""
    try:
        training_runs.run(*options)
        end = "returned"
    except SystemExit as error:
        end = str(error.code)
    except KeyboardInterrupt:
        end = "interrupted before the first step"
    told.write_text(end)


def children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def interrupt(kind: str, process: int, seconds: float) -> bool:
    """Signal the group of a process, or kill its first child, after a random time. Whether it still ran."""
    time.sleep(random.uniform(0, seconds))
    if kind == "worker":
        while not children(process):
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.01)
        time.sleep(random.uniform(0, seconds))
        process, kind, send = (children(process) or [process])[0], "SIGKILL", os.kill
    else:
        send = os.killpg
    try:
        send(process, getattr(signal, kind))
    except ProcessLookupError:
        return False
    return True


def last_step(output: Path) -> int:
    """Of its loss.csv; 0 without one."""
    if not (output / "loss.csv").exists():
        return 0
    return max((int(row["step"]) for row in csv.DictReader(open(output / "loss.csv")) if row["loss"]), default=0)


def interrupt_again_and_again(kind: str, count: int, seconds: float, output: Path, options: list[str]) -> dict:
    """Train in forks of this process and end each; what they did.

    Returns:
        ends: how each said that it ended; None for those that could not.
        saved: how many left a checkpoint of their last step.
        damaged: the checkpoints that were ever found damaged.
        slowest: seconds from a signal to the end of its process.
        step: of the last checkpoint.
    """
    told, results = output.with_name("told"), {"ends": [], "saved": 0, "damaged": [], "slowest": 0.0}
    for _ in range(count):
        told.unlink(missing_ok=True)
        resume = ["--resume_from_checkpoint", "latest"] if find_checkpoints(output) else []
        with forked(train_and_tell, [*options, "--output_dir", output, *resume], told) as process:
            if not interrupt(kind, process.pid, seconds):
                raise RuntimeError(f"The run ended by itself: {told.read_text()}")
            start = time.monotonic()
            process.join()
            results["slowest"] = max(results["slowest"], time.monotonic() - start)
        results["ends"].append(told.read_text() if told.exists() else None)
        found = find_checkpoints(output)
        results["damaged"] += [str(path) for path in found.values() if find_corruption(path)]
        results["saved"] += bool(found) and max(found) == last_step(output)
    return {**results, "step": max(find_checkpoints(output), default=0)}
