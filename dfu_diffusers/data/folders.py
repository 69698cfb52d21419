# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tables of images with `datasets`: from a folder, a zip or the Hub."""

import glob
import hashlib
import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock

from .images import _reason


def load_table(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
):
    """A `datasets` table whose images are left encoded, as records {"path": str | None, "bytes": bytes | None}.

    Args:
        dataset_name: id of a data set on the Hub, or a folder in one of the formats that `datasets` knows.
        dataset_config, split: which part of it.
        streaming: read while training instead of downloading first; gives an `IterableDataset`.
        data_dir: instead of a name, a folder of images, nested as one likes, or a zip of one. All of it is taken, and
            each image is labelled by the folder that it lies in: column "label". A metadata.csv replaces the labels.
        cache_dir: where `datasets` keeps its tables, and we unpacked zips; None for its usual place.

    Raises:
        ValueError: there is no such source, or no image in it.
    """
    datasets = _require_datasets()
    if (dataset_name is None) == (data_dir is None):
        raise ValueError(
            f"Either dataset_name or data_dir names the images, but got {dataset_name!r} and {data_dir!r}."
        )
    if data_dir is None:
        source, arguments = dataset_name, dict(path=dataset_name, name=dataset_config)
        remedy = "check its id, configuration and split, and the connection to the Hub"
    else:
        if split != "train":
            raise ValueError(f"A folder has no split {split!r}: give the folder of that split as data_dir.")
        source, folder = data_dir, _image_folder(Path(data_dir).expanduser(), cache_dir)
        # Named as a pattern, the whole folder is one split; left to itself, `datasets` would take files and folders
        # with "test" or "validation" in their names for other splits, and drop them from this one.
        pattern = glob.escape(str(folder.resolve())) + "/**"
        arguments = dict(path="imagefolder", data_files={"train": pattern}, drop_labels=False)
        remedy = "give a folder or zip with images in it"
    try:
        table = datasets.load_dataset(**arguments, split=split, streaming=streaming, cache_dir=_text(cache_dir))
        if streaming:
            table = table._resolve_features()
    except Exception as error:  # besides its own, `datasets` lets through those of huggingface_hub, httpx and pyarrow
        raise ValueError(f"{source} cannot be loaded ({_reason(error.__cause__ or error)}): {remedy}.") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = _undecoded(table, column)
    if data_dir is not None and next(iter(table), None) is None:
        raise ValueError(f"{source} holds no image: {remedy}.")
    return table


def _require_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Image data sets need datasets: pip install "dfu_diffusers[train]"') from error
    return datasets


def _text(path) -> str | None:
    return None if path is None else str(path)


def _image_folder(path: Path, cache_dir) -> Path:
    """The folder itself, or the folder that a zip is unpacked to."""
    if path.is_file() and zipfile.is_zipfile(path):
        return _unzip(path, Path(cache_dir or _require_datasets().config.HF_DATASETS_CACHE) / "unzipped")
    if not path.is_dir():
        raise ValueError(f"{path} is {'no zip' if path.exists() else 'no folder and no zip'}: give one with images.")
    archive = next(path.rglob("*.[zZ][iI][pP]"), None)
    if archive:  # `datasets` would mix its content, text files included, with the images
        raise ValueError(f"{path} holds an archive, {archive.name}: unpack it or move it away.")
    return path


def _unzip(path: Path, folder: Path) -> Path:
    """Unpack into a folder of the zip's name, once for each of its versions.

    `datasets` can read zips itself, but then takes every file for an image, loses the labels, and looks for each image
    anew in the table of contents.
    """
    stat = path.stat()
    target = folder / _digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns) / path.stem
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target.parent}.lock"):
        partial = Path(f"{target.parent}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(partial)
                partial.rename(target)
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{path} cannot be unpacked to {target} ({_reason(error)}).") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _digest(*values) -> str:
    """A short name for a list of strings and numbers."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:20]


def _undecoded(table, column: str):
    """The table with records in place of decoded images. A column of file names or of encoded bytes will do, too."""
    _check_column(table, column)
    return table.cast_column(column, _require_datasets().Image(decode=False))


def _check_column(table, column: str) -> None:
    if column not in table.column_names:
        raise ValueError(f"The data set has no column {column!r}, only {table.column_names}: choose one.")
