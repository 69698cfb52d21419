# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained pipeline on the Hugging Face Hub: the files that belong to it, its model card, clear errors.

    python -m dfu_diffusers.hub push outputs/dfu-portraits me/dfu-portraits --private
    python -m dfu_diffusers.hub convert outputs/dfu-portraits fp16

The trainer calls `check_push` before it starts, `model_card` and `push_folder` when it is done.

A plain repository holds no code, and loads with this package. A self-contained one (`self_contained=True`) also holds
our modules, for people without the package: they pass `trust_remote_code=True` to diffusers' loaders, and so run the
code as it was pushed. `DFUPipeline.from_pretrained` loads both kinds, and never runs code of a repository.
`docs/publish.md` compares the two.

Every push is one commit, so readers see all of it or nothing. Large files are uploaded before the commit and
identified by their content, so a push after an interruption sends only the missing files (`max_shard_size` makes these
smaller). huggingface_hub's `upload_large_folder` (removed in its release 2) and `upload_folder` are not used: they
split an upload into several commits, and an interruption would publish half a model.
"""

from .card import METADATA, TEMPLATE, card_head, check_card, model_card, update_card
from .folder import CARD, HubError
from .push import check_push, files_left_out, files_to_push, push_folder
from .weights import DTYPES, convert

__all__ = [
    "CARD",
    "DTYPES",
    "METADATA",
    "TEMPLATE",
    "HubError",
    "card_head",
    "check_card",
    "check_push",
    "convert",
    "files_left_out",
    "files_to_push",
    "model_card",
    "push_folder",
    "update_card",
]
