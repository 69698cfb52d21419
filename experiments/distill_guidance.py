#!/usr/bin/env python
"""Train a refiner of portraits to give its own guided output by itself, at no cost in sampling.

    python experiments/distill_guidance.py --guide outputs/portraits-refiner-early [--model checkpoints/dfu-portraits]

Autoguidance (arXiv 2406.02507) moves the output of a network away from that of a weaker one, G + w (F - G): here it
restores the power that a refiner's detail lacks. --guide is the folder of a refiner, or of a pipeline that has one: a
snapshot early in the same training. A copy of --model's refiner learns the guided output by squared error (guidance
distillation, arXiv 2210.03142), and is saved as a refiner in --output_dir.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from dfu_diffusers import DFURefiner
from dfu_diffusers.command_line import count
from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.data.resolutions import Size
from dfu_diffusers.training.losses import OctaveLoss, octave_scalings
from pictures import CHECKPOINT

# Size, images in a batch, and how often it is drawn.
BATCHES = [((20, 20), 8, 2), ((24, 33), 8, 1), ((32, 32), 8, 5), ((48, 48), 4, 1), ((57, 38), 4, 1), ((64, 64), 4, 3)]


class Distillation(nn.Module):
    """A student that is called as a refiner is; `error` is its squared error in the last call, (batch,)."""

    def __init__(self, student, strong, weak, guidance_scale: float):
        super().__init__()
        self.student, self.strong, self.weak, self.guidance_scale = student, strong, weak, guidance_scale

    def forward(self, *inputs):
        with torch.no_grad():
            target = self.weak(*inputs).sample.lerp(self.strong(*inputs).sample, self.guidance_scale)
        output = self.student(*inputs)
        self.error = (output.sample - target).square().mean((1, 2, 3))
        return output


def load_refiner(folder: str) -> DFURefiner:
    part = "refiner" if (Path(folder) / "refiner").is_dir() else None
    return DFURefiner.from_pretrained(folder, subfolder=part, use_safetensors=True).float().eval()


def portraits(first: int, number: int, size: Size) -> torch.Tensor:
    """At the pixel density of 64 x 64, cropped to the shape of `size` by the loss."""
    scale = 64 / max(size)
    sides = [max(round(scale * side), side) for side in size]
    return render_portraits(portrait_parameters(range(first, first + number)), *sides)


def main(argv=None) -> DFURefiner:
    """Returns the trained refiner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(CHECKPOINT), help="folder of a refiner, or of a pipeline that has one")
    add("--guide", required=True, help="folder of a weaker refiner of the same pictures")
    add("--guidance_scale", type=float, default=1.3)
    add("--steps", type=count, default=2000)
    add("--learning_rate", type=float, default=4e-4, help="falls to 0 over the steps")
    add("--threads", type=count, help="of the CPU (default: torch's own choice)")
    add("--output_dir", default="outputs/distilled")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        strong, weak = load_refiner(args.model), load_refiner(args.guide)
    except OSError as error:
        parser.error(f"no refiner can be loaded: {error}")
    channels = strong.config.in_channels, weak.config.in_channels
    if set(channels) != {3}:
        parser.error(f"portraits have 3 channels, but --model and --guide take {channels[0]} and {channels[1]}")
    laws = [(model.config.detail_std, model.config.detail_exponent) for model in (strong, weak)]
    if laws[0] != laws[1]:
        parser.error(
            f"--model and --guide must have one detail_std and detail_exponent, but have {laws[0]} and {laws[1]}"
        )
    student = copy.deepcopy(strong).train()
    distillation = Distillation(student, strong, weak, args.guidance_scale)
    loss = OctaveLoss(distillation, octave_scalings(strong.config))
    optimizer = torch.optim.Adam(student.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, args.steps)
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    generator, seen = torch.Generator().manual_seed(0), 0
    shares = torch.tensor([float(share) for *_, share in BATCHES])
    progress = tqdm(range(args.steps), unit="step")
    for _ in progress:
        size, number, _ = BATCHES[torch.multinomial(shares, 1, generator=generator).item()]
        loss(portraits(seen, number, size), range(seen, seen + number), size)
        error = distillation.error.mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(student)
        seen += number
        progress.set_postfix(error=f"{error.item():.4f}")
    average.module.eval().save_pretrained(args.output_dir)
    return average.module


if __name__ == "__main__":
    main()
