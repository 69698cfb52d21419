# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Weights are read from and written to safetensors, never pickles."""

import os
from collections.abc import Callable


class SafetensorsMixin:
    """Loads and saves safetensors only; goes before `ModelMixin`."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in diffusers, but from safetensors only, and with weights at aligned addresses, so that a loaded model
        gives bit for bit the results of the saved one.

        A `.bin` file is a pickle, and is never opened. Weights mapped from a file may begin at unaligned addresses,
        where a CPU's matrix products take other paths and round differently; these weights are copied.

        Raises:
            ValueError: `use_safetensors=False`.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                f"{cls.__name__} loads safetensors only (use_safetensors=False asks for pickles): convert the file."
            )
        loaded = super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # (model, info) with output_loading_info=True
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **kwargs,
    ) -> None:
        """As in diffusers, as safetensors only.

        Raises:
            ValueError: `safe_serialization=False`, which writes a pickle that `from_pretrained` would refuse.
        """
        refuse_pickles(type(self).__name__, safe_serialization)
        kwargs |= {"variant": variant, "max_shard_size": max_shard_size}  # by name: pipelines look for these arguments
        super().save_pretrained(save_directory, is_main_process, save_function, **kwargs)


def refuse_pickles(name: str, safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError(
            f"{name} saves safetensors only, but got safe_serialization={safe_serialization!r}, which writes a pickle "
            "that it would not load: leave it out."
        )
