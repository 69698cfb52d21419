# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What `examples/evaluate_dfu.py` is made of: sources of images, collections of them on the disk, and their figures.

A *source* draws image number i at a size: a model from seed i (`ModelSource`), upsampling from the images of another
collection (`Resized`), or real images (`Portraits`, `Pictures`). An image depends on its number, not on those drawn
beside it. A `Collection` keeps a range of them with their features, and `METRICS` compares collections.

All images are kept in 8 bit, real and generated ones alike, and grey ones are shown to extractors as colour.
"""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from tqdm.auto import tqdm

from . import hub, metrics
from .portraits import portrait_parameters, render_portraits
from .reports import write_atomically
from .resolutions import Size, format_resolution

HELD_OUT_SERIES = 20_002  # of portraits: neither trained on (--seed) nor validated on (--seed + 10_001)
PATCHES = 4  # crops of each image
PIXEL_IMAGES = 1024  # what the metrics that need no extractor look at, at most
MIN_SIDE = 8  # in pixels: smaller images have no layout to speak of
MIN_IMAGES = 4  # precision and recall look at three neighbours


class EvaluationError(ValueError):
    """What cannot be measured, and what to do; one line."""


# --- Pixels ---


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """(n, c, h, w) in [-1, 1] to (n, h, w, c) uint8, what lies outside clipped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_floats(pixels: np.ndarray) -> torch.Tensor:
    """The opposite of `to_bytes`, in colour: (n, h, w, 1 or 3) uint8 to (n, 3, h, w) float32 in [-1, 1]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return images.expand(-1, 3, -1, -1).contiguous()


def fourier_resize(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Zero-pad the spectrum of (n, c, h, w), or cut it: the band-limited function through the pixels at other centres.

    Pixel j of N is the cell around (j + 1/2)/N of a periodic function, as everywhere in this package.

    >>> wave = torch.cos(2 * torch.pi * (torch.arange(8) + 0.5) / 8).expand(1, 1, 8, 8)
    >>> expected = torch.cos(2 * torch.pi * (torch.arange(12) + 0.5) / 12).expand(1, 1, 12, 12)
    >>> torch.allclose(fourier_resize(wave, (12, 12)), expected, atol=1e-6)
    True
    """
    rows, columns = (_fourier_matrix(*sides).to(images) for sides in zip(images.shape[-2:], size))
    return rows @ images @ columns.T


def _fourier_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old): the sum over the modes k of both grids of exp(2 pi i k (y - x)) / old, in float64."""
    x, y = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (old, new))
    k = torch.arange(1, (min(old, new) - 1) // 2 + 1, dtype=torch.float64)
    matrix = 1 + 2 * torch.cos(2 * torch.pi * k * (y[:, None] - x)[..., None]).sum(-1)
    if old % 2 == 0 and new >= old:  # what alternates from pixel to pixel is a sine, zero between its samples
        matrix += torch.sin(torch.pi * old * y)[:, None] * torch.sin(torch.pi * old * x)
    return matrix / old


def lanczos_resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's Lanczos filter, antialiased where it shrinks: (n, h, w, c) uint8 at another size."""
    images = [Image.fromarray(each.squeeze(-1) if each.shape[-1] == 1 else each) for each in pixels]
    resized = [np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)) for image in images]
    return np.stack(resized).reshape(len(pixels), *size, -1)


# --- Sources ---


class ModelSource:
    """A pipeline's images: number i from seed i, noise drawn on the CPU, classes in turn.

    Args:
        pipe: a `DFUPipeline`, its scheduler included.
        steps: `num_inference_steps`.
        nested_noise: noise whose low Fourier modes agree at all sizes, see the pipeline; otherwise plain one.
        options: more arguments of the pipeline, such as `strategy`.
    """

    def __init__(self, pipe, steps: int, nested_noise: bool = True, **options):
        self.pipe, self.steps, self.nested_noise, self.options = pipe, steps, nested_noise, options
        self.digest = weights_digest(pipe.unet)
        if pipe.guide is not None:
            self.digest += " guided by " + weights_digest(pipe.guide)

    def key(self, size: Size) -> dict:
        config = {name: value for name, value in self.pipe.scheduler.config.items() if not name.startswith("_")}
        name = f"{type(self.pipe.scheduler).__name__} {_digest(json.dumps(config, sort_keys=True).encode())}"
        noise = "nested" if self.nested_noise else "plain"
        return {"weights": self.digest, "steps": self.steps, "scheduler": name, "noise": noise, **self.options}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        """(n, h, w, c) uint8."""
        height, width = size
        classes = self.pipe.unet.config.num_class_embeds
        images = self.pipe(
            batch_size=len(indices), height=height, width=width, num_inference_steps=self.steps,
            class_labels=[seed % classes for seed in indices] if classes else None, nested_noise=self.nested_noise,
            generator=[torch.Generator().manual_seed(seed) for seed in indices], output_type="latent", **self.options,
        ).images  # fmt: skip
        if not images.isfinite().all():
            raise EvaluationError(f"The model gives pixels that are not finite at {format_resolution(size)} px.")
        return to_bytes(images)


def weights_digest(model: torch.nn.Module) -> str:
    """Names a model by its configuration and weights, wherever and in whatever files these lie."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:20]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


class Resized:
    """The images of a collection brought to other sizes by "lanczos" or "fourier": the baseline of upsampling."""

    def __init__(self, samples: "Collection", method: str):
        self.samples, self.method = samples, method

    def key(self, size: Size) -> dict:
        return {**self.samples.source.key(size), "from": format_resolution(self.samples.size), "method": self.method}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        pixels = self.samples.pixels(indices)
        if self.method == "lanczos":
            return lanczos_resize(pixels, size)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double().div(127.5).sub(1)
        return to_bytes(fourier_resize(images, size))


class Portraits:
    """Procedural portraits that no run of the trainer with its usual seeds has seen, rendered at the size itself."""

    length = 2**31

    def key(self, size: Size) -> dict:
        return {"data": f"portraits-{HELD_OUT_SERIES}", "filter": "rendered"}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        return to_bytes(render_portraits(portrait_parameters(indices, HELD_OUT_SERIES), *size))


class Pictures:
    """Images of an `ImageDataset` in an order of chance, centre-cropped and shrunk by antialiased Lanczos."""

    def __init__(self, dataset, seed: int = 0):
        self.dataset, self.length = dataset, len(dataset)
        self.order = np.random.default_rng((seed, 4)).permutation(self.length)

    def key(self, size: Size) -> dict:
        return {"data": f"{self.dataset.fingerprint}, {self.length} images", "filter": "lanczos"}

    def draw(self, indices: Sequence[int], size: Size) -> np.ndarray:
        items = self.dataset.__getitems__([(int(self.order[i]), size) for i in indices])
        return to_bytes(torch.stack([item["image"] for item in items]))


# --- Collections ---


def coarse_size(size: Size, training_size: Size) -> Size | None:
    """The size shrunk, in its own shape, to fit into the training size; None if it does as it is.

    >>> coarse_size((96, 96), (64, 64)), coarse_size((48, 96), (64, 64)), coarse_size((64, 32), (64, 64))
    ((64, 64), (32, 64), None)
    """
    scale = min(of / side for of, side in zip(training_size, size))
    return tuple(max(MIN_SIDE, round(scale * side)) for side in size) if scale < 1 else None


class Features:
    """What an extractor tells of images: as a whole, of native-scale crops, and shrunk to the training size.

    Args:
        extractor: of `dfu_diffusers.extractors`, or another callable with a `name`.
        training_size: the largest (height, width) in training.
        device: of the extractor.
    """

    def __init__(self, extractor, training_size: Size, device: torch.device | str = "cpu"):
        self.extractor, self.training_size, self.device = extractor, training_size, device

    def check_count(self, images: int, names: Sequence[str]) -> None:
        """Raise an EvaluationError if so many images are too few for the Frechet distances among the metrics."""
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
        """Half of the training size, where the image is as large as that."""
        return max(MIN_SIDE, min(min(self.training_size) // 2, *size))

    def key(self, size: Size) -> dict:
        coarse = self.coarse_size(size)
        coarse = coarse and format_resolution(coarse)
        return {"extractor": self.extractor.name, "patch": self.patch_size(size), "coarse": coarse}

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray, places: Sequence[int]) -> dict[str, np.ndarray]:
        """Arrays (n, ..., d); crops of images at equal `places` in their collections lie at equal positions."""
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

    key.json says what they are; a folder with another key is refused. `complete` draws what is not there yet.

    Args:
        folder: theirs alone.
        source: draws them.
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
        """Raise an EvaluationError if the folder holds something else."""
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
        """Draw what is missing, in batches that the processes take in turn. All of them call it."""
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
        return sorted(set(self.indices).difference(*(batch["indices"].tolist() for batch in self.batches())))

    def batches(self) -> Iterator[np.lib.npyio.NpzFile]:
        """The finished batches by their first image; arrays are read when asked for."""
        for path in self.files():
            try:
                with np.load(path) as batch:
                    yield batch
            except (zipfile.BadZipFile, EOFError, ValueError) as error:
                raise EvaluationError(f"{path} is damaged ({error}): remove it, and run the same again.") from error

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """(n, h, w, c) uint8."""
        found = {}
        for path in dict.fromkeys(self._paths[number] for number in indices):
            with np.load(path) as batch:
                found |= zip(batch["indices"].tolist(), batch["pixels"])
        return np.stack([found[number] for number in indices])

    @cached_property
    def _paths(self) -> dict[int, Path]:
        """The file of each image of a complete collection."""
        files = zip(self.files(), self.batches())
        return {number: path for path, batch in files for number in batch["indices"].tolist()}

    @property
    def seconds_per_image(self) -> float:
        """In which they were drawn, by one process."""
        return sum(float(batch["seconds"]) for batch in self.batches()) / len(self.indices)

    @property
    def images(self) -> torch.Tensor:
        """The first `PIXEL_IMAGES`: (n, 3, h, w) in [-1, 1]."""
        return to_floats(self.pixels(self.indices[:PIXEL_IMAGES]))

    def matrix(self, kind: str) -> torch.Tensor:
        """All features of a kind, (n, d), in the order of the images."""
        order = np.argsort(np.concatenate([batch["indices"] for batch in self.batches()]))
        return torch.from_numpy(np.concatenate([batch[kind] for batch in self.batches()])[order])

    def statistics(self, kind: str) -> "metrics.FeatureStatistics":
        """Mean and covariance of a kind, read batch by batch."""
        statistics = metrics.FeatureStatistics()
        for batch in self.batches():
            statistics.update(torch.from_numpy(batch[kind]).flatten(0, -2))
        return statistics


# --- Metrics ---


class Compared(NamedTuple):
    """What the figures of one row come from."""

    samples: Collection
    references: Collection
    coarse_references: Collection | None  # at samples.features.coarse_size; None at sizes within those of training
    training_samples: Collection | None  # the same seeds at the training size; None for real images
    seed: int


class Metric(NamedTuple):
    """Columns of the table, and how they are computed; None where a metric does not apply."""

    columns: dict[str, str]  # names in results.json -> headings
    better: str  # "lower", "higher" or "real": as near as possible to the value of real images
    uses_features: bool
    compute: Callable[[Compared], Sequence[float] | None]


def _frechet(kind: str):
    def compute(row: Compared):
        references = row.coarse_references if kind == "coarse" else row.references
        if references is None:
            return None
        real = references.statistics("whole" if kind == "coarse" else kind)
        return (metrics.frechet_distance(row.samples.statistics(kind), real),)

    return compute


def _kernel(row: Compared):
    real, fake = row.references.matrix("whole"), row.samples.matrix("whole")
    return metrics.kernel_distance(real, fake, seed=row.seed)


def _precision_recall(row: Compared):
    real, fake = row.references.matrix("whole"), row.samples.matrix("whole")
    return metrics.precision_recall(real, fake)


def _agreement(row: Compared):
    if row.training_samples is None or row.samples.size == row.training_samples.size:
        return None
    size = tuple(map(min, row.samples.size, row.training_samples.size))
    small, large = (metrics.box_downsample(each.images, size) for each in (row.training_samples, row.samples))
    return (metrics.agreement(small, large).clamp(max=100),)  # infinite where they are equal


def _spectrum(row: Compared):
    real, fake = (metrics.radial_spectrum(each.images) for each in (row.references, row.samples))
    return (metrics.spectrum_distance(real, fake),)


def _wasserstein(row: Compared):
    return (metrics.sliced_wasserstein(row.references.images, row.samples.images, row.seed)[1],)


METRICS = {
    "fd": Metric({"fd": "FD"}, "lower", True, _frechet("whole")),
    "kid": Metric({"kid": "KID", "kid_low": "KID low", "kid_high": "KID high"}, "lower", True, _kernel),
    "coherence": Metric({"coherence": "coherence FD"}, "lower", True, _frechet("coarse")),
    "patch": Metric({"patch_fd": "patch FD"}, "lower", True, _frechet("patch")),
    "precision": Metric({"precision": "precision", "recall": "recall"}, "higher", True, _precision_recall),
    "spectrum": Metric({"spectrum": "spectrum"}, "lower", False, _spectrum),
    "wasserstein": Metric({"wasserstein": "sliced W"}, "lower", False, _wasserstein),
    "repetition": Metric(
        {"repetition": "repetition"}, "real", False, lambda row: (metrics.repetition_score(row.samples.images),)
    ),
    "agreement": Metric({"agreement": "agreement, dB"}, "higher", False, _agreement),
    "seam": Metric({"seam": "wrap seam"}, "real", False, lambda row: (metrics.wrap_seam(row.samples.images),)),
}  # fmt: skip


def measure(row: Compared, names: Sequence[str]) -> dict[str, float]:
    """The figures of a row by column."""
    figures = {}
    for name in names:
        values = METRICS[name].compute(row)
        if values is not None:
            figures |= {column: _number(value) for column, value in zip(METRICS[name].columns, values)}
    return figures


def _number(value) -> float:
    """One figure, the mean where a metric gives one for each image."""
    return torch.as_tensor(value).double().mean().item()


# --- The model card ---


def update_card(folder: Path, figures: dict[Size, dict[str, float]], data: str, protocol: str) -> None:
    """Put figures by size and column into the `model-index` of a pipeline's README.md, in place of older ones.

    Args:
        figures: {(height, width): {column: value}}.
        data: what was compared with.
        protocol: extractor and count, for figures made in another way are others.

    Raises:
        hub.HubError: there is no card, or its metadata are not valid.
    """
    path = folder / hub.CARD
    if not path.is_file():
        raise hub.HubError(f"{folder} has no {hub.CARD} to update: train_dfu.py and hub.model_card write one.")
    text = path.read_text(encoding="utf-8")
    hub.check_card(text)
    card = ModelCard(text, ignore_metadata_errors=False)
    headings = {column: heading for metric in METRICS.values() for column, heading in metric.columns.items()}
    new = [
        EvalResult(
            task_type=hub.METADATA["pipeline_tag"], dataset_type="images", dataset_name=data, metric_type=column,
            metric_name=f"{headings[column]} at {format_resolution(size)} px ({protocol})", metric_value=value,
        )
        for size, columns in figures.items()
        for column, value in columns.items()
    ]  # fmt: skip
    names = {(result.dataset_name, result.metric_name) for result in new}
    old = [each for each in card.data.eval_results or [] if (each.dataset_name, each.metric_name) not in names]
    card.data.eval_results = old + new
    card.data.model_name = card.data.model_name or folder.resolve().name
    hub.check_card(str(card))
    write_atomically(path, str(card))
