# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Model cards: filled from a template, checked, and kept up to date."""

import html
import json
import math
import re
from pathlib import Path

import diffusers
import jinja2
import jinja2.meta
import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .. import __version__
from ..data.resolutions import Size, format_resolution
from ..files import write_atomically
from .folder import CARD, HubError, _code, _components, _one_line, _read_card, _read_mapping, _variant

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "model_card.md"  # of `model_card`
METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["diffusers", "dfu", "dfu_diffusers", "fourier-neural-operator", "any-resolution"],
}
# The code in cards that loads the model, and the section that explains how to do so without this package.
SNIPPET = re.compile(
    r'^pipe = DFU\w*Pipeline\.from_pretrained\((?P<place>"(?P<id>[^"\n]*)"(?:, revision="[^"\n]*")?)', re.MULTILINE
)
WITHOUT_PACKAGE = """
Without `dfu_diffusers`, this needs nothing but diffusers, and runs the code that lies in this repository:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({place}, trust_remote_code=True)
```
"""
TOKEN, CREDENTIALS = re.compile(r"\bhf_\w{20,}"), re.compile(r"://(?!git@)[^/?#\s@]+@")
WORD = re.compile(r"[\w.+-]{1,20}")  # an option's value that a card shows


def model_card(template: str | Path, folder: str | Path, repo_id: str, **facts) -> str:
    """README.md of a trained pipeline. Sections of the template for which there are no facts are left out.

    Args:
        template: path of a Jinja template, such as `TEMPLATE`. Its variables are the possible facts, all optional.
        folder: the saved pipeline. Parameters, size and classes are read there, and samples.png, loss.png and
            validation.png are shown if they exist.
        repo_id: the name with which `from_pretrained` will be called.
        facts: `license` (the Hub's identifier, "apache-2.0") and `datasets` (Hub ids) also enter the metadata.
            `train_sizes` is a list such as ["16", "24x32"], `validation` maps such sizes to losses, `metrics` maps
            names to such a mapping each, {"FID": {"32": 12.3}}; both enter the metadata as `model-index`, too.
            `options` maps names to values; only numbers and short words are shown, no paths, addresses or texts.
            `class_names` are shown as plain text. `self_contained` adds how to load without this package; by default
            it is true if the folder was saved that way. Access tokens and credentials in addresses are removed from
            all texts. Paths are not removed, so write none.

    Returns:
        Markdown that begins with valid metadata.

    Raises:
        HubError: the folder holds no pipeline with a unet, or the metadata are not valid.
        TypeError: a fact for which the template has no variable.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["thousands"] = "{:,}".format
    environment.filters["plain"] = _plain
    text = Path(template).read_text(encoding="utf-8")
    known = jinja2.meta.find_undeclared_variables(environment.parse(text)) - {"card_data"}
    known |= {"metrics", "self_contained"}
    if unknown := sorted(facts.keys() - known):
        raise TypeError(f"{template} has no place for {', '.join(unknown)}: it knows {', '.join(sorted(known))}.")

    values = {"repo_id": repo_id, "name": repo_id.split("/")[-1], **_facts_of(Path(folder)), **facts}
    values["options"] = {k: v for k, v in (values.get("options") or {}).items() if _is_brief(v)}
    public = _without_secrets(values)
    head = card_head(public.get("license"), public.get("datasets"), **_results(values["name"], public))
    head = head.removeprefix("---\n").removesuffix("\n---\n")
    filled = environment.from_string(text).render({**dict.fromkeys(known), **public}, card_data=head)
    filled = re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"
    filled = _fit_card(filled, public["repo_id"], values["self_contained"])
    check_card(filled)
    return filled


def card_head(license: str | None = None, datasets: list[str] | None = None, **more) -> str:
    """The metadata at the top of a card, between lines of ---. `more` are arguments of huggingface_hub's
    ModelCardData.

    Raises:
        HubError: `license` cannot be a licence identifier of the Hub.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license)):
        raise HubError(f"{license!r} names no licence as the Hub does: write cc-by-4.0, apache-2.0 or other, say.")
    return f"---\n{ModelCardData(**METADATA, license=license, datasets=datasets, **more).to_yaml()}\n---\n"


def _fit_card(card: str, repo_id: str | None, self_contained: bool, revision: str | None = None) -> str:
    """The card with code that loads the model from `repo_id`; None keeps the name in the card.

    Other code, in cards that `model_card` did not write, is not changed.
    """
    card = re.sub(re.escape(WITHOUT_PACKAGE).replace(re.escape("{place}"), ".*"), "", card)
    if not (found := SNIPPET.search(card)):
        return card
    place = json.dumps(repo_id or found["id"]) + (f", revision={json.dumps(revision)}" if revision else "")
    before, after = card[: found.start("place")] + place, card[found.end("place") :]
    if self_contained:
        after = after.replace("\n```\n", "\n```\n" + WITHOUT_PACKAGE.format(place=place), 1)
    return before + after


def _results(name: str, facts: dict) -> dict:
    """The Hub's evaluation results as arguments of ModelCardData; empty without figures."""
    figures = {"held-out loss": facts.get("validation"), **(facts.get("metrics") or {})}
    dataset = (facts.get("datasets") or [None])[0]
    results = [
        EvalResult(
            task_type=METADATA["pipeline_tag"],
            dataset_type=dataset or "images",
            dataset_name=dataset or "held-out images",
            metric_type="loss" if metric == "held-out loss" else metric.lower(),
            metric_name=f"{metric} at {size} px",
            metric_value=value,
        )
        for metric, values in figures.items()
        for size, value in (values or {}).items()
    ]
    return {"model_name": name, "eval_results": results} if results else {}


def check_card(text: str) -> None:
    """Raise a HubError if the text does not begin with the metadata by which the Hub lists and loads a model, or if it
    contains an access token or an address with credentials.

    This needs no network. The Hub validates the metadata again before every push.
    """
    remedy = f"write {', '.join(METADATA)} between two lines of --- at its top, as in model_card.md"
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise HubError(f"The metadata of {CARD} cannot be read ({_one_line(error)}): {remedy}.") from error
    if missing := [name for name in METADATA if not data.get(name)]:
        raise HubError(f"The metadata of {CARD} lack {', '.join(missing)}: {remedy}.")
    if odd := [name for name, value in METADATA.items() if type(data.get(name)) is not type(value)]:
        raise HubError(f"The metadata of {CARD} have no text or no list where {', '.join(odd)} belongs: {remedy}.")
    if TOKEN.search(text) or CREDENTIALS.search(text):
        raise HubError(f"{CARD} holds an access token, or an address with a password: cut it, and replace the secret.")


def update_card(
    folder: Path, figures: dict[Size, dict[str, float]], headings: dict[str, str], data: str, protocol: str
) -> None:
    """Put figures by size and column into the `model-index` of a pipeline's README.md, in place of older ones.

    Args:
        figures: {(height, width): {column: value}}.
        headings: {column: its name on the card}.
        data: the references of the figures.
        protocol: extractor and number of images; figures with another protocol are separate entries.

    Raises:
        HubError: there is no card, or its metadata are not valid.
    """
    text = _read_card(folder)
    if text is None:
        raise HubError(f"{folder} has no {CARD} to update: train_dfu.py and model_card write one.")
    check_card(text)
    card = ModelCard(text, ignore_metadata_errors=False)
    new = [
        EvalResult(
            task_type=METADATA["pipeline_tag"], dataset_type="images", dataset_name=data, metric_type=column,
            metric_name=f"{headings[column]} at {format_resolution(size)} px ({protocol})", metric_value=value,
        )
        for size, columns in figures.items()
        for column, value in columns.items()
    ]  # fmt: skip
    names = {(result.dataset_name, result.metric_name) for result in new}
    old = [each for each in card.data.eval_results or [] if (each.dataset_name, each.metric_name) not in names]
    card.data.eval_results = old + new
    card.data.model_name = card.data.model_name or folder.resolve().name
    check_card(str(card))
    write_atomically(folder / CARD, str(card))


def _facts_of(folder: Path) -> dict:
    """Facts that can be read from the saved pipeline."""
    components = _components(folder)
    if "unet" not in components:
        raise HubError(f"{folder} holds a pipeline without a unet, which no template here describes: write its card.")
    refiner = "refiner" in components
    config = _read_mapping(folder / "unet" / "config.json")
    size = _read_mapping(folder / "refiner" / "config.json").get("sample_size") if refiner else None
    try:
        height, width = np.broadcast_to(size or config.get("sample_size"), 2).tolist()
    except ValueError as error:
        raise HubError(f"The sample_size in the configurations of {folder} is no size: save it again.") from error
    return {
        "parameters": _count_parameters(folder / "unet"),
        "refiner_parameters": _count_parameters(folder / "refiner") if refiner else None,
        "height": height,
        "width": width,
        "classes": config.get("num_class_embeds"),
        "self_contained": bool(_code(folder)),
        "pictures": {path.stem for path in folder.glob("*.png")},
        "versions": {
            "dfu_diffusers": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__.split("+")[0],
        },
    }


def _count_parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        if _variant(path.name) == "":  # variants such as *.fp16.safetensors hold the same weights again
            with safe_open(path, "pt") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return total


def _is_brief(value) -> bool:
    """Whether an option's value is a number, a short word, or a list of these: nothing that could be a path."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_brief, value))
    return value is None or isinstance(value, (bool, int, float)) or bool(WORD.fullmatch(str(value)))


def _plain(text) -> str:
    """Untrusted text, such as the name of a class, as Markdown that shows it literally, in one line."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _without_secrets(value):
    """The value, with access tokens and credentials in addresses removed from all its texts."""
    if isinstance(value, dict):
        return {key: _without_secrets(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(each) for each in value]
    if not isinstance(value, str):
        return value
    return CREDENTIALS.sub("://", TOKEN.sub("hf_***", value))
