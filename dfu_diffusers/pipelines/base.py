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
        """As in diffusers. Models are set to evaluation mode, as loading does, so that sampling uses no dropout."""
        for component in components.values():
            if isinstance(component, nn.Module):
                component.eval()
        super().register_modules(**components)

    def __setattr__(self, name: str, value) -> None:
        """As in diffusers, but a component that was None and is set later is registered, so that it is saved, too."""
        if name in COMPONENTS and name in self.__dict__:
            del self.__dict__[name]
            self.register_modules(**{name: value})  # which sets the attribute
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "DFUPipelineBase":
        """As in diffusers, but from safetensors only, also for components of other classes.

        diffusers would otherwise fall back to a `.bin` file, a pickle, which can run code when it is opened.

        Raises:
            ValueError: `use_safetensors=False`, or a pipeline without a `unet` that this class needs.
            OSError: a component has no safetensors weights.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                f"{cls.__name__} loads safetensors only (use_safetensors=False asks for pickles): convert the files, "
                f"or pass `unet` as you loaded it."
            )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{**kwargs, "use_safetensors": True})
        except ValueError as error:
            given = str(error).partition("but only {")[2]  # diffusers lists the components that it found
            if "unet" in {*cls._optional_components, *kwargs} or not given or "'unet'" in given:
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} was saved without a `unet`, which {cls.__name__} needs: load it "
                "with DFUSuperResolutionPipeline, or pass `unet=`."
            ) from error

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "DFUPipelineBase":
        """A pipeline of this class that shares the components of another one; `kwargs` replace some, as in diffusers.

        The weights keep their dtype unless `dtype` (`torch_dtype`) is given; then it changes for both pipelines.
        """
        # diffusers passes a model on only if the type hint names exactly its class; ours allows any denoiser.
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
        """As in diffusers, but without the entry `auto_map`, which is for AutoModel: diffusers would warn about it."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_pretrained(
        self, save_directory, safe_serialization: bool = True, *args, self_contained: bool = False, **kwargs
    ) -> None:
        """Save as in diffusers, as safetensors. Loading such a folder needs dfu_diffusers.

        With `self_contained` our modules are saved beside the weights, and `DiffusionPipeline.from_pretrained(...,
        trust_remote_code=True)` needs only diffusers. A pipeline that was loaded in this way is always saved in this
        way, because its classes exist nowhere else.

        Raises:
            ValueError: `safe_serialization=False`, which writes pickles that `from_pretrained` would refuse.
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
        """While it is open, pipelines are saved with code if `self_contained` is true here or in an outer call."""
        before, self._self_contained = self._self_contained, self._self_contained or self_contained
        try:
            yield
        finally:
            self._self_contained = before

    def save_config(self, save_directory, *args, **kwargs) -> None:
        """As in diffusers, which calls this after it saved the components and before it uploads them."""
        super().save_config(save_directory, *args, **kwargs)
        recorded = [library for library, _ in map(self.config.get, self.components) if library]
        if self._self_contained or any(name.split(".")[0] == REMOTE for name in (self.__module__, *recorded)):
            for path, text in code_files(save_directory, type(self)).items():
                Path(save_directory, path).write_text(text, encoding="utf-8")
