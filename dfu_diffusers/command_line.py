# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Helpers of the scripts: options and their types, loading, and the commit and device of a result."""

import argparse
import math
import platform
import re
import subprocess
from functools import cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.utils.torch_utils import get_device

from .data.resolutions import Size, parse_resolution
from .schedulers.edm_heun import EDMHeunScheduler

SCHEDULERS = {"heun": EDMHeunScheduler, "euler": EDMEulerScheduler, "dpm": EDMDPMSolverMultistepScheduler}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def number(kind, low, high=math.inf, open_low=False):
    """A type for argparse: an int or float in a range."""

    def parse(text):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high:
            bounds = f"{'greater than' if open_low else 'at least'} {low}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}" + (f", at most {high}" * math.isfinite(high)))
        return value

    parse.__name__ = kind.__name__
    return parse


count, natural, positive = number(int, 1), number(int, 0), number(float, 0, open_low=True)


def resolution(text: str) -> Size:
    try:
        return parse_resolution(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # PyTorch has both for a device that is not there
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def add_pipeline_options(parser: argparse.ArgumentParser, checkpoint: Path) -> None:
    """The options that scripts of one pipeline share; `checkpoint` is the default of --model. See `load_pipeline`."""
    add = parser.add_argument
    add("--model", default=str(checkpoint), help="folder of a pipeline, or its id on the Hub (default: portraits)")
    add("--octave_steps", type=int, help="of the refiner, in each doubling of the size (default: the pipeline's)")
    add("--seed", type=int, default=0, help="of the noise")
    add("--class_label", type=int, help="for a class-conditional model")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's own, heun as a rule)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=usable_device, default=get_device(), help="default: %(default)s")


def load_pipeline(pipeline_class: type[DiffusionPipeline], args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline that the options of `add_pipeline_options` ask for."""
    pipe = pipeline_class.from_pretrained(args.model, torch_dtype=DTYPES[args.dtype]).to(args.device)
    if args.scheduler:
        pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    return pipe


def check_model_and_seed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with a message if --model or --seed cannot be used."""
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must lie in [0, 2^63), not {args.seed}")
    if not Path(args.model).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.model):
        parser.error(
            f"--model: there is no folder {args.model}; name a saved pipeline, or its id on the Hub (user/name)"
        )


@cache
def git_commit() -> str | None:
    """Short hash of the repository's commit at the first call, followed by "-dirty" if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its repository


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor, if the system gives one, with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return f"{(names or [platform.processor() or device.type])[0]}, {torch.get_num_threads()} threads"
