# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images of a source with their features, kept in files, so that no image is drawn twice."""

import json
import lzma
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.resolutions import Size, format_resolution
from ..files import write_atomically
from . import metrics
from .sources import EvaluationError, to_floats

PATCHES = 4  # crops of each image
PIXEL_IMAGES = 1024  # what the metrics that need no extractor look at, at most
MIN_SIDE = 8  # in pixels: smaller images have no layout to speak of
MIN_IMAGES = 4  # precision and recall look at three neighbours
# What a damaged .npz raises, depending on the bit.
DAMAGE = (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def coarse_size(size: Size, training_size: Size) -> Size | None:
    """The size shrunk to fit into the training size, at the same aspect ratio; None if it fits already.

    >>> coarse_size((96, 96), (64, 64)), coarse_size((48, 96), (64, 64)), coarse_size((64, 32), (64, 64))
    ((64, 64), (32, 64), None)
    """
    scale = min(of / side for of, side in zip(training_size, size))
    return tuple(max(MIN_SIDE, round(scale * side)) for side in size) if scale < 1 else None


class Features:
    """Features of images: of whole images, of crops that are not resized, and of images averaged to the training size.

    Args:
        extractor: of `dfu_diffusers.evaluation.extractors`, or another callable with a `name`.
        training_size: the largest (height, width) in training.
        device: of the extractor.
    """

    def __init__(self, extractor, training_size: Size, device: torch.device | str = "cpu"):
        self.extractor, self.training_size, self.device = extractor, training_size, device

    def check_count(self, images: int, names: Sequence[str]) -> None:
        """Raise an EvaluationError if there are too few images for the Frechet distances among the metrics."""
        dim = self.extractor.dim
        for name, per_image in (("fd", 1), ("coherence", 1), ("patch", PATCHES)):
            if name in names and images * per_image <= dim:
                raise EvaluationError(
                    f"{images} images are too few for the covariance of the {dim} features of {self.extractor.name}: "
                    f"take more than {dim // per_image}, or leave {name} out of the metrics."
                )

    def coarse_size(self, size: Size) -> Size | None:
        return coarse_size(size, self.training_size)

    def patch_size(self, size: Size) -> int:
        """Side of the crops: half of the training size, or the image's shorter side if that is less."""
        return max(MIN_SIDE, min(min(self.training_size) // 2, *size))

    def key(self, size: Size) -> dict:
        coarse = self.coarse_size(size)
        coarse = coarse and format_resolution(coarse)
        return {"extractor": self.extractor.name, "patch": self.patch_size(size), "coarse": coarse}

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Arrays (n, ..., d). Images with equal `places` (numbers in their collections) are cropped at equal
        positions."""
        images, size = to_floats(pixels), pixels.shape[1:3]
        coarse, patch = self.coarse_size(size), self.patch_size(size)
        crops = metrics.random_patches(images, patch, PATCHES, numbers=places)
        found = {"whole": self._extract(images)}
        found["patch"] = self._extract(crops).reshape(len(images), PATCHES, -1)
        return found | ({"coarse": self._extract(metrics.box_downsample(images, coarse))} if coarse else {})

    def _extract(self, images: torch.Tensor) -> np.ndarray:
        features = self.extractor(images.to(self.device)).float().cpu()
        if not features.isfinite().all():
            raise EvaluationError(f"The extractor {self.extractor.name} gives features that are not finite.")
        return features.numpy()


class Collection:
    """Images `indices` of a source at one size, with their features: a folder of .npz files, one for each batch.

    key.json identifies the images; a folder with another key is refused. `complete` draws the missing ones.

    Args:
        folder: for this collection only.
        source: draws the images.
        size: (height, width).
        indices: numbers of the images.
        features: None if no metric needs any.
    """

    def __init__(self, folder: Path, source, size: Size, indices: range, features: Features | None):
        self.folder, self.source, self.size, self.indices, self.features = folder, source, size, indices, features
        span = [indices.start, indices.stop - 1]
        self.key = {"size": format_resolution(size), "images": span, **source.key(size)}
        self.key |= features.key(size) if features else {"extractor": None}

    def check(self) -> None:
        """Raise an EvaluationError if the folder holds other images."""
        path = self.folder / "key.json"
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return
        except (ValueError, TypeError, OSError) as error:
            raise EvaluationError(f"{path} cannot be read ({error}): remove {self.folder}.") from error
        names = [name for name in {**found, **self.key} if found.get(name) != self.key.get(name)]
        if names:
            was, asked = ([key.get(name, "default") for name in names] for key in (found, self.key))
            changes = ", ".join(f"{name} {old!r} (asked for: {new!r})" for name, old, new in zip(names, was, asked))
            raise EvaluationError(
                f"{self.folder} holds other images: {changes}. Remove it, or take another --output_dir or --cache_dir."
            )

    def complete(self, accelerator, batch_size: int, title: str) -> "Collection":
        """Draw the missing images, in batches that are divided among the processes. All processes must call it."""
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != accelerator.num_processes:  # each would draw all, into the same files
            raise EvaluationError(
                f"{launched} processes were launched, but Accelerate knows of {accelerator.num_processes}: on CPUs "
                "set ACCELERATE_USE_CPU=true."
            )
        self.check()
        todo = self.missing()
        batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
        accelerator.wait_for_everyone()  # all have seen the same files before one writes another
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "key.json", json.dumps(self.key, indent=2) + "\n")
        accelerator.wait_for_everyone()
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        with tqdm(
            total=sum(map(len, mine)), desc=title, unit="img", disable=not accelerator.is_main_process, leave=False
        ) as bar:
            for batch in mine:
                self._draw(batch)
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        return self

    def _draw(self, batch: list[int]) -> None:
        started = time.perf_counter()
        pixels = self.source.draw(batch, self.size)
        seconds = time.perf_counter() - started
        found = self.features(pixels, [i - self.indices.start for i in batch]) if self.features else {}
        arrays = {"indices": np.array(batch), "pixels": pixels, "seconds": np.array(seconds), **found}
        path = self.folder / f"{batch[0]:010d}.npz"
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)

    def missing(self) -> list[int]:
        return sorted(set(self.indices).difference(*(indices.tolist() for indices in self.read("indices"))))

    def read(self, name: str) -> Iterator[np.ndarray]:
        """An array of each finished batch, in the order of their first images."""
        return (self._read(path, name) for path in self.files())

    def _read(self, path: Path, name: str) -> np.ndarray:
        try:
            with np.load(path) as batch:
                return batch[name]
        except DAMAGE as error:
            raise EvaluationError(f"{path} is damaged ({error}): remove it, and run the same again.") from error

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """(n, h, w, c) uint8."""
        found = {}
        for path in dict.fromkeys(self._paths[number] for number in indices):
            found |= zip(self._read(path, "indices").tolist(), self._read(path, "pixels"))
        return np.stack([found[number] for number in indices])

    @cached_property
    def _paths(self) -> dict[int, Path]:
        """The file of each image of a complete collection."""
        files = zip(self.files(), self.read("indices"))
        return {number: path for path, indices in files for number in indices.tolist()}

    @property
    def seconds_per_image(self) -> float:
        """Mean seconds in which one process drew an image."""
        return sum(map(float, self.read("seconds"))) / len(self.indices)

    @property
    def images(self) -> torch.Tensor:
        """The first `PIXEL_IMAGES`: (n, 3, h, w) in [-1, 1]."""
        return to_floats(self.pixels(self.indices[:PIXEL_IMAGES]))

    def matrix(self, kind: str) -> torch.Tensor:
        """All features of a kind, (n, d), in the order of the images."""
        order = np.argsort(np.concatenate(list(self.read("indices"))))
        return torch.from_numpy(np.concatenate(list(self.read(kind)))[order])

    def statistics(self, kind: str) -> "metrics.FeatureStatistics":
        """Mean and covariance of the features of a kind, computed batch by batch."""
        statistics = metrics.FeatureStatistics()
        for features in self.read(kind):
            statistics.update(torch.from_numpy(features).flatten(0, -2))
        return statistics
