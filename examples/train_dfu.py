#!/usr/bin/env python
"""Train a DFU model on several resolutions at once, with Accelerate.

    accelerate launch examples/train_dfu.py                                      # procedural portraits, nothing else
    accelerate launch examples/train_dfu.py --train_data_dir photos --resolutions 32 48 64 --mixed_precision bf16

Writes into --output_dir: the pipeline with averaged weights (load it with DFUPipeline.from_pretrained), samples.png
with samples at 1, 1.5 and 2 times the largest training size, loss.csv and loss.png, and checkpoints to resume from.
"""

import argparse
import csv
import json
import math
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.data import ImageDataset, MixedResolutionBatchSampler, parse_resolution
from dfu_diffusers.losses import edm_loss
from dfu_diffusers.portraits import PortraitDataset

CONFIGS = Path(__file__).parent / "configs"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--train_data_dir", help="folder of images, nested ones too (default: procedural portraits)")
    data.add_argument("--random_flip", action="store_true", help="mirror half of the images")
    data.add_argument("--resolutions", nargs="+", default=["16", "24", "32"], help="HEIGHT or HEIGHTxWIDTH")
    data.add_argument("--resolution_weights", nargs="+", type=float, help="how often each is drawn (default: equally)")
    data.add_argument("--num_workers", type=int, default=0, help="processes that load images")
    model = parser.add_argument_group("model")
    model.add_argument("--model_config", default=str(CONFIGS / "portraits.json"), help="DFUModel's config.json format")
    training = parser.add_argument_group("training")
    training.add_argument("--batch_size", type=int, default=32, help="images per step, over all processes together")
    training.add_argument("--max_train_steps", type=int, default=2000)
    training.add_argument("--learning_rate", type=float, default=1e-3)
    training.add_argument("--lr_scheduler", default="cosine", choices=[s.value for s in SchedulerType], metavar="NAME")
    training.add_argument("--lr_warmup_steps", type=int, default=100)
    training.add_argument("--max_grad_norm", type=float, default=1.0)
    training.add_argument("--ema_halflife_images", type=float, default=20_000, help="of the averaged weights")
    training.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    training.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    training.add_argument("--seed", type=int, default=0)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="outputs/dfu-portraits")
    output.add_argument("--checkpointing_steps", type=int, default=1000)
    output.add_argument("--resume_from_checkpoint", help="a checkpoint folder, or 'latest'")
    output.add_argument("--sample_steps", type=int, default=1000, help="draw samples.png every so many steps")
    args = parser.parse_args(argv)

    for name in ("batch_size", "max_train_steps", "checkpointing_steps", "sample_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("learning_rate", "ema_halflife_images", "max_grad_norm"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, not {getattr(args, name)}")
    if args.resolution_weights and len(args.resolution_weights) != len(args.resolutions):
        parser.error(f"--resolution_weights needs {len(args.resolutions)} numbers, one for each of --resolutions")
    if not Path(args.model_config).is_file():
        presets = sorted(path.name for path in CONFIGS.glob("*.json"))
        parser.error(f"--model_config {args.model_config} is not a file; presets in {CONFIGS}: {', '.join(presets)}")
    try:
        args.resolutions = [parse_resolution(text) for text in args.resolutions]
    except ValueError as error:
        parser.error(f"--resolutions: {error}")
    return args


def load_config(args) -> dict:
    """Arguments of the model, checked against what this script trains: unconditional models of images."""
    config = json.loads(Path(args.model_config).read_text())
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels[0] != channels[1] or config.get("num_class_embeds"):
        raise SystemExit(
            f"--model_config {args.model_config}: this script trains unconditional models that return what they take, "
            f"but here in_channels, out_channels = {channels}, num_class_embeds = {config.get('num_class_embeds')}."
        )
    height, width = max(args.resolutions, key=math.prod)
    return {**config, "in_channels": channels[0], "sample_size": height if height == width else (height, width)}


def load_data(args, config: dict):
    """The images to train on, indexed by (index, (height, width))."""
    if args.train_data_dir is None:
        if config["in_channels"] != 3:
            raise SystemExit(f"The portraits have 3 channels, but the model has {config['in_channels']}.")
        return PortraitDataset(length=1_000_000, seed=args.seed)
    if not Path(args.train_data_dir).is_dir():
        raise SystemExit(f"--train_data_dir {args.train_data_dir} is not a folder.")
    from datasets import load_dataset

    mode = {1: "L", 3: "RGB"}.get(config["in_channels"])
    if mode is None:
        raise SystemExit(f"Images have 1 or 3 channels, but the model has in_channels={config['in_channels']}.")
    try:
        table = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train", drop_labels=True)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--train_data_dir {args.train_data_dir} holds no image that can be read: {error}") from error
    return ImageDataset(table, mode=mode, flip=args.random_flip)


def draw_samples(pipe: DFUPipeline, path: Path, seed: int, count: int = 6) -> None:
    """A row of images at 1, 1.5 and 2 times the model's `sample_size`, the same seeds in each, shown at one scale."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    sheet = Image.new("RGB", (2 * count * width, 6 * height))
    for row, factor in enumerate((1, 1.5, 2)):
        images = pipe(
            batch_size=count,
            height=round(factor * height),
            width=round(factor * width),
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        ).images
        for column, image in enumerate(images):
            enlarged = image.resize((2 * width, 2 * height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (2 * column * width, 2 * row * height))
    sheet.save(path)


class LossLog:
    """loss.csv and its plot. After a resume the rows up to the checkpoint stay, later ones are made again."""

    FIELDS = ["step", "resolution", "loss", "grad_norm", "learning_rate", "seconds"]

    def __init__(self, path: Path, start_step: int):
        self.path, self.rows = path, []
        if start_step and path.exists():
            with open(path, newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= start_step]
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def append(self, *values) -> None:
        self.rows.append(dict(zip(self.FIELDS, values)))
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.FIELDS).writerow(self.rows[-1])

    def plot(self, path: Path) -> None:
        """One curve for each resolution, averaged over about fifty groups of steps."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for resolution in sorted({row["resolution"] for row in self.rows}):
            chosen = [row for row in self.rows if row["resolution"] == resolution]
            window = max(1, len(chosen) // 50)
            groups = [chosen[i : i + window] for i in range(0, len(chosen) - window + 1, window)]
            means = [sum(float(row["loss"]) for row in group) / window for group in groups]
            axes.plot([int(group[-1]["step"]) for group in groups], means, label=resolution)
        axes.set(xlabel="step", ylabel="EDM loss", yscale="log")
        axes.legend(title="resolution")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)


def save_checkpoint(accelerator: Accelerator, ema: EMAModel | None, output: Path, step: int) -> None:
    """Everything a resumed run needs, in output/checkpoint-<step>. It takes that name once it is complete, and only
    then the earlier ones go."""
    partial, folder = output / "partial-checkpoint", output / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.save_pretrained(str(partial / "ema"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old, path in find_checkpoints(output).items():
            if old < step:
                shutil.rmtree(path)


def find_checkpoints(output: Path) -> dict[int, Path]:
    """Complete checkpoints by steps done, in order."""
    paths = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return dict(sorted((int(path.name.removeprefix("checkpoint-")), path) for path in paths))


def choose_checkpoint(args, output: Path) -> tuple[int, Path | None]:
    """Steps done and folder of the checkpoint to resume from, or (0, None) for a new run."""
    found = find_checkpoints(output)
    if args.resume_from_checkpoint is None:
        if found:
            raise SystemExit(
                f"{output} holds {found[max(found)].name} of an earlier run: continue it with "
                f"--resume_from_checkpoint latest, or choose another --output_dir."
            )
        return 0, None
    if args.resume_from_checkpoint != "latest":
        folder = Path(args.resume_from_checkpoint)
        found = {step: path for step, path in find_checkpoints(folder.parent).items() if path.name == folder.name}
    if not found:
        name = args.resume_from_checkpoint
        raise SystemExit(f"--resume_from_checkpoint {name}: no such checkpoint-STEP in {output}.")
    step = max(found)
    if step >= args.max_train_steps:
        raise SystemExit(f"{found[step]} has done {step} steps already: ask for more with --max_train_steps.")
    return step, found[step]


def save_pipeline(unet: DFUModel, scheduler: EDMHeunScheduler, ema: EMAModel, output: Path, seed: int) -> None:
    """The pipeline with averaged weights, and samples of it."""
    with torch.random.fork_rng():  # initial weights, soon replaced, must not cost the run its random numbers
        averaged = DFUModel.from_config(unet.config).to(unet.device).eval()
    ema.copy_to(averaged.parameters())
    pipe = DFUPipeline(averaged, scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(output)
    draw_samples(pipe, output / "samples.png", seed)


def main(argv=None) -> None:
    args = parse_args(argv)
    output = Path(args.output_dir)
    start_step, checkpoint = choose_checkpoint(args, output)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)

    # Data. Each process draws its own share of every batch, so the loader is not handed to Accelerate. With its own
    # generator it leaves the global one alone, so that a resumed run draws the same noise.
    config = load_config(args)
    dataset = load_data(args, config)
    try:
        sampler = MixedResolutionBatchSampler(
            len(dataset), args.batch_size, args.resolutions, args.resolution_weights, args.max_train_steps, start_step,
            args.seed, accelerator.process_index, accelerator.num_processes,
        )  # fmt: skip
    except ValueError as error:
        raise SystemExit(str(error)) from error
    own = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers, generator=own)

    # Model, optimizer, moving average. The learning rate's schedule stays unprepared: Accelerate would step it once
    # for each process, and our steps count the global batch.
    model = DFUModel.from_config(config)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = EDMHeunScheduler()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    unet = accelerator.unwrap_model(model)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint}.")
    if accelerator.is_main_process:
        decay = 0.5 ** (args.batch_size / args.ema_halflife_images)
        ema = EMAModel(unet.parameters(), decay=decay, model_cls=DFUModel, model_config=unet.config)
        if checkpoint is not None:
            saved = EMAModel.from_pretrained(str(checkpoint / "ema"), DFUModel).state_dict()
            ema.load_state_dict({**saved, "decay": decay})  # of this run's half-life
        ema.to(accelerator.device)
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
        log = LossLog(output / "loss.csv", start_step)
    parameters = sum(p.numel() for p in unet.parameters())
    accelerator.print(f"{parameters / 1e6:.2f} M parameters, {len(dataset)} images, {len(sampler)} steps to go.")

    # Train.
    unet.train()
    started = time.time()
    progress = tqdm(total=args.max_train_steps, initial=start_step, disable=not accelerator.is_local_main_process)
    for done, batch in enumerate(loader, start=start_step + 1):
        images = batch["image"].to(accelerator.device)
        loss = edm_loss(model, scheduler, images).mean()
        accelerator.backward(loss)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        # Report, save.
        loss = accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(loss):
            raise SystemExit(f"The loss of step {done} is {loss}: lower --learning_rate.")
        resolution = "x".join(map(str, images.shape[-2:]))
        progress.update()
        progress.set_postfix(loss=f"{loss:.3f}", resolution=resolution)
        if accelerator.is_main_process:
            ema.step(unet.parameters())
            seconds = round(time.time() - started, 1)
            log.append(done, resolution, loss, float(grad_norm), lr_scheduler.get_last_lr()[0], seconds)
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            save_checkpoint(accelerator, ema if accelerator.is_main_process else None, output, done)
        if accelerator.is_main_process and (done % args.sample_steps == 0 or done == args.max_train_steps):
            save_pipeline(unet, scheduler, ema, output, args.seed)
            log.plot(output / "loss.png")
    progress.close()
    accelerator.wait_for_everyone()  # the others must not take the process group down while samples are drawn
    accelerator.print(f"Trained {args.max_train_steps} steps: the pipeline and samples.png are in {output}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
