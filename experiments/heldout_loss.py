#!/usr/bin/env python
"""How well does a checkpoint denoise portraits it never saw, at sizes it was trained on and at others?

python experiments/heldout_loss.py [--model checkpoints/dfu-portraits] [--sizes 16 24 32 48 64]

Prints a Markdown table of the EDM loss with fixed noise: about 1 for a network that learned nothing, lower is better.
"""

import argparse

import torch
from tqdm.auto import tqdm

from dfu_diffusers import DFUPipeline
from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.data.resolutions import parse_resolution
from dfu_diffusers.evaluation.tables import markdown
from dfu_diffusers.training.losses import edm_loss
from pictures import CHECKPOINT, HELD_OUT


@torch.no_grad()
def heldout_loss(pipe: DFUPipeline, size: tuple[int, int], count: int, batch_size: int = 64) -> tuple[float, float]:
    """Mean loss of `count` portraits of (height, width), and its standard error."""
    generator, losses = torch.Generator().manual_seed(0), []
    for parameters in portrait_parameters(range(count), seed=HELD_OUT).split(batch_size):
        images = render_portraits(parameters, *size)
        sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(images), generator=generator))
        noise = torch.randn(images.shape, generator=generator)
        losses.append(edm_loss(pipe.unet, pipe.scheduler, images, sigma, noise))
    losses = torch.cat(losses)
    return losses.mean().item(), losses.std().item() / count**0.5


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--sizes", nargs="+", default=["16", "20", "24", "20x28", "32", "40", "48", "64", "96"])
    parser.add_argument("--count", type=int, default=512, help="portraits of each size")
    args = parser.parse_args(argv)
    pipe = DFUPipeline.from_pretrained(args.model)
    rows = []
    for text in tqdm(args.sizes, unit="size"):
        loss, error = heldout_loss(pipe, parse_resolution(text), args.count)
        rows.append({"size": text, "held-out loss": f"{loss:.4f}", "standard error": f"{error:.4f}"})
    print(markdown(rows))


if __name__ == "__main__":
    main()
