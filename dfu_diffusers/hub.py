# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained pipeline on the Hugging Face Hub: the files that belong to it, its model card, clear errors.

    python -m dfu_diffusers.hub push outputs/dfu-portraits me/dfu-portraits --private
    python -m dfu_diffusers.hub convert outputs/dfu-portraits fp16

The trainer calls `check_push` before it starts, `model_card` and `push_folder` when it is done.

Two kinds of repository, which differ in a few lines of model_index.json and in three files:

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

import argparse
import json
import logging
import math
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import jinja2
import jinja2.meta
import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from safetensors import safe_open

from . import _TRAVELLING, __version__
from .pipeline_dfu import DFUPipeline, code_files, with_neighbours

logger = logging.getLogger(__name__)

CARD, INDEX = "README.md", "model_index.json"
CODE = [f"{module}.py" for module in _TRAVELLING]  # of self-contained repositories
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REPORTS = ("samples.png", "loss.png", "validation.png", "loss.csv", "validation.csv")  # what the trainer leaves beside
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

WAITS = (1, 4, 16)  # seconds before the second, third and fourth try
# Of requests that got no answer. The first is the HTTP library's own, whichever one huggingface_hub is built on;
# RuntimeError is all that its Rust client for large files tells.
NO_ANSWER = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError, json.JSONDecodeError, RuntimeError)


class HubError(Exception):
    """What keeps a model from the Hub, in one line that names the remedy."""


# --- Files ---


def files_to_push(
    folder: str | Path, self_contained: bool = False, include: Sequence[str] = ()
) -> list[tuple[str, int]]:
    """What of a pipeline's folder belongs on the Hub: paths relative to it, with sizes in bytes.

    These are model_index.json, *.safetensors and *.json of the components it lists, README.md with the pictures that
    it shows, and the trainer's pictures and tables; besides the modules that model_index.json names, or, with
    `self_contained`, those that make the pipeline load without this package. Nothing else leaves the machine: no
    checkpoints, logs, optimizer states or pickled weights, and no run.json, which tells the paths of the machine it
    ran on; for the same reason `_name_or_path`, which diffusers adds, is cut from the configurations.

    `include` asks for more: patterns such as "logs", "checkpoint-*" or "**/*.txt", relative to the folder. What they
    match goes up as it is, folders with all that is in them, pickles and paths of this machine, too.

    README.md goes up with code that loads the model from where it was pushed: it may grow or shrink by a few bytes.

    Raises:
        HubError: the folder holds no pipeline, one without safetensors weights, or nothing that `include` matches.
    """
    contents = _contents(Path(folder), self_contained, include)
    return [(path, len(at) if isinstance(at, bytes) else at.stat().st_size) for path, at in contents.items()]


def _contents(
    folder: Path, self_contained: bool, include: Sequence[str] = (), repo_id: str | None = None, revision=None
) -> dict[str, Path | bytes]:
    """What to push, by path: a file on the disk, or its content where that is changed on the way."""
    paths = [folder / INDEX]
    for component in _components(folder):
        found = [
            path for path in sorted((folder / component).glob("[!.]*")) if path.suffix in (".safetensors", ".json")
        ]
        names = {path.name for path in found}
        if not names or ("config.json" in names and not any(name.endswith(".safetensors") for name in names)):
            missing = "no *.safetensors weights" if names else "no *.json"
            raise HubError(
                f"{folder / component}, a component of the pipeline, holds {missing}: save the pipeline again "
                f"with save_pretrained({str(folder)!r})."
            )
        paths += found
    shown = re.findall(r"!\[[^]]*]\((\w[\w.-]*\.(?:png|jpe?g|webp))\)", _read_card(folder) or "")
    paths += [folder / name for name in dict.fromkeys([CARD, *REPORTS, *shown])]
    contents = {path.relative_to(folder).as_posix(): path for path in [*paths, *_code(folder)] if path.is_file()}
    named = _index(folder).get("_class_name")
    if isinstance(named, list) and f"{named[0]}.py" not in contents:
        raise HubError(
            f"{folder / INDEX} names {named[0]}.py, which is not there: save the pipeline again with "
            f"save_pretrained({str(folder)!r}, self_contained=True)."
        )
    if self_contained and not isinstance(named, list):
        files = code_files(folder, getattr(diffusers, str(named), DFUPipeline))
        contents |= {path: text.encode() for path, text in files.items()}
    try:
        contents = {path: _without_origin(at) if path.endswith(".json") else at for path, at in contents.items()}
    except ValueError as error:
        raise HubError(
            f"A *.json of {folder} cannot be read ({_one_line(error)}): save the pipeline again."
        ) from error
    card = _read_card(folder) or ""
    fitted = _fit_card(card, repo_id, self_contained or bool(_code(folder)), revision)
    if fitted != card:
        contents[CARD] = fitted.encode()
    return {path.relative_to(folder).as_posix(): path for path in _included(folder, include)} | contents


def _included(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that the patterns ask for, those in folders that they match included."""
    files = []
    for pattern in patterns:
        path = Path(pattern)
        outside = path.is_absolute() or ".." in path.parts or not path.parts
        found = [] if outside else [file for at in folder.glob(pattern) for file in (at, *at.rglob("*"))]
        if not (found := [file for file in found if file.is_file()]):
            raise HubError(f"{folder} holds no files that match {pattern!r}: give a pattern relative to it.")
        files += found
    return files


def _without_origin(content: Path | bytes) -> Path | bytes:
    """The same, unless it is a configuration that names the folder from which diffusers loaded the part."""
    config = json.loads(content if isinstance(content, bytes) else content.read_bytes())
    if "_name_or_path" not in config:
        return content
    del config["_name_or_path"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _index(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = "is no folder" if not folder.is_dir() else f"holds no {INDEX} that can be read ({error})"
        raise HubError(f"{folder} {reason}: name one that DFUPipeline.save_pretrained wrote.") from error


def _components(folder: Path) -> list[str]:
    """Names of the pipeline's components, each a folder of that name."""
    index = _index(folder)
    names = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and any(value)]
    for name in names:
        if not re.fullmatch(r"\w+", name):  # "../elsewhere" would publish what lies beside the pipeline
            raise HubError(
                f"{folder / INDEX} lists a component {name!r}, which is no name of a folder: save it again."
            )
    return names


def _code(folder: Path) -> list[Path]:
    """The modules of a self-contained pipeline, which its model_index.json names, with those that they import from
    beside them; none of a plain one."""
    index = _index(folder)
    places = {"_class_name": folder, **{name: folder / name for name in _components(folder)}}
    named = [(places[name], str(index[name][0])) for name in places if isinstance(index.get(name), list)]
    paths = [place / f"{module}.py" for place, module in named if re.fullmatch(r"\w+", module)]
    return list(dict.fromkeys(each for path in paths if path.is_file() for each in with_neighbours(path)))


def convert(folder: str | Path, dtype: str, max_shard_size: str = "10GB") -> list[Path]:
    """Write the weights of a saved pipeline's models in another precision, beside the ones that are there.

    Args:
        folder: the saved pipeline.
        dtype: "fp16" or "bf16" makes a variant, which `from_pretrained(folder, variant="fp16",
            torch_dtype=torch.float16)` loads. "fp32" replaces the weights themselves: with smaller shards, say.
        max_shard_size: larger weights are split into files of at most so much, "5GB" say.

    Returns:
        The new files.

    Raises:
        HubError: unknown `dtype`, no pipeline with whole weights, or weights that do not fit into the precision.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise HubError(f"{dtype!r} is no precision to convert to: use {', '.join(DTYPES)}.")
    models = [folder / name for name in _components(folder) if (folder / name / "config.json").is_file()]
    return [path for model in models for path in _convert_model(model, dtype, max_shard_size)]


def _convert_model(folder: Path, dtype: str, max_shard_size: str) -> list[Path]:
    variant = None if dtype == "fp32" else dtype
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_class = getattr(diffusers, config["_class_name"])
        model = model_class.from_pretrained(folder, torch_dtype=DTYPES[dtype], use_safetensors=True)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise HubError(
            f"{folder} holds no weights to convert ({_one_line(error)}): save the pipeline again."
        ) from error
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise HubError(
            f"{folder} holds weights too large for {dtype}, or not finite: convert them to bf16, or to fp32."
        )
    old = {path for path in folder.iterdir() if _variant(path.name) == (variant or "")}
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:  # so that a failure leaves the folder as it was
        model.save_pretrained(new, variant=variant, max_shard_size=max_shard_size)
        written = [folder / path.name for path in sorted(Path(new).iterdir()) if _variant(path.name) is not None]
        for path in written:
            os.replace(Path(new) / path.name, path)
    for path in old.difference(written):
        path.unlink()
    return written


def _variant(name: str) -> str | None:
    """Of a file of weights or their index: "fp16", "raw", "" for the main weights; None of another file."""
    index = r"diffusion_pytorch_model\.safetensors\.index(?:\.(?P<a>\w+))?\.json"
    weights = r"diffusion_pytorch_model(?:\.(?P<b>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
    match = re.fullmatch(f"{index}|{weights}", name)
    return (match["a"] or match["b"] or "") if match else None


# --- The Hub ---


def check_push(
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    tag: str | None = None,
    card: str | None = None,
) -> str:
    """Make sure, before a run of days begins, that its result can be pushed.

    Checks name and login, has the Hub validate the card, creates the repository unless it is there, and asks whether
    this login may write to it and whether the tag is new.

    Args:
        repo_id: "user/name", "organization/name", or "name" for the user who is logged in.
        private: only those with access will see it. False leaves the Hub's default: public, unless an organization
            made private its own. An existing repository keeps its visibility; a public one is refused if private was
            asked for.
        token: an access token; None takes the one of `hf auth login` or of HF_TOKEN.
        tag: as for `push_folder`.
        card: README.md as it will be pushed; its metadata will do, see `card_head`.

    Returns:
        The full name, "user/name".

    Raises:
        HubError: no login, unknown token, no permission, malformed name, no network, offline mode, metadata that the
            Hub does not take, a tag that is there.
    """
    _check_name(repo_id)
    api = HfApi(token=token)
    user = _call(api.whoami, repo_id)["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    if card is not None:
        _validate_card(card, repo_id)
    _call(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id)
    # Only this request, the first one of every upload, tells whether a repository that exists may be written to.
    probe = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=b"#")
    _call(lambda: api.preupload_lfs_files(repo_id, [probe]), repo_id)
    if private and not _call(lambda: api.repo_info(repo_id), repo_id).private:
        raise HubError(
            f"{repo_id} is there already and public, but private was asked for: make it private in its settings on "
            f"the Hub, or choose another name."
        )
    _check_tag(api, repo_id, tag)
    return repo_id


def _check_tag(api: HfApi, repo_id: str, tag: str | None) -> None:
    if tag and tag in [ref.name for ref in _call(lambda: api.list_repo_refs(repo_id), repo_id).tags]:
        raise HubError(f"{repo_id} has a tag {tag} already, and tags stay what they are: choose another name.")


def push_folder(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    commit_message: str = "Upload DFUPipeline",
    self_contained: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    include: Sequence[str] = (),
) -> str:
    """Upload `files_to_push(folder)` in one commit, so that an interrupted upload leaves the repository as it was.

    Weights and modules of an earlier push that this one does not replace (shards, say) are deleted in the same
    commit, for diffusers might load them instead of the new ones. Other files there stay.

    Args:
        repo_id: full name of a repository that exists, as returned by `check_push`.
        token: as for `check_push`.
        self_contained: see the top of this file; the folder itself stays as it is. One that was saved so goes up so.
        revision: a branch, made from main unless it is there (and left there by an upload that fails). None is main.
        tag: a new name for this state, "v1.0" say, by which `from_pretrained(..., revision="v1.0")` finds it for good.
        include: patterns of files that do not belong to a pipeline and shall go along, see `files_to_push`.

    Returns:
        The address of the repository's page.

    Raises:
        HubError: the folder does not fit, the tag exists, or the Hub refused, or failed again and again.
    """
    folder = Path(folder)
    contents = _contents(folder, self_contained, include, repo_id, revision)
    if CARD in contents:
        check_card(_read_card(folder))
    components = _components(folder)
    api = HfApi(token=token)
    _check_tag(api, repo_id, tag)
    if revision:
        _call(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)

    def commit():
        there = api.list_repo_files(repo_id, revision=revision)
        old = [path for path in there if path not in contents and _is_replaced(path, components)]
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=at if isinstance(at, bytes) else str(at))
            for path, at in contents.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=path) for path in old]
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)

    info = _call(commit, repo_id)
    if tag:  # exist_ok, for the answer to a first try may have been lost
        _call(
            lambda: api.create_tag(repo_id, tag=tag, revision=info.oid, exist_ok=True),
            repo_id,
            state="has the new files, but not the tag",
        )
    return str(info.repo_url)


def _is_replaced(path: str, components: list[str]) -> bool:
    """Whether a file on the Hub is a part of the pipeline that every push brings anew."""
    *folder, name = path.split("/")
    is_weights = bool(folder) and (name.endswith(".safetensors") or ".safetensors.index." in name)
    return folder in ([], *([each] for each in components)) and (is_weights or name in CODE)


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if not repo_id.isascii():  # huggingface_hub 1 lets other letters pass, the Hub does not
            raise HFValidationError("it has letters beyond ASCII")
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot name a repository on the Hub ({_one_line(error)}): use NAME or USER/NAME, of "
            f"letters, digits, '-', '_' and '.'."
        ) from error


def _call(request: Callable, repo_id: str, state: str = "is as it was"):
    """request(), tried again where that may help; an error that stays becomes a HubError, which tells the state."""
    for wait in (*WAITS, None):
        try:
            return request()
        except (*NO_ANSWER, OSError, ValueError) as raised:
            error = _cause(raised)
            if wait is None or not _is_transient(error):
                raise HubError(_explain(error, repo_id, state)) from raised
            wait = max(wait, _retry_after(error))
            logger.warning(f"The Hub failed ({_one_line(error)}); next try in {wait} s.")
            time.sleep(wait)


def _cause(error: Exception) -> Exception:
    """The failed request itself: huggingface_hub wraps that of a single file in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int | None:
    """HTTP status of the Hub's answer, None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, NO_ANSWER) and not isinstance(error, OfflineModeIsEnabled)


def _retry_after(error: Exception) -> int:
    """Seconds that the Hub asks to wait, 0 if it does not say."""
    seconds = error.response.headers.get("Retry-After", "") if _status(error) else ""
    return int(seconds) if seconds.isdigit() else 0


def _explain(error: Exception, repo_id: str, state: str) -> str:
    """One line: what is wrong, and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be reached: offline mode is on. Unset HF_HUB_OFFLINE to push."
    if isinstance(error, LocalTokenNotFoundError):
        return "Nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
    status = _status(error)
    if status == 401:
        return (
            "The Hub does not accept this token (401): run `hf auth login --force` with a new one, or set HF_TOKEN, "
            "which comes first where it is set."
        )
    if status == 403:
        return (
            f"This login may not write to {repo_id} (403): use a token with write permission, or a name under your "
            f"own account."
        )
    if status == 404:
        return f"This login sees no repository {repo_id} (404): check the name, or let check_push create it."
    if status in (409, 412):
        return f"Somebody else is changing {repo_id}, too, or has changed it ({status}): look at it, and try again."
    if _is_transient(error):
        reason = f"answered {status}" if status else f"did not answer ({_one_line(error)})"
        return (
            f"The Hub {reason}, {len(WAITS) + 1} times, and {repo_id} {state}: check the network and try again "
            f"with the same options; what has arrived is not sent twice."
        )
    return f"{repo_id} could not be pushed: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


# --- Model card ---


def model_card(template: str | Path, folder: str | Path, repo_id: str, **facts) -> str:
    """README.md of a trained pipeline. Nothing is made up: a section of the template without facts is left out.

    Args:
        template: a Jinja template, our model_card.md. Its variables are the facts that it knows, each optional.
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


def _validate_card(card: str, repo_id: str) -> None:
    """Have the Hub validate the metadata. ModelCard.validate, which does so, does it elsewhere than HF_ENDPOINT says
    in older releases."""
    check_card(card)
    content = {"content": card, "repoType": "model"}

    def request():
        url = f"{HfApi().endpoint}/api/validate-yaml"
        hf_raise_for_status(get_session().post(url, json=content, headers=build_hf_headers(token=False)))

    _call(request, repo_id)


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


def _read_card(folder: Path) -> str | None:
    path = folder / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


# --- Command line ---


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dfu_diffusers.hub", description="Publish a saved pipeline.")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="upload it", description="Upload a saved pipeline in one commit.")
    push.add_argument("folder", help="what save_pretrained or the trainer wrote")
    push.add_argument("repo_id", help="NAME or USER/NAME; created unless it is there")
    push.add_argument("--private", action="store_true", help="create it private, and refuse a public one")
    push.add_argument("--self_contained", action="store_true", help="with the code, for those without dfu_diffusers")
    push.add_argument("--revision", help="branch to push to, made unless it is there (default: main)")
    push.add_argument("--tag", help="new name by which this state will be found for good")
    push.add_argument(
        "--include", nargs="+", default=[], metavar="GLOB", help="more files of the folder, for example 'checkpoint-*'"
    )
    push.add_argument(
        "--dry_run", action="store_true", help="list the files with their sizes, and have the Hub look at the card"
    )
    change = commands.add_parser(
        "convert", help="write its weights in another precision", description=convert.__doc__.splitlines()[0]
    )
    change.add_argument("folder", help="what save_pretrained or the trainer wrote; the files join those there")
    change.add_argument("dtype", choices=DTYPES, help="fp16 or bf16: a variant; fp32: the main weights anew")
    change.add_argument(
        "--max_shard_size", default="10GB", help="split larger weights, for example 5GB (default: 10GB)"
    )
    args = parser.parse_args(argv)
    try:
        _push(args) if args.command == "push" else _convert(args)
    except HubError as error:
        raise SystemExit(str(error)) from error


def _push(args) -> None:
    _list(files_to_push(args.folder, args.self_contained, args.include))
    card = _read_card(Path(args.folder))
    if args.dry_run:
        return _look_at(card, args.repo_id)
    repo_id = check_push(args.repo_id, args.private, tag=args.tag, card=card)
    how = {name: vars(args)[name] for name in ("self_contained", "revision", "tag", "include")}
    print(push_folder(args.folder, repo_id, **how))


def _look_at(card: str | None, repo_id: str) -> None:
    """Have the Hub validate the card, if it can be reached."""
    try:
        if card is not None:
            _validate_card(card, repo_id)
    except HubError as error:
        if not isinstance(error.__cause__, NO_ANSWER) or _status(_cause(error.__cause__)):
            raise
        print(f"The Hub has not seen the card: {error}")


def _convert(args) -> None:
    _list([(str(path), path.stat().st_size) for path in convert(args.folder, args.dtype, args.max_shard_size)])


def _list(files: list[tuple[str, int]]) -> None:
    for path, size in files:
        print(f"{size:>15,}  {path}")
    print(f"{sum(size for _, size in files):>15,}  bytes in {len(files)} files")


if __name__ == "__main__":
    main()
