# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Publish a trained pipeline on the Hugging Face Hub: the files that belong to it, its model card, clear errors.

    python -m dfu_diffusers.hub outputs/dfu-portraits me/dfu-portraits --private

The trainer calls `check_push` before it starts, `model_card` and `push_folder` when it is done.
"""

import argparse
import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jinja2
import jinja2.meta
import torch
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from . import __version__

logger = logging.getLogger(__name__)

CARD, INDEX = "README.md", "model_index.json"
REPORTS = ("samples.png", "loss.png", "validation.png", "loss.csv", "validation.csv")  # what the trainer leaves beside
METADATA = {
    "library_name": "diffusers",
    "pipeline_tag": "unconditional-image-generation",
    "tags": ["diffusers", "dfu", "dfu_diffusers", "fourier-neural-operator", "any-resolution"],
}

WAITS = (1, 4, 16)  # seconds before the second, third and fourth try
# Of requests that got no answer. The first is the HTTP library's own, whichever one huggingface_hub is built on;
# RuntimeError is all that its Rust client for large files tells.
NO_ANSWER = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError, json.JSONDecodeError, RuntimeError)


class HubError(Exception):
    """What keeps a model from the Hub, in one line that names the remedy."""


# --- Files ---


def files_to_push(folder: str | Path) -> list[tuple[str, int]]:
    """What of a pipeline's folder belongs on the Hub: paths relative to it, with sizes in bytes.

    These are model_index.json, *.safetensors and *.json of the components it lists, README.md with the pictures that
    it shows, and the trainer's pictures and tables. Nothing else leaves the machine: no checkpoints, logs, optimizer
    states or pickled weights, and no run.json, which tells the paths of the machine it ran on.

    Raises:
        HubError: the folder holds no pipeline, or one without safetensors weights.
    """
    folder = Path(folder)
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
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths if path.is_file()]


def _components(folder: Path) -> list[str]:
    """Names of the pipeline's components, each a folder of that name."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is no folder" if not folder.is_dir() else f"holds no {INDEX} that can be read ({error})"
        raise HubError(f"{folder} {reason}: name one that DFUPipeline.save_pretrained wrote.") from error
    names = [name for name, value in index.items() if isinstance(value, list) and name[0] != "_" and value[0]]
    for name in names:
        if not re.fullmatch(r"\w+", name):  # "../elsewhere" would publish what lies beside the pipeline
            raise HubError(
                f"{folder / INDEX} lists a component {name!r}, which is no name of a folder: save it again."
            )
    return names


# --- The Hub ---


def check_push(repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Make sure, before a run of days begins, that its result can be pushed.

    Checks name and login, creates the repository unless it is there, and asks whether this login may write to it.

    Args:
        repo_id: "user/name", "organization/name", or "name" for the user who is logged in.
        private: only those with access will see it. False leaves the Hub's default: public, unless an organization
            made private its own. An existing repository keeps its visibility; a public one is refused if private was
            asked for.
        token: an access token; None takes the one of `hf auth login` or of HF_TOKEN.

    Returns:
        The full name, "user/name".

    Raises:
        HubError: no login, unknown token, no permission, malformed name, no network, offline mode.
    """
    _check_name(repo_id)
    api = HfApi(token=token)
    user = _call(api.whoami, repo_id)["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    _call(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id)
    # Only this request, the first one of every upload, tells whether a repository that exists may be written to.
    probe = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=b"#")
    _call(lambda: api.preupload_lfs_files(repo_id, [probe]), repo_id)
    if private and not _call(lambda: api.repo_info(repo_id), repo_id).private:
        raise HubError(
            f"{repo_id} is there already and public, but private was asked for: make it private in its settings on "
            f"the Hub, or choose another name."
        )
    return repo_id


def push_folder(
    folder: str | Path, repo_id: str, token: str | None = None, commit_message: str = "Upload DFUPipeline"
) -> str:
    """Upload `files_to_push(folder)` in one commit, so that an interrupted upload leaves the repository as it was.

    Weights of an earlier push that this one does not replace (shards, say) are deleted in the same commit, for
    diffusers might load them instead of the new ones. Other files there stay.

    Args:
        repo_id: full name of a repository that exists, as returned by `check_push`.
        token: as for `check_push`.

    Returns:
        The address of the repository's page.

    Raises:
        HubError: the folder does not fit, or the Hub refused, or failed again and again.
    """
    folder = Path(folder)
    paths = [path for path, _ in files_to_push(folder)]
    if CARD in paths:
        check_card(_read_card(folder))
    components = _components(folder)
    api = HfApi(token=token)

    def commit():
        old = [path for path in api.list_repo_files(repo_id) if path not in paths and _is_weights(path, components)]
        operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(folder / path)) for path in paths]
        operations += [CommitOperationDelete(path_in_repo=path) for path in old]
        return api.create_commit(repo_id, operations, commit_message=commit_message)

    return str(_call(commit, repo_id).repo_url)


def _is_weights(path: str, components: list[str]) -> bool:
    return path.split("/")[0] in components and path.endswith((".safetensors", ".safetensors.index.json"))


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot name a repository on the Hub ({_one_line(error)}): use NAME or USER/NAME, of "
            f"letters, digits, '-', '_' and '.'."
        ) from error


def _call(request: Callable, repo_id: str):
    """request(), tried again where that may help; an error that stays becomes a HubError."""
    for wait in (*WAITS, None):
        try:
            return request()
        except (*NO_ANSWER, OSError, ValueError) as raised:
            error = _cause(raised)
            if wait is None or not _is_transient(error):
                raise HubError(_explain(error, repo_id)) from raised
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


def _explain(error: Exception, repo_id: str) -> str:
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
    if _is_transient(error):
        reason = f"answered {status}" if status else f"did not answer ({_one_line(error)})"
        return (
            f"The Hub {reason}, {len(WAITS) + 1} times, and {repo_id} is as it was: check the network and try again; "
            f"`python -m dfu_diffusers.hub FOLDER {repo_id}` pushes a saved pipeline."
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
            `train_sizes` is a list such as ["16", "24x32"], `validation` maps such sizes to losses, `options` and
            `versions` map names to values. From every text, directories of absolute paths and access tokens are cut.

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
    if unknown := sorted(facts.keys() - known):
        raise TypeError(f"{template} has no place for {', '.join(unknown)}: it knows {', '.join(sorted(known))}.")

    values = {"repo_id": repo_id, "name": repo_id.split("/")[-1], **_facts_of(Path(folder)), **facts}
    data = ModelCardData(**METADATA, license=facts.get("license"), datasets=facts.get("datasets"))
    filled = environment.from_string(text).render(
        {**dict.fromkeys(known), **{name: _public(value) for name, value in values.items()}}, card_data=data.to_yaml()
    )
    filled = re.sub(r"\n{3,}", "\n\n", filled).strip() + "\n"
    check_card(filled)
    return filled


def check_card(text: str) -> None:
    """Raise a HubError unless the text begins with the metadata by which the Hub lists and loads a model.

    This needs no network; the Hub validates them again at every push.
    """
    remedy = f"write {', '.join(METADATA)} between two lines of --- at its top, as in model_card.md"
    try:
        data = ModelCard(text).data
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise HubError(f"The metadata of {CARD} cannot be read ({_one_line(error)}): {remedy}.") from error
    if missing := [name for name in METADATA if not data.get(name)]:
        raise HubError(f"The metadata of {CARD} lack {', '.join(missing)}: {remedy}.")


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


def _public(value):
    """The value without what is nobody's business: where files lie on this machine, and tokens."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(each) for each in value]
    if not isinstance(value, (str, Path)):
        return value
    text = re.sub(r"\bhf_\w{20,}", "hf_***", str(value))
    return re.sub(r"(?<![\w.:/\\~])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+", "", text)


def _read_card(folder: Path) -> str | None:
    path = folder / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


# --- Command line ---


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dfu_diffusers.hub", description="Push a saved pipeline.")
    parser.add_argument("folder", help="what save_pretrained or the trainer wrote")
    parser.add_argument("repo_id", help="NAME or USER/NAME; created unless it is there")
    parser.add_argument("--private", action="store_true", help="create it private, and refuse a public one")
    parser.add_argument("--dry_run", action="store_true", help="list the files with their sizes, and send nothing")
    args = parser.parse_args(argv)
    try:
        files = files_to_push(args.folder)
        for path, size in files:
            print(f"{size:>15,}  {path}")
        print(f"{sum(size for _, size in files):>15,}  bytes in {len(files)} files")
        if not args.dry_run:
            repo_id = check_push(args.repo_id, args.private)
            print(push_folder(args.folder, repo_id))
    except HubError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
