# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a training run: complete or not there at all, checked before they are loaded.

OUTPUT/checkpoint-STEP holds what the run needs to go on: safetensors and JSON, no pickle. (FSDP and DeepSpeed write
and read files of their own.) It is written under another name, its files are listed with their SHA-256 in
manifest.json and flushed to the disk, and it takes its name last. One whose files differ from the list is damaged.
"""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import flush_to_disk
from .options import Options, public_options
from .step import unwrap

logger = logging.getLogger(__name__)
PARTIAL, REMOVED, MANIFEST, LOCK = "partial-checkpoint", "removed-checkpoint", "manifest.json", ".lock"
WEIGHTS, MOMENTS, SETTINGS = "model.safetensors", "optimizer.safetensors", "optimizer.json"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
FULL_DISK = ("PytorchStreamWriter", "inline_container")  # in torch's words for it, a RuntimeError


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or used; the message says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# The state of a run


def save_state(accelerator: Accelerator, model, optimizer, folder: Path) -> None:
    """Weights, optimizer and scale of gradients. All processes call it; the main one writes."""
    if accelerator.distributed_type in SHARDED:
        accelerator.save_state(str(folder))
        return
    if not accelerator.is_main_process:
        return
    weights = accelerator.get_state_dict(model).items()  # torch.compile's wrapper has a name of its own
    save_file({name.replace("_orig_mod.", ""): value.contiguous() for name, value in weights}, folder / WEIGHTS)
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                numbers[f"{index}.{name}"] = value
    save_file(tensors, folder / MOMENTS)
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    settings = {"groups": state["param_groups"], "numbers": numbers, "scaler": scaler}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_state(accelerator: Accelerator, model, optimizer, folder: Path) -> None:
    """What `save_state` wrote, into a prepared model and optimizer. All processes call it."""
    if accelerator.distributed_type in SHARDED:
        accelerator.load_state(str(folder))
        return
    unwrap(accelerator, model).load_state_dict(load_file(folder / WEIGHTS))
    settings, state = read_object(folder / SETTINGS), {}
    for key, value in {**load_file(folder / MOMENTS), **settings["numbers"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})
    if accelerator.scaler and settings["scaler"]:
        accelerator.scaler.load_state_dict(settings["scaler"])


def read_object(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, but holds a {type(values).__name__}.")
    return values


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong while the contents of a checkpoint are taken up into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of safetensors, JSON, torch and the optimizer, for contents that are not theirs
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder} cannot be resumed from: {reason}") from error


@contextlib.contextmanager
def sole_user(output: Path) -> Iterator[None]:
    """Makes an output folder and holds its lock, which ends with the process at the latest.

    Raises:
        CheckpointError: another process holds it, or it cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = FileLock(output / LOCK).acquire(timeout=0)
    except Timeout as error:
        raise CheckpointError(
            f"Another run writes to {output}: wait until it ends, or choose another --output_dir."
        ) from error
    except OSError as error:
        raise CheckpointError(f"--output_dir {output} cannot be written to: {error}") from error
    with held:
        yield


def changes_since(folder: Path, args: Options, data: dict) -> list[str]:
    """What is different from the run that made a checkpoint, in words; `data` are the facts of the images now.

    Raises:
        CheckpointError: the batch size differs.
    """
    options, free = public_options(args), {"resume_from_checkpoint", "output_dir", "config", "dry_run"}
    with readable(folder):
        facts = read_object(folder / "run.json")
        saved, images = dict(facts["options"]), dict(facts["data"])
    if saved.get("batch_size") != args.batch_size:
        raise CheckpointError(
            f"{folder} was made with --batch_size {saved.get('batch_size')}, not {args.batch_size}, which must stay: "
            f"it decides which images have been seen (--max_pixels_per_batch saves memory)."
        )
    changed = [f"{k} {saved.get(k)} -> {v}" for k, v in options.items() if k not in free and saved.get(k) != v]
    if images.get("fingerprint") != data["fingerprint"]:
        changed.append(f"the images: {images.get('description')} -> {data['description']}, so some will come twice")
    return changed


def check_finite(average, done: int, args: Options) -> None:
    """Raise a CheckpointError where weights are not finite; `average` is a `WeightAverage`."""
    if not average.is_finite():
        raise diverged(f"The weights are not finite after step {done}", args)


def diverged(what: str, args: Options) -> CheckpointError:
    """The error of a run whose results are not finite."""
    found = find_checkpoints(Path(args.output_dir))
    remedy = f"Go on from {found[max(found)]}" if found else "Begin again"
    return CheckpointError(
        f"{what}: the training has diverged, and is neither saved nor exported. {remedy} with a --learning_rate below "
        f"{args.learning_rate}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def find_checkpoints(output: Path) -> dict[int, Path]:
    """Checkpoints in a folder by steps done, in order."""
    paths = [path for path in Path(output).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return dict(sorted((int(path.name.removeprefix("checkpoint-")), path) for path in paths))


def save_checkpoint(accelerator, output: Path, step: int, save: Callable[[Path], None], total_limit: int) -> Path:
    """Write OUTPUT/checkpoint-<step>, then remove the oldest so that `total_limit` remain. All processes call it.

    Args:
        accelerator: its processes agree on when the files are complete.
        save: writes the contents into the folder it is given, each process its part.

    Raises:
        CheckpointError: the disk is full or not writable. Earlier checkpoints are as they were.
    """
    partial, removed, folder = output / PARTIAL, output / REMOVED, output / f"checkpoint-{step}"
    try:
        if accelerator.is_main_process:
            for left in (partial, removed):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_manifest(partial)
            if folder.exists():
                os.replace(folder, removed)
            os.replace(partial, folder)
            shutil.rmtree(removed, ignore_errors=True)
            flush_to_disk(output)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        intact = find_checkpoints(output)
        kept = f"{intact[max(intact)].name} is intact" if intact else "there is no earlier one"
        raise CheckpointError(
            f"checkpoint-{step} could not be written to {output} ({error}); {kept}. Make room there, then continue "
            f"with --resume_from_checkpoint latest."
        ) from error
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
    if accelerator.is_main_process:
        for old in list(find_checkpoints(output).values())[:-total_limit]:
            os.replace(old, removed)  # at once: a kill leaves nothing that looks like a checkpoint
            shutil.rmtree(removed, ignore_errors=True)
    return folder


def _is_of_the_disk(error: Exception) -> bool:
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in FULL_DISK)


def set_aside(output: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond a step from which the run goes on: they belong to what it turned away from, and
    would be taken for its latest. Returns their new names."""
    moved = []
    for found, path in find_checkpoints(output).items():
        if found > step:
            moved.append(path.with_name(f"set-aside-{path.name}"))
            shutil.rmtree(moved[-1], ignore_errors=True)
            path.rename(moved[-1])
    return moved


def replace_contents(folder: Path, save: Callable[[Path], None]) -> None:
    """Write files into a new folder, then put each in the place of its namesake in `folder`.

    Each file is replaced at once, so that there is always an old or a new one, those of subfolders first. Other files
    of these subfolders then go.

    Raises:
        CheckpointError: the disk is full or not writable. The old files are as they were.
    """
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial)
        paths = [path.relative_to(partial) for path in partial.rglob("*") if path.is_file()]
        for path in paths:
            flush_to_disk(partial / path)
        for path in sorted(paths, key=lambda path: -len(path.parts)):
            (folder / path).parent.mkdir(exist_ok=True)
            os.replace(partial / path, folder / path)
        for path in {folder / path.parent for path in paths} - {folder}:
            for stale in {file for file in path.iterdir() if file.is_file()} - {folder / path for path in paths}:
                stale.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The pipeline could not be written to {folder} ({error}); the checkpoints are intact. Make room there, "
            f"then continue with --resume_from_checkpoint latest."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    """Flushes the files and lists them with their digests."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        flush_to_disk(path)
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def find_corruption(folder: Path) -> str | None:
    """What is missing or damaged in a checkpoint, in words; None if nothing is."""
    try:
        files = read_object(folder / MANIFEST)
    except CheckpointError:
        return f"its {MANIFEST} is missing or damaged"
    if not files:
        return f"its {MANIFEST} names no file"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not as it was written (SHA-256)"
    return None


def choose_checkpoint(resume: str | None, output: Path) -> Path | None:
    """The checkpoint to resume from: `resume` is a folder, "latest" in `output`, or None for a new run.

    The latest is the last one that is whole: damaged ones are passed over, and named in a warning.

    Raises:
        CheckpointError: none there, a damaged one (the last whole one is offered), or a new run where an earlier one
            left checkpoints.
    """
    found = find_checkpoints(output)
    if resume is None:
        if found:
            raise CheckpointError(
                f"{output} holds {found[max(found)].name} of an earlier run: continue it with "
                f"--resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None
    if resume == "latest":
        return _last_whole(list(found.values()), output)
    folder = Path(resume)
    if folder not in find_checkpoints(folder.parent).values():
        raise CheckpointError(f"--resume_from_checkpoint {resume}: no such checkpoint-STEP in {folder.parent}.")
    if problem := find_corruption(folder):
        others = [path for path in find_checkpoints(folder.parent).values() if not find_corruption(path)]
        remedy = f"Resume from --resume_from_checkpoint {others[-1]}" if others else "No other one is intact"
        raise CheckpointError(f"{folder} is damaged: {problem}. {remedy}.")
    return folder


def _last_whole(checkpoints: list[Path], output: Path) -> Path:
    if not checkpoints:
        raise CheckpointError(f"--resume_from_checkpoint latest: no such checkpoint-STEP in {output}.")
    problems = []
    for path in reversed(checkpoints):
        if not (problem := find_corruption(path)):
            for text in problems:
                logger.warning("%s. The run goes on from %s.", text, path)
            return path
        problems.append(f"{path} is damaged: {problem}")
    raise CheckpointError(f"{'; '.join(problems)}. No other one is intact.")


def check_architecture(folder: Path, model) -> None:
    """Refuse a checkpoint whose model, by its config.json, differs from `model` in what its weights mean. Fields that
    did not exist when it was saved have their defaults.

    Raises:
        CheckpointError: names the fields that differ, with both values.
    """
    defaults = {name: each.default for name, each in inspect.signature(type(model).__init__).parameters.items()}
    saved = defaults | read_object(folder / "config.json")
    free = {"sample_size", "coarse_size", "coarse_sizes", "dropout"}  # none changes what trained weights compute
    differing = [
        f"{name} is {saved.get(name)} there and {json.loads(json.dumps(value))} here"
        for name, value in model.config.items()
        if not name.startswith("_") and name not in free and saved.get(name) != json.loads(json.dumps(value))
    ]
    if differing:
        raise CheckpointError(
            f"{folder} holds a model of another architecture: {'; '.join(differing)}. Choose its --model_config."
        )
