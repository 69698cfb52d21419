"""Images kept resized on disk: the same images, whole or not there."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from image_files import SIZES, batches_of, break_body, images_of, save
from torch.utils.data import DataLoader

from dfu_diffusers.data import cache as cache_module
from dfu_diffusers.data.cache import build_cache
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.streams import ImageStream, ignore_signals

pytest_plugins = "image_files"


@pytest.fixture
def colourful(tmp_path, open_folder):
    """Eight random pictures, the third with a broken body, the last without a header; labels a and b."""
    random = np.random.default_rng(3)
    for number in range(8):
        pixels = random.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", pixels)
    break_body(tmp_path / "photos" / "a" / "2.png")
    (tmp_path / "photos" / "b" / "7.png").write_bytes(b"")
    return open_folder()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_cached_images_are_the_same_to_the_bit(tmp_path, colourful, mode, num_workers, caplog):
    options = dict(mode=mode, random_flip=True, seed=2, label_column="label")
    plain = ImageDataset(colourful, **options)
    cache = build_cache(plain, SIZES, tmp_path / "cache", num_workers)
    assert "1 of 8 images are left out" in caplog.text and "2.png" in caplog.text
    cached = ImageDataset(colourful, **options, cache=cache)
    assert len(plain) == 7 and len(cached) == 6 and cached.rows.tolist() == [row for row in plain.rows if row != 1]
    for size in [*SIZES, (9, 9)]:  # the last one is not in the cache
        for number in range(12):
            index = number % 6
            twin = plain.rows.tolist().index(cached.rows[index])
            found, expected = cached[index, size, number], plain[twin, size, number]
            assert torch.equal(found["image"], expected["image"]) and found["label"] == expected["label"]
    together = cached.__getitems__([(i, SIZES[1], i) for i in range(6)])
    assert all(torch.equal(item["image"], cached[i, SIZES[1], i]["image"]) for i, item in enumerate(together))


def test_a_cache_is_built_once_and_extended(tmp_path, colourful, monkeypatch):
    dataset = ImageDataset(colourful)
    cache = build_cache(dataset, SIZES[:1], tmp_path / "cache")
    first = (cache.folder / "16x16.npy").stat().st_mtime_ns
    assert SIZES[0] in cache and SIZES[1] not in cache
    built = []
    fill = cache_module._fill_cache
    monkeypatch.setattr(
        cache_module, "_fill_cache", lambda dataset, sizes, *rest: built.append(sizes) or fill(dataset, sizes, *rest)
    )
    build_cache(dataset, SIZES, tmp_path / "cache")
    assert SIZES[1] in build_cache(dataset, SIZES, tmp_path / "cache") and built == [SIZES[1:]]
    assert (cache.folder / "16x16.npy").stat().st_mtime_ns == first
    assert np.load(cache.folder / "12x20.npy").shape == (8, 12, 20, 3)
    assert {path.name for path in cache.folder.iterdir()} <= {"lock", "sizes.npy", "16x16.npy", "12x20.npy"}


def test_another_source_or_mode_has_another_cache(tmp_path, colourful, open_folder):
    caches = [build_cache(ImageDataset(colourful, mode=mode), SIZES[:1], tmp_path / "cache") for mode in ("L", "RGB")]
    save(tmp_path / "photos" / "a" / "new.png")
    caches.append(build_cache(ImageDataset(open_folder()), SIZES[:1], tmp_path / "cache"))
    assert len({cache.folder for cache in caches}) == 3
    for cache in (caches[0], caches[2]):
        with pytest.raises(ValueError, match="build it for this data set"):
            ImageDataset(colourful, cache=cache)
    with pytest.raises(ValueError, match="random_crop works without a cache only"):
        ImageDataset(colourful, cache=caches[1], random_crop=True)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_build_leaves_nothing(tmp_path, colourful, monkeypatch, stop):
    dataset, fit, calls = ImageDataset(colourful), cache_module._fit, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 5:
            raise stop
        return fit(*arguments)

    monkeypatch.setattr(cache_module, "_fit", interrupted)
    with pytest.raises(stop):
        build_cache(dataset, SIZES, tmp_path / "cache")
    assert not [*(tmp_path / "cache").rglob("*.npy"), *(tmp_path / "cache").rglob("*.partial")]
    monkeypatch.undo()
    assert SIZES[0] in build_cache(dataset, SIZES, tmp_path / "cache")


def test_a_killed_build_is_not_taken_for_complete(tmp_path, colourful):
    dataset = ImageDataset(colourful)
    cache = build_cache(dataset, SIZES[:1], tmp_path / "elsewhere")
    folder = tmp_path / "cache" / cache.folder.name
    folder.mkdir(parents=True)
    (folder / "16x16.npy.partial").write_bytes((cache.folder / "16x16.npy").read_bytes()[:3000])
    again = build_cache(dataset, SIZES[:1], tmp_path / "cache")
    assert (again.folder / "16x16.npy").read_bytes() == (cache.folder / "16x16.npy").read_bytes()
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["sizes.npy", "16x16.npy"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array at all"])
def test_a_damaged_cache_is_named(tmp_path, colourful, name, content):
    dataset = ImageDataset(colourful)
    cache = build_cache(dataset, SIZES[:1], tmp_path / "cache")
    (cache.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged .*: remove .*, to have it built again"):
        build_cache(dataset, SIZES[:1], tmp_path / "cache").read(SIZES[0], [0])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, colourful, monkeypatch):
    resource = pytest.importorskip("resource")
    dataset = ImageDataset(colourful)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="needs 11,904 bytes, but only 10 are free"):
        build_cache(dataset, SIZES, tmp_path / "cache")
    monkeypatch.undo()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="needs 11,904 bytes"):
            build_cache(dataset, SIZES, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not [*(tmp_path / "cache").rglob("*.npy"), *(tmp_path / "cache").rglob("*.partial")]


def test_workers_open_the_cache_themselves(tmp_path, colourful):
    cache = build_cache(ImageDataset(colourful), SIZES, tmp_path / "cache")
    dataset = ImageDataset(colourful, cache=cache, random_flip=True)
    batches = [[(n % 6, SIZES[0], n) for n in range(4)], [(n % 6, SIZES[1], n) for n in range(4, 8)]]
    plain = [batch["image"] for batch in DataLoader(dataset, batch_sampler=batches)]
    worked = DataLoader(dataset, batch_sampler=batches, num_workers=2)
    assert all(map(torch.equal, plain, (batch["image"] for batch in worked)))
    pickled = pickle.dumps(dataset)  # what a spawned worker receives
    assert len(pickled) < 20_000 and not pickle.loads(pickled).cache._arrays
    again = [batch["image"] for batch in DataLoader(pickle.loads(pickled), batch_sampler=batches)]
    assert all(map(torch.equal, plain, again))


@pytest.mark.slow  # a new process imports everything anew
def test_spawned_workers(tmp_path, colourful):
    cache = build_cache(ImageDataset(colourful), SIZES, tmp_path / "cache")
    options = dict(num_workers=1, multiprocessing_context="spawn", worker_init_fn=ignore_signals)
    batches = batches_of(range(4))
    for dataset in (ImageDataset(colourful), ImageDataset(colourful, cache=cache)):
        draws = [[(n, size, n) for _, size, n in batch] for batch in batches]
        plain = [batch["image"] for batch in DataLoader(dataset, batch_sampler=draws)]
        worked = DataLoader(dataset, batch_sampler=draws, **options)
        assert all(map(torch.equal, plain, (batch["image"] for batch in worked)))
    stream = ImageStream(colourful.to_iterable_dataset(), batches)
    assert all(map(torch.equal, images_of(stream), images_of(stream, **options)))


def test_a_split_reads_the_cache(tmp_path, colourful):
    cache = build_cache(ImageDataset(colourful), SIZES, tmp_path / "cache")
    whole = ImageDataset(colourful, cache=cache)
    _, held_out = whole.split(2)
    for index, row in enumerate(held_out.rows):
        expected = whole[whole.rows.tolist().index(row), SIZES[0]]["image"]
        assert torch.equal(held_out[index, SIZES[0]]["image"], expected)
