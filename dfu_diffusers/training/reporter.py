# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a run says while it trains, and what it leaves for people beside its checkpoints."""

import json
import math
import platform
import time
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

import dfu_diffusers

from .. import DFUModel, DFUPipeline, DFURefiner, DFUSuperResolutionPipeline, EDMHeunScheduler
from ..command_line import device_name, git_commit
from ..data.resolutions import MixedResolutionBatchSampler, Size, format_resolution, source_size
from ..files import write_atomically
from .checkpoints import check_finite, diverged, replace_contents, set_aside
from .freezing import summary
from .losses import ValidationLoss, fit_size
from .options import Options, public_options
from .reports import Table, activation_bytes, enlargement_sheet, plot_losses, sample_sheet, sheet_sizes
from .setup import Data
from .step import WeightAverage


class Reporter:
    """Tables of losses and trackers, a row for each step; and reports: the pipeline with averaged weights, samples
    from it, and its loss on held-out images. All processes call the methods, the main one writes.

    It takes parts of the run, with `network` as it was before it was prepared, and `command`, that started the run.
    """

    def __init__(
        self, args: Options, command: str, accelerator: Accelerator, network: DFUModel | DFURefiner,
        average: WeightAverage, scheduler: EDMHeunScheduler, data: Data, validation: ValidationLoss | None,
    ):  # fmt: skip
        self.args, self.command, self.output = args, command, Path(args.output_dir)
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.network, self.average, self.scheduler = network, average, scheduler
        self.data, self.validation = data, validation

    def facts(self) -> dict:
        """What the run is made of: the contents of run.json."""
        return {
            "options": public_options(self.args),
            "command": self.command,
            "data": self.data.facts(),
            "model": {k: v for k, v in self.network.config.items() if not k.startswith("_")},
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "versions": {m.__name__: m.__version__ for m in (dfu_diffusers, torch, diffusers, accelerate)}
            | {"python": platform.python_version()},
            "commit": git_commit(),
            "device": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "distributed": str(self.accelerator.distributed_type.value),
        }

    def begin(self, start: int) -> tqdm:
        """Say what is to come, and open the tables without rows after step `start`. Returns the bar of progress, which
        counts images and is to be closed."""
        args, accelerator = self.args, self.accelerator
        accelerator.print(summary(self.network))
        accelerator.print(f"Data: {self.data}.")
        total, self.recent = args.max_train_steps * args.batch_size, {}
        if args.lr_scheduler != "constant" and args.lr_warmup_images > total:
            accelerator.print("The learning rate will not rise to its full value: --lr_warmup_images is longer.")
        if self.main:
            self._open_tables(start)
        self.progress = tqdm(
            total=total, initial=start * args.batch_size, unit="img", unit_scale=True,
            disable=not accelerator.is_local_main_process,
        )  # fmt: skip
        return self.progress

    def _open_tables(self, start: int) -> None:
        for path in set_aside(self.output, start):
            print(f"A later checkpoint of this run, which goes on before it, is now {path}.")
        write_atomically(self.output / "run.json", json.dumps(self.facts(), indent=2) + "\n")
        fields = ["step", "resolution", "loss", "grad_norm", "learning_rate", "seconds"]
        self.losses = Table(self.output / "loss.csv", fields, start)
        self.started = time.time() - (float(self.losses.rows[-1]["seconds"]) if self.losses.rows else 0)
        bins = self.validation.bin_names if self.validation else []
        fields = ["step", "resolution", "loss", *(f"sigma {name}" for name in bins)]
        self.held_out = Table(self.output / "validation.csv", fields, start)
        self.accelerator.init_trackers("dfu", {k: str(v) for k, v in public_options(self.args).items()})

    def log(self, done: int, size: Size, loss: float, grad_norm: float, learning_rate: float) -> None:
        """A step that was trained at a size."""
        name, recent = format_resolution(size), self.recent
        if math.isfinite(loss) and math.isfinite(grad_norm):
            recent[name] = 0.9 * recent.get(name, loss) + 0.1 * loss
        elif self.main:
            self.progress.write(f"Step {done} at {name} skipped: loss {loss}, norm of the gradient {grad_norm}.")
        self.progress.set_postfix({name: f"{recent[name]:.3f}" for name in sorted(recent)}, refresh=False)
        self.progress.update(self.args.batch_size)
        if self.main:
            seconds = round(time.time() - self.started, 2)
            self.losses.append(done, name, loss, grad_norm, learning_rate, seconds)
            values = {"loss": loss, f"loss/{name}": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
            self.accelerator.log(values, step=done)

    def is_due(self, done: int) -> bool:
        before, now = (n * self.args.batch_size // self.args.report_images for n in (done - 1, done))
        return now > before

    def has_missed(self, start: int) -> bool:
        """Whether a run ended between the checkpoint from which this one goes on and the report that was due."""
        if not (self.validation and 0 < start < self.args.max_train_steps and self.is_due(start)):
            return False
        missed = torch.tensor(float(self.main and not self._has_validated(start)), device=self.accelerator.device)
        return self.accelerator.reduce(missed, "sum").item() > 0

    def _has_validated(self, done: int) -> bool:
        return any(int(row["step"]) == done for row in self.held_out.rows)

    def report(self, done: int) -> None:
        """Write the pipeline as it is, its samples and its loss on held-out images."""
        check_finite(self.average, done, self.args)
        weights = self.average.weights()
        if self.main:
            pipe = self._pipeline(weights)
            if self.validation and not self._has_validated(done):
                self._validate(pipe.refiner if isinstance(self.network, DFURefiner) else pipe.unet, done)
            sheet = self._samples(pipe)

            def save(folder: Path) -> None:
                pipe.save_pretrained(folder)
                if sheet:
                    sheet.save(folder / "samples.png")
                plot_losses(folder / "loss.png", self.losses, self.held_out)

            replace_contents(self.output, save)
            if sheet:
                self._track(sheet, done)
        self.accelerator.wait_for_everyone()

    def _pipeline(self, weights: dict[str, torch.Tensor]) -> DFUPipeline:
        refines = isinstance(self.network, DFURefiner)  # FSDP gives it a class of its own
        with torch.device("meta"):
            model = (DFURefiner if refines else DFUModel).from_config(self.network.config)
        model.load_state_dict(weights, assign=True)
        model = model.to(self.accelerator.device).eval()
        if refines:
            pipe = DFUSuperResolutionPipeline(None, self.scheduler, refiner=model)
        else:
            pipe = DFUPipeline(model, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _validate(self, model, done: int) -> None:
        with self.accelerator.autocast():
            losses = self.validation(model)
        if not all(values.isfinite().all() for values in losses.values()):
            raise diverged(f"The held-out loss is not finite after step {done}", self.args)
        for size, values in losses.items():
            name = format_resolution(size)
            self.held_out.append(done, name, *values.tolist())
            self.accelerator.log({f"validation/{name}": values[0].item()}, step=done)

    def _samples(self, pipe: DFUPipeline) -> Image.Image | None:
        """Samples, or held-out images enlarged by a refiner from half of the smallest resolution; None without any."""
        args, held_out = self.args, self.data.held_out
        if not isinstance(self.network, DFURefiner):
            return sample_sheet(pipe, sheet_sizes(args.resolutions + args.upsample_resolutions), args.seed)
        if held_out is None:
            return None
        size = tuple(side // 2 for side in min(args.resolutions, key=math.prod))
        source = source_size(size, [size], args.source_resolution)
        items = held_out.__getitems__([(i, source) for i in range(min(6, len(held_out)))])
        return enlargement_sheet(pipe, fit_size(torch.stack([item["image"] for item in items]), size), args.seed)

    def _track(self, sheet: Image.Image, done: int) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=done, **layout)


def describe(args: Options, network, data: Data, sampler: MixedResolutionBatchSampler) -> str:
    """Model, data, schedule and memory of a run, as --dry_run prints them."""
    steps, expected = args.max_train_steps - sampler.first_step, sampler.expected_steps()
    schedule = f"{steps} steps of {args.batch_size} images, {steps * args.batch_size} in all, on average:"
    lines = [summary(network), f"Data: {data}.", schedule]
    for size in sorted(expected, key=math.prod):
        micro = sampler.micro_batch_sizes(size)
        lines.append(
            f"  {format_resolution(size):>9}: {expected[size]:.0f} steps, {len(micro)} x {max(micro)} images a "
            f"process, about {activation_bytes(network, max(micro), size) / 2**30:.2f} GiB of activations in float32"
        )
    trained, weights = (
        sum(p.numel() for p in network.parameters() if p.requires_grad or every) for every in (False, True)
    )
    copies = 4 * (2 * weights + 3 * trained)
    lines.append(f"weights, average, gradients and Adam's moments: {copies / 2**30:.2f} GiB in float32")
    return "\n".join(lines)
