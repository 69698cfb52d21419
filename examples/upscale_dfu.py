#!/usr/bin/env python
"""Enlarge images with a DFU model, by any factor or to any size.

    python examples/upscale_dfu.py portrait.png other.png --scale 2.7
    python examples/upscale_dfu.py photo.jpg --height 1024 --tile_size 256

From twice the size on each result, area-averaged to the size that it had, is the input again (--consistency asks for
that at any factor, --no-consistency gives the model a free hand).
Writes OUTPUT_DIR/portrait_86x86.png and so on (height x width).
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils.torch_utils import get_device

from dfu_diffusers import DFUSuperResolutionPipeline
from dfu_diffusers.command_line import DTYPES, SCHEDULERS, check_model_and_seed, usable_device
from dfu_diffusers.decode import open_picture

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image files, of any sizes")
    add(
        "--model", default=str(CHECKPOINT), help="folder of a saved pipeline or its id on the Hub (default: portraits)"
    )
    add("--scale", type=float, help="factor of both sides, e.g. 2.7 (default: 2)")
    add("--height", type=int, help="in pixels, instead of --scale; a side left out keeps the proportions")
    add("--width", type=int, help="in pixels, instead of --scale")
    add("--strength", type=float, help="in (0, 1]: how much is drawn anew (default: the pipeline's)")
    add(
        "--consistency",
        action=argparse.BooleanOptionalAction,
        help="whether the result averages to the input (default: from a factor of 2 on)",
    )
    add("--tile_size", type=int, help="let the network see squares of at most this side, to need less memory")
    add("--tile_overlap", type=int, help="pixels that tiles share (default: a quarter)")
    add("--num_inference_steps", type=int, default=18, help="of the whole schedule (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--class_label", type=int, help="for a class-conditional model")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's own, heun as a rule)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=usable_device, default=get_device(), help="default: %(default)s")
    add("--output_dir", type=Path, default=Path("outputs/upscaled"))
    return parser


def main(argv=None) -> list[Path]:
    """Returns the files written."""
    parser = get_parser()
    args = parser.parse_args(argv)
    check_model_and_seed(parser, args)
    if len({path.stem for path in args.images}) < len(args.images):
        parser.error("two images have one name, and so would their results: enlarge them one by one")
    options = {} if args.strength is None else {"strength": args.strength}
    files = []
    try:
        pipe = DFUSuperResolutionPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype]).to(args.device)
        if args.scheduler:
            pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
        for path in args.images:
            with open_picture(path) as image:
                image = image.copy()
            (result,) = pipe(
                image,
                height=args.height,
                width=args.width,
                scale=args.scale,
                consistency=args.consistency,
                num_inference_steps=args.num_inference_steps,
                class_labels=args.class_label,
                generator=torch.Generator().manual_seed(args.seed),
                tile_size=args.tile_size,
                tile_overlap=args.tile_overlap,
                **options,
            ).images
            args.output_dir.mkdir(parents=True, exist_ok=True)
            files.append(args.output_dir / f"{path.stem}_{result.height}x{result.width}.png")
            result.save(files[-1])
    except (OSError, ValueError) as error:  # what the arguments ask for cannot be had: the message says why
        parser.error(str(error))
    print("Wrote", *files, sep="\n  ")
    return files


if __name__ == "__main__":
    main()
