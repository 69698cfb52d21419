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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
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
    training.add_argument("--lr_scheduler", default="cosine", help="a schedule of diffusers' get_scheduler")
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


def draw_samples(pipe: DFUPipeline, size: tuple[int, int], path: Path, seed: int = 0, count: int = 6) -> None:
    """One row of images for 1, 1.5 and 2 times `size`, the same seeds in each, shown at one scale."""
    from PIL import Image

    cell = 2 * size[0], 2 * size[1]
    sheet = Image.new("RGB", (count * cell[1], 3 * cell[0]))
    for row, factor in enumerate((1, 1.5, 2)):
        height, width = round(factor * size[0]), round(factor * size[1])
        generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        images = pipe(batch_size=count, height=height, width=width, generator=generators, output_type="pil").images
        for column, image in enumerate(images):
            image = image.resize(cell[::-1], Image.Resampling.NEAREST)
            sheet.paste(image, (column * cell[1], row * cell[0]))
    sheet.save(path)


def plot_loss(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for resolution in sorted({row["resolution"] for row in rows}):
        chosen = [row for row in rows if row["resolution"] == resolution]
        window = max(1, len(chosen) // 50)
        groups = [chosen[i : i + window] for i in range(0, len(chosen) - window + 1, window)]
        means = [sum(row["loss"] for row in group) / window for group in groups]
        axes.plot([group[-1]["step"] for group in groups], means, label=resolution)
    axes.set(xlabel="step", ylabel="EDM loss", yscale="log")
    axes.legend(title="resolution")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(argv=None) -> None:
    args = parse_args(argv)
    output = Path(args.output_dir)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed, device_specific=True)
    start_step, checkpoint = find_checkpoint(args, output)

    # Model, its moving average, optimizer.
    config = json.loads(Path(args.model_config).read_text())
    largest = max(args.resolutions, key=math.prod)
    config["sample_size"] = largest[0] if largest[0] == largest[1] else list(largest)
    model = DFUModel.from_config(config)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    scheduler = EDMHeunScheduler()
    decay = 0.5 ** (args.batch_size / args.ema_halflife_images)
    ema = EMAModel(model.parameters(), decay=decay, model_cls=DFUModel, model_config=model.config)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )
    # The scheduler stays unprepared: Accelerate would step it once per process, and our steps count the global batch.
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        ema = EMAModel.from_pretrained(str(checkpoint / "ema"), DFUModel)
        accelerator.print(f"Resumed from {checkpoint}.")
    ema.to(accelerator.device)

    # Data. Each process draws its own share of every batch, so the loader is not handed to Accelerate.
    dataset = load_data(args, config)
    sampler = MixedResolutionBatchSampler(
        len(dataset), args.batch_size, args.resolutions, args.resolution_weights, args.max_train_steps, start_step,
        args.seed, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    # With a generator of its own the loader leaves the global one alone, so that a resumed run draws the same noise.
    own = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers, generator=own)

    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    accelerator.print(f"{parameters / 1e6:.2f} M parameters, {len(dataset)} images, {len(sampler)} steps to go.")

    def save(folder: Path) -> None:
        """The pipeline with averaged weights, and its samples and losses."""
        unet = accelerator.unwrap_model(model)
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        unet.eval()
        pipe = DFUPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder)
        draw_samples(pipe, largest, folder / "samples.png", args.seed)
        unet.train()
        ema.restore(unet.parameters())
        plot_loss(history, folder / "loss.png")

    # Train.
    model.train()
    history, log, started = [], open_log(output / "loss.csv", start_step, accelerator.is_main_process), time.time()
    progress = tqdm(total=args.max_train_steps, initial=start_step, disable=not accelerator.is_local_main_process)
    for step, batch in enumerate(loader, start=start_step):
        images = batch["image"].to(accelerator.device)
        loss = edm_loss(model, scheduler, images).mean()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())

        done = step + 1
        row = {
            "step": done, "resolution": "x".join(map(str, images.shape[-2:])),
            "loss": accelerator.reduce(loss.detach(), "mean").item(), "grad_norm": float(norm),
            "learning_rate": lr_scheduler.get_last_lr()[0], "seconds": round(time.time() - started, 1),
        }  # fmt: skip
        if not math.isfinite(row["loss"]):
            raise SystemExit(f"The loss of step {done} is {row['loss']}: lower --learning_rate.")
        progress.update()
        progress.set_postfix(loss=f"{row['loss']:.3f}", resolution=row["resolution"])
        if accelerator.is_main_process:
            history.append(row)
            log.writerow(row)
            if done % args.sample_steps == 0 and done < args.max_train_steps:
                save(output)
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            folder = output / f"checkpoint-{done}"
            accelerator.save_state(str(folder))
            if accelerator.is_main_process:
                ema.save_pretrained(str(folder / "ema"))
                for old in output.glob("checkpoint-*"):
                    if old != folder:
                        shutil.rmtree(old)
    progress.close()
    if accelerator.is_main_process:
        save(output)
        accelerator.print(f"Saved the pipeline and samples.png to {output}.")
    accelerator.end_training()


def find_checkpoint(args, output: Path) -> tuple[int, Path | None]:
    """Steps done and folder of the checkpoint to resume from, or (0, None)."""
    if args.resume_from_checkpoint is None:
        return 0, None
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    folder = found[-1] if args.resume_from_checkpoint == "latest" and found else Path(args.resume_from_checkpoint)
    if not folder.is_dir():
        raise SystemExit(f"There is no checkpoint {folder}; {output} has {[path.name for path in found] or 'none'}.")
    return int(folder.name.split("-")[1]), folder


def open_log(path: Path, start_step: int, is_main_process: bool) -> csv.DictWriter | None:
    """loss.csv, continued after a resume."""
    if not is_main_process:
        return None
    file = open(path, "a" if start_step else "w", newline="", buffering=1)
    log = csv.DictWriter(file, ["step", "resolution", "loss", "grad_norm", "learning_rate", "seconds"])
    if not start_step:
        log.writeheader()
    return log


if __name__ == "__main__":
    main()
