# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained pipeline on the Hugging Face Hub: the files that belong to it, its model card, clear errors.

    python -m dfu_diffusers.hub push outputs/dfu-portraits me/dfu-portraits --private
    python -m dfu_diffusers.hub convert outputs/dfu-portraits fp16

The trainer calls `check_push` before it starts, `model_card` and `push_folder` when it is done.

Two kinds of repository, which differ in a few lines of model_index.json and in a file of code for each component:

- Plain, the default. It holds no code. `DFUPipeline.from_pretrained(id)` loads it, and so do diffusers' own loaders
  after `import dfu_diffusers`. Publish this kind for people who can install the package: they need no flag, have to
  trust only weights, and get later fixes.
- Self-contained (`self_contained=True`). It also holds our modules: `DiffusionPipeline.from_pretrained(id,
  trust_remote_code=True)` and `AutoModel.from_pretrained(id, subfolder="unet", trust_remote_code=True)` need only
  diffusers. Publish this kind for people without the package. They have to trust you, and run the code as it was
  pushed. With the package, `DFUPipeline.from_pretrained(id)` and `DFUModel.from_pretrained(id, subfolder="unet")` load
  it, too, with the package's own classes: without a flag, and without running code of the repository. diffusers' own
  loaders need the flag even then, because they cannot know whose code it is.

One repository can offer both: plain on main, self-contained on another `revision`.

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
