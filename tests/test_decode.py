"""The one reader of pictures, at the doors of the pipelines; test_data_images.py holds training to the same table."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_diffusers.decode import convert_picture
from dfu_diffusers.pipelines.images import read_images, read_mask

COLOURS_OF_MODES = [  # Pillow mode, colour, and the opaque 8-bit colour that it means
    ("1", 1, (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("P", 0, (0, 0, 0)),
    ("I;16", 65535, (255, 255, 255)),
    ("I;16", 257 * 100 + 128, (100, 100, 100)),
    ("I;16", 257 * 100 + 129, (101, 101, 101)),
    ("I;16", 127, (0, 0, 0)),
    ("I;16B", 257 * 3, (3, 3, 3)),
    ("I", 257 * 200, (200, 200, 200)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 255, 51), (204, 224, 255)),
    ("LA", (0, 0), (255, 255, 255)),
    ("LA", (50, 255), (50, 50, 50)),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, colour, rgb", COLOURS_OF_MODES)
def test_pictures_mean_what_they_mean_in_training(mode, colour, rgb, channels):
    read = read_images(Image.new(mode, (4, 3), colour), channels)
    grey = Image.new("RGB", (1, 1), rgb).convert("L").getpixel((0, 0))
    assert (255 * read[0, :, 0, 0]).round().tolist() == ([grey] if channels == 1 else list(rgb))


def test_a_model_with_transparency_keeps_it():
    read = read_images(Image.new("RGBA", (4, 3), (10, 20, 30, 40)), 4)
    assert (255 * read[0, :, 0, 0]).round().tolist() == [10, 20, 30, 40]


def test_pictures_stand_upright_and_the_one_given_stays():
    image = Image.new("L", (4, 3))
    image.getexif()[0x0112] = 6
    assert read_images(image, 1).shape[-2:] == (4, 3) and image.size == (4, 3)


def test_values_without_a_stated_range_are_refused():
    for image, message in ((Image.new("F", (4, 4), 0.5), "floating-point"), (Image.new("I", (4, 4), 70000), "32-bit")):
        with pytest.raises(ValueError, match=f"`image` cannot be read, mode {image.mode}: {message}.*pass an array"):
            read_images(image, 3)
    with pytest.raises(TypeError, match="holds torch.uint16: divide it by the value of white"):
        read_images(np.full((4, 4, 3), 65535, np.uint16), 3)


def test_the_picture_given_stays_as_it_is():
    image = Image.new("RGBA", (2, 2), (10, 20, 30, 40))
    convert_picture(image, "L")
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (10, 20, 30, 40)


# --- Masks ---


def test_a_mask_of_sixteen_bits_keeps_its_greys():
    mask = read_mask(Image.fromarray(np.array([[0, 20000, 40000, 65535]], np.uint16)))
    torch.testing.assert_close(mask, torch.tensor([[[[0, 20000, 40000, 65535]]]]) / 65535, atol=0.5 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "I", "I;16"])
def test_a_mask_of_zeros_and_ones_is_a_mask(mode):
    mask = Image.new(mode, (3, 2), 0)
    mask.putpixel((2, 0), 1)
    assert read_mask(mask)[0, 0].tolist() == [[0, 0, 1], [0, 0, 0]]
    mask.getexif()[0x0112] = 6  # to be turned right by a quarter
    assert read_mask(mask)[0, 0].tolist() == [[0, 0], [0, 0], [0, 1]]
    assert read_mask(Image.new(mode, (3, 2), 0)).max() == 0


def test_colours_of_a_mask_count_by_their_luminance():
    mask = read_mask([Image.new("RGB", (2, 1), "white"), Image.new("P", (2, 1), 0)])
    assert mask.shape == (2, 1, 1, 2) and mask[:, 0, 0, 0].tolist() == [1, 0]


def test_a_transparent_mask_is_refused_and_an_opaque_one_is_not():
    strokes = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    for mask in (strokes, [strokes.convert("LA")]):
        with pytest.raises(ValueError, match="`mask_image` is transparent somewhere.*pass its own transparency"):
            read_mask(mask)
    assert read_mask(strokes.getchannel("A")).max() == 0
    assert read_mask(Image.new("RGBA", (4, 4), "white")).min() == 1
