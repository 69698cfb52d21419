# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command line: python -m dfu_diffusers.hub."""

import argparse
from pathlib import Path

from .folder import HubError, _read_card
from .push import NO_ANSWER, _cause, _status, _validate_card, check_push, files_left_out, files_to_push, push_folder
from .weights import DTYPES, convert


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
    what = (args.folder, args.self_contained, args.include)
    _list(files_to_push(*what))
    if left_out := files_left_out(*what):
        print(f"Left out, unless --include names them: {', '.join(left_out)}")
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
