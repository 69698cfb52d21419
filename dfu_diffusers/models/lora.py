# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of a DFU, which reach the spectral weights, too."""

import importlib
import os

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import get_adapter_name

# What a file's metadata may say of a LoRA, of all that PEFT has options for: where it is, its size and its scale.
LORA_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "lora_bias", "use_rslora", "use_dora", "target_modules", "target_parameters",
    "exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern",
)  # fmt: skip
# And what is not heeded: the origin, and how to begin where no values are given.
LORA_REMARKS = (
    "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "init_lora_weights",
)  # fmt: skip
HUB_ARGUMENTS = (
    "weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies",
)  # fmt: skip


class LoRAMixin(PeftAdapterMixin):
    """Loading of LoRAs that also adapt plain parameters: the spectral weights."""

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

        Not by way of diffusers' method, which hands PEFT the state dict, and that refuses adapters of plain parameters
        such as the spectral weights. Of the file's metadata only what describes the layers is used. A LoRA that is
        refused leaves the model as it was.

        Args:
            pretrained_model_name_or_path_or_dict: a folder, a file, the id of a Hub repository, or a state dict.
            adapter_name: a new name; None makes one up.
            metadata: the LoRA's configuration, for a state dict or in place of the file's.
            hub_arguments: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`,
                `force_download` and `proxies`.

        Raises:
            TypeError: an unknown argument (`hotswap` is one), or metadata that ask for more than LoRA layers.
            ValueError: a prefix, pickles, a name in use, or a LoRA for a model of another configuration.
        """
        # Imported here because it is private: should diffusers move it, nothing else may break.
        from diffusers.loaders.lora_base import _fetch_state_dict

        if prefix is not None or use_safetensors is False:
            raise ValueError(
                f"DFUModel loads LoRAs from safetensors and without a prefix, but got prefix={prefix!r} and "
                f"use_safetensors={use_safetensors!r}: save the LoRA with DFUModel.save_lora_adapter."
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
        config = _lora_config(state_dict, metadata)
        with torch.device("meta"):  # a twin without memory shows which weights belong to it
            twin = self.from_config(self.config)
            for other, its_config in {**adapters, name: config}.items():
                twin.add_adapter(its_config, other)
        expected = _peft().get_peft_model_state_dict(twin, adapter_name=name)
        if {key: p.shape for key, p in expected.items()} != {key: p.shape for key, p in state_dict.items()}:
            raise ValueError("This LoRA was made for a model of another configuration.")
        self.add_adapter(config, name)
        _peft().set_peft_model_state_dict(self, state_dict, name)


def _peft():
    """PEFT, an option. An import statement, wherever it stood, would make diffusers demand it of all who load this
    file from a repository."""
    return importlib.import_module("peft")


def _lora_config(state_dict: dict, metadata: dict | None):
    """PEFT's LoraConfig of a saved LoRA; one without metadata tells its layers and ranks by names and shapes."""
    from diffusers.utils.peft_utils import _create_lora_config

    if metadata is None:
        ranks = {f"^{key}": value.shape[1] for key, value in state_dict.items() if "lora_B" in key and value.ndim > 1}
        return _create_lora_config(state_dict, None, None, ranks)
    lora_config = _peft().LoraConfig
    default = lora_config().to_dict()
    odd = [
        key for key, value in metadata.items()
        if value and key not in LORA_OPTIONS + LORA_REMARKS and value != default.get(key)
    ]  # fmt: skip
    if odd:
        raise TypeError(
            f"`LoraConfig` class could not be instantiated: the LoRA's metadata ask for {', '.join(sorted(odd))}, and "
            f"DFUModel reads {', '.join(LORA_OPTIONS)} only."
        )
    return lora_config(**{key: value for key, value in metadata.items() if key in LORA_OPTIONS})
