#!/usr/bin/env python
"""Generate images with a DFU model, at one size or at several.

    python examples/generate_dfu.py --sizes 32 48 64x96 --batch_size 4 --seed 7

One seed is one picture at every size if the model has a refiner, whatever is drawn beside it. With --batch_size 4
--seed 7 the seeds are 7, 8, 9 and 10, at each size. Writes OUTPUT_DIR/seed7_64x96.png and so on (height x width).
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils.torch_utils import get_device

from dfu_diffusers import DFUPipeline
from dfu_diffusers.command_line import DTYPES, SCHEDULERS, check_model_and_seed, usable_device
from dfu_diffusers.data.resolutions import parse_resolution
from dfu_diffusers.pipelines.dfu import STRATEGIES

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", default=str(CHECKPOINT), help="folder of a saved pipeline or its id on the Hub (default: portraits)"
    )
    add("--height", type=int, help="in pixels (default: the model's own)")
    add("--width", type=int, help="in pixels (default: the model's own)")
    add(
        "--sizes",
        nargs="+",
        metavar="SIZE",
        help="several sizes, HEIGHT or HEIGHTxWIDTH, instead of --height, --width",
    )
    add("--batch_size", type=int, default=1, help="images of each size")
    add("--max_batch_size", type=int, help="evaluate at most so many at once, to need less memory")
    add("--num_inference_steps", type=int, default=18)
    add("--octave_steps", type=int, help="of the refiner, in each doubling of the size (default: the pipeline's)")
    add("--seed", type=int, default=0, help="of the first image")
    add("--class_label", type=int, help="for a class-conditional model")
    add("--strategy", choices=STRATEGIES, help="default: octaves with a refiner, else direct; see docs/zero_shot.md")
    add("--tileable", choices=["x", "y", "xy"], help="axes along which opposite edges meet: see docs/tileable.md")
    add("--guidance_scale", type=float, default=1.0, help="for a model trained with --label_dropout, or with a guide")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's own, heun as a rule)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=usable_device, default=get_device(), help="default: %(default)s")
    add("--output_dir", type=Path, default=Path("outputs/generated"))
    return parser


def main(argv=None) -> list[Path]:
    """Returns the files written."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.sizes and (args.height is not None or args.width is not None):
        parser.error("--sizes takes the place of --height and --width: give one or the other")
    check_model_and_seed(parser, args)

    seeds = range(args.seed, args.seed + args.batch_size)
    options = {} if args.octave_steps is None else {"octave_steps": args.octave_steps}
    files = []
    try:
        sizes = [parse_resolution(text) for text in args.sizes or []] or [(args.height, args.width)]
        pipe = DFUPipeline.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype]).to(args.device)
        if args.scheduler:
            pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
        for height, width in sizes:
            images = pipe(
                batch_size=args.batch_size,
                height=height,
                width=width,
                num_inference_steps=args.num_inference_steps,
                class_labels=args.class_label,
                strategy=args.strategy,
                tileable=args.tileable,
                guidance_scale=args.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                max_batch_size=args.max_batch_size,
                **options,
            ).images
            args.output_dir.mkdir(parents=True, exist_ok=True)
            for seed, image in zip(seeds, images):
                files.append(args.output_dir / f"seed{seed}_{image.height}x{image.width}.png")
                image.save(files[-1])
    except (OSError, ValueError) as error:  # what the arguments ask for cannot be had: the message says why
        parser.error(str(error))
    print("Wrote", *files, sep="\n  ")
    return files


if __name__ == "__main__":
    main()
