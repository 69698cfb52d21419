"""Image files in temporary folders, and what they look like when read back: for the tests of dfu_diffusers/data.

Its fixtures are used by `pytest_plugins = "image_files"`.
"""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from dfu_diffusers.data.folders import load_table

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

COLOURS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
SIZES = [(16, 16), (12, 20)]


@pytest.fixture
def open_folder(tmp_path):
    """`load_table` of a folder or zip below tmp_path, its cache there, too."""

    def load(name="photos", **options):
        return load_table(data_dir=tmp_path / name, cache_dir=tmp_path / "tables", **options)

    return load


def save(path, pixels=COLOURS, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def encode(image, format="PNG", **options) -> dict:
    """The record of an image that lies in no file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"path": None, "bytes": buffer.getvalue()}


def flat_image(number, size=(20, 24)):
    """All pixels carry the number, so that an image is known by any of its pixels."""
    return np.full((*size, 3), number, dtype=np.uint8)


def numbers_of(images) -> list[int]:
    """Which flat images a batch (B, C, H, W) shows."""
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def photos(folder, count=12, **options):
    for number in range(count):
        save(folder / f"{number:02}.png", flat_image(number), **options)


def break_body(path):
    """Leave a PNG with a good header whose pixels end early."""
    pixels = np.random.default_rng(9).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels))["bytes"]
    path.write_bytes(content[: len(content) // 2])


FAULTS = {
    "zero.png": b"",
    "text.jpg": b"no image at all",
    "cut_header.png": encode(Image.fromarray(COLOURS))["bytes"][:20],
    "bomb.pgm": b"P5 60000 60000 255\n",  # a header that promises 60000 x 60000 pixels
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",  # Pillow would start Ghostscript for it
}


def pack(folder, archive):
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))


def table_of(count, **columns):
    """A table of flat images kept as bytes."""
    images = [encode(Image.fromarray(flat_image(number))) for number in range(count)]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


def batches_of(numbers, share=2, size=None):
    """Micro-batches of consecutive images, at alternating sizes: what a sampler yields."""
    numbers = list(numbers)
    groups = [numbers[i : i + share] for i in range(0, len(numbers), share)]
    return [[(-1, size or SIZES[group[0] // share % 2], n) for n in group] for group in groups]


def images_of(stream, **loader):
    return [batch["image"] for batch in DataLoader(stream, batch_size=None, **loader)]
