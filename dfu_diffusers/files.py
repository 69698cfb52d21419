# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Atomic writing of files, and digests of contents."""

import hashlib
import json
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interruption leaves either the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names of the files in a folder, are on the disk."""
    if os.name == "nt":  # Windows cannot open folders, and flushes only files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*parts: bytes) -> str:
    """SHA-256 of these bytes, in this order, cut to twenty hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:20]


def digest_of(*values) -> str:
    """The digest of strings, numbers and lists of them."""
    return digest(json.dumps(values).encode())
