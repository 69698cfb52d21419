# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the training loop needs under Accelerate: batches, gradients, the average of the weights, and signals."""

import contextlib
import ctypes
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has spread over processes (all of them call this), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor spread over processes as `other` is, or as it is where `other` is whole, too."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def unwrap(accelerator: Accelerator, model):
    """The model that Accelerate prepared, without what it was wrapped in, `torch.compile` included."""
    model = accelerator.unwrap_model(model)
    return getattr(model, "_orig_mod", model)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU leave behind for those of the next step; with glibc,
    elsewhere nothing happens. Whether it was done.

    By default large blocks go back to the system, and it takes time to get fresh pages from it: in a step of a model
    with many weights about a quarter more (docs/performance.md)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # numbers of malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, -1))  # no blocks of their own; never shrink


class DataError(RuntimeError):
    """Images that cannot be had; the message says which, why, and what to do."""


@contextlib.contextmanager
def workers(loader: DataLoader) -> Iterator[Iterator]:
    """Iterates over a loader's batches, whose processes end with the context, whatever happens.

    Raises:
        DataError: one of the processes was killed.
    """
    batches = iter(loader)
    try:
        yield batches
    except (RuntimeError, ConnectionError) as error:  # of torch's signal handler; of a read from the dead process
        died = any(not process.is_alive() for process in getattr(batches, "_workers", []))
        if "DataLoader worker (pid" not in str(error) and not (died and isinstance(error, ConnectionError)):
            raise
        raise DataError(
            f"a process that loads images died ({error}), often for lack of memory. Use fewer --num_workers, perhaps "
            f"with --cache_dir, and go on with --resume_from_checkpoint latest."
        ) from error
    finally:
        # They ignore SIGTERM (`ignore_signals`), with which Python would end them when it exits, and wait for them.
        if processes := getattr(batches, "_workers", []):
            batches._shutdown_workers()
            for process in processes:
                process.kill()


def next_batch(batches: Iterator) -> dict[str, torch.Tensor]:
    """{"image", optionally "label"} of the next micro-batch.

    Raises:
        DataError: it cannot be loaded.
    """
    try:
        return next(batches)
    except (ValueError, OSError) as error:  # of our data sets; a worker puts its own trail before the message
        message = str(error).strip().splitlines()[-1]
        raise DataError(message.removeprefix(f"{type(error).__name__}: ")) from error


def exchange_gradients(accelerator: Accelerator, model, now: bool):
    """The context of a backward pass after which processes exchange gradients, or after which they do not yet."""
    accelerator.gradient_state._set_sync_gradients(now)  # which Accelerate's DeepSpeed engine looks at
    return contextlib.nullcontext() if now else accelerator.no_sync(model)


class WeightAverage:
    """Moving average of a model's weights: on the main process alone, or in shares where FSDP shards the model.

    Args:
        accelerator: that prepared the model.
        model: as prepared.
        make: makes the average of a list of parameters, such as
            `lambda parameters: HalfLifeEMA(parameters, batch_size, halflife_images)`.

    Its methods are called by all processes.

    Raises:
        ValueError: the model's weights are spread in a way that they cannot be averaged in.
    """

    FILE = "average-ema.safetensors"

    def __init__(self, accelerator: Accelerator, model, make: Callable[[list], EMAModel]):
        kind = accelerator.distributed_type
        if kind == DistributedType.FSDP and not getattr(accelerator, "is_fsdp2", False):
            raise ValueError("FSDP version 1 flattens the weights: set fsdp_version: 2 in Accelerate's configuration.")
        if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("DeepSpeed's zero_stage: 3 spreads each weight: use stage 1 or 2, or FSDP.")
        self.accelerator = accelerator
        self.parameters = dict(unwrap(accelerator, model).named_parameters())
        holds_a_share = accelerator.is_main_process or kind == DistributedType.FSDP
        self.average = make(list(self.parameters.values())) if holds_a_share else None

    def is_finite(self) -> bool:
        """Whether all weights and their averages are, on every process."""
        shadows = self.average.shadow_params if self.average else []
        tensors = (p.to_local() if isinstance(p, DTensor) else p for p in (*self.parameters.values(), *shadows))
        broken = not all(tensor.isfinite().all() for tensor in tensors)
        return self.accelerator.reduce(torch.tensor(float(broken), device=self.accelerator.device), "sum").item() == 0

    def step(self) -> None:
        if self.average:
            self.average.step(self.parameters.values())

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Averaged weights by name, whole and on the CPU, on the main process; {} on the others."""
        if not self.average:
            return {}
        whole = ((name, full_tensor(p)) for name, p in zip(self.parameters, self.average.shadow_params))
        return {name: p.cpu().contiguous() for name, p in whole if self.accelerator.is_main_process}

    def save(self, folder: Path) -> None:
        """One file, whatever the number of processes."""
        weights = self.weights()
        if self.accelerator.is_main_process:
            save_file(weights, folder / self.FILE, {"optimization_step": str(self.average.optimization_step)})

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        if not self.average:
            return
        with safe_open(folder / self.FILE, "pt") as file:
            for name, shadow in zip(self.parameters, self.average.shadow_params):
                shadow.copy_(place_like(file.get_tensor(name), shadow))
            self.average.optimization_step = int(file.metadata()["optimization_step"])


class StopSignal:
    """Remembers a SIGTERM or SIGINT, so that the run can save and end after the step it is in. A SIGINT after that
    acts as it would without this; a SIGTERM does not, for launchers and schedulers send it more than once.

    >>> with StopSignal() as stop:
    ...     signal.raise_signal(signal.SIGINT)
    ...     stop.name
    'SIGINT'
    """

    def __init__(self):
        self.name, self._previous = None, {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
