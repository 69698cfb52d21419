#!/usr/bin/env python
"""What the benchmarks of speed share: contenders that take turns, memory, arithmetic, and tables.

    python benchmarks/measure.py README.md docs/performance.md

writes the tables of these pages anew: each stands behind a line `<!-- FILE.csv: COLUMN; COLUMN -->` and takes these
columns of a file in benchmarks/results or experiments/results. `COLUMN=TITLE` gives one another title, `COLUMN==VALUE`
keeps only the rows with this value, without a column of their own.
"""

import argparse
import csv
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dfu_diffusers.evaluation.tables import markdown
from dfu_diffusers.training.step import keep_freed_memory

ROOT = Path(__file__).resolve().parent.parent
CONFIGS, CHECKPOINT = ROOT / "examples" / "configs", ROOT / "checkpoints" / "dfu-portraits"


def parser(doc: str, turns: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--turns", type=int, default=turns, help="of each contender; what is printed is a median")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.md")
    return parser


def parse_case(case: str, device: str) -> tuple[str, int, int]:
    """(kind, size, batch) of KIND:SIZE:BATCH, for --cases. From the first of training on the process keeps freed
    memory on a CPU, as train_dfu.py does, so these belong at the end."""
    kind, size, batch = case.split(":")
    if kind not in ("forward", "training"):
        raise SystemExit(f"--cases {case}: the kind must be forward or training")
    if kind == "training" and device == "cpu":
        keep_freed_memory()
    return kind, int(size), int(batch)


def allow_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products and convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


# ---------------------------------------------------------------------------------------------------------------------
# Time


def race(contenders: dict[str, Callable], turns: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each turn of each contender. They take turns after a warm-up each: on a shared machine the times
    wander, the ratios within a turn much less."""
    seconds = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times: list[float], others: list[float]) -> float:
    """Median over the turns of the ratio within one turn."""
    return statistics.median(a / b for a, b in zip(times, others))


def milliseconds(times: list[float]) -> float:
    return statistics.median(times) * 1e3


def gemm_peak(device: str, dtype: torch.dtype) -> float:
    """Most operations a second in matrix products: what this machine can do at all. Sizes grow to 2048 (GPU: 8192),
    or until a product takes a tenth of a second: CPUs without bfloat16 are thousands of times slower in it."""
    fastest, n, largest = 0.0, 256, 8192 if device.startswith("cuda") else 2048
    while n <= largest:
        a = torch.randn(n, n, device=device, dtype=dtype)
        seconds = min(race({"gemm": lambda a=a: a @ a}, 3, device)["gemm"])
        fastest = max(fastest, 2 * n**3 / seconds)
        if seconds > 0.1:
            break
        n *= 2
    return fastest


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic and memory


def _baddbmm_flops(_, a, b, *args, out_shape=None, **kwargs) -> int:  # all that the counter does not know of ours
    return 2 * a[0] * a[1] * a[2] * b[-1]


def operations(run: Callable) -> int:
    """Floating point operations of the matrix products and convolutions in a call."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: _baddbmm_flops})
    with counter:
        run()
    return counter.get_total_flops()


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators made and that are alive, and remembers the most: `peak`."""

    def __init__(self):
        super().__init__()
        self.peak, self.live = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:  # a view of a weight is not memory that the call needs
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(run: Callable, device: str = "cpu") -> int:
    """Most bytes that a call holds at once besides what was there before: by the allocator of a GPU, or the tensors
    that its operators make (without what they need inside)."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with LiveMemory() as memory:
        run()
    return memory.peak


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def with_tables(page: str) -> str:
    """The text of a page with the tables that its comments ask for."""
    pattern = r"(<!-- ([\w.-]+\.csv): (.*?) -->\n\n?)(?:\|.*\n)*"
    return re.sub(pattern, lambda match: match[1] + _table(match[2], match[3].split("; ")), page)


def _table(file: str, columns: list[str]) -> str:
    with open(next(ROOT.glob(f"*/results/{file}")), encoding="utf-8", newline="") as source:
        rows = list(csv.DictReader(source))
    for column in [column for column in columns if "==" in column]:
        name, value = column.split("==")
        rows = [row for row in rows if row[name] == value]
    chosen = [column.partition("=") for column in columns if "==" not in column]
    return markdown([{title or name: _number(row[name]) for name, _, title in chosen} for row in rows])


def _number(text: str):
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        text = Path(argument).read_text(encoding="utf-8")
        Path(argument).write_text(with_tables(text), encoding="utf-8")
