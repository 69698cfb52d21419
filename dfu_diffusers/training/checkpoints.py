# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a training run: complete or not there at all, checked before they are loaded.

OUTPUT/checkpoint-STEP holds what the run needs to go on. It is written under another name, listed file by file in
manifest.json, and takes its name last; a checkpoint without its files as listed there is damaged and refused.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

PARTIAL, MANIFEST = "partial-checkpoint", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or used; the message says what to do."""


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
    partial, folder = output / PARTIAL, output / f"checkpoint-{step}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_manifest(partial)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):  # torch's word for a full disk
            raise
        shutil.rmtree(partial, ignore_errors=True)
        intact = find_checkpoints(output)
        kept = f"{intact[max(intact)].name} is intact" if intact else "there is no earlier one"
        raise CheckpointError(
            f"checkpoint-{step} could not be written to {output} ({error}); {kept}. Make room there, then continue "
            f"with --resume_from_checkpoint latest."
        ) from error
    if accelerator.is_main_process:
        for old in list(find_checkpoints(output).values())[:-total_limit]:
            shutil.rmtree(old)
    return folder


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
    """Write into a new folder, then put each thing in it in the place of its namesake in `folder`, so that an error
    or a full disk leaves the old ones."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save(partial)
        for path in partial.iterdir():
            if (folder / path.name).is_dir():
                shutil.rmtree(folder / path.name)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2, sort_keys=True) + "\n")


def find_corruption(folder: Path) -> str | None:
    """What is missing or truncated in a checkpoint, in words; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"its {MANIFEST} is missing or damaged"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def choose_checkpoint(resume: str | None, output: Path) -> Path | None:
    """The checkpoint to resume from: `resume` is a folder, "latest" in `output`, or None for a new run.

    Raises:
        CheckpointError: none there, a damaged one (the latest intact one is offered), or a new run where an earlier
            one left checkpoints.
    """
    found = find_checkpoints(output)
    if resume is None:
        if found:
            raise CheckpointError(
                f"{output} holds {found[max(found)].name} of an earlier run: continue it with "
                f"--resume_from_checkpoint latest, or choose another --output_dir."
            )
        return None
    if resume != "latest":
        folder = Path(resume)
        found = {step: path for step, path in find_checkpoints(folder.parent).items() if path.name == folder.name}
    if not found:
        raise CheckpointError(f"--resume_from_checkpoint {resume}: no such checkpoint-STEP in {output}.")
    folder = found[max(found)]
    if problem := find_corruption(folder):
        intact = [path for path in find_checkpoints(folder.parent).values() if not find_corruption(path)]
        remedy = f"Resume from --resume_from_checkpoint {intact[-1]}" if intact else "No other one is intact"
        raise CheckpointError(f"{folder} is damaged: {problem}. {remedy}.")
    return folder


def check_architecture(folder: Path, config: dict) -> None:
    """Refuse a checkpoint whose model differs in what its weights mean.

    Args:
        folder: a checkpoint with the model's config.json.
        config: that of the model to load it into.

    Raises:
        CheckpointError: names the fields that differ, with both values.
    """
    saved = json.loads((folder / "config.json").read_text())
    free = {"sample_size", "coarse_size", "dropout"}  # neither changes what the weights compute in a trained network
    differing = [
        f"{name} is {saved.get(name)} there and {json.loads(json.dumps(value))} here"
        for name, value in config.items()
        if not name.startswith("_") and name not in free and saved.get(name) != json.loads(json.dumps(value))
    ]
    if differing:
        raise CheckpointError(
            f"{folder} holds a model of another architecture: {'; '.join(differing)}. Choose its --model_config."
        )
