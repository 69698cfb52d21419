# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Model cards: filled from a template, checked, and kept up to date."""

import json
import math
import re
import shlex
from pathlib import Path

import diffusers
import jinja2
import jinja2.meta
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .. import __version__
from ..data.resolutions import Size, format_resolution
from ..files import write_atomically
from .folder import CARD, HubError, _code, _components, _one_line

TEMPLATE = Path(__file__).resolve().parent.parent / "assets" / "model_card.md"  # of `model_card`
METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["diffusers", "dfu", "dfu_diffusers", "fourier-neural-operator", "any-resolution"],
}
# What `model_card` and our own cards hold to load the model, and what tells how to do so without this package.
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
TOKEN = re.compile(r"\bhf_\w{20,}")
WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+""")  # of a command for a shell
# Absolute paths. In a text a directory's name may have spaces within, but a comma or quotation mark ends the path.
ROOT, HOME = r"[/\\]+(?=[^\s/\\])", r"(?:file:/*|~[\w.-]*|[A-Za-z]:)"
DIRECTORY = r"""(?:[^/\\'"\n,;|<>]*[^/\\'"\s,;|<>][/\\]+(?=[^\s/\\'",;]))"""
DIRECTORIES = re.compile(rf"(?<![\w.:/\\~])(?:{HOME}{ROOT}{DIRECTORY}*|{ROOT}{DIRECTORY}+)")
VALUE = re.compile(rf"(-[\w-]+=|[A-Z_]+=)?({HOME}?{ROOT}.*)", re.DOTALL)  # a path as a whole, or --option=path


def model_card(template: str | Path, folder: str | Path, repo_id: str, **facts) -> str:
    """README.md of a trained pipeline. Nothing is made up: a section of the template without facts is left out.

    Args:
        template: a Jinja template, such as `TEMPLATE`. Its variables are the facts that it knows, each optional.
        folder: the saved pipeline: parameters, size and classes are read there, and samples.png, loss.png and
            validation.png are shown if they exist.
        repo_id: what `from_pretrained` will be called with.
        facts: `license` (the Hub's identifier, "apache-2.0") and `datasets` (Hub ids) also enter the metadata.
            `train_sizes` is a list such as ["16", "24x32"], `validation` maps such sizes to losses, `metrics` maps
            names to such a mapping each, {"FID": {"32": 12.3}}; both enter the metadata as `model-index`, too.
            `options` and `versions` map names to values. `self_contained` tells how to load without this package; it
            is true of a folder that was saved so. From every text, directories of absolute paths and access tokens are
            cut; a directory ends at the last slash of a phrase, since its name may have spaces.

    Returns:
        Markdown that begins with valid metadata.

    Raises:
        HubError: the folder holds no pipeline, or the metadata are not valid.
        TypeError: a fact that the template does not know.
    """
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["thousands"] = "{:,}".format
    text = Path(template).read_text(encoding="utf-8")
    known = jinja2.meta.find_undeclared_variables(environment.parse(text)) - {"card_data"}
    known |= {"metrics", "self_contained"}
    if unknown := sorted(facts.keys() - known):
        raise TypeError(f"{template} has no place for {', '.join(unknown)}: it knows {', '.join(sorted(known))}.")

    values = {"repo_id": repo_id, "name": repo_id.split("/")[-1], **_facts_of(Path(folder)), **facts}
    public = {name: (_public_command if name == "command" else _public)(value) for name, value in values.items()}
    head = card_head(public.get("license"), public.get("datasets"), **_results(values["name"], public))
    head = head.removeprefix("---\n").removesuffix("\n---\n")
    filled = environment.from_string(text).render({**dict.fromkeys(known), **public}, card_data=head)
    filled = re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"
    filled = _fit_card(filled, public["repo_id"], values["self_contained"])
    check_card(filled)
    return filled


def card_head(license: str | None = None, datasets: list[str] | None = None, **more) -> str:
    """The metadata with which a card begins, between lines of ---; `more` is for huggingface_hub's ModelCardData.

    Raises:
        HubError: `license` cannot be an identifier of the Hub.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license)):
        raise HubError(f"{license!r} names no licence as the Hub does: write cc-by-4.0, apache-2.0 or other, say.")
    return f"---\n{ModelCardData(**METADATA, license=license, datasets=datasets, **more).to_yaml()}\n---\n"


def _fit_card(card: str, repo_id: str | None, self_contained: bool, revision: str | None = None) -> str:
    """The card with code that loads the model from `repo_id`, None being the name that it has there.

    Code of other forms, in cards that `model_card` did not write, stays as it is.
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
    """What the Hub shows as evaluation results: arguments of ModelCardData, none without figures."""
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
    """Raise a HubError unless the text begins with the metadata by which the Hub lists and loads a model.

    This needs no network; the Hub validates them again before every push.
    """
    remedy = f"write {', '.join(METADATA)} between two lines of --- at its top, as in model_card.md"
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise HubError(f"The metadata of {CARD} cannot be read ({_one_line(error)}): {remedy}.") from error
    if missing := [name for name in METADATA if not data.get(name)]:
        raise HubError(f"The metadata of {CARD} lack {', '.join(missing)}: {remedy}.")


def update_card(
    folder: Path, figures: dict[Size, dict[str, float]], headings: dict[str, str], data: str, protocol: str
) -> None:
    """Put figures by size and column into the `model-index` of a pipeline's README.md, in place of older ones.

    Args:
        figures: {(height, width): {column: value}}.
        headings: {column: what it is called on the card}.
        data: what was compared with.
        protocol: extractor and count, for figures made in another way are others.

    Raises:
        HubError: there is no card, or its metadata are not valid.
    """
    path = folder / CARD
    if not path.is_file():
        raise HubError(f"{folder} has no {CARD} to update: train_dfu.py and model_card write one.")
    text = path.read_text(encoding="utf-8")
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
    write_atomically(path, str(card))


def _facts_of(folder: Path) -> dict:
    """What the saved pipeline itself can tell."""
    _components(folder)  # is it a pipeline?
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "parameters": _count_parameters(folder / "unet"),
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
        if path.name.count(".") == 1:  # others are variants, the same weights once more: *.fp16.safetensors
            with safe_open(path, "pt") as weights:
                total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return total


def _public(value, is_text: bool = True):
    """The value without what is nobody's business: where files lie on this machine, and tokens.

    Of a path that is a value as a whole, in a mapping say, the name stays; in a text, its last directory and the rest.
    """
    if isinstance(value, dict):
        return {key: _public(each, is_text=False) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(each, is_text=False) for each in value]
    if not isinstance(value, (str, Path)):
        return value
    text = TOKEN.sub("hf_***", str(value))
    if not is_text and (path := VALUE.fullmatch(text)):
        return (path[1] or "") + re.split(r"[/\\]+", path[2].rstrip("/\\"))[-1]
    return DIRECTORIES.sub("", text)


def _public_command(command: str | None) -> str | None:
    """The same for a command line, word by word; words that may stay keep their quotes."""

    def public(word: re.Match) -> str:
        plain = re.sub(r"""['"]|\\(?=\s)""", "", word[0])  # not shlex.split, which drops the separators of Windows
        shown = _public(plain, is_text=False)
        return word[0] if shown == plain else shlex.quote(shown)

    return command and WORD.sub(public, TOKEN.sub("hf_***", command))
