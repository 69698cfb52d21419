#!/usr/bin/env python
"""Generate images with a DFU model, at one size or at several.

    python examples/generate_dfu.py --sizes 32 48 64x96 --batch_size 4 --seed 7

One seed is one picture at every size if the model has a refiner, whatever is drawn beside it. With --batch_size 4
--seed 7 the seeds are 7, 8, 9 and 10, at each size. Writes OUTPUT_DIR/seed7_64x96.png and so on (height x width).
"""

import argparse
from pathlib import Path

import torch

from dfu_diffusers import DFUPipeline
from dfu_diffusers.command_line import add_pipeline_options, check_model_and_seed, load_pipeline
from dfu_diffusers.data.resolutions import parse_resolution
from dfu_diffusers.pipelines.dfu import STRATEGIES

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_options(parser, CHECKPOINT)
    add = parser.add_argument
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
    add("--strategy", choices=STRATEGIES, help="default: octaves with a refiner, else direct; see docs/zero_shot.md")
    add("--tileable", choices=["x", "y", "xy"], help="axes along which opposite edges meet: see docs/tileable.md")
    add("--guidance_scale", type=float, default=1.0, help="for a model trained with --label_dropout, or with a guide")
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
        pipe = load_pipeline(DFUPipeline, args)
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
