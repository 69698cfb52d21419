# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Self-contained folders: the code of a pipeline saved beside its weights.

diffusers fetches one file of code for each component from the Hub. So each class is saved as one file: the modules of
this package that it imports, followed by its own module.
"""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

REMOTE = "diffusers_modules"  # where diffusers puts code that came with a repository
# The files of self-contained repositories, and the class that each contains. These names are part of the format: they
# stay the same even if a module of this package is renamed.
REMOTE_CODE_MODULES = {
    "modeling_dfu": "DFUModel",
    "modeling_dfu_refiner": "DFURefiner",
    "pipeline_dfu": "DFUPipeline",
    "pipeline_dfu_inpaint": "DFUInpaintPipeline",
    "pipeline_dfu_super_resolution": "DFUSuperResolutionPipeline",
    "scheduling_edm_heun": "EDMHeunScheduler",
}
INTERNAL_IMPORT = re.compile(r"^from (\.[\w.]*) import (?:\([^)]*\)|.*)\n", re.MULTILINE)


def code_files(folder: str | Path, pipeline_class: type) -> dict[str, str]:
    """The files that make a saved pipeline self-contained: code for each of our classes, and a model_index.json that
    names it.

    Args:
        folder: the pipeline as diffusers saved it.
        pipeline_class: its class.

    Returns:
        The text of each file by its path in the folder.
    """
    index = json.loads(Path(folder, "model_index.json").read_text(encoding="utf-8"))
    files = {}

    def add(cls: type, place: str = "") -> list[str]:
        stem, text = _code_of(cls)
        files[f"{place}{stem}.py"] = text
        return [stem, cls.__name__]

    packages = (__name__.split(".")[0], REMOTE)
    ours = [
        name for name, value in index.items() if isinstance(value, list) and str(value[0]).split(".")[0] in packages
    ]
    for name in ours:
        library, class_name = index[name]
        index[name] = add(getattr(sys.modules[library], class_name), f"{name}/")
    if pipeline_class.__module__.split(".")[0] in packages:  # a pipeline of diffusers stays a plain name
        index["_class_name"] = add(pipeline_class)
    if "unet" in ours:  # AutoModel asks here, not in unet/config.json
        index["auto_map"] = {"AutoModel": ".".join(index["unet"])}
    files["model_index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return files


def _code_of(cls: type) -> tuple[str, str]:
    """Stem and text of the file that contains a class. A class that came with a repository already has its file."""
    if cls.__module__.split(".")[0] == REMOTE:
        source = Path(sys.modules[cls.__module__].__file__)
        return source.stem, source.read_text(encoding="utf-8")
    stems = {name: stem for stem, name in REMOTE_CODE_MODULES.items()}
    return stems[cls.__name__], bundle(cls.__module__)


def bundle(module: str) -> str:
    """One text with a module and all modules of this package that it imports, each after those that it needs."""
    texts = {}

    def add(name: str) -> None:
        if name in texts:
            return
        text = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
        for relative in INTERNAL_IMPORT.findall(text):
            add(importlib.util.resolve_name(relative, name.rpartition(".")[0]))
        texts[name] = INTERNAL_IMPORT.sub("", text)

    add(module)
    return "\n\n".join(texts.values())
