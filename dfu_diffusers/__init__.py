# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Diffusers plugin for DFU (arXiv 2401.06144): images of any height and width from one diffusion model.

Importing it registers the public classes with diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoModel.from_pretrained` load saved DFU models. Training, evaluation and publishing are imported by name:
`dfu_diffusers.data`, `dfu_diffusers.training`, `dfu_diffusers.evaluation`, `dfu_diffusers.hub`.
"""

import diffusers as _diffusers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  diffusers looks these names up in this package

from .models.dfu import DFUModel
from .models.refiner import DFURefiner
from .pipelines.dfu import DFUPipeline
from .pipelines.inpaint import DFUInpaintPipeline
from .pipelines.remote_code import REMOTE_CODE_MODULES as _REMOTE_CODE_MODULES
from .pipelines.super_resolution import DFUSuperResolutionPipeline
from .schedulers.edm_heun import EDMHeunScheduler

__version__ = "0.1.0"
__all__ = [
    "DFUInpaintPipeline",
    "DFUModel",
    "DFUPipeline",
    "DFURefiner",
    "DFUSuperResolutionPipeline",
    "EDMHeunScheduler",
]

# Only the next two functions use parts of diffusers that are not public classes.


def _register_with_diffusers() -> None:
    """Make diffusers save our components as ["dfu_diffusers", class] and find them again, by name, when loading."""
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

        read_index = DFUPipeline._dict_from_json_file
    except (ImportError, AttributeError) as error:  # neither is a public part of diffusers
        raise ImportError(
            f"diffusers {_diffusers.__version__} has moved its table of loadable classes, or the reader of its files, "
            f"without which saved DFU models cannot be found: install a release that dfu_diffusers {__version__} was "
            f"made for (see setup.py)."
        ) from error
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES["dfu_diffusers"] = {"ModelMixin": methods, "SchedulerMixin": methods}
    for name in __all__:
        setattr(_diffusers, name, globals()[name])
    DFUPipeline._dict_from_json_file = classmethod(
        lambda cls, *args, **kwargs: _use_installed_classes(read_index(*args, **kwargs))
    )


def _use_installed_classes(index: dict) -> dict:
    """model_index.json with the classes of this package in place of the copies in a self-contained repository.

    So `DFUPipeline.from_pretrained` loads such a repository, too, without running the code that came with it.
    """
    copies = [[module, name] for module, name in _REMOTE_CODE_MODULES.items()]
    index = {name: ["dfu_diffusers", value[1]] if value in copies else value for name, value in index.items()}
    if isinstance(index.get("_class_name"), list) and index["_class_name"][0] == "dfu_diffusers":
        index["_class_name"] = index["_class_name"][1]
    return index


_register_with_diffusers()
