# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of a DFU, for the spectral weights, too."""

import importlib
import os
import re

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import get_adapter_name
from torch import nn

from .loading import refuse_pickles

# The metadata of a file that are read.
LORA_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "use_dora", "target_parameters", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
# The metadata that are ignored: the origin, how weights are initialised, and which layers are adapted. The names of
# the weights say which layers these are; here they may be regular expressions, which can take very long to match.
LORA_REMARKS = (
    "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
)  # fmt: skip
MAX_RANK, MAX_ALPHA, MAX_NAMES = 4096, 1e6, 1000
LAYER_NAME = re.compile(r"\^?[\w.\\]{1,200}\$?")  # also with the anchors and escaped dots of a regular expression
HUB_ARGUMENTS = (
    "weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies",
)  # fmt: skip


ANOTHER_MODEL = "This LoRA was made for a model of another configuration."


class LoRAMixin(PeftAdapterMixin):
    """LoRAs as safetensors alone, which may also adapt plain parameters: the spectral weights."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict,
        prefix: None = None,
        adapter_name: str | None = None,
        metadata: dict | None = None,
        use_safetensors: bool = True,
        **hub_arguments,
    ) -> None:
        """As in diffusers, for what `save_lora_adapter` wrote: a .safetensors file or a state dict, without a prefix.

        diffusers' method is not used: it passes the state dict to PEFT, which refuses adapters of plain parameters, as
        the spectral weights are. The names of the weights say which layers are adapted. Of the file's metadata only
        numbers and names of layers are used, never a regular expression. A LoRA that is refused leaves the model
        unchanged.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, the id of a Hub repository, or a state dict.
            adapter_name: a new name; by default one is generated.
            metadata: the LoRA's configuration, for a state dict or in place of the file's.
            hub_arguments: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download` and `proxies`.

        Raises:
            TypeError: an unknown argument (such as `hotswap`), or metadata for anything but LoRA layers.
            ValueError: a prefix, pickles, a name in use, metadata with values out of range or with patterns that are
                not names of layers, or a LoRA for a model of another configuration.
        """
        # Imported here because it is private: if diffusers moves it, nothing else breaks.
        from diffusers.loaders.lora_base import _fetch_state_dict

        if prefix is not None or use_safetensors is False:
            raise ValueError(
                f"{type(self).__name__} loads LoRAs from safetensors and without a prefix, but got prefix={prefix!r} "
                f"and use_safetensors={use_safetensors!r}: save the LoRA with save_lora_adapter."
            )
        if unknown := sorted(hub_arguments.keys() - set(HUB_ARGUMENTS)):
            raise TypeError(f"load_lora_adapter takes no {', '.join(unknown)}; it takes {HUB_ARGUMENTS}.")
        adapters = getattr(self, "peft_config", {})
        name = adapter_name or get_adapter_name(self)
        if name in adapters:
            raise ValueError(f"This model has an adapter {name!r} already: give another `adapter_name`.")

        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            metadata=metadata,
            **{**dict.fromkeys(HUB_ARGUMENTS), **hub_arguments},
        )
        with torch.device("meta"):  # a twin without memory shows which weights belong to it
            twin = self.from_config(self.config)
            config = _lora_config(twin, state_dict, _checked(metadata))
            for other, its_config in {**adapters, name: config}.items():
                twin.add_adapter(its_config, other)
        expected = _peft().get_peft_model_state_dict(twin, adapter_name=name)
        if {key: p.shape for key, p in expected.items()} != {key: p.shape for key, p in state_dict.items()}:
            raise ValueError(ANOTHER_MODEL)
        self.add_adapter(config, name)
        _peft().set_peft_model_state_dict(self, state_dict, name)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """As in diffusers, as safetensors only.

        Raises:
            ValueError: `safe_serialization=False`, which writes a pickle that `load_lora_adapter` would refuse.
        """
        refuse_pickles(type(self).__name__, safe_serialization)
        super().save_lora_adapter(save_directory, adapter_name, upcast_before_saving, weight_name=weight_name)


def _peft():
    """PEFT, which is optional. Were it imported by a statement, diffusers would require it of all who load this file
    with a repository."""
    return importlib.import_module("peft")


def _checked(metadata: dict | None) -> dict | None:
    """The metadata that LoRA layers need. Raises TypeError or ValueError for others, or for values out of range."""
    if metadata is None:
        return None
    _refuse_other_adapters(metadata)
    options = {key: metadata[key] for key in LORA_OPTIONS if metadata.get(key) is not None}
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("target_parameters", list)):
        value = options.setdefault(name, kind())
        if not isinstance(value, kind) or len(value) > MAX_NAMES or not all(map(_is_layer_name, value)):
            raise _odd(name, value, f"a {kind.__name__} of at most {MAX_NAMES} names of layers, no other patterns")
    for value in (options.get("r", 8), *options["rank_pattern"].values()):
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            raise _odd("r", value, f"a whole number from 1 to {MAX_RANK}")
    for value in (options.get("lora_alpha", 8), *options["alpha_pattern"].values()):
        if not _is_within(value, -MAX_ALPHA, MAX_ALPHA):
            raise _odd("lora_alpha", value, f"a number of at most {MAX_ALPHA:g}")
    if not _is_within(value := options.get("lora_dropout", 0), 0, 0.999):
        raise _odd("lora_dropout", value, "a number in [0, 1)")
    for name in ("lora_bias", "use_rslora", "use_dora"):
        if not isinstance(value := options.get(name, False), bool):
            raise _odd(name, value, "true or false")
    return options


def _refuse_other_adapters(metadata: dict) -> None:
    if not isinstance(metadata, dict):
        raise TypeError(f"The LoRA's metadata must be a mapping, but are {metadata!r:.80}: save the LoRA again.")
    default = _peft().LoraConfig().to_dict()
    odd = [
        key for key, value in metadata.items()
        if value and key not in LORA_OPTIONS + LORA_REMARKS and value != default.get(key)
    ]  # fmt: skip
    if odd:
        asked = ", ".join(sorted(odd))
        raise TypeError(
            f"`LoraConfig` class could not be instantiated: the LoRA's metadata ask for {asked:.200}, but only "
            f"{', '.join(LORA_OPTIONS)} are read."
        )


def _is_layer_name(value) -> bool:
    return isinstance(value, str) and LAYER_NAME.fullmatch(value) is not None


def _is_within(value, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _odd(name: str, value, wanted: str) -> ValueError:
    return ValueError(f"{name} of the LoRA's metadata must be {wanted}, but is {value!r:.80}: save the LoRA again.")


def _lora_config(model: nn.Module, state_dict: dict, metadata: dict | None):
    """PEFT's LoraConfig of a saved LoRA for a model without adapters, with escaped names where PEFT takes patterns.

    Without metadata the ranks follow from the shapes, and alpha is the rank.
    """
    layers = {key.split(".lora_")[0].replace(".base_layer", "") for key in state_dict}
    if not layers <= {name for name, _ in model.named_modules()}:
        raise ValueError(ANOTHER_MODEL)
    if metadata is None:
        ranks = {key.split(".lora_")[0]: value.shape[1] for key, value in state_dict.items() if _is_up(key, value)}
        metadata = {
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
            "use_dora": any("lora_magnitude_vector" in key for key in state_dict),
            "lora_bias": any("lora_B" in key and key.endswith(".bias") for key in state_dict),
            "target_parameters": [],
        }
    parameters = [
        name
        for name, _ in model.named_parameters()
        if _value_of(name, dict.fromkeys(metadata["target_parameters"], 1))
    ]
    modules = sorted(layers - {name.rpartition(".")[0] for name in parameters})
    patterns = {
        name: {
            re.escape(layer): value
            for layer in (*modules, *parameters)
            if (value := _value_of(layer, given)) is not None
        }
        for name in ("rank_pattern", "alpha_pattern")
        if (given := metadata.get(name))
    }
    given = {**metadata, **patterns, "target_parameters": metadata["target_parameters"] or None}
    return _peft().LoraConfig(target_modules=modules, **given)


def _is_up(key: str, value: torch.Tensor) -> bool:
    return "lora_B" in key and value.ndim > 1


def _value_of(layer: str, patterns: dict):
    """The value of the first of these names that ends the full name of a layer; None if none does."""
    names = ((name.strip("^$").replace("\\.", "."), value) for name, value in patterns.items())
    return next((value for name, value in names if f".{layer}".endswith(f".{name}")), None)
