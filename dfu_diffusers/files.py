# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there, and names for contents."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole, so that an interruption leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to a file is on the disk; of a folder, the names of its files."""
    if os.name == "nt":  # which opens no folders, and flushes only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(*parts: bytes) -> str:
    """Twenty hexadecimal digits that stand for these bytes, in this order."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:20]
