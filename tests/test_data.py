"""Images of folders, zips and streams, made in a temporary folder: none is downloaded."""

import functools
import io
import itertools
import os
import pickle
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_decode import COLOURS_OF_MODES
from torch.utils.data import DataLoader

from benchmarks import bench_data
from dfu_diffusers.data import cache as cache_module
from dfu_diffusers.data import folders, streams
from dfu_diffusers.data.cache import build_cache
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.folders import load_table
from dfu_diffusers.data.images import UnusableImage, read_image, read_size
from dfu_diffusers.data.streams import ImageStream, ignore_signals
from dfu_diffusers.decode import FORMATS

datasets = pytest.importorskip("datasets")

COLOURS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
SIZES = [(16, 16), (12, 20)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress bars; nothing of these tests goes to the caches of whoever runs them."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


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


# --- The source ---


def test_a_nested_folder_holds_images_of_all_kinds_and_labels(tmp_path, open_folder):
    for name in ("a/1.png", "a/2.JPG", "b/deep/3.webp", "b/test_4.bmp", "test/5.jpeg", "6.gif"):
        save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    (tmp_path / "photos" / "a" / "table.csv").write_text("x,y\n1,2\n")
    table = open_folder()
    labels = table.features["label"]
    found = {Path(row["image"]["path"]).name: labels.int2str(row["label"]) for row in table}
    assert found == {
        "1.png": "a",
        "2.JPG": "a",
        "3.webp": "deep",
        "test_4.bmp": "b",
        "5.jpeg": "test",
        "6.gif": "photos",
    }


def test_a_flat_folder_with_an_odd_name(tmp_path, open_folder):
    photos(tmp_path / ".hidden [1] *", 3)
    assert len(open_folder(".hidden [1] *")) == 3


@pytest.mark.parametrize("name", ["a::b", "$HOME", "100% [x]{1,2}?", "~", "zip:"])
def test_names_are_letters_and_nothing_more(tmp_path, open_folder, name):
    save(tmp_path / name / name / f"{name}.png")
    table = open_folder(name)
    assert table.features["label"].names == [name] and len(ImageDataset(table)) == 1


def test_a_name_that_is_not_utf_8_is_left_out_and_told(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 2)
    try:
        os.rename(tmp_path / "photos" / "00.png", os.fsencode(tmp_path / "photos") + b"/caf\xe9.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(open_folder()) == 1
    assert "1 files or folders are left out" in caplog.text and r"caf\udce9.png': the name is not UTF-8" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_links_to_folders_and_files_are_followed(tmp_path, open_folder, streaming, caplog):
    save(tmp_path / "store" / "pets" / "1.png")
    save(tmp_path / "photos" / "dogs" / "2.png")
    (tmp_path / "photos" / "cats").symlink_to(tmp_path / "store" / "pets")
    (tmp_path / "photos" / "dogs" / "3.png").symlink_to(tmp_path / "store" / "pets" / "1.png")
    (tmp_path / "photos" / "dogs" / "again").symlink_to(tmp_path / "photos")
    table = open_folder(streaming=streaming)
    names = table.features["label"].names
    found = [(Path(row["image"]["path"]).name, names[row["label"]]) for row in table]
    assert found == [("1.png", "cats"), ("2.png", "dogs"), ("3.png", "dogs")]
    assert "again': a link to a folder that it lies in" in caplog.text


def test_every_format_that_is_read_is_found_and_others_are_told(tmp_path, open_folder, caplog):
    names = ["a.avif", "a.bmp", "a.gif", "a.JPG", "a.jpeg", "a.png", "a.pgm", "a.tif", "a.TIFF", "a.webp"]
    for name in [*names, "b.eps", "b.tga"]:
        save(tmp_path / "photos" / name, COLOURS[..., 0] if name.endswith("pgm") else COLOURS)
    dataset = ImageDataset(open_folder())
    assert sorted(Path(row["image"]["path"]).name for row in dataset.source) == sorted(names) and len(dataset) == 10
    assert "2 files or folders are left out" in caplog.text and "b.eps': EPS is not read" in caplog.text


def write_metadata(folder, kind, rows):
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    path = folder / f"metadata.{kind}"
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_metadata_replace_the_labels_and_what_they_do_not_mention_is_told(
    tmp_path, open_folder, kind, streaming, caplog
):
    photos(tmp_path / "photos", 3)
    photos(tmp_path / "photos" / "more", 2)
    write_metadata(tmp_path / "photos", kind, [{"file_name": f"0{n}.png", "label": n + 5} for n in (2, 0)])
    write_metadata(tmp_path / "photos" / "more", kind, [{"file_name": "../more/01.png", "label": 1}])
    rows = list(open_folder(streaming=streaming))
    found = [(os.path.relpath(row["image"]["path"], tmp_path / "photos"), row["label"]) for row in rows]
    assert sorted(found) == [("00.png", 5), ("02.png", 7), ("more/01.png", 1)]
    assert "2 of 5 images are left out, for the metadata do not mention them" in caplog.text
    assert "photos/01.png" in caplog.text and "more/00.png" in caplog.text


def test_pairs_of_images_in_metadata(tmp_path, open_folder):
    photos(tmp_path / "photos", 4)
    rows = [{"file_name": f"0{n}.png", "depth_file_name": f"0{n + 1}.png"} for n in (0, 2)]
    write_metadata(tmp_path / "photos", "csv", rows)
    dataset = ImageDataset(open_folder(), image_column="depth")
    assert numbers_of(torch.stack([dataset[i, (4, 4)]["image"] for i in range(2)])) == [1, 3]


def test_files_that_metadata_name_but_are_not_there_are_told(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 1)
    write_metadata(tmp_path / "photos", "csv", [{"file_name": "00.png"}, {"file_name": "gone.png"}])
    assert len(ImageDataset(open_folder())) == 1 and "gone.png: no such file" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"name,label\n00.png,3\n", r"has no column file_name, only \['name', 'label'\]: name the images"),
        (b"file_name\n../secret.png\n", "names '../secret.png', which lies outside of its folder"),
        (b"file_name\n/etc/passwd\n", "names '/etc/passwd', which lies outside of its folder"),
        (b"file_name\n\xff\xfe\n", "metadata.csv cannot be read"),
        (b"", "metadata.csv cannot be read"),
    ],
)
def test_metadata_that_are_refused(tmp_path, open_folder, content, message):
    photos(tmp_path / "photos", 1)
    (tmp_path / "photos" / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_folder()


def test_an_empty_label_is_told(tmp_path, open_folder):
    photos(tmp_path / "photos", 2)
    for second in ("", ","):
        for label in ("cat", "3"):
            content = f"file_name,label\n00.png,{label}\n01.png{second}\n"
            (tmp_path / "photos" / "metadata.csv").write_text(content)
            with pytest.raises(ValueError, match="Image 1 has no label, but column 'label' is to label all"):
                ImageDataset(open_folder(), label_column="label")


def test_an_empty_name_is_no_folder():
    with pytest.raises(ValueError, match="data_dir is empty"):
        load_table(data_dir="")


def test_a_zip_is_its_folder(tmp_path, open_folder):
    for name in ("a/1.png", "a/2.JPG", "b/3.png"):
        save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    folder, packed = open_folder(), open_folder("photos.zip")
    assert packed["label"] == folder["label"] and packed.features == folder.features
    assert ImageDataset(packed).fingerprint == ImageDataset(folder).fingerprint
    unpacked = Path(packed[0]["image"]["path"]).stat().st_mtime_ns
    assert Path(open_folder("photos.zip")[0]["image"]["path"]).stat().st_mtime_ns == unpacked  # not unpacked again


def pack(folder, archive):
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder))


def test_a_changed_folder_or_zip_is_read_anew(tmp_path, open_folder):
    photos(tmp_path / "photos", 2)
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    assert len(open_folder()) == len(open_folder("photos.zip")) == 2
    photos(tmp_path / "photos", 3)
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    assert len(open_folder()) == len(open_folder("photos.zip")) == 3


def test_a_damaged_zip_leaves_nothing_behind(tmp_path, open_folder):
    save(tmp_path / "photos" / "a.png")
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    content = bytearray((tmp_path / "photos.zip").read_bytes())
    content[200] ^= 255
    (tmp_path / "photos.zip").write_bytes(content)
    with pytest.raises(ValueError, match="photos.zip cannot be unpacked .*CRC"):
        open_folder("photos.zip")
    assert not [path for path in (tmp_path / "tables").rglob("*") if path.suffix in (".png", ".partial")]


def test_a_zip_that_unpacks_to_far_more_than_pictures_do_is_refused(tmp_path, open_folder, monkeypatch):
    monkeypatch.setattr(folders, "MIN_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.bmp", bytes(2**22))
    with pytest.raises(ValueError, match=r"bomb.zip cannot be unpacked .*unpacks to 4,194,304.*give the folder"):
        open_folder("bomb.zip")
    assert not list((tmp_path / "tables").rglob("*.bmp"))
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    save(tmp_path / "photos" / "a.png")
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    with pytest.raises(ValueError, match="only 10 are free: make room"):
        open_folder("photos.zip")


def test_zips_that_cannot_be_unpacked(tmp_path, open_folder):
    save(tmp_path / "photos" / "a.png")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(tmp_path / "photos" / "a.png", "a.png")
    content = bytearray((tmp_path / "lzma.zip").read_bytes())
    content[39:43] = b"\xff" * 4  # the properties of LZMA, behind a header of 30 bytes, the name and four more
    (tmp_path / "lzma.zip").write_bytes(content)
    with pytest.raises(ValueError, match="lzma.zip cannot be unpacked to .*") as caught:
        open_folder("lzma.zip")
    assert "\n" not in str(caught.value)
    pack(tmp_path / "photos", tmp_path / "inner.zip")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(tmp_path / "inner.zip", "nested/inner.ZIP")
    with pytest.raises(ValueError, match="outer.zip holds an archive, 'inner.ZIP': unpack it or move it away"):
        open_folder("outer.zip")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_stay_encoded(tmp_path, open_folder, streaming):
    photos(tmp_path / "photos", 1)
    table = open_folder(streaming=streaming)
    assert next(iter(table))["image"] == {"path": str(tmp_path / "photos" / "00.png"), "bytes": None}


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_do_not_exist(tmp_path, open_folder, streaming, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("x")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and so on")
    photos(tmp_path / "archives", 1)
    pack(tmp_path / "archives", tmp_path / "archives" / "more.ZIP")
    for name, message in {
        "missing": "missing is no folder and no zip",
        "texts/notes.txt": "no zip",
        "broken.zip": "no zip",
        "empty": "give a folder or zip with images",
        "archives": "holds an archive, 'more.ZIP'",
        "texts": "texts holds no image: give a folder or zip with images",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_folder(name, streaming=streaming)
    with pytest.raises(ValueError, match="no split 'test'"):
        open_folder("archives", split="test")
    with pytest.raises(ValueError, match="Either dataset_name or data_dir"):
        load_table()


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_names_splits_and_configurations(tmp_path, streaming, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    load = functools.partial(load_table, streaming=streaming, cache_dir=tmp_path / "tables")
    with pytest.raises(ValueError, match="nobody/nothing cannot be loaded .*Hub"):
        load("nobody/nothing")
    (tmp_path / "named").mkdir()
    table = datasets.Dataset.from_dict({"image": [encode(Image.fromarray(COLOURS))]})
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "named" / "train.parquet")
    assert next(iter(load(str(tmp_path / "named"))))["image"]["bytes"][1:4] == b"PNG"
    with pytest.raises(ValueError, match=r"Unknown split|Bad split"):
        load(str(tmp_path / "named"), split="tset")
    with pytest.raises(ValueError, match="'large' not found. Available: .'default'."):
        load(str(tmp_path / "named"), "large")


# --- One image ---


def one_pixel(mode, colour) -> dict:
    return encode(Image.new(mode, (3, 2), colour), "TIFF" if mode in ("CMYK", "I", "F", "I;16B") else "PNG")


@pytest.mark.parametrize("mode, colour, rgb", COLOURS_OF_MODES)
def test_pixels_of_every_mode(mode, colour, rgb):
    record = one_pixel(mode, colour)
    assert read_image(record, "RGB").getpixel((1, 1)) == rgb
    assert read_image(record, "L").getpixel((1, 1)) == Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))


def test_pillow_opens_no_other_formats(tmp_path):
    """The formats that docs/train.md names are read, and no others, whatever a file is called."""
    for format in FORMATS:
        if format in Image.SAVE:
            assert read_size(encode(Image.new("RGB", (4, 3)), format)) == (3, 4), format
    for format in ("EPS", "PDF", "PCX", "TGA", "ICO", "JPEG2000"):
        Image.new("RGB", (16, 16)).save(tmp_path / "photo.jpg", format)
        with pytest.raises(UnusableImage, match="photo.jpg: empty, or no image of type AVIF, BMP, .*WEBP"):
            read_image({"path": str(tmp_path / "photo.jpg"), "bytes": None}, "RGB")


def test_a_transparent_colour_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    found = read_image(encode(image, transparency=0), "RGB")
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    image.info["transparency"] = b"\x00\xff"
    assert image.convert("PA").mode == "PA"
    assert read_image(encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3)), "L").getpixel((0, 0)) == 255


def test_sixteen_bit_grey_keeps_its_order():
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    found = np.asarray(read_image(encode(Image.fromarray(ramp)), "L")).ravel()
    assert (np.diff(found.astype(int)) >= 0).all() and set(found) == set(range(256))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pictures_stand_upright(format, orientation):
    grey = Image.fromarray(np.repeat(np.repeat([[0, 80, 160], [40, 120, 255]], 16, 0), 16, 1).astype(np.uint8))
    options = {"quality": 100} if format in ("JPEG", "WEBP") else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    record = encode(grey.convert("RGB"), format, exif=exif, **options)
    flipped = Image.new("L", grey.size)
    flipped.paste(grey)
    flipped.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(flipped)
    found = read_image(record, "L")
    assert found.size == expected.size and read_size(record) == found.size[::-1]
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).mean() < 4


def test_a_cmyk_jpeg_and_the_first_frame_of_a_gif():
    cmyk = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(np.subtract(read_image(cmyk, "RGB").getpixel((8, 8)), (255, 0, 0))).max() < 4
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    gif = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(gif, "RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(FAULTS[name])
    for read in (read_size, functools.partial(read_image, mode="RGB")):
        with pytest.raises(UnusableImage, match=name) as caught:
            read({"path": str(tmp_path / name), "bytes": None})
        assert caught.value.name.endswith(name) and "0x" not in caught.value.reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_body_has_a_good_header(format):
    content = encode(Image.fromarray(COLOURS), format)["bytes"]
    record = {"path": None, "bytes": content[: len(content) * 2 // 3]}
    with pytest.raises(UnusableImage, match="an image without a name: ."):
        read_image(record, "RGB")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it finds
def test_damaged_bytes_never_end_in_another_error():
    for format in ("PNG", "JPEG", "GIF", "TIFF"):
        content = encode(Image.fromarray(COLOURS[:16, :16]), format)["bytes"]
        for seed in range(25):
            random = np.random.default_rng(seed)
            damaged = bytearray(content)
            for place in random.integers(0, len(content), 12):
                damaged[place] = random.integers(256)
            try:
                read_image({"path": None, "bytes": bytes(damaged)}, "RGB")
            except UnusableImage as error:
                assert error.reason


def test_other_unusable_records(tmp_path):
    for record, reason in [
        (None, "no file"),
        ({"path": None, "bytes": None}, "no file"),
        ({"path": str(tmp_path / "gone.png"), "bytes": None}, "gone.png: no such file"),
        (one_pixel("F", 0.5), "floating-point"),
        (one_pixel("I", 70000), "32-bit"),
    ]:
        with pytest.raises(UnusableImage, match=reason):
            read_image(record, "L")


def test_an_image_in_an_archive_is_fetched_and_errors_of_the_way_there_are_no_fault_of_its(tmp_path):
    save(tmp_path / "photos" / "a.png")
    pack(tmp_path / "photos", tmp_path / "photos.zip")
    found = read_image({"path": f"zip://a.png::{tmp_path / 'photos.zip'}", "bytes": None}, "RGB")
    assert np.array_equal(np.asarray(found), COLOURS)
    with pytest.raises(FileNotFoundError):
        read_image({"path": f"zip://a.png::{tmp_path / 'gone.zip'}", "bytes": None}, "RGB")


# --- Random access ---


@pytest.fixture
def mixed(tmp_path, open_folder):
    """A wide colour, a tall grey and a transparent picture."""
    save(tmp_path / "photos" / "wide.png")
    save(tmp_path / "photos" / "nested" / "grey.png", COLOURS[:, :40, 0])
    save(tmp_path / "photos" / "nested" / "alpha.webp", np.dstack([COLOURS, COLOURS[..., :1]]), lossless=True)
    return open_folder()


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (7, 31), (70, 20)])
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_images_come_at_any_size(mixed, size, mode, channels):
    dataset = ImageDataset(mixed, mode=mode)
    assert len(dataset) == 3
    for index in range(3):
        image = dataset[index, size]["image"]
        assert image.shape == (channels, *size) and image.dtype == torch.float32
        assert -1 <= image.min() and image.max() <= 1
    batch = dataset.__getitems__([(0, size), (1, (9, 9)), (2, size, 50)])
    assert torch.equal(batch[0]["image"], dataset[0, size]["image"]) and batch[1]["image"].shape[1:] == (9, 9)
    assert torch.equal(dataset[-1, size]["image"], batch[2]["image"])
    with pytest.raises(IndexError):
        dataset[3, size]


def test_the_crop_keeps_the_aspect_ratio(mixed):
    """A square view of a picture that is 1.5 times as wide as high shows its middle two thirds."""
    wide = next(i for i, row in enumerate(mixed) if row["image"]["path"].endswith("wide.png"))
    view = ImageDataset(mixed)[wide, (60, 60)]["image"]
    assert torch.equal(view, torch.from_numpy(COLOURS[:, 15:75].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1)


def test_flips_and_crops_are_functions_of_seed_and_number(mixed):
    wide = next(i for i, row in enumerate(mixed) if row["image"]["path"].endswith("wide.png"))
    draws = [(wide, (60, 60), number) for number in range(60)]
    straight = ImageDataset(mixed)[draws[0]]["image"]
    flips = [item["image"] for item in ImageDataset(mixed, random_flip=True).__getitems__(draws)]
    mirrored = sum(torch.equal(image, straight.flip(-1)) for image in flips)
    assert 15 < mirrored < 45 and mirrored + sum(torch.equal(image, straight) for image in flips) == 60

    options = dict(random_crop=True, random_flip=True, seed=5)
    first = [item["image"] for item in ImageDataset(mixed, **options).__getitems__(draws)]
    torch.manual_seed(1)
    again = [ImageDataset(mixed, **options)[draw]["image"] for draw in reversed(draws)]
    other = [item["image"] for item in ImageDataset(mixed, **{**options, "seed": 6}).__getitems__(draws)]
    assert all(map(torch.equal, first, reversed(again))) and not all(map(torch.equal, first, other))
    assert len({image.numpy().tobytes() for image in first}) > 50
    whole = ImageDataset(mixed, random_crop=True)[wide, (60, 90), 3]["image"]  # nothing to choose
    assert torch.equal(whole, ImageDataset(mixed)[wide, (60, 90)]["image"])


def test_unreadable_headers_are_left_out_by_name(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 3)
    for name, content in FAULTS.items():
        (tmp_path / "photos" / name).write_bytes(content)
    dataset = ImageDataset(open_folder())
    assert len(dataset) == 3 and "5 of 8 images are left out" in caplog.text
    assert all(name in caplog.text for name in FAULTS)
    assert numbers_of(torch.stack([dataset[i, (4, 4)]["image"] for i in range(3)])) == [0, 1, 2]


def test_only_five_names_are_told(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 1)
    for number in range(8):
        (tmp_path / "photos" / f"bad{number}.png").write_bytes(b"")
    ImageDataset(open_folder())
    assert "bad4.png" in caplog.text and "bad5.png" not in caplog.text and "and 3 more" in caplog.text


def test_a_broken_body_is_told_once_and_replaced_by_the_next(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 4)
    break_body(tmp_path / "photos" / "03.png")
    dataset = ImageDataset(open_folder(), label_column="label")
    assert len(dataset) == 4 and not caplog.text
    for _ in range(2):
        items = dataset.__getitems__([(i, (8, 8), i) for i in range(4)])
        assert numbers_of(torch.stack([item["image"] for item in items])) == [0, 1, 2, 0]
    assert caplog.text.count("03.png") == 1


def test_nothing_usable(tmp_path, open_folder):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 1 images can be used: 1 unreadable"):
        ImageDataset(open_folder())
    photos(tmp_path / "photos", 1)
    break_body(tmp_path / "photos" / "00.png")
    with pytest.raises(ValueError, match="None of the 1 images can be decoded"):
        ImageDataset(open_folder())[0, (4, 4)]


def test_small_images_fail_are_skipped_or_enlarged(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 2)  # 20 x 24
    save(tmp_path / "photos" / "wide.png", flat_image(7, (18, 100)))
    table = open_folder()
    with pytest.raises(ValueError, match=r"1 of the images .*19x19 pixels: .*wide.png \(18x100\).*skip.*upscale"):
        ImageDataset(table, min_size=(19, 19))
    assert len(ImageDataset(table, min_size=(18, 24))) == 3
    assert len(ImageDataset(table, min_size=(19, 19), small_images="upscale")) == 3
    assert len(ImageDataset(table, min_size=(19, 19), small_images="skip")) == 2
    assert "1 of 3 images are smaller than 19x19" in caplog.text
    with pytest.raises(ValueError, match="0 unreadable, 3 too small"):
        ImageDataset(table, min_size=(64, 64), small_images="skip")


@pytest.mark.parametrize(
    "kind, values, names, numbers",
    [
        ("class", [1, 0, 1], ["cat", "dog"], [1, 0, 1]),
        ("int", [2, 0, 2], ["0", "1", "2"], [2, 0, 2]),
        ("str", ["b", "a", "b"], ["a", "b"], [1, 0, 1]),
    ],
)
def test_labels(kind, values, names, numbers):
    table = table_of(3, kind=values)
    if kind == "class":
        table = table.cast_column("kind", datasets.ClassLabel(names=names))
    dataset = ImageDataset(table, label_column="kind")
    assert dataset.class_names == names and dataset.num_classes == len(names)
    loader = DataLoader(dataset, batch_sampler=[[(i, (4, 4)) for i in range(3)]])
    assert next(iter(loader))["label"].tolist() == numbers
    assert ImageDataset(table).class_names is None and "label" not in ImageDataset(table)[0, (4, 4)]


def table_of(count, **columns):
    """A table of flat images kept as bytes."""
    images = [encode(Image.fromarray(flat_image(number))) for number in range(count)]
    return datasets.Dataset.from_dict({"image": images, **columns}).cast_column("image", datasets.Image())


@pytest.mark.parametrize("values, wrong", [([0.5, 1.0], "0.5"), ([0, -1], "-1")])
def test_bad_labels(values, wrong):
    with pytest.raises(ValueError, match=f"column 'kind' holds {wrong}"):
        ImageDataset(table_of(2, kind=values), label_column="kind")


def test_bad_options(mixed):
    for options, message in [
        (dict(image_column="picture"), r"no column 'picture', only \['image', 'label'\]"),
        (dict(label_column="kind"), "no column 'kind'"),
        (dict(mode="CMYK"), "mode='CMYK'"),
        (dict(small_images="grow"), "small_images='grow'.*fail.*skip.*upscale"),
    ]:
        for make in (ImageDataset, lambda table, **options: ImageStream(table.to_iterable_dataset(), [], **options)):
            with pytest.raises(ValueError, match=message):
                make(mixed, **options)


def test_held_out_images_are_others_and_not_randomised(tmp_path, open_folder):
    photos(tmp_path / "photos", 10)
    dataset = ImageDataset(open_folder(), random_flip=True, random_crop=True)
    train, held_out = dataset.split(3, seed=1)
    shown = [numbers_of(torch.stack([d[i, (4, 4)]["image"] for i in range(len(d))])) for d in (train, held_out)]
    assert len(held_out) == 3 and sorted(sum(shown, [])) == list(range(10))
    assert held_out.rows.tolist() == dataset.split(3, seed=1)[1].rows.tolist() != dataset.split(3)[1].rows.tolist()
    assert train.framing == dataset.framing and not (held_out.framing.random_crop or held_out.framing.random_flip)
    for count in (0, 10, -1):
        with pytest.raises(ValueError, match=f"{count} of 10 images"):
            dataset.split(count)


def test_indices_choose_rows():
    dataset = ImageDataset(table_of(5), indices=[4, 2])
    assert numbers_of(torch.stack([dataset[i, (4, 4)]["image"] for i in range(2)])) == [4, 2]


def test_the_fingerprint_knows_files_but_not_where_they_lie(tmp_path, open_folder):
    for folder in ("here", "there"):
        photos(tmp_path / folder / "photos", 3)
        save(tmp_path / folder / "photos" / "sub" / "x.png")
    fingerprints = {ImageDataset(open_folder(f"{folder}/photos")).fingerprint for folder in ("here", "there")}
    (tmp_path / "there/photos/sub/x.png").rename(tmp_path / "there/photos/sub/y.png")
    fingerprints.add(ImageDataset(open_folder("there/photos")).fingerprint)
    save(tmp_path / "here/photos/sub/x.png", COLOURS[:30])
    fingerprints.add(ImageDataset(open_folder("here/photos")).fingerprint)
    assert len(fingerprints) == 3
    assert ImageDataset(table_of(3)).fingerprint == ImageDataset(table_of(3)).fingerprint
    assert ImageDataset(table_of(3)).fingerprint != ImageDataset(table_of(4)).fingerprint


def test_workers_change_nothing(tmp_path, open_folder):
    photos(tmp_path / "photos", 8)
    break_body(tmp_path / "photos" / "05.png")
    dataset = ImageDataset(open_folder(), random_crop=True, random_flip=True)
    batches = [[(n % 8, SIZES[n % 2], n) for n in range(start, start + 6, 2)] for start in range(8)]
    plain = [batch["image"] for batch in DataLoader(dataset, batch_sampler=batches)]
    worked = DataLoader(dataset, batch_sampler=batches, num_workers=2, worker_init_fn=ignore_signals)
    assert all(map(torch.equal, plain, (batch["image"] for batch in worked)))


# --- Cache ---


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


# --- Streaming ---


def batches_of(numbers, share=2, size=None):
    """Micro-batches of consecutive images, at alternating sizes: what a sampler yields."""
    numbers = list(numbers)
    groups = [numbers[i : i + share] for i in range(0, len(numbers), share)]
    return [[(-1, size or SIZES[group[0] // share % 2], n) for n in group] for group in groups]


def images_of(stream, **loader):
    return [batch["image"] for batch in DataLoader(stream, batch_size=None, **loader)]


@pytest.fixture(params=["folder", "bytes"])
def stream_table(request, tmp_path, open_folder):
    """Eleven usable flat images and a file that is none, streamed from a folder or from a table in several shards."""
    photos(tmp_path / "photos", 11)
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    if request.param == "folder":
        return open_folder(streaming=True)
    images = [{"path": p.name, "bytes": p.read_bytes()} for p in sorted((tmp_path / "photos").iterdir())]
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    return table.to_iterable_dataset(num_shards=3)


def test_a_stream_shows_each_image_once_an_epoch(stream_table, caplog):
    stream = ImageStream(stream_table, batches_of(range(33), size=(4, 4)), shuffle_buffer=5)
    shown = numbers_of(torch.cat(images_of(stream)))
    epochs = [shown[:11], shown[11:22], shown[22:]]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert caplog.text.count("zero.png") == 1


def test_without_a_buffer_a_stream_keeps_its_order(stream_table):
    stream = ImageStream(stream_table, batches_of(range(22), size=(4, 4)), shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(stream))) == [*range(11), *range(11)]


def test_resume_processes_and_workers_see_the_same_stream(stream_table):
    options = dict(random_crop=True, random_flip=True, seed=4, shuffle_buffer=4)
    batches = batches_of(range(40))
    whole = images_of(ImageStream(stream_table, batches, **options))
    assert [image.shape[-2:] for image in whole] == [batch[0][1] for batch in batches]
    for start in (3, 7, 19):
        resumed = images_of(ImageStream(stream_table, batches[start:], **options))
        assert all(map(torch.equal, whole[start:], resumed)) and len(resumed) == 20 - start
    for rank in range(2):
        share = [[batch[rank]] for batch in batches]
        part = images_of(ImageStream(stream_table, share, **options))
        assert all(torch.equal(images[rank], own[0]) for images, own in zip(whole, part))
    worked = images_of(ImageStream(stream_table, batches, **options), num_workers=3)
    assert len(worked) == len(whole) and all(map(torch.equal, whole, worked))


def test_a_stream_can_be_sent_to_a_spawned_worker(stream_table):
    stream = ImageStream(stream_table, batches_of(range(4)))
    assert all(map(torch.equal, images_of(stream), images_of(pickle.loads(pickle.dumps(stream)))))


def test_skipped_records_are_not_decoded(stream_table, monkeypatch):
    decoded = []
    read = streams.read_image
    monkeypatch.setattr(streams, "read_image", lambda *arguments: decoded.append(1) or read(*arguments))
    images_of(ImageStream(stream_table, batches_of(range(100, 104))))
    assert len(decoded) == 4


@pytest.mark.parametrize("broken, replacement", [(0, 1), (1, 0), (9, 8)])
def test_a_broken_body_is_replaced_by_its_neighbour(tmp_path, open_folder, broken, replacement, caplog):
    photos(tmp_path / "photos", 11)
    break_body(tmp_path / "photos" / f"{broken:02}.png")
    table = open_folder(streaming=True)
    batches = batches_of(range(22), size=(4, 4))
    shown = numbers_of(torch.cat(images_of(ImageStream(table, batches, shuffle_buffer=1))))
    expected = [replacement if number == broken else number for number in range(11)]
    if broken == 0:  # nothing is before it: one of the epoch's first eight
        assert shown[1:11] == expected[1:] and shown[0] in range(1, 8) and shown[11:] == shown[:11]
    else:
        assert shown == expected * 2
    assert caplog.text.count(f"{broken:02}.png") == 1
    resumed = ImageStream(table, batches[broken // 2 :], shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(resumed))) == shown[broken // 2 * 2 :]


def test_streams_without_usable_images(tmp_path, open_folder):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image that can be used"):
        images_of(ImageStream(open_folder(streaming=True), batches_of(range(1))))
    empty = table_of(1).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="no image that can be used"):
        images_of(ImageStream(empty, batches_of(range(1))))
    break_body(tmp_path / "photos" / "zero.png")
    with pytest.raises(ValueError, match="No image near number 0"):
        images_of(ImageStream(open_folder(streaming=True), batches_of(range(1))))
    with pytest.raises(ValueError, match="1 follows 3"):
        images_of(ImageStream(table_of(5).to_iterable_dataset(), [[(0, (4, 4), 3), (0, (4, 4), 1)]]))


def test_small_images_of_a_stream(tmp_path, open_folder):
    photos(tmp_path / "photos", 3)
    save(tmp_path / "photos" / "small.png", flat_image(9, (10, 10)))
    table, options = open_folder(streaming=True), dict(min_size=(16, 16), shuffle_buffer=1)
    batches = batches_of(range(4), size=(16, 16))
    with pytest.raises(ValueError, match=r"small.png \(10x10\)"):
        images_of(ImageStream(table, batches, **options))
    for small_images, shown in {"skip": [0, 1, 2, 0], "upscale": [0, 1, 2, 9]}.items():
        stream = ImageStream(table, batches, small_images=small_images, **options)
        assert numbers_of(torch.cat(images_of(stream))) == shown


def test_labels_of_a_stream(tmp_path, open_folder):
    for number in range(4):
        save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", flat_image(number))
    stream = ImageStream(open_folder(streaming=True), batches_of(range(4)), label_column="label")
    assert stream.class_names == ["a", "b"]
    for batch in DataLoader(stream, batch_size=None):
        assert batch["label"].tolist() == [number % 2 for number in numbers_of(batch["image"])]
    table = table_of(2, kind=["x", "y"], number=[5, 6]).to_iterable_dataset()
    assert ImageStream(table, [], label_column="number").class_names is None
    with pytest.raises(ValueError, match="'kind' is .*string"):
        ImageStream(table, [], label_column="kind")
    unlabelled = table_of(2, number=[-1, -1]).to_iterable_dataset()
    with pytest.raises(ValueError, match="'number' holds -1"):
        images_of(ImageStream(unlabelled, batches_of(range(1)), label_column="number"))


def test_a_stream_whose_columns_are_not_known_yet():
    table = table_of(3).cast_column("image", datasets.Image(decode=False)).to_iterable_dataset().map(lambda row: row)
    assert table.column_names is None
    stream = ImageStream(table, batches_of(range(3), size=(4, 4)), shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(stream))) == [0, 1, 2]


# --- Processes ---


def test_workers_leave_signals_to_the_main_process():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        ignore_signals(0)
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def test_the_benchmark_runs(tmp_path, capsys):
    options = ["--images", "4", "--source_size", "32", "--sizes", "8", "--seconds", "0"]
    (row,) = bench_data.main([*options, "--output", str(tmp_path / "data.csv")])
    assert row["size"] == 8 and row["cached"] > 0 and "| 8 |" in capsys.readouterr().out
    assert (tmp_path / "data.csv").read_text().count("\n") == 2
