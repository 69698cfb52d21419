"""Folders, zips and saved tables of images as a source of training."""

import functools
import os
import zipfile
from pathlib import Path

import pytest
import torch
from image_files import COLOURS, datasets, encode, numbers_of, pack, photos, save
from PIL import Image

from dfu_diffusers.data import folders
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.folders import load_table

pytest_plugins = "image_files"


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
