# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The recipes of examples/make_data.py, on tiny packages made here: nothing is downloaded."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfu_diffusers.data.folders import load_table
from examples import make_data

CAT, DOG, SCIENTIST, PLANET, KEYCAP = "1f431", "1f436", "1f468-200d-1f52c", "1fa90", "0035-fe0f-20e3"
FLAG, ENGLAND = "1f1e9-1f1ea", "1f3f4-e0067_e0062_e0065_e006e_e0067"
COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: A Programmer
License: GPL-3+

Files: images/land/*
Copyright: Various
License: public-domain
 Taken from a collection of photographs
 in the public domain.

Files: images/land/*-ann*
Copyright: Ann (ann.example)
License: CC-BY-SA-4.0
Comment: Cropped.

Files:
 images/land/hill1*
 images/land/sea?.jpg
Copyright: Others
License: public-domain
"""


def picture(format: str, size=(256, 256), color=(200, 30, 60, 255)) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste(color, (64, 64, 192, 192))
    (image if format == "WEBP" else image.convert("RGB")).save(file, format, lossless=True)
    return file.getvalue()


def write_npm(folder: Path, files: dict[str, bytes], more=()) -> Path:
    """An npm package of drawings, and of further (TarInfo, content)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / make_data.EMOJI_ARCHIVE
    members = [(tarfile.TarInfo(f"package/assets/{name}.webp"), data) for name, data in files.items()]
    with tarfile.open(path, "w:gz") as tar:
        for member, data in [*members, *more]:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_deb(folder: Path, tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package of these files, by Debian's own tool."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    root = tmp_path / "root"
    control = b"Package: endless-sky-data\nVersion: 0.9.8-1.2\nArchitecture: all\nMaintainer: A <a@b.example>\n"
    for name, data in {"DEBIAN/control": control + b"Description: a test\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    folder.mkdir(parents=True)
    path = folder / make_data.LANDSCAPES_ARCHIVE
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, path], check=True, capture_output=True)
    return path


def run(output_dir: Path, *arguments: str) -> list[str]:
    """Runs the script; returns the files of all folders that it made."""
    make_data.main([*arguments, "--output_dir", str(output_dir)])
    return files(output_dir)


def files(folder: Path) -> list[str]:
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if path.parts[0] != "packages")


# --- Emoji ---


def test_emoji(tmp_path):
    names = [CAT, SCIENTIST, PLANET, KEYCAP, FLAG, ENGLAND]
    write_npm(tmp_path / "packages", {name: picture("WEBP") for name in names})
    assert run(tmp_path, "emoji") == [
        "emoji/README.md",
        f"emoji/validation/animals/{CAT}.png",  # every fifth of a class, from the first on
        f"emoji/validation/people/{SCIENTIST}.png",
        f"emoji/validation/places/{PLANET}.png",
        f"emoji/validation/signs/{KEYCAP}.png",
    ]


def test_emoji_over_white(tmp_path):
    """Transparent pixels turn white, half transparent ones half white, and rows below the 256th go."""
    data = picture("WEBP", size=(256, 264), color=(200, 0, 0, 128))
    write_npm(tmp_path / "packages", {CAT: data})
    (path,) = (path for path in run(tmp_path, "emoji") if path.endswith(".png"))
    with Image.open(tmp_path / path) as image:
        assert image.mode == "RGB" and image.size == (256, 256)
        pixels = np.array(image)
    assert (pixels[:64] == 255).all() and (pixels[192:] == 255).all()
    expected = np.array([200, 0, 0]) * 128 / 255 + 255 * 127 / 255
    np.testing.assert_allclose(pixels[64:192, 64:192].reshape(-1, 3), np.tile(expected, (128 * 128, 1)), atol=1)


def test_variants_are_never_split(tmp_path):
    tones = ["", *(f"-1f3f{digit}" for digit in "bcdef")]
    people = [f"1f9d{digit}" for digit in "1346789abcd"]
    names = {f"{person}{tone}{sex}": person for person in people for tone in tones for sex in ("", "-200d-2640-fe0f")}
    jobs = ["1f52c", "1f680", "1f33e", "1f373", "1f393"]
    names |= {f"{sex}{tone}-200d-{job}": job for sex in ("1f468", "1f469") for tone in tones for job in jobs}
    data = picture("WEBP")
    write_npm(tmp_path / "packages", {name: data for name in names})
    splits = {}
    for path in run(tmp_path, "emoji"):
        if path.endswith(".png"):
            _, split, label, file = path.split("/")
            assert label == "people"
            splits.setdefault(names[file.removesuffix(".png")], set()).add(split)
    assert all(len(split) == 1 for split in splits.values()), splits
    assert sum(split == {"validation"} for split in splits.values()) == 4  # a fifth of 16 groups, rounded up


def test_the_same_folder_every_time(tmp_path):
    archive = write_npm(tmp_path / "a" / "packages", {name: picture("WEBP") for name in (CAT, DOG, PLANET)})
    (tmp_path / "b" / "packages").mkdir(parents=True)
    shutil.copy(archive, tmp_path / "b" / "packages")
    first, second = run(tmp_path / "a", "emoji"), run(tmp_path / "b", "emoji")
    assert first == second
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in first)


def test_emoji_are_read_by_the_trainer_and_by_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = [*(f"1f40{digit:x}" for digit in range(10)), *(f"1f60{digit:x}" for digit in range(10))]
    write_npm(tmp_path / "packages", {name: picture("WEBP") for name in names})
    run(tmp_path, "emoji")
    table = load_table(data_dir=tmp_path / "emoji" / "train", cache_dir=tmp_path / "cache")
    assert len(table) == 16 and table.features["label"].names == ["animals", "faces"]
    splits = datasets.load_dataset(str(tmp_path / "emoji"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    assert splits["validation"].features["label"].names == ["animals", "faces"]
    text = (tmp_path / "emoji" / "README.md").read_text()
    assert "\nlicense: mit\n---\n" in text and "@lobehub/fluent-emoji-3d@1.1.0" in text
    assert "| animals | 8 | 2 |" in text and "Microsoft" in text


# --- Landscapes ---


@pytest.fixture
def landscapes(tmp_path):
    names = ["hill1", "hill10-ann", "sea1", "fog0", "beach2-ann", "space3", "station0", "nasa1", "earthrise"]
    land = {f"usr/share/games/endless-sky/images/land/{name}.jpg": picture("JPEG", (720, 360)) for name in names}
    other = {"usr/share/games/endless-sky/images/ship/falcon.jpg": picture("JPEG", (720, 360))}
    copyright = {make_data.LANDSCAPES_COPYRIGHT: COPYRIGHT.encode()}
    write_deb(tmp_path / "data" / "packages", tmp_path, {**land, **other, **copyright})
    return tmp_path / "data"


def test_landscapes(landscapes):
    datasets = pytest.importorskip("datasets")
    made = run(landscapes, "landscapes")
    stems = {Path(name).stem for name in made if name.endswith(".jpg")}
    assert stems == {"hill1", "hill10-ann", "sea1", "fog0", "beach2-ann"} and len(made) == 6
    assert sum("/validation/" in name for name in made) == 1
    for name in made:
        if name.endswith(".jpg"):
            assert (landscapes / name).read_bytes() == picture("JPEG", (720, 360)), "the package's own bytes"
    text = (landscapes / "landscapes" / "README.md").read_text()
    assert "| Ann (ann.example) | CC-BY-SA-4.0 | Cropped. | beach2-ann, hill10-ann |" in text
    assert "| Various | public-domain | Taken from a collection of photographs in the public domain. | fog0 |" in text
    assert "| Others | public-domain |  | hill1, sea1 |" in text and "endless-sky-data=0.9.8-1.2" in text
    assert len(load_table(data_dir=landscapes / "landscapes" / "train", cache_dir=landscapes / "cache")) == 4
    splits = datasets.load_dataset(str(landscapes / "landscapes"), cache_dir=str(landscapes / "cache"))
    assert {name: (len(split), list(split.features)) for name, split in splits.items()} == {
        "train": (4, ["image"]),
        "validation": (1, ["image"]),
    }


def test_crops_of_training_landscapes(landscapes):
    run(landscapes, "landscapes")
    made = run(landscapes, "crops")
    photos = len(list((landscapes / "landscapes" / "train").glob("*.jpg")))
    assert len([name for name in made if name.endswith(".png")]) == photos * (14 * 7 + 7 * 3)
    with Image.open(landscapes / "crops" / "sea1-360-48-96.png") as crop:
        whole = Image.open(landscapes / "landscapes" / "train" / "sea1.jpg")
        assert crop.tobytes() == whole.crop((96, 48, 160, 112)).tobytes()
    assert "CC-BY-SA-4.0" in (landscapes / "crops" / "README.md").read_text(), "credits come along"


def test_crops_need_landscapes(tmp_path):
    with pytest.raises(SystemExit, match="make the landscapes first"):
        run(tmp_path, "crops")


def test_landscapes_in_the_public_domain(landscapes):
    """`hill1*` declares hill10-ann.jpg public domain, too, but Ann has a licence of her own."""
    whole = {name for name in run(landscapes, "landscapes") if "-ann" not in name}
    shutil.rmtree(landscapes / "landscapes")
    assert set(run(landscapes, "landscapes", "--public_domain")) == whole, "and in the same split as before"
    assert "CC-BY" not in (landscapes / "landscapes" / "README.md").read_text()


# --- What goes wrong ---


def test_hostile_members_are_not_written(tmp_path):
    def member(name: str, **fields) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        return info

    data = picture("WEBP")
    outside = tmp_path / "outside.webp"
    hostile = [
        (member("../outside.webp"), data),
        (member(str(outside)), data),
        (member("package/assets/../../../outside.webp"), data),
        (member("package/assets/1f436.webp", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (member("package/assets/1f437.webp", type=tarfile.LNKTYPE, linkname="/etc/passwd"), b""),
        (member("package/assets/1f438.webp", type=tarfile.FIFOTYPE), b""),
        (member("package/assets/-.webp"), data),
    ]
    write_npm(tmp_path / "data" / "packages", {CAT: data}, hostile)
    made = run(tmp_path / "data", "emoji")
    assert [Path(name).name for name in made if name.endswith((".webp", ".png"))] == [f"{CAT}.png"]
    assert sorted(os.listdir(tmp_path)) == ["data"] and sorted(os.listdir(tmp_path / "data")) == ["emoji", "packages"]


def test_unpacking_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "UNPACKED_LIMIT", 2**20)
    write_npm(tmp_path / "packages", {CAT: bytes(2**21)})
    with pytest.raises(SystemExit, match="unpacks to more than 1 MiB"):
        run(tmp_path, "emoji")
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "data, message",
    [
        (b"no picture", "is no picture as expected"),
        (picture("PNG"), "is no picture as expected"),
        (picture("WEBP")[:30], "is no picture as expected"),
        (picture("WEBP", size=(32, 32)), "its size is 32x32"),
    ],
    ids=["text", "png", "half", "small"],
)
def test_bad_pictures(tmp_path, data, message):
    write_npm(tmp_path / "packages", {CAT: picture("WEBP"), DOG: data})
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, "emoji")
    assert os.listdir(tmp_path) == ["packages"], "no half folder stays"


def test_damaged_packages(tmp_path):
    archive = write_npm(tmp_path / "packages", {CAT: picture("WEBP")})
    whole = archive.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"<html>", whole[:-20] + bytes(20)):
        archive.write_bytes(data)
        with pytest.raises(SystemExit, match="cannot be unpacked .*Remove it"):
            run(tmp_path, "emoji")
    write_npm(tmp_path / "packages", {})
    with pytest.raises(SystemExit, match="holds none of the files expected"):
        run(tmp_path, "emoji")
    assert os.listdir(tmp_path) == ["packages"]


def test_a_damaged_deb(landscapes):
    archive = landscapes / "packages" / make_data.LANDSCAPES_ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(SystemExit, match="cannot be unpacked .*Remove it"):
        run(landscapes, "landscapes")
    assert os.listdir(landscapes) == ["packages"]


def test_missing_tools(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"npm was not found.*run `npm pack .*` on another machine and put .*\.tgz into"
    ):
        run(tmp_path / "data", "emoji")
    with pytest.raises(SystemExit, match="dpkg-deb was not found"):
        run(tmp_path / "data", "landscapes")
    (tmp_path / "dpkg-deb").write_text("#!/bin/sh\n")
    (tmp_path / "dpkg-deb").chmod(0o755)
    with pytest.raises(SystemExit, match="apt-get was not found.*put .*_all.deb into"):
        run(tmp_path / "data", "landscapes")
    assert os.listdir(tmp_path / "data") == []


def test_downloads_that_fail_or_are_cut_off(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text(
        "#!/bin/sh\necho half > lobehub-fluent-emoji-3d-1.1.0.tgz\necho no route >&2\nexit 1\n"
    )
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SystemExit, match="(?s)could not be downloaded:.no route.Check the network"):
        run(tmp_path / "data", "emoji")
    assert os.listdir(tmp_path / "data" / "packages") == []


def test_folders_that_exist_stay(tmp_path, capsys):
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        run(tmp_path, "emoji")
    assert "emoji exists: remove it" in capsys.readouterr().err and files(tmp_path) == ["emoji/mine.txt"]
    with pytest.raises(SystemExit):
        run(tmp_path, "emojis")
    assert "no data set 'emojis': choose from photos, digits" in capsys.readouterr().err
