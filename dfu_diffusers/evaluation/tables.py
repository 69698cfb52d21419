# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tables of results: as Markdown to read and as CSV to go on with, each with the command and the machine behind it."""

import argparse
import csv
import shlex
import sys
from pathlib import Path

import torch

from ..command_line import device_name, git_commit


def parse(parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    """The parsed arguments, and the command line as `words`, which `report` prints with the table."""
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else list(argv)
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    return args


def setting(device: str) -> dict:
    """How a figure was measured: device with number of threads, version of torch, and commit."""
    return {"device": device_name(torch.device(device)), "torch": torch.__version__, "commit": git_commit()}


def markdown(rows: list[dict]) -> str:
    """A table of rows with the same keys; numbers to three digits. Empty if there are no rows."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_csv(path: Path, rows: list[dict]) -> None:
    """A file of rows, which may lack some of the columns."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(rows: list[dict], title: str, command: str, args) -> None:
    """Print the table and, with --output, write it as CSV, with the setting in each row, and as Markdown."""
    where = setting(args.device)
    command = shlex.join([*command.split(), *getattr(args, "words", [])])
    text = f"{title} By `{command}`; " + ", ".join(f"{name} {value}" for name, value in where.items()) + ".\n\n"
    print(text + markdown(rows))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".md").write_text(text + markdown(rows), encoding="utf-8")
        write_csv(args.output.with_suffix(".csv"), [{**row, **where} for row in rows])
