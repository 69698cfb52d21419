"""One image of a training set: modes, formats, orientation, damage."""

import functools

import numpy as np
import pytest
from image_files import COLOURS, FAULTS, encode, pack, save
from PIL import Image, ImageOps
from test_decode import COLOURS_OF_MODES

from dfu_diffusers.data.images import UnusableImage, read_image, read_size
from dfu_diffusers.decode import FORMATS

pytest_plugins = "image_files"


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
