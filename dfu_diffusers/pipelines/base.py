# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""How the pipelines are made, loaded, saved and shared."""

import contextlib
import warnings
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn

from ..models.loading import refuse_pickles
from .remote_code import REMOTE, code_files

COMPONENTS = ("unet", "scheduler", "guide", "refiner")


class DFUPipelineBase(DiffusionPipeline):
    """Components in evaluation mode, safetensors only, and folders that may bring their own code."""

    _self_contained = False

    def register_modules(self, **components) -> None:
        """As in diffusers. Models go into evaluation mode, as they do when they are loaded: dropout has no part in
        sampling."""
        for component in components.values():
            if isinstance(component, nn.Module):
                component.eval()
        super().register_modules(**components)

    def __setattr__(self, name: str, value) -> None:
        """As in diffusers; but a component that takes the place of none is saved, too."""
        if name in COMPONENTS and name in self.__dict__:
            del self.__dict__[name]
            self.register_modules(**{name: value})  # which sets the attribute
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "DFUPipelineBase":
        """As in diffusers, from safetensors only, components of other classes included.

        diffusers would fall back on a `.bin`, a pickle, which may run code when it is opened.

        Raises:
            ValueError: `use_safetensors=False`.
            OSError: a component has no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                f"{cls.__name__} loads safetensors only (use_safetensors=False asks for pickles): convert the files, "
                f"or pass `unet` as you loaded it."
            )
        return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DFUPipelineBase":
        """A pipeline of this class that shares the components of another one; `kwargs` replace some, as in diffusers.

        The weights keep their dtype unless `dtype` (`torch_dtype`) says otherwise; then both pipelines' change.
        """
        # diffusers hands a model on only if the type hint names its very class, and ours admits any denoiser.
        if hasattr(pipeline, "unet"):
            kwargs.setdefault("unet", pipeline.unet)
        for name in ("guide", "refiner"):
            if getattr(pipeline, name, None) is not None:
                kwargs.setdefault(name, getattr(pipeline, name))
        with warnings.catch_warnings():
            if not {"dtype", "torch_dtype"} & kwargs.keys():  # by default diffusers makes shared weights float32
                kwargs["torch_dtype"] = pipeline.dtype
                warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # the name that every release knows
            return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple:
        """As in diffusers, which would warn of `auto_map`: the entry is AutoModel's, not ours."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(
        self, save_directory, safe_serialization: bool = True, *args, self_contained: bool = False, **kwargs
    ) -> None:
        """Save as in diffusers, as safetensors; such a folder needs dfu_diffusers to be loaded.

        With `self_contained` our modules are saved along, and `DiffusionPipeline.from_pretrained(...,
        trust_remote_code=True)` needs nothing but diffusers. A pipeline that was loaded in that way is always saved
        in that way, for its classes exist nowhere else.

        Raises:
            ValueError: `safe_serialization=False`, whose files, pickles, `from_pretrained` would refuse.
        """
        refuse_pickles(type(self).__name__, safe_serialization)
        with self._with_code(self_contained):
            super().save_pretrained(save_directory, True, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, self_contained: bool = False, **kwargs) -> str:
        """As in diffusers, with the option of `save_pretrained`; `dfu_diffusers.hub` does more for a saved folder."""
        refuse_pickles(type(self).__name__, kwargs.get("safe_serialization", True))
        with self._with_code(self_contained):
            return super().push_to_hub(repo_id, *args, **kwargs)

    @contextlib.contextmanager
    def _with_code(self, self_contained: bool):
        """Until it ends, pipelines are saved with code, if so asked here or further out."""
        before, self._self_contained = self._self_contained, self._self_contained or self_contained
        try:
            yield
        finally:
            self._self_contained = before

    def save_config(self, save_directory, *args, **kwargs) -> None:
        """As in diffusers, which calls it when the components are saved, and before it uploads them."""
        super().save_config(save_directory, *args, **kwargs)
        recorded = [library for library, _ in map(self.config.get, self.components) if library]
        if self._self_contained or any(name.split(".")[0] == REMOTE for name in (self.__module__, *recorded)):
            for path, text in code_files(save_directory, type(self)).items():
                Path(save_directory, path).write_text(text, encoding="utf-8")
