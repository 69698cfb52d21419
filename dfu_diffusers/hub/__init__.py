# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained pipeline on the Hugging Face Hub: the files that belong to it, its model card, clear errors.

    python -m dfu_diffusers.hub push outputs/dfu-portraits me/dfu-portraits --private
    python -m dfu_diffusers.hub convert outputs/dfu-portraits fp16

The trainer calls `check_push` before it starts, `model_card` and `push_folder` when it is done.

Two kinds of repository, which differ in a few lines of model_index.json and in a file of code for each component:

- Plain, the default. It holds no code: `DFUPipeline.from_pretrained(id)` loads it, and after `import dfu_diffusers`
  diffusers' own loaders do. Publish this one where people can install the package: they need no flag, trust nothing
  but weights, and get our later corrections.
- Self-contained (`self_contained=True`). Our modules lie beside the weights: `DiffusionPipeline.from_pretrained(id,
  trust_remote_code=True)` and `AutoModel.from_pretrained(id, subfolder="unet", trust_remote_code=True)` need nothing
  but diffusers. Publish this one for people without the package; it asks them to trust you, and runs the code of the
  day it was pushed. With the package, `DFUPipeline.from_pretrained(id)` and `DFUModel.from_pretrained(id,
  subfolder="unet")` load it, too, with the package's own classes: no flag, and no code of the repository runs.
  diffusers' own loaders want the flag all the same, for they cannot know whose code it is.

One repository can offer both: plain on main, self-contained on another `revision`.

Every push is one commit, of which nothing shows before all of it has arrived. Large files go ahead of it and are known
by their content, so pushing again after an interruption sends only what is missing; with shards (`max_shard_size`),
that is in steps of their size. So nothing here uses huggingface_hub's `upload_large_folder` (gone in its release 2) or
`upload_folder`: they cut an upload into several commits, and an interruption would leave half a model for others.
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
