#!/usr/bin/env python
"""Train a DFU model, or the refiner of its octaves, on several resolutions at once, with Accelerate.

    accelerate launch examples/train_dfu.py                                      # procedural portraits, nothing else
    accelerate launch examples/train_dfu.py --train_data_dir photos --resolutions 32 48 64 --mixed_precision bf16
    accelerate launch examples/train_dfu.py --config examples/configs/ffhq-96.yaml --dry_run
    accelerate launch examples/train_dfu.py --config examples/configs/portraits-refiner.yaml

Writes into --output_dir: the pipeline with averaged weights (load it with DFUPipeline.from_pretrained, one that has a
refiner alone with DFUSuperResolutionPipeline.from_pretrained), samples.png at the training sizes and beyond, loss.csv,
validation.csv and loss.png, run.json, logs, and checkpoints to resume from.
Several processes share each batch; nothing but the speed depends on how many they are. See examples/README.md.
"""

import contextlib
import datetime
import json
import math
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from dfu_diffusers import hub
from dfu_diffusers.data.resolutions import format_resolution
from dfu_diffusers.files import write_atomically
from dfu_diffusers.training import checkpoints, setup
from dfu_diffusers.training.checkpoints import CheckpointError
from dfu_diffusers.training.options import Options, parse_args
from dfu_diffusers.training.reporter import Reporter, describe
from dfu_diffusers.training.step import (
    DataError,
    StopSignal,
    exchange_gradients,
    full_tensor,
    next_batch,
    workers,
)

CONFIGS = Path(__file__).parent / "configs"
FP16_HALVINGS = 24  # the gradient scaler finds its scale by halving one that overflows, from 2^16 on


class Run:
    """Everything a run needs. Making it checks what can be checked before the first step, and writes nothing."""

    def __init__(self, args: Options, command: str = "train_dfu.py"):
        self.args, self.output = args, Path(args.output_dir)
        self.checkpoint = checkpoints.choose_checkpoint(args.resume_from_checkpoint, self.output)
        self.start = int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else 0
        if self.start > args.max_train_steps:
            raise CheckpointError(f"{self.checkpoint} has done {self.start} steps: ask for more: --max_train_steps.")
        self.accelerator = accelerator = setup.build_accelerator(args)
        self.part, config = setup.load_config(args)  # of a pipeline: "unet" or "refiner"

        # Images. Each process draws its own share of every batch, so the loader is not handed to Accelerate.
        self.data = setup.Data(args, config.get("in_channels", 3), accelerator)
        self.sampler = setup.build_sampler(args, self.data.length, self.start, accelerator)
        self.loader = self.data.loader(self.sampler, pin_memory=accelerator.device.type == "cuda")

        # Network, and the scalings around it.
        self.network = setup.build_network(args, self.part, config, self.data, self.checkpoint)
        self.scheduler = setup.build_scheduler(args)
        scalings = setup.build_scalings(self.scheduler, self.network)
        validation = setup.build_validation(args, self.part, scalings, self.data.held_out)
        if args.dry_run:
            return

        # Loss, optimizer, average.
        optimizer, self.lr_scheduler = setup.build_optimizer(args, self.network)
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.loss = setup.build_loss(args, self.part, self.model, scalings, self.data.num_classes)
        self.average = setup.build_average(args, accelerator, self.model)
        if self.checkpoint:
            self.resume()
        card = hub.card_head(args.hub_license)
        if args.push_to_hub and accelerator.is_main_process:
            args.hub_model_id = hub.check_push(args.hub_model_id or self.output.name, args.hub_private, card=card)
        self.reporter = Reporter(
            args, command, accelerator, self.network, self.average, self.scheduler, self.data, validation
        )

    def train(self) -> None:
        args, accelerator, reporter, end = self.args, self.accelerator, self.reporter, self.args.max_train_steps
        patience = args.max_nonfinite_steps + FP16_HALVINGS * (args.mixed_precision == "fp16")
        nonfinite = 0
        with self.open() as (batches, stop):
            if reporter.has_missed(self.start):
                reporter.report(self.start)
            for step in range(self.start, end):
                loss, grad_norm, stopping = self.step(step, batches, stop.name is not None)
                self.lr_scheduler.step()
                if math.isfinite(loss) and math.isfinite(grad_norm):
                    self.average.step()
                    nonfinite = 0
                else:
                    nonfinite += 1
                done, size = step + 1, self.sampler.resolution(step)
                reporter.log(done, size, loss, grad_norm, self.lr_scheduler.get_last_lr()[0])
                if nonfinite == patience:
                    what = f"Stopped after {nonfinite} steps in a row without a finite loss"
                    raise checkpoints.diverged(what, args)

                if done == end or done % args.checkpointing_steps == 0 or stopping:
                    if math.isfinite(loss):  # otherwise its weights are none to go on from
                        self.save(done)
                    elif done == end:
                        raise checkpoints.diverged(f"The loss is not finite in the last step, {end}", args)
                if done < end and reporter.is_due(done):
                    reporter.report(done)
                if done < end and stopping:
                    reason, how = stop.name or "a signal to another process", "--resume_from_checkpoint latest"
                    accelerator.print(f"Stopped by {reason} after step {done}; go on with {how}.")
                    return
            reporter.report(end)
            self.finish()

    @contextlib.contextmanager
    def open(self):
        """The output folder, kept for this run alone, the images, and the signals, until the run ends."""
        folder = checkpoints.sole_user(self.output) if self.accelerator.is_main_process else contextlib.nullcontext()
        with folder, workers(self.loader) as batches, self.reporter.begin(self.start), StopSignal() as stop:
            yield batches, stop

    def step(self, step: int, batches: Iterator, stopping: bool = False) -> tuple[float, float, bool]:
        """One step of the optimizer on the mean loss of a global batch, in micro-batches and over all processes.

        Returns the loss, the norm of its gradient, and whether any process is `stopping`, the same on all processes.
        Where the loss or the gradient is not finite the weights stay as they were (not under DeepSpeed, whose engine
        steps before it can be asked).
        """
        accelerator, device = self.accelerator, self.accelerator.device
        size, micro_batches = self.sampler.resolution(step), self.sampler.micro_batches(step)
        share, total = sum(map(len, micro_batches)), torch.zeros((), device=device)
        for index, draws in enumerate(micro_batches, 1):
            batch = next_batch(batches)
            images = batch["image"].to(device, non_blocking=True)
            labels = batch["label"].to(device) if "label" in batch else None
            with exchange_gradients(accelerator, self.model, index == len(micro_batches)):
                loss = self.loss(images, [draw.number for draw in draws], size, labels).sum() / share
                accelerator.backward(loss)
            total += loss.detach()

        grad_norm = accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        grad_norm = math.nan if grad_norm is None else float(full_tensor(torch.as_tensor(grad_norm)))
        # One reduction for all that processes must agree on.
        loss, stopping = accelerator.reduce(torch.stack([total, torch.full_like(total, stopping)]), "mean").tolist()
        if math.isfinite(loss) and math.isfinite(grad_norm) or accelerator.scaler is not None:
            self.optimizer.step()  # in fp16 the gradient scaler skips the step itself, and must hear of it
        self.optimizer.zero_grad(set_to_none=True)
        return loss, grad_norm, stopping > 0

    def save(self, done: int) -> None:
        """Write checkpoint-DONE, from which a run goes on to the bit."""
        checkpoints.check_finite(self.average, done, self.args)

        def save(folder: Path) -> None:
            checkpoints.save_state(self.accelerator, self.model, self.optimizer, folder)
            self.average.save(folder)
            if self.accelerator.is_main_process:
                self.network.save_config(folder)
                facts = json.dumps(self.reporter.facts(), indent=2)
                (folder / "run.json").write_text(facts + "\n", encoding="utf-8")

        checkpoints.save_checkpoint(self.accelerator, self.output, done, save, self.args.checkpoints_total_limit)

    def resume(self) -> None:
        changed = checkpoints.changes_since(self.checkpoint, self.args, self.data.facts())
        with checkpoints.readable(self.checkpoint):
            checkpoints.load_state(self.accelerator, self.model, self.optimizer, self.checkpoint)
            self.average.load(self.checkpoint)
        setup.set_learning_rate(self.lr_scheduler, self.optimizer, self.start, self.args.learning_rate)
        self.accelerator.print(f"Resumed from {self.checkpoint}." + " Changed: " * bool(changed) + ", ".join(changed))

    def finish(self) -> None:
        """The card, and the upload."""
        args = self.args
        if self.accelerator.is_main_process:
            if self.part == "unet":  # the card shows how to generate with it
                write_atomically(self.output / "README.md", self.card())
            if args.push_to_hub:
                print(f"Pushed to {hub.push_folder(self.output, args.hub_model_id)}.")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"Trained {args.max_train_steps} steps: see {self.output}/samples.png and loss.png.")
        self.accelerator.end_training()

    def card(self) -> str:
        args, data, facts, rows = self.args, self.data, self.reporter.facts(), self.reporter.losses.rows
        recent = [loss for row in rows[-100:] if math.isfinite(loss := float(row["loss"]))]
        on_the_hub = args.dataset_name and not Path(args.dataset_name).exists()
        source = data.images if on_the_hub else Path(data.images or "").resolve().name
        return hub.model_card(
            hub.TEMPLATE,
            self.output,
            args.hub_model_id or self.output.name,
            train_sizes=[format_resolution(size) for size in args.resolutions + args.upsample_resolutions],
            data=data.description.replace(str(data.images), source),
            class_names=data.class_names,
            datasets=[args.dataset_name] if on_the_hub else None,
            options=facts["options"],
            images_seen=args.max_train_steps * args.batch_size,
            hardware=f"{facts['processes']} x {facts['device']}",
            time=str(datetime.timedelta(seconds=round(float(rows[-1]["seconds"])))),
            final_loss=sum(recent) / len(recent) if recent else None,
            validation={row["resolution"]: float(row["loss"]) for row in self.reporter.held_out.rows} or None,
            license=args.hub_license,
            advised_sizes=args.hub_advised_sizes,
            limits=args.hub_limits,
            commit=facts["commit"],
        )


@contextlib.contextmanager
def one_line_errors(*kinds):
    """Ends the script with one line, without the trail that a mistake of ours needs."""
    try:
        yield
    except (CheckpointError, OSError, hub.HubError, *kinds) as error:
        raise SystemExit(f"train_dfu.py: {error}") from error


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, CONFIGS, __doc__)
    with one_line_errors(ValueError):
        run = Run(args, shlex.join(["train_dfu.py", *argv]))
    if args.dry_run:
        run.accelerator.print(describe(args, run.network, run.data, run.sampler))
        return
    with one_line_errors(DataError, SafetensorError):
        run.train()


if __name__ == "__main__":
    main()
