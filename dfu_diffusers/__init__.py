# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""A Diffusers plugin for DFU (arXiv 2401.06144): images of any height and width from one diffusion model.

Importing it teaches diffusers the three public classes, so that `DiffusionPipeline.from_pretrained` and
`AutoModel.from_pretrained` load saved DFU models. Training parts are imported by name: `dfu_diffusers.data`,
`dfu_diffusers.losses`, `dfu_diffusers.portraits`.
"""

import diffusers as _diffusers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  diffusers looks these names up in this package

from .modeling_dfu import DFUModel
from .pipeline_dfu import DFUPipeline
from .scheduling_edm_heun import EDMHeunScheduler

__version__ = "0.1.0"
__all__ = ["DFUModel", "DFUPipeline", "EDMHeunScheduler"]


def _register_with_diffusers() -> None:
    """Make diffusers save our components as ["dfu_diffusers", class] and find them again, by name, when loading."""
    try:
        from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
    except ImportError as error:  # the table is no public part of diffusers
        raise ImportError(
            f"diffusers {_diffusers.__version__} has moved its table of loadable classes, without which saved DFU "
            f"models cannot be found: install a release that dfu_diffusers {__version__} was made for (see setup.py)."
        ) from error
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES["dfu_diffusers"] = {"ModelMixin": methods, "SchedulerMixin": methods}
    for public_class in (DFUModel, DFUPipeline, EDMHeunScheduler):
        setattr(_diffusers, public_class.__name__, public_class)


_register_with_diffusers()
