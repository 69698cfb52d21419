#!/usr/bin/env python
"""Enlarge images by any factor or to any size, with a refiner or a DFU model.

    python examples/upscale_dfu.py portrait.png other.png --scale 2.7
    python examples/upscale_dfu.py photo.jpg --model me/upscaler --height 1024 --noise_level 0.05

A folder of a pipeline with a `refiner` needs no other model; without one the DFU model redraws the enlarged image.
With a refiner the averages of the input hold at every step, and at integer factors the result has them to 1/255.
Without one the result has them if both sides at least double. --consistency asks for that at any factor,
--no-consistency leaves it out.
Writes OUTPUT_DIR/portrait_86x86.png and so on (height x width).
"""

import argparse
from pathlib import Path

import torch

from dfu_diffusers import DFUSuperResolutionPipeline
from dfu_diffusers.command_line import add_pipeline_options, check_model_and_seed, load_pipeline
from dfu_diffusers.decode import open_picture

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "dfu-portraits"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_options(parser, CHECKPOINT)
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="image files, of any sizes")
    add("--scale", type=float, help="factor of both sides, e.g. 2.7 (default: 2)")
    add("--height", type=int, help="in pixels, instead of --scale; a side left out keeps the proportions")
    add("--width", type=int, help="in pixels, instead of --scale")
    add("--noise_level", type=float, help="deviation of noise in the images (-1 to 1): about 0.05 if compressed")
    add("--strength", type=float, help="in (0, 1], how much is drawn anew without a refiner (default: the pipeline's)")
    add(
        "--consistency",
        action=argparse.BooleanOptionalAction,
        help="whether the result averages to the input to 1/255 (default: with a refiner at integer factors, "
        "without one from a factor of 2 on)",
    )
    add("--num_inference_steps", type=int, help="without a refiner, of the whole schedule (default: the pipeline's)")
    add("--output_dir", type=Path, default=Path("outputs/upscaled"))
    return parser


def main(argv=None) -> list[Path]:
    """Returns the files written."""
    parser = get_parser()
    args = parser.parse_args(argv)
    check_model_and_seed(parser, args)
    if len({path.stem for path in args.images}) < len(args.images):
        parser.error("two images have one name, and so would their results: enlarge them one by one")
    names = ("noise_level", "octave_steps", "strength", "num_inference_steps")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    files = []
    try:
        pipe = load_pipeline(DFUSuperResolutionPipeline, args)
        for path in args.images:
            with open_picture(path) as image:
                image = image.copy()
            (result,) = pipe(
                image,
                height=args.height,
                width=args.width,
                scale=args.scale,
                consistency=args.consistency,
                class_labels=args.class_label,
                generator=torch.Generator().manual_seed(args.seed),
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
