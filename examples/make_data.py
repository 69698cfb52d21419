#!/usr/bin/env python
"""Write data sets for the runs in examples/README.md and docs/data.md.

    python examples/make_data.py                    # photos, digits and portraits: nothing is downloaded
    python examples/make_data.py emoji landscapes   # from an npm package and a Debian package

photos      eight photographs that ship inside scikit-image and scikit-learn
digits      scikit-learn's 1,797 handwritten digits, 8x8 grey, in one folder for each class
portraits   4,000 procedural portraits at 48 px in a parquet file
emoji       3,138 drawings in one 3D style, 256 px over white, in one folder for each of 8 classes (16 MB download)
landscapes  249 photographs, 720x360 (70 MB download)
crops       squares of 64 px cut from the training landscapes, whole and at half the size: 119 of each photograph

Emoji and landscapes have train/ and validation/ (every fifth), and a card, README.md, with package, licence and
credits. Their packages are downloaded into OUTPUT_DIR/packages with npm and apt-get; one that is there is used.
Crops are made from the landscapes in OUTPUT_DIR.
A folder that exists is never changed: remove it to make it anew.
"""

import argparse
import email
import gzip
import hashlib
import io
import itertools
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

HELD_OUT = 5  # one picture in so many is for validation
UNPACKED_LIMIT = 2**28  # bytes: the larger package has 78 MB

EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
EMOJI_ARCHIVE = "lobehub-fluent-emoji-3d-1.1.0.tgz"
EMOJI_SIZES = {(256, 256), (256, 264)}  # a few have empty rows below
FLAGS = (*range(0x1F1E6, 0x1F200), 0x1F3F3, 0x1F3F4)  # first code points of flags, which another artist drew
VARIANTS = {*range(0x1F3FB, 0x1F400), 0x2640, 0x2642, 0x200D, 0xFE0F}  # skin tones, the two sexes, and what joins them
MAN, WOMAN, PERSON = 0x1F468, 0x1F469, 0x1F9D1

# Classes of emoji by first code point, along the headings of Unicode's code charts. All else is in "things".
EMOJI_CLASSES = {
    "faces": (
        "2639-263A 1F479-1F47B 1F47D-1F480 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A "
        "1F9D0 1FAE0-1FAE5 1FAE8"
    ),
    "people": (
        "26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F 1F491 "
        "1F574-1F575 1F57A 1F5E3 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 1F930-1F931 "
        "1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC2-1FAC5"
    ),
    "body": (
        "261D 270A-270D 1F440-1F450 1F485 1F4AA 1F590 1F595-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932-1F933 "
        "1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAE6 1FAF0-1FAF8"
    ),
    "animals": "1F400-1F43F 1F54A 1F577 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FABC-1FABF 1FACE-1FACF",
    "food_and_plants": (
        "2615 2618 1F32D-1F37F 1F382 1F384 1F38B 1F38D 1F490 1F940 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAB4 1FAB7 "
        "1FABB 1FAD0-1FADB"
    ),
    "places": (
        "2600-2604 26C4-26C8 26E9-26F5 26FA 26FD 2708 2B50 1F300-1F32C 1F3A0-1F3A2 1F3AA 1F3CD-1F3CE 1F3D4-1F3E6 "
        "1F3E8-1F3ED 1F3EF-1F3F0 1F492 1F54B-1F54D 1F5FA-1F5FF 1F680-1F6A2 1F6A4 1F6B2 1F6D5-1F6D6 1F6E3-1F6FC 1FA90"
    ),
    "signs": (
        "0000-21FF 23CF-23EF 23F8-23FA 24C2-25FE 2611 2620-2638 2640-2653 2660-2668 267B-267F 2695 269B-26AB 26CE "
        "26D4 2705 2714-27BF 2934-2B1C 2B55 3030-3299 1F170-1F251 1F3E7 1F493-1F49F 1F4A0 1F4A2 1F4A4 1F4AB-1F4AF "
        "1F4F3-1F4F6 1F500-1F506 1F515 1F517-1F524 1F52F-1F53D 1F549 1F54E-1F567 1F5A4 1F5E8-1F5EF 1F6AB 1F6AD-1F6B1 "
        "1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0-1F6D1 1F6D7 1F6DC 1F7E0-1F7F0 1F90D-1F90E 1F9E1 1FA75-1FA77 1FAAF"
    ),
}

LANDSCAPES_PACKAGE = "endless-sky-data=0.9.8-1.2"  # of Debian 12
LANDSCAPES_ARCHIVE = "endless-sky-data_0.9.8-1.2_all.deb"
LANDSCAPES_SIZES = {(720, 360)}
LANDSCAPES_COPYRIGHT = "usr/share/doc/endless-sky-data/copyright"
CROP, CROP_STRIDE = 64, 48  # pixels
NO_LANDSCAPES = ("space", "station", "nasa", "earthrise")  # names that begin so show space, or its inside


def main(argv=None) -> None:
    makers = {
        "photos": make_photos, "digits": make_digits, "portraits": make_portraits,
        "emoji": make_emoji, "landscapes": make_landscapes, "crops": make_crops,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(makers)} (default: the first three)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/data"))
    parser.add_argument("--portraits", type=int, default=4000, help="how many")
    parser.add_argument("--public_domain", action="store_true", help="only landscapes that are in the public domain")
    args = parser.parse_args(argv)
    names = args.names or list(makers)[:3]
    for name in names:
        if name not in makers:
            parser.error(f"there is no data set {name!r}: choose from {', '.join(makers)}")
        if (args.output_dir / name).exists():
            parser.error(f"{args.output_dir / name} exists: remove it, or name another --output_dir")
    for name in names:
        with new_folder(args.output_dir / name) as folder:
            text = makers[name](folder, args)
        print(f"{text} are in {args.output_dir / name}.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that gets its name when the block ends well, and is removed otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as temporary:
        partial = Path(temporary, folder.name)
        partial.mkdir()
        yield partial
        partial.rename(folder)


# --- Sets that are made from installed packages ---


def make_photos(folder: Path, args: argparse.Namespace) -> str:
    from skimage import data
    from sklearn.datasets import load_sample_image

    photos = {name: getattr(data, name)() for name in ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")}
    photos |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    for name, pixels in photos.items():
        save(Image.fromarray(pixels), folder / f"{name}.png")
    return f"{len(photos)} photos"


def make_digits(folder: Path, args: argparse.Namespace) -> str:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target)):  # values from 0 to 16
        save(Image.fromarray((pixels * 255 / 16).astype(np.uint8)), folder / str(label) / f"{number}.png")
    return f"{len(digits.target)} digits"


def make_portraits(folder: Path, args: argparse.Namespace) -> str:
    from dfu_diffusers.data.portraits import portraits_to_datasets

    portraits_to_datasets(args.portraits, size=48, seed=3).to_parquet(str(folder / "train.parquet"))
    return f"{args.portraits} portraits"


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# --- Emoji ---


def make_emoji(folder: Path, args: argparse.Namespace) -> str:
    archive = fetch(args.output_dir / "packages", EMOJI_ARCHIVE, "npm", "pack", "--ignore-scripts", EMOJI_PACKAGE)
    files = unpack(archive, r"package/assets/[0-9a-f]+([_-][0-9a-f]+)*\.webp")
    drawings = {PurePosixPath(name).stem: data for name, data in sorted(files.items())}
    drawings = {name: data for name, data in drawings.items() if code_points(name)[0] not in FLAGS}
    bases = defaultdict(set)
    for name in drawings:
        bases[emoji_class(name)].add(base_name(name))
    validation = set().union(*map(held_out, bases.values()))
    counts = Counter()
    for name, data in drawings.items():
        picture = over_white(decode(data, "WEBP", EMOJI_SIZES, f"{name} of {archive}"))
        split = "validation" if base_name(name) in validation else "train"
        save(picture, folder / split / emoji_class(name) / f"{name}.png")
        counts[emoji_class(name), split] += 1
    rows = [f"| {label} | {counts[label, 'train']} | {counts[label, 'validation']} |" for label in sorted(bases)]
    text = f"""{len(drawings)} drawings of 256 px in one style, laid over white. MIT licence, copyright
Microsoft Corporation (Fluent Emoji) and LobeHub (the package).

A file is named after its code points. Variants of skin tone and sex are all in train or all in validation. Flags,
which another artist drew, are left out. Classes are ranges of code points.

| class | train | validation |
|---|---|---|
"""
    write_card(
        folder, "Fluent emoji, 3D", "license: mit", text + "\n".join(rows), f"npm package {EMOJI_PACKAGE}", archive
    )
    return f"{len(drawings)} emoji"


def code_points(name: str) -> list[int]:
    return [int(number, 16) for number in re.split("[-_]", name)]


def base_name(name: str) -> str:
    """Equal for variants of skin tone and of sex.

    >>> base_name("1f468-1f3fd-200d-1f373"), base_name("1f3c3-1f3fb-200d-2640-fe0f")
    ('1f9d1-1f373', '1f3c3')
    """
    points = [point for point in code_points(name) if point not in VARIANTS] or code_points(name)
    return "-".join(f"{PERSON if point in (MAN, WOMAN) else point:x}" for point in points)


def emoji_class(name: str) -> str:
    first = code_points(name)[0]
    for label, ranges in EMOJI_CLASSES.items():
        for low, _, high in (text.partition("-") for text in ranges.split()):
            if int(low, 16) <= first <= int(high or low, 16):
                return label
    return "things"


def over_white(picture: Image.Image) -> Image.Image:
    """The upper square of a transparent picture, laid over white."""
    side = picture.width
    page = Image.new("RGBA", (side, side), "white")
    page.alpha_composite(picture.convert("RGBA").crop((0, 0, side, side)))
    return page.convert("RGB")


# --- Landscapes ---


class Credit(NamedTuple):
    """A paragraph of a Debian copyright file."""

    patterns: list[str]
    holder: str
    license: str
    comment: str


def make_landscapes(folder: Path, args: argparse.Namespace) -> str:
    if shutil.which("dpkg-deb") is None:
        raise SystemExit(
            "dpkg-deb was not found, which unpacks Debian packages. Install dpkg, or make the landscapes on Debian or "
            "Ubuntu and copy their folder."
        )
    archive = fetch(args.output_dir / "packages", LANDSCAPES_ARCHIVE, "apt-get", "download", LANDSCAPES_PACKAGE)
    files = unpack(archive, rf"{LANDSCAPES_COPYRIGHT}|usr/share/games/endless-sky/images/land/[a-z0-9-]+\.jpg")
    if LANDSCAPES_COPYRIGHT not in files:
        raise SystemExit(f"{archive} has no {LANDSCAPES_COPYRIGHT}. Remove it, and it will be downloaded again.")
    credits = read_credits(files.pop(LANDSCAPES_COPYRIGHT).decode())
    photos = {PurePosixPath(name).name: data for name, data in sorted(files.items())}
    photos = {name: data for name, data in photos.items() if not name.startswith(NO_LANDSCAPES)}
    validation = held_out(photos)
    credited = {name: find_credit(f"images/land/{name}", credits) for name in photos}
    if args.public_domain:
        credited = {name: credit for name, credit in credited.items() if credit.license == "public-domain"}
    groups = defaultdict(list)
    for name, credit in credited.items():
        decode(photos[name], "JPEG", LANDSCAPES_SIZES, f"{name} of {archive}")
        path = folder / ("validation" if name in validation else "train") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photos[name])
        groups[credit.holder, credit.license, credit.comment].append(path.stem)
    rows = [f"| {' | '.join(group)} | {', '.join(names)} |" for group, names in groups.items()]
    number, held = len(credited), len(validation & credited.keys())
    which = "only those in the public domain" if args.public_domain else "without those of space"
    text = f"""{number} photographs of 720x360 px, as they are in the package, {which}: {number - held} for
training, {held} for validation. Holders and licences as in the package's copyright file:

| copyright | licence | comment | pictures |
|---|---|---|---|
"""
    # without drop_labels, `datasets` would take the names of the splits for labels
    metadata = "license: other\nconfigs:\n- config_name: default\n  drop_labels: true"
    write_card(folder, "Landscapes", metadata, text + "\n".join(rows), f"Debian package {LANDSCAPES_PACKAGE}", archive)
    return f"{len(credited)} landscapes"


def make_crops(folder: Path, args: argparse.Namespace) -> str:
    landscapes = args.output_dir / "landscapes"
    photos = sorted(landscapes.glob("train/*.jpg"))
    if not photos:
        raise SystemExit(f"{landscapes}/train has no photographs to cut: make the landscapes first.")
    for path in photos:
        with Image.open(path) as photo:
            for shrunk in (photo.convert("RGB"), photo.convert("RGB").reduce(2)):
                corners = (range(0, side - CROP + 1, CROP_STRIDE) for side in shrunk.size)
                for left, top in itertools.product(*corners):
                    crop = shrunk.crop((left, top, left + CROP, top + CROP))
                    crop.save(folder / f"{path.stem}-{shrunk.height}-{top}-{left}.png")
    shutil.copy(landscapes / "README.md", folder)  # of the same photographs: licence and credits
    return f"{len(list(folder.glob('*.png')))} crops"


def read_credits(text: str) -> list[Credit]:
    """The paragraphs on landscapes of a machine-readable Debian copyright file, which consists of mail headers."""
    credits = []
    for paragraph in map(email.message_from_string, re.split(r"\n\s*\n", text)):
        patterns = [pattern for pattern in paragraph.get("Files", "").split() if pattern.startswith("images/land/")]
        if patterns:
            license, *more = paragraph["License"].splitlines()
            comment = " ".join((" ".join(more) or paragraph.get("Comment", "")).split())
            credits.append(Credit(patterns, paragraph["Copyright"], license.strip(), comment))
    return credits


def find_credit(path: str, credits: list[Credit]) -> Credit:
    """The last paragraph that covers a file, as in the format's definition, but public domain comes last.

    Some patterns cover too much: `mountain1*` is for mountain1.jpg, and is below that of mountain10-sfiera.jpg.
    """
    covering = [credit for credit in credits if any(fnmatchcase(path, pattern) for pattern in credit.patterns)]
    if not covering:
        raise SystemExit(f"The copyright file says nothing of {path}: is the package {LANDSCAPES_PACKAGE}?")
    return max(reversed(covering), key=lambda credit: credit.license != "public-domain")


# --- Packages ---


def fetch(folder: Path, name: str, *command: str) -> Path:
    """The package `name` in a folder, downloaded by a command that writes it unless it is there."""
    archive, program = folder / name, command[0]
    if archive.exists():
        return archive
    remedy = f"or run `{shlex.join(command)}` on another machine and put {name} into {folder}"
    if shutil.which(program) is None:
        raise SystemExit(f"{program} was not found, which downloads {name}. Install it, {remedy}.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        result = subprocess.run(command, cwd=partial, capture_output=True, text=True)
        if result.returncode or not Path(partial, name).is_file():
            raise SystemExit(f"{name} could not be downloaded:\n{result.stderr.strip()}\nCheck the network, {remedy}.")
        Path(partial, name).rename(archive)
    return archive


def unpack(archive: Path, pattern: str) -> dict[str, bytes]:
    """The regular files of a .tgz or .deb whose whole path matches, in memory: {path: content}."""
    try:
        with tar_stream(archive) as stream:
            tar = stream.read(UNPACKED_LIMIT + 1)
            if len(tar) > UNPACKED_LIMIT:
                raise OSError(f"it unpacks to more than {UNPACKED_LIMIT >> 20} MiB")
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as members:
            files = {each.name.removeprefix("./"): each for each in members if each.isreg() and not each.issparse()}
            files = {
                name: members.extractfile(each).read() for name, each in files.items() if re.fullmatch(pattern, name)
            }
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise SystemExit(
            f"{archive} cannot be unpacked ({error}). Remove it, and it will be downloaded again."
        ) from error
    if not files:
        raise SystemExit(f"{archive} holds none of the files expected. Remove it, and it will be downloaded again.")
    return files


@contextmanager
def tar_stream(archive: Path) -> Iterator[io.BufferedIOBase]:
    """The tar inside a .tgz or .deb, to read from."""
    if archive.suffix == ".tgz":
        with gzip.open(archive) as stream:
            yield stream
        return
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as process:
        yield process.stdout
        if process.wait():
            raise OSError(f"dpkg-deb ended with {process.returncode}")


def decode(data: bytes, format: str, sizes: set[tuple[int, int]], name: str) -> Image.Image:
    """A picture of one format and of one of the sizes (width, height)."""
    try:
        picture = Image.open(io.BytesIO(data), formats=[format])
        if picture.size not in sizes:
            raise ValueError(f"its size is {picture.width}x{picture.height}")
        picture.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SystemExit(
            f"{name} is no picture as expected ({error}). Is it the package named in this script?"
        ) from error
    return picture


def held_out(names: Iterable[str]) -> set[str]:
    """One in HELD_OUT names, chosen by their digests: the same ones everywhere."""
    return set(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[::HELD_OUT])


def write_card(folder: Path, title: str, metadata: str, text: str, package: str, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    card = f"""---
pretty_name: {title}
{metadata}
---

# {title}

{text}

Made by `examples/make_data.py` of dfu_diffusers from the {package}.
SHA-256 of {archive.name}: `{digest}`
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
