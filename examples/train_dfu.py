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

import argparse
import contextlib
import datetime
import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from tqdm.auto import tqdm

import dfu_diffusers
from dfu_diffusers import DFUPipeline, DFUSuperResolutionPipeline, hub
from dfu_diffusers.command_line import device_name, git_commit
from dfu_diffusers.data.resolutions import MixedResolutionBatchSampler, format_resolution, source_size
from dfu_diffusers.files import write_atomically
from dfu_diffusers.pipelines.octaves import octave_scheduler
from dfu_diffusers.training.augment import GeometricAugment
from dfu_diffusers.training.checkpoints import (
    CheckpointError,
    check_architecture,
    choose_checkpoint,
    find_checkpoints,
    load_state,
    read_object,
    readable,
    replace_contents,
    save_checkpoint,
    save_state,
    set_aside,
    sole_user,
    whole_weights,
)
from dfu_diffusers.training.ema import save_snapshot
from dfu_diffusers.training.freezing import freeze, summary
from dfu_diffusers.training.losses import OctaveLoss, OctaveValidationLoss, TrainingLoss, ValidationLoss, fit_size
from dfu_diffusers.training.options import parse_args, public_options
from dfu_diffusers.training.reports import (
    Table,
    activation_bytes,
    enlargement_sheet,
    plot_losses,
    sample_sheet,
    sheet_sizes,
)
from dfu_diffusers.training.setup import (
    MODELS,
    NOISE_LEVELS,
    Data,
    average_rules,
    build_optimizer,
    build_refiner,
    build_scheduler,
    build_unet,
    load_config,
)
from dfu_diffusers.training.step import (
    DataError,
    StopSignal,
    TrainingStep,
    WeightAverages,
    end_workers,
    keep_freed_memory,
)

CONFIGS = Path(__file__).parent / "configs"


class Run:
    """Everything a training run holds. Making it checks what can be checked before the first step."""

    def __init__(self, args: argparse.Namespace, command: str = "train_dfu.py"):
        self.args, self.command, self.output = args, command, Path(args.output_dir)
        self.checkpoint = choose_checkpoint(args.resume_from_checkpoint, self.output)
        self.start = int(self.checkpoint.name.removeprefix("checkpoint-")) if self.checkpoint else 0
        if self.start > args.max_train_steps:
            raise CheckpointError(f"{self.checkpoint} has done {self.start} steps: ask for more: --max_train_steps.")
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(str(self.output), str(self.output / "logs")),
            # The others wait while the main process samples and validates, longer than the usual ten minutes.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=4))],
        )
        self.main = self.accelerator.is_main_process
        if args.report_to != "none" and not self.accelerator.log_with:
            raise ValueError(f"--report_to {args.report_to} is not installed: install it, or use --report_to none.")
        args.mixed_precision = self.accelerator.mixed_precision
        if args.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ValueError("--mixed_precision fp16 needs a GPU (here it would silently be float32): use bf16.")
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        set_seed(args.seed)

        self.part, config = load_config(args)
        self._fill_in_options()
        self._prepare_data(config.get("in_channels", 3))
        self._build(config)
        if not args.dry_run:
            self._prepare_model()

    def _fill_in_options(self) -> None:
        """Those whose default depends on the model."""
        args, (p_mean, p_std) = self.args, NOISE_LEVELS[self.part]
        args.p_mean = p_mean if args.p_mean is None else args.p_mean
        args.p_std = args.p_std or p_std
        if self.part == "refiner":
            args.source_resolution = args.source_resolution or max(args.resolutions, key=math.prod)

    def _prepare_data(self, channels: int) -> None:
        """Each process draws its own share of every batch, so the loader is not handed to Accelerate."""
        args, accelerator = self.args, self.accelerator
        self.data = Data(args, channels, accelerator)
        self.sampler = MixedResolutionBatchSampler(
            self.data.length, args.batch_size, args.resolutions, args.resolution_weights, args.upsample_resolutions,
            args.upsample_weight, args.resolution_warmup_steps, args.max_pixels_per_batch, args.max_train_steps,
            self.start, args.seed, accelerator.process_index, accelerator.num_processes, args.source_resolution,
        )  # fmt: skip
        self.loader = self.data.loader(self.sampler, pin_memory=accelerator.device.type == "cuda")

    def _build(self, config: dict) -> None:
        """Network, scalings of its loss, and validation."""
        args, refines = self.args, self.part == "refiner"
        if refines and config.get("detail_std") is None:
            config["detail_std"] = self._saved_detail_std() or self.data.detail_std()
        with torch.device("meta") if args.dry_run and not args.init_from else contextlib.nullcontext():
            self.network = build_refiner(args, config) if refines else build_unet(args, config, self.data.num_classes)
        self.scheduler = build_scheduler(args)
        self.scalings = octave_scheduler(self.scheduler, self.network) if refines else self.scheduler
        if args.freeze:
            freeze(self.network, args.freeze)
        self.noise = dict(seed=args.seed, p_mean=args.p_mean, p_std=args.p_std)
        self.validation = None
        if self.data.held_out is not None:
            self.validation = (OctaveValidationLoss if refines else ValidationLoss)(
                self.data.held_out, args.resolutions, self.scalings, **self.noise,
                source_resolution=args.source_resolution,
            )  # fmt: skip

    def _saved_detail_std(self) -> float | None:
        """That of the checkpoint to go on from: the images may not be the same."""
        return read_object(self.checkpoint / "config.json").get("detail_std") if self.checkpoint else None

    def _make_loss(self) -> TrainingLoss | OctaveLoss:
        if self.part == "refiner":
            return OctaveLoss(self.model, self.scalings, **self.noise)
        args = self.args
        augment = GeometricAugment(args.augment_probability) if args.augment_probability else None
        return TrainingLoss(
            self.model, self.scalings, **self.noise, augment=augment, label_dropout=args.label_dropout,
            no_class=self.data.num_classes,
        )  # fmt: skip

    def _prepare_model(self) -> None:
        args = self.args
        if self.checkpoint:
            check_architecture(self.checkpoint, self.network.config)
        if args.gradient_checkpointing:
            levels = {"levels": args.checkpointed_levels} if self.part == "unet" else {}
            self.network.enable_gradient_checkpointing(**levels)
        if args.torch_compile:
            self.network.compile_repeated_blocks()
        if deepspeed := self.accelerator.state.deepspeed_plugin:  # whose engine clips and wants to know the batch
            share = args.batch_size // self.accelerator.num_processes
            options = {"train_micro_batch_size_per_gpu": share, "gradient_clipping": args.max_grad_norm}
            deepspeed.deepspeed_config.update(options)
        optimizer = build_optimizer(args, self.network)
        # This schedule stays unprepared: Accelerate would step it once for each process, and our steps count the
        # global batch.
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=-(-args.lr_warmup_images // args.batch_size),
            num_training_steps=args.max_train_steps,
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.averages = WeightAverages(self.accelerator, self.model, average_rules(args))
        self.loss = self._make_loss()
        if self.checkpoint:
            self._resume()
        card = hub.card_head(args.hub_license)
        if args.push_to_hub and self.main:
            args.hub_model_id = hub.check_push(
                args.hub_model_id or self.output.name, args.hub_private, tag=args.hub_tag, card=card
            )

    def describe(self) -> str:
        """Model, data, schedule and memory, as --dry_run prints them."""
        args, steps = self.args, self.args.max_train_steps - self.start
        expected = self.sampler.expected_steps()
        lines = [summary(self.network), f"Data: {self.data}."]
        lines += [f"{steps} steps of {args.batch_size} images, {steps * args.batch_size} in all, on average:"]
        for size in sorted(expected, key=math.prod):
            micro = self.sampler.micro_batch_sizes(size)
            lines.append(
                f"  {format_resolution(size):>9}: {expected[size]:.0f} steps, {len(micro)} x {max(micro)} images a "
                f"process, about {activation_bytes(self.network, max(micro), size) / 2**30:.2f} GiB of activations "
                f"in float32"
            )
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        weights = sum(p.numel() for p in self.network.parameters())
        copies = 4 * (weights * (2 + len(args.power_ema)) + 3 * trained)
        lines.append(f"weights, averages, gradients and Adam's moments: {copies / 2**30:.2f} GiB in float32")
        return "\n".join(lines)

    def train(self) -> None:
        args, end = self.args, self.args.max_train_steps
        with self._output_folder(), self._workers() as batches:
            self.begin(batches)
            with StopSignal() as stop, self.progress:
                if self._missed_report():
                    self._report(self.start)
                for done in range(self.start + 1, end + 1):
                    stopping = self.step(done, stop)
                    if done == end or done % args.checkpointing_steps == 0 or stopping:
                        self._checkpoint(done)
                    if done < end and self._is_report_due(done):
                        self._report(done)
                    if stopping and done < end:
                        self._say_stopped(done, stop)
                        return
            self._report(end)
            self._finish()

    # -- before the first step ----------------------------------------------------------------------------------------

    def _resume(self) -> None:
        with readable(self.checkpoint):
            facts = read_object(self.checkpoint / "run.json")
            saved, data, options = dict(facts["options"]), dict(facts["data"]), public_options(self.args)
        for name, reason in (
            ("batch_size", "it decides which images have been seen (--max_pixels_per_batch saves memory)"),
            ("optimizer", "its moments are those of that one"),
        ):
            if saved.get(name) != options[name]:
                raise CheckpointError(
                    f"{self.checkpoint} was made with --{name} {saved.get(name)}, not {options[name]}, which must "
                    f"stay: {reason}."
                )
        with readable(self.checkpoint):
            load_state(self.accelerator, self.model, self.optimizer, self.checkpoint)
            self.averages.load(self.checkpoint)
        self._apply_learning_rate()
        free = {"resume_from_checkpoint", "output_dir", "config", "dry_run"}
        changed = [f"{k} {saved.get(k)} -> {v}" for k, v in options.items() if k not in free and saved.get(k) != v]
        if data.get("fingerprint") != self.data.fingerprint:
            changed.append(
                f"the images: {data.get('description')} -> {self.data.description}, so some will come twice"
            )
        self.accelerator.print(f"Resumed from {self.checkpoint}." + " Changed: " * bool(changed) + ", ".join(changed))

    def _apply_learning_rate(self) -> None:
        """This run's options, at the step of the checkpoint; the optimizer's came with it."""
        schedule, rate = self.lr_scheduler, self.args.learning_rate
        schedule.last_epoch = self.start
        schedule.base_lrs = [rate for _ in schedule.base_lrs]
        for group, scale in zip(self.optimizer.param_groups, schedule.lr_lambdas):
            group["initial_lr"], group["lr"] = rate, rate * scale(schedule.last_epoch)
            if self.args.optimizer == "adamw":
                group["weight_decay"] = self.args.weight_decay

    @contextlib.contextmanager
    def _output_folder(self):
        """The folder, kept for this run alone: everything that leaves a trace waits until the run is possible."""
        with contextlib.ExitStack() as stack:
            if self.main:
                try:
                    self.output.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(sole_user(self.output))
                except OSError as error:
                    raise CheckpointError(f"--output_dir {self.output} cannot be written to: {error}") from error
            yield

    @contextlib.contextmanager
    def _workers(self):
        """Iterates over the images; their workers end with it, whatever happens."""
        batches = iter(self.loader)
        try:
            yield batches
        finally:
            end_workers(batches)

    def begin(self, batches) -> None:
        """Say what is to come, and open the tables."""
        self.nonfinite, self.has_loss, self.recent, self.progress = 0, True, {}, self._progress_bar()
        max_grad_norm = self.args.max_grad_norm
        self.training_step = TrainingStep(
            self.accelerator, self.model, self.optimizer, self.loss, self.sampler, batches, max_grad_norm
        )
        self.accelerator.print(summary(self.network))
        self.accelerator.print(f"Data: {self.data}.")
        images = self.args.max_train_steps * self.args.batch_size
        if self.args.lr_scheduler != "constant" and self.args.lr_warmup_images > images:
            self.accelerator.print("The learning rate will not rise to its full value: --lr_warmup_images is longer.")
        if self.main:
            self._begin_tables()

    def _begin_tables(self) -> None:
        for path in set_aside(self.output, self.start):
            self.accelerator.print(f"A later checkpoint of this run, which goes on before it, is now {path}.")
        write_atomically(self.output / "run.json", json.dumps(self._facts(), indent=2) + "\n")
        fields = ["step", "resolution", "loss", "grad_norm", "learning_rate", "seconds"]
        self.log = Table(self.output / "loss.csv", fields, self.start)
        self.started = time.time() - (float(self.log.rows[-1]["seconds"]) if self.log.rows else 0)
        bins = self.validation.bin_names if self.validation else []
        fields = ["step", "resolution", "loss", *(f"sigma {name}" for name in bins)]
        self.validation_log = Table(self.output / "validation.csv", fields, self.start)
        self.accelerator.init_trackers("dfu", {k: str(v) for k, v in public_options(self.args).items()})

    def _facts(self) -> dict:
        return {
            "options": public_options(self.args),
            "command": self.command,
            "data": {name: getattr(self.data, name) for name in ("description", "fingerprint", "class_names")},
            "model": {k: v for k, v in self.network.config.items() if not k.startswith("_")},
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "versions": {m.__name__: m.__version__ for m in (dfu_diffusers, torch, diffusers, accelerate)}
            | {"python": platform.python_version()},
            "commit": git_commit(),
            "device": device_name(self.accelerator.device),
            "processes": self.accelerator.num_processes,
            "distributed": str(self.accelerator.distributed_type.value),
        }

    # -- while it trains ----------------------------------------------------------------------------------------------

    def _progress_bar(self) -> tqdm:
        """Counts images, so that it shows images a second and the time left."""
        batch_size, main = self.args.batch_size, self.accelerator.is_local_main_process
        total, seen = self.args.max_train_steps * batch_size, self.start * batch_size
        return tqdm(total=total, initial=seen, unit="img", unit_scale=True, disable=not main)

    def step(self, done: int, stop: StopSignal) -> bool:
        """Step `done` and what belongs to each: averages of weights and losses, logs, a count of losses not finite.
        Returns whether a process was asked to stop."""
        loss, grad_norm, stopping = self.training_step(done - 1, value=float(stop.name is not None))
        self.lr_scheduler.step()
        name = format_resolution(self.sampler.resolution(done - 1))
        # The gradient scaler of fp16 finds its scale by halving one that overflows, from 2^16 on.
        patience = self.args.max_nonfinite_steps + (24 if self.args.mixed_precision == "fp16" else 0)
        self.has_loss = math.isfinite(loss)
        if self.has_loss and math.isfinite(grad_norm):
            self.nonfinite = 0
            self.averages.step()
            self.recent[name] = 0.9 * self.recent.get(name, loss) + 0.1 * loss
        else:
            self.nonfinite += 1
            if self.main:
                self.progress.write(f"Step {done} at {name} skipped: loss {loss}, norm of the gradient {grad_norm}.")
        self.progress.set_postfix({name: f"{self.recent[name]:.3f}" for name in sorted(self.recent)}, refresh=False)
        self.progress.update(self.args.batch_size)
        if self.main:
            self._log(done, name, loss, grad_norm)
        if self.nonfinite == patience:
            raise CheckpointError(
                f"Stopped after {self.nonfinite} steps in a row without a finite loss: the learning rate "
                f"{self.args.learning_rate} may be too high. {self.output} holds the checkpoints before."
            )
        return stopping > 0

    def _log(self, done: int, name: str, loss: float, grad_norm: float) -> None:
        rate, seconds = self.lr_scheduler.get_last_lr()[0], round(time.time() - self.started, 2)
        self.log.append(done, name, loss, grad_norm, rate, seconds)
        values = {"loss": loss, f"loss/{name}": loss, "grad_norm": grad_norm, "learning_rate": rate}
        self.accelerator.log(values, step=done)

    def _check_finite(self, done: int) -> None:
        """Weights that are saved or exported pass here."""
        if not self.averages.are_finite():
            raise self._diverged(f"The weights are not finite after step {done}")

    def _diverged(self, what: str) -> CheckpointError:
        found = find_checkpoints(self.output)
        remedy = f"Go on from {found[max(found)]}" if found else "Begin again"
        return CheckpointError(
            f"{what}: the training has diverged, and is neither saved nor exported. {remedy} with a --learning_rate "
            f"below {self.args.learning_rate}."
        )

    def _checkpoint(self, done: int) -> None:
        """Weights whose loss is not finite are none to go on from; an earlier checkpoint stays the latest."""
        args = self.args
        if self.has_loss:
            self._check_finite(done)
            save_checkpoint(self.accelerator, self.output, done, self._save, args.checkpoints_total_limit)
        elif done == args.max_train_steps:
            raise self._diverged(f"The loss is not finite in the last step, {done}")

    def _save(self, folder: Path) -> None:
        save_state(self.accelerator, self.model, self.optimizer, folder)
        self.averages.save(folder)
        if self.main:
            self.network.save_config(folder)
            (folder / "run.json").write_text(json.dumps(self._facts(), indent=2) + "\n", encoding="utf-8")

    def _say_stopped(self, done: int, stop: StopSignal) -> None:
        reason = stop.name or "a signal to another process"
        self.accelerator.print(f"Stopped by {reason} after step {done}; go on with --resume_from_checkpoint latest.")

    def _is_report_due(self, done: int) -> bool:
        before, now = (n * self.args.batch_size // self.args.report_images for n in (done - 1, done))
        return now > before

    def _has_reported(self, done: int) -> bool:
        return any(int(row["step"]) == done for row in self.validation_log.rows)

    def _missed_report(self) -> bool:
        """Whether a run ended between the checkpoint from which this one goes on and the report that was due."""
        if not (self.validation and 0 < self.start < self.args.max_train_steps and self._is_report_due(self.start)):
            return False
        missed = torch.tensor(float(self.main and not self._has_reported(self.start)), device=self.accelerator.device)
        return self.accelerator.reduce(missed, "sum").item() > 0

    def _report(self, done: int) -> None:
        """The pipeline as it is, its samples and its loss on held-out images: by the main process."""
        self._check_finite(done)
        weights = self.averages.weights("ema")
        raw = whole_weights(self.accelerator, self.model) if self.args.save_raw_weights else {}
        for sigma_rel in self.args.power_ema:
            snapshot = self.averages.weights(f"power-{sigma_rel}")
            if self.main:
                steps = self.averages.averages[f"power-{sigma_rel}"].optimization_step
                save_snapshot(snapshot, sigma_rel, steps, self.output / "power_ema")
        if self.main:
            pipe = self._pipeline(weights)
            if self.validation and not self._has_reported(done):
                self._validate(getattr(pipe, self.part), done)
            sheet = self._sheet(pipe)

            def save(folder: Path) -> None:
                pipe.save_pretrained(folder)
                if raw:
                    getattr(self._pipeline(raw), self.part).save_pretrained(folder / self.part, variant="raw")
                if sheet:
                    sheet.save(folder / "samples.png")
                plot_losses(folder / "loss.png", self.log, self.validation_log)

            replace_contents(self.output, save)
            if sheet:
                self._log_sheet(sheet, done)
        self.accelerator.wait_for_everyone()

    def _validate(self, model, done: int) -> None:
        with self.accelerator.autocast():
            losses = self.validation(model)
        if not all(values.isfinite().all() for values in losses.values()):
            raise self._diverged(f"The held-out loss is not finite after step {done}")
        for size, values in losses.items():
            name = format_resolution(size)
            self.validation_log.append(done, name, *values.tolist())
            self.accelerator.log({f"validation/{name}": values[0].item()}, step=done)

    def _pipeline(self, weights: dict[str, torch.Tensor]) -> DFUPipeline:
        with torch.device("meta"):
            model = MODELS[self.part].from_config(self.network.config)
        model.load_state_dict(weights, assign=True)
        model = model.to(self.accelerator.device).eval()
        if self.part == "refiner":
            pipe = DFUSuperResolutionPipeline(None, self.scheduler, refiner=model)
        else:
            pipe = DFUPipeline(model, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _sheet(self, pipe: DFUPipeline):
        """Samples, or held-out images enlarged by a refiner; None without such images."""
        args, held_out = self.args, self.data.held_out
        if self.part == "unet":
            return sample_sheet(pipe, sheet_sizes(args.resolutions + args.upsample_resolutions), args.seed)
        if held_out is None:
            return None
        size = tuple(side // 2 for side in min(args.resolutions, key=math.prod))
        source = source_size(size, [size], args.source_resolution)
        items = held_out.__getitems__([(i, source) for i in range(min(6, len(held_out)))])
        return enlargement_sheet(pipe, fit_size(torch.stack([item["image"] for item in items]), size), args.seed)

    def _log_sheet(self, sheet, done: int) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": np.asarray(sheet)[None]}, step=done, **layout)

    def _finish(self) -> None:
        if self.main:
            if self.part == "unet":  # the card shows how to generate with it
                self._write_card()
            if self.args.push_to_hub:
                how = {name: vars(self.args)[f"hub_{name}"] for name in ("revision", "tag", "self_contained")}
                print(f"Pushed to {hub.push_folder(self.output, self.args.hub_model_id, **how)}.")
        self.accelerator.wait_for_everyone()
        self.accelerator.print(
            f"Trained {self.args.max_train_steps} steps: see {self.output}/samples.png and loss.png."
        )
        self.accelerator.end_training()

    def _write_card(self) -> None:
        args, facts = self.args, self._facts()
        last = {row["resolution"]: float(row["loss"]) for row in self.validation_log.rows}
        recent = [loss for row in self.log.rows[-100:] if math.isfinite(loss := float(row["loss"]))]
        on_the_hub = args.dataset_name and not Path(args.dataset_name).exists()
        source = self.data.images if on_the_hub else Path(self.data.images or "").resolve().name
        card = hub.model_card(
            hub.TEMPLATE,
            self.output,
            args.hub_model_id or self.output.name,
            train_sizes=[format_resolution(size) for size in args.resolutions + args.upsample_resolutions],
            data=self.data.description.replace(str(self.data.images), source),
            class_names=self.data.class_names,
            datasets=[args.dataset_name] if on_the_hub else None,
            options=facts["options"],
            images_seen=args.max_train_steps * args.batch_size,
            hardware=f"{facts['processes']} x {facts['device']}",
            time=str(datetime.timedelta(seconds=round(float(self.log.rows[-1]["seconds"])))),
            final_loss=sum(recent) / len(recent) if recent else None,
            validation=last or None,
            self_contained=args.hub_self_contained,
            **{name: vars(args)[f"hub_{name}"] for name in ("license", "advised_sizes", "limits")},
            commit=facts["commit"],
        )
        write_atomically(self.output / "README.md", card)


@contextlib.contextmanager
def one_line_errors():
    """Mistakes of the user end the script with one line, without the trail that a mistake of ours needs."""
    try:
        yield
    except (ValueError, OSError, CheckpointError, hub.HubError) as error:
        raise SystemExit(f"train_dfu.py: {error}") from error


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, CONFIGS, __doc__)
    with one_line_errors():
        run = Run(args, shlex.join(["train_dfu.py", *argv]))
    if args.dry_run:
        run.accelerator.print(run.describe())
        return
    try:
        run.train()
    except (CheckpointError, DataError, OSError, SafetensorError, hub.HubError) as error:
        raise SystemExit(f"train_dfu.py: {error}") from error
    except RuntimeError as error:  # raised by a signal handler of torch's, wherever the run is
        if "DataLoader worker (pid" not in str(error):
            raise
        raise SystemExit(
            f"train_dfu.py: a process that loads images died ({error}), often for lack of memory. Use fewer "
            f"--num_workers, perhaps with --cache_dir, and go on with --resume_from_checkpoint latest."
        ) from error


if __name__ == "__main__":
    main()
