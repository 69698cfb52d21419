#!/usr/bin/env python
"""Does a repainted part of a held-out portrait join the rest?

    python experiments/inpaint.py [--model checkpoints/dfu-portraits] [--size 64] [--count 24] [--churn 0 20]

Prints the mean jump between the two pixels on either side of the mask's edge, in 1/255, beside that of the true
portrait, and writes a picture of the first six, OUTPUT.png: truth, what is known, and a column for each row of the
table: known pixels replaced, or `seamless`, each with each `s_churn`.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfu_diffusers import DFUInpaintPipeline, EDMHeunScheduler
from dfu_diffusers.evaluation.tables import markdown
from pictures import CHECKPOINT, portraits, sheet


def masks(count: int, size: int) -> np.ndarray:
    """The face, the right half and the shirt in turn: (count, size, size) booleans, true where to repaint."""
    holes = np.zeros((count, size, size), bool)
    holes[0::3, size * 5 // 16 : size * 11 // 16, size // 4 : size * 3 // 4] = True
    holes[1::3, :, size // 2 :] = True
    holes[2::3, size * 11 // 16 :] = True
    return holes


def edge_jump(images: np.ndarray, holes: np.ndarray) -> float:
    """Mean absolute difference of neighbours of which one is in the hole: images (n, h, w, 3), holes (n, h, w)."""
    jumps = []
    for axis in (1, 2):
        across = np.diff(holes.astype(int), axis=axis) != 0
        jumps.append(np.abs(np.diff(images.astype(float), axis=axis)).mean(-1)[across])
    return np.concatenate(jumps).mean()


def main(argv=None) -> dict[str, float]:
    """Returns the jumps by name of the setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--num_inference_steps", type=int, default=18)
    parser.add_argument("--churn", type=float, nargs="+", default=[0, 20], help="`s_churn` of EDMHeunScheduler")
    parser.add_argument("--output", type=Path, default=Path("outputs/inpaint"), help="write OUTPUT.png")
    args = parser.parse_args(argv)
    pipe = DFUInpaintPipeline.from_pretrained(args.model)
    truth, holes = portraits(args.count, args.size), masks(args.count, args.size)
    columns = {"truth": truth, "known": np.where(holes[..., None], 255, truth)}
    jumps = {"truth": edge_jump(truth, holes)}
    for seamless, churn in itertools.product((False, True), args.churn):
        pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config, s_churn=churn)
        images = pipe(
            [Image.fromarray(pixels) for pixels in truth],
            [Image.fromarray(hole) for hole in holes],
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(i) for i in range(args.count)],
            seamless=seamless,
        ).images
        name = f"{'seamless' if seamless else 'replaced'}, s_churn {churn:g}"
        columns[name] = np.stack([np.asarray(image) for image in images])
        jumps[name] = edge_jump(columns[name], holes)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(columns).save(args.output.with_suffix(".png"))
    print(markdown([{"pictures": name, "jump at the edge, 1/255": jump} for name, jump in jumps.items()]))
    return jumps


if __name__ == "__main__":
    main()
