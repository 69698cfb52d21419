# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""A saved pipeline's folder: its components, its code, its card."""

import json
import re
from pathlib import Path

CARD, INDEX = "README.md", "model_index.json"
CONFIGS = ("config.json", "scheduler_config.json")  # of components
WEIGHTS = r"(?:diffusion_pytorch_)?model"  # start of the names of files with weights


class HubError(Exception):
    """Why a model cannot be published, in one line that names the remedy."""


def _index(folder: Path) -> dict:
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder: name one that DFUPipeline.save_pretrained wrote.")
    return _read_mapping(folder / INDEX)


def _read_mapping(path: Path) -> dict:
    """The content of a JSON file that must be a mapping, or a HubError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, not a mapping")
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(
            f"{path.parent} holds no {path.name} that can be read ({_one_line(error)}): save the pipeline again with "
            "save_pretrained."
        ) from error


def _variant(name: str) -> str | None:
    """The variant of a file of weights or of their index: "fp16", "raw", or "" for the main weights. None for other
    files."""
    index = rf"{WEIGHTS}\.safetensors\.index(?:\.(?P<a>\w+))?\.json"
    weights = rf"{WEIGHTS}(?:\.(?P<b>\w+))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors"
    match = re.fullmatch(f"{index}|{weights}", name)
    return (match["a"] or match["b"] or "") if match else None


def _components(folder: Path) -> list[str]:
    """Names of the pipeline's components, each a folder of that name."""
    index = _index(folder)
    names = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and any(value)]
    for name in names:
        if not re.fullmatch(r"\w+", name):  # "../elsewhere" would publish files outside of the pipeline
            raise HubError(
                f"{folder / INDEX} lists a component {name!r}, which is no name of a folder: save it again."
            )
    return names


def _code(folder: Path) -> list[Path]:
    """The modules of a self-contained pipeline that its model_index.json names, with the modules in the same folder
    that they import. Empty for a plain pipeline."""
    index = _index(folder)
    places = {"_class_name": folder, **{name: folder / name for name in _components(folder)}}
    named = [(places[name], str(index[name][0])) for name in places if isinstance(index.get(name), list)]
    paths = [place / f"{module}.py" for place, module in named if re.fullmatch(r"\w+", module)]
    return list(dict.fromkeys(each for path in paths if path.is_file() for each in with_neighbours(path)))


def _read_card(folder: Path) -> str | None:
    path = folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise HubError(f"{path} cannot be read ({_one_line(error)}): save it as text in UTF-8.") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def with_neighbours(module: Path) -> list[Path]:
    """The file of a module and the files in its folder that it imports, directly or not, as in folders of 0.1.0."""
    found = [module]
    for path in found:  # the list grows during the loop
        names = re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE)
        found += [other for name in names if (other := path.with_name(f"{name}.py")) not in found]
    return found
