# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pushing a saved pipeline to the Hub in one commit."""

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import diffusers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from ..pipelines.dfu import DFUPipeline
from ..pipelines.remote_code import REMOTE_CODE_MODULES, code_files
from .card import _fit_card, check_card
from .folder import (
    CARD,
    CONFIGS,
    INDEX,
    HubError,
    _code,
    _components,
    _index,
    _one_line,
    _read_card,
    _read_mapping,
    _variant,
)

logger = logging.getLogger(__name__)
CODE = [f"{module}.py" for module in REMOTE_CODE_MODULES]  # of self-contained repositories
REPORTS = ("samples.png", "loss.png", "validation.png", "loss.csv", "validation.csv")  # written by the trainer
WAITS = (1, 4, 16)  # seconds before the second, third and fourth try
# Errors of requests without an answer. The first is that of the HTTP library on which huggingface_hub is built; its
# Rust client for large files raises a plain RuntimeError.
NO_ANSWER = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError, json.JSONDecodeError, RuntimeError)


def files_to_push(
    folder: str | Path, self_contained: bool = False, include: Sequence[str] = ()
) -> list[tuple[str, int]]:
    """The files of a pipeline's folder that a push uploads: paths relative to the folder, with sizes in bytes.

    - model_index.json;
    - of each component that it lists: config.json or scheduler_config.json, and the safetensors weights with their
      index, in every precision;
    - README.md with the pictures that it shows, and the pictures and tables of the trainer;
    - the modules that model_index.json names or, with `self_contained`, those with which the pipeline loads without
      this package.

    Nothing else is uploaded, see `files_left_out`: no checkpoints, logs, optimizer states, pickles or other files.
    `_name_or_path`, which diffusers adds, is removed from the configurations.

    `include` adds files by patterns such as "logs", "checkpoint-*" or "**/*.txt", relative to the folder. Matching
    files are uploaded unchanged, and matching folders with all their files, pickles and paths of this machine
    included.

    The code in README.md is changed to load the model from where it was pushed, so its size may change by a few bytes.

    Raises:
        HubError: the folder holds no pipeline, a pipeline without safetensors weights, nothing that `include` matches,
            or a link to a file outside of the folder.
    """
    contents = _contents(Path(folder), self_contained, include)
    return [(path, len(at) if isinstance(at, bytes) else at.stat().st_size) for path, at in contents.items()]


def files_left_out(folder: str | Path, self_contained: bool = False, include: Sequence[str] = ()) -> list[str]:
    """The files and folders that `files_to_push` leaves out, in the pipeline's folder and in those of its
    components."""
    folder = Path(folder)
    pushed = {Path(path) for path in _contents(folder, self_contained, include)}
    kept = pushed | {parent for path in pushed for parent in path.parents}
    inside = [path for name in _components(folder) for path in (folder / name).iterdir()]
    found = [path.relative_to(folder) for path in sorted([*folder.iterdir(), *inside])]
    return [path.as_posix() for path in found if path not in kept]


def _contents(
    folder: Path, self_contained: bool, include: Sequence[str] = (), repo_id: str | None = None, revision=None
) -> dict[str, Path | bytes]:
    """What to push, by path: a file on disk, or its content if it is changed for the push."""
    paths = [folder / INDEX]
    for component in _components(folder):
        found = [path for path in sorted((folder / component).glob("*")) if _is_known(path.name)]
        names = {path.name for path in found}
        if not names or ("config.json" in names and not any(name.endswith(".safetensors") for name in names)):
            missing = "no *.safetensors weights" if names else "no configuration"
            raise HubError(
                f"{folder / component}, a component of the pipeline, holds {missing}: save the pipeline again "
                f"with save_pretrained({str(folder)!r})."
            )
        paths += found
    card = _read_card(folder) or ""
    shown = re.findall(r"!\[[^]\n]{0,300}]\((\w[\w.-]{0,100}\.(?:png|jpe?g|webp))\)", card)
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
    contents |= {path: _without_origin(at) for path, at in contents.items() if Path(path).name in (INDEX, *CONFIGS)}
    fitted = _fit_card(card, repo_id, self_contained or bool(_code(folder)), revision)
    if fitted != card:
        contents[CARD] = fitted.encode()
    contents = {path.relative_to(folder).as_posix(): path for path in _included(folder, include)} | contents
    _check_links(folder, map(folder.joinpath, contents))
    return contents


def _is_known(name: str) -> bool:
    """Whether a file of this name belongs to a component."""
    return name in CONFIGS or _variant(name) is not None


def _check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Raise a HubError if one of the paths, or one of its parent folders, is a link to a place outside of the
    folder."""
    for path in paths:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise HubError(f"{path} is a link that leaves {folder}: put a copy of what it shall publish in its place.")


def _included(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that match the patterns, and the files in matching folders."""
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
    """A configuration without `_name_or_path`, the folder from which diffusers loaded the component."""
    if isinstance(content, bytes) or "_name_or_path" not in (config := _read_mapping(content)):
        return content
    del config["_name_or_path"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def check_push(
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    tag: str | None = None,
    card: str | None = None,
) -> str:
    """Check before a long run that its result can be pushed.

    Checks name and login, lets the Hub validate the card, creates the repository if it does not exist, and checks that
    this login may write to it and that the tag is new.

    Args:
        repo_id: "user/name", "organization/name", or "name" for the user who is logged in.
        private: create a private repository. False takes the Hub's default: public, unless the organization has
            another default. An existing repository keeps its visibility; a public one is refused if `private` is true.
        token: an access token; None takes the one of `hf auth login` or of HF_TOKEN.
        tag: as for `push_folder`.
        card: README.md as it will be pushed; its metadata (`card_head`) are enough.

    Returns:
        The full name, "user/name".

    Raises:
        HubError: no login, unknown token, no permission, malformed name, no network, offline mode, metadata that the
            Hub does not accept, or a tag that exists.
    """
    _check_name(repo_id)
    api = HfApi(token=token)
    user = _call(api.whoami, repo_id)["name"]
    repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
    if card is not None:
        _validate_card(card, repo_id)
    _call(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id)
    # Only this request, the first of every upload, shows whether this login may write to an existing repository.
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
    """Upload `files_to_push(folder)` in one commit, so that an interrupted upload leaves the repository unchanged.

    Weights and modules of an earlier push that this one does not replace, such as shards, are deleted in the same
    commit, because diffusers might load them instead of the new ones. Other files in the repository stay.

    Args:
        repo_id: full name of a repository that exists, as returned by `check_push`.
        token: as for `check_push`.
        self_contained: see `dfu_diffusers.hub`. The folder itself is not changed. A folder that was saved as
            self-contained is always pushed as such.
        revision: a branch; it is created from main if it does not exist (and stays if the upload fails). None is main.
        tag: a new name for this state, such as "v1.0", to load it later by `from_pretrained(..., revision="v1.0")`.
        include: patterns of further files to push, see `files_to_push`.

    Returns:
        The address of the repository's page.

    Raises:
        HubError: the folder cannot be pushed, the tag exists, or the Hub refused or failed repeatedly.
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
    if tag:  # exist_ok, because the answer to a first try may have been lost
        _call(
            lambda: api.create_tag(repo_id, tag=tag, revision=info.oid, exist_ok=True),
            repo_id,
            state="has the new files, but not the tag",
        )
    return str(info.repo_url)


def _is_replaced(path: str, components: list[str]) -> bool:
    """Whether a file on the Hub is one of those that every push replaces: weights and modules of the pipeline."""
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


def _validate_card(card: str, repo_id: str) -> None:
    """Let the Hub validate the metadata. Not by ModelCard.validate, which ignores HF_ENDPOINT in older releases."""
    check_card(card)
    content = {"content": card, "repoType": "model"}

    def request():
        url = f"{HfApi().endpoint}/api/validate-yaml"
        hf_raise_for_status(get_session().post(url, json=content, headers=build_hf_headers(token=False)))

    _call(request, repo_id)


def _call(request: Callable, repo_id: str, state: str = "is as it was"):
    """request(), repeated if that may help. A lasting error becomes a HubError that names the repository's state."""
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
    """The error of the failed request: huggingface_hub wraps that of a single file in a RuntimeError."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int | None:
    """HTTP status of the Hub's answer; None if there was no answer."""
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
    """One line that says what is wrong and what to do."""
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
