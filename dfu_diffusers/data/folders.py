# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tables of images with `datasets`: from a folder, a zip or the Hub."""

import logging
import lzma
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from PIL import Image

from ..decode import FORMATS
from ..files import digest_of
from .images import _listed, _reason

logger = logging.getLogger(__name__)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MAX_RATIO = 100  # between unpacked and packed size of a zip; pictures hardly compress
MIN_BYTES = 2**26  # that every zip may unpack to, however small it is
UNPACKING_ERRORS = (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def load_table(
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
):
    """A `datasets` table whose images stay encoded, as records {"path": str | None, "bytes": bytes | None}.

    Args:
        dataset_name: id of a data set on the Hub, or a folder in one of the formats that `datasets` knows.
        dataset_config, split: which part of it.
        streaming: read while training instead of downloading first; gives an `IterableDataset`.
        data_dir: instead of a name, a folder of images, with or without subfolders, or a zip of one. All images are
            used, also through links. The column "label" of an image is the name of its folder. A metadata.csv, .jsonl
            or .parquet in the format of `datasets` replaces the labels. Warnings list what is left out.
        cache_dir: where `datasets` keeps its tables, and zips are unpacked; None for the default of `datasets`.

    Raises:
        ValueError: there is no such source, or no image in it, or a zip that is damaged or unpacks to too much.
    """
    if (dataset_name is None) == (data_dir is None):
        raise ValueError(
            f"Either dataset_name or data_dir names the images, but got {dataset_name!r} and {data_dir!r}."
        )
    if data_dir is not None:
        if split != "train":
            raise ValueError(f"A folder has no split {split!r}: give the folder of that split as data_dir.")
        table = _table_of(data_dir, cache_dir)
        return table.to_iterable_dataset() if streaming else table
    datasets = _require_datasets()
    try:
        table = datasets.load_dataset(
            dataset_name, dataset_config, split=split, streaming=streaming, cache_dir=cache_dir and str(cache_dir)
        )
        if streaming:
            table = table._resolve_features()
    except Exception as error:  # `datasets` raises its own errors, and those of huggingface_hub, httpx and pyarrow
        raise ValueError(
            f"{dataset_name} cannot be loaded ({_reason(error.__cause__ or error)}): check its id, configuration and "
            "split, and the connection to the Hub."
        ) from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = _undecoded(table, column)
    return table


def _table_of(source: str | os.PathLike, cache_dir):
    """The table of a folder's or a zip's images.

    `datasets`' own reader of image folders is not used: it silently leaves out links to folders, AVIF files and images
    that the metadata do not mention, and gives "::", "$HOME" and "*" in a path a special meaning.
    """
    if not str(source):
        raise ValueError("data_dir is empty: name a folder or zip of images.")
    datasets = _require_datasets()
    folder = _image_folder(Path(source).expanduser(), cache_dir).resolve()
    images, metadata = _find(folder, source)
    if not images:
        raise ValueError(f"{source} holds no image: give a folder or zip with images in it, {', '.join(FORMATS)}.")
    if metadata:
        return _table_of_metadata(metadata, images)
    labels = [os.path.basename(os.path.dirname(path)) for path in images]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted(set(labels)))}
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _find(folder: Path, source) -> tuple[list[str], list[str]]:
    """Paths of the images and of the metadata files in a folder and its subfolders. A warning lists other files."""
    formats = Image.registered_extensions()
    images, metadata, left_out = [], [], []
    for path in _files(str(folder), left_out):
        name, extension = os.path.basename(path), os.path.splitext(path)[1].lower()
        if extension == ".zip":
            raise ValueError(f"{source} holds an archive, {name!a}: unpack it or move it away.")
        if name in METADATA or formats.get(extension) in FORMATS:
            kind = metadata if name in METADATA else images
            kind.append(path) if _is_text(path) else left_out.append(f"{path!a}: the name is not UTF-8")
        elif formats.get(extension) in Image.OPEN:
            left_out.append(f"{path!a}: {formats[extension]} is not read")
    if left_out:
        logger.warning(
            "%d files or folders are left out of %s: %s", len(left_out), source, _listed(left_out[:5], len(left_out))
        )
    return sorted(images), metadata


def _files(folder: str, left_out: list[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of all files in a folder and its subfolders, links included, without hidden ones."""
    above += (os.path.realpath(folder),)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"{folder!a} cannot be read ({error.strerror}): make it readable, or move it away."
        ) from error
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        if not entry.is_dir():
            yield entry.path
        elif os.path.realpath(entry.path) in above:
            left_out.append(f"{entry.path!a}: a link to a folder that it lies in")
        else:
            yield from _files(entry.path, left_out, above)


def _is_text(path: str) -> bool:
    try:
        return bool(path.encode("utf-8"))
    except UnicodeEncodeError:
        return False


def _table_of_metadata(files: list[str], images: list[str]):
    """The table of the images that files of metadata name, by paths relative to each."""
    datasets = _require_datasets()
    tables, mentioned, shown = [], set(), {}
    for path in files:
        table = datasets.Dataset(datasets.table.InMemoryTable(_read_metadata(path)))
        columns = [name for name in table.column_names if name == "file_name" or name.endswith("_file_name")]
        if not columns:
            raise ValueError(f"{path} has no column file_name, only {table.column_names}: name the images in one.")
        for column in columns:
            paths = [_beside(path, name) for name in table[column]]
            mentioned.update(paths)
            shown[name := column.removesuffix("file_name").rstrip("_") or "image"] = datasets.Image(decode=False)
            table = table.add_column(name, paths).remove_columns(column)
        tables.append(table)
    if unsaid := sorted(set(images) - mentioned):
        logger.warning(
            "%d of %d images are left out, for the metadata do not mention them: %s",
            len(unsaid), len(images), _listed(unsaid[:5], len(unsaid)),
        )  # fmt: skip
    try:
        table = datasets.concatenate_datasets(tables)
    except ValueError as error:
        raise ValueError(f"{', '.join(files)} have different columns ({_reason(error)}): make them alike.") from error
    return table.cast(datasets.Features({**table.features, **shown}))


def _read_metadata(path: str):
    """A table of pyarrow, which comes with `datasets` as pandas does."""
    import pandas
    import pyarrow
    from pyarrow import json as pyarrow_json
    from pyarrow import parquet

    try:
        if path.endswith(".csv"):
            return pyarrow.Table.from_pandas(pandas.read_csv(path), preserve_index=False)
        return pyarrow_json.read_json(path) if path.endswith(".jsonl") else parquet.read_table(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({_reason(error)}): mend it or move it away.") from error


def _beside(metadata: str, name: str | None) -> str | None:
    """The path of a file that metadata name, which must be in their folder or below it."""
    if name is None:
        return None
    folder = os.path.dirname(metadata)
    path = os.path.normpath(os.path.join(folder, str(name)))
    if not Path(path).is_relative_to(folder):
        raise ValueError(f"{metadata} names {name!r}, which lies outside of its folder: name files below it.")
    return path


def _require_datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError('Image data sets need datasets: pip install "dfu_diffusers[train]"') from error
    return datasets


def _image_folder(path: Path, cache_dir) -> Path:
    """The folder itself, or the folder to which a zip is unpacked."""
    if path.is_file() and zipfile.is_zipfile(path):
        return _unzip(path, Path(cache_dir or _require_datasets().config.HF_DATASETS_CACHE) / "unzipped")
    if not path.is_dir():
        raise ValueError(f"{path} is {'no zip' if path.exists() else 'no folder and no zip'}: give one with images.")
    return path


def _unzip(path: Path, folder: Path) -> Path:
    """Unpack into a folder with the zip's name, once for each version of the zip."""
    stat = path.stat()
    target = folder / digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns) / path.stem
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target.parent}.lock"):
        partial = Path(f"{target.parent}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if not target.exists():
            try:
                with zipfile.ZipFile(path) as archive:
                    _check_unpacked_size(archive, stat.st_size, shutil.disk_usage(target.parent.parent).free)
                    archive.extractall(partial)
                partial.rename(target)
            except UNPACKING_ERRORS as error:
                raise ValueError(f"{path} cannot be unpacked to {target} ({_reason(error)}).") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_unpacked_size(archive: zipfile.ZipFile, packed: int, free: int) -> None:
    """Raise a ValueError if a zip would fill the disk. `zipfile` never unpacks more than the zip declares."""
    total = sum(each.file_size for each in archive.infolist())
    if total > max(MIN_BYTES, MAX_RATIO * packed):
        raise ValueError(
            f"it is a zip of {packed:,} bytes that unpacks to {total:,}, as no pictures do: if you trust it, unpack "
            "it yourself and give the folder"
        )
    if total > free:
        raise ValueError(f"it unpacks to {total:,} bytes, but only {free:,} are free: make room")


def _undecoded(table, column: str):
    """The table with records instead of decoded images; the column may also hold file names or encoded bytes."""
    _check_column(table, column)
    return table.cast_column(column, _require_datasets().Image(decode=False))


def _check_column(table, column: str) -> None:
    if column not in table.column_names:
        raise ValueError(f"The data set has no column {column!r}, only {table.column_names}: choose one.")
