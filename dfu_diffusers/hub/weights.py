# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Weights of a saved pipeline in another precision."""

import os
import tempfile
from pathlib import Path

import diffusers
import torch

from .folder import HubError, _components, _one_line, _read_mapping, _variant

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def convert(folder: str | Path, dtype: str, max_shard_size: str = "10GB") -> list[Path]:
    """Write the weights of a saved pipeline's models in another precision, beside the existing ones.

    Args:
        folder: the saved pipeline.
        dtype: "fp16" or "bf16" writes a variant, which `from_pretrained(folder, variant="fp16",
            torch_dtype=torch.float16)` loads. "fp32" replaces the main weights, for example with smaller shards.
        max_shard_size: larger weights are split into files of at most this size, such as "5GB".

    Returns:
        The new files.

    Raises:
        HubError: unknown `dtype`, no pipeline with whole weights, or weights that do not fit into the precision.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise HubError(f"{dtype!r} is no precision to convert to: use {', '.join(DTYPES)}.")
    models = [folder / name for name in _components(folder) if (folder / name / "config.json").is_file()]
    return [path for model in models for path in _convert_model(model, dtype, max_shard_size)]


def _convert_model(folder: Path, dtype: str, max_shard_size: str) -> list[Path]:
    variant = None if dtype == "fp32" else dtype
    try:
        model_class = getattr(diffusers, _read_mapping(folder / "config.json")["_class_name"])
        model = model_class.from_pretrained(folder, torch_dtype=DTYPES[dtype], use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise HubError(
            f"{folder} holds no weights to convert ({_one_line(error)}): save the pipeline again."
        ) from error
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise HubError(
            f"{folder} holds weights too large for {dtype}, or not finite: convert them to bf16, or to fp32."
        )
    old = {path for path in folder.iterdir() if _variant(path.name) == (variant or "")}
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:  # so that a failure leaves the folder as it was
        model.save_pretrained(new, variant=variant, max_shard_size=max_shard_size)
        written = [folder / path.name for path in sorted(Path(new).iterdir()) if _variant(path.name) is not None]
        for path in written:
            os.replace(Path(new) / path.name, path)
    for path in old.difference(written):
        path.unlink()
    return written
