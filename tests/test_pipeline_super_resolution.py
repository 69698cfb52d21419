"""DFUSuperResolutionPipeline: sizes, area averages, the analytic answer of an exact denoiser, images read.

What it shares with the other pipelines is tested in test_pipeline_contract.py.
"""

import math

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sampling import GaussianDenoiser, seeded, silent

from dfu_diffusers import DFUPipeline, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines import super_resolution as module
from dfu_diffusers.pipelines.images import read_images
from dfu_diffusers.pipelines.super_resolution import AreaAverage, area_matrix
from examples import upscale_dfu

SIDES = st.integers(1, 12)


@pytest.fixture(scope="module")
def pipe(make_model):
    return silent(DFUSuperResolutionPipeline(make_model(), EDMHeunScheduler()))


def noise_image(*shape, low=0.0, high=1.0, seed=0):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed))


def enlarge(pipe, image, *args, **kwargs):
    return pipe(image, *args, **{"generator": seeded(), "num_inference_steps": 4, **kwargs}).images


def consistency_error(images: list[Image.Image], small: torch.Tensor) -> float:
    """In 1/255, of 8-bit results, by the area average that the models use."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).double()
    return (resample(pixels, small.shape[-2:]) - 255 * small.double()).abs().max().item()


# --- Sizes ---


@pytest.mark.parametrize(
    "arguments, size",
    [
        (dict(), (8, 12)),
        (dict(scale=2.7), (11, 16)),
        (dict(scale=1), (4, 6)),
        (dict(height=9), (9, 14)),
        (dict(width=9), (6, 9)),
        (dict(height=5, width=13), (5, 13)),
        (dict(scale=0.3), (1, 2)),
        (dict(height=2, width=40), (2, 40)),
        (dict(height=np.int64(7), width=torch.tensor(7)), (7, 7)),
        (dict(scale=torch.tensor(2.5)), (10, 15)),
    ],
)
def test_target_sizes(pipe, arguments, size):
    assert enlarge(pipe, noise_image(2, 3, 4, 6), output_type="pt", **arguments).shape == (2, 3, *size)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(scale=0), ValueError, "`scale` must be a positive number, but got 0"),
        (dict(scale=-2), ValueError, "`scale` must be a positive number, but got -2"),
        (dict(scale=math.inf), ValueError, "`scale` must be a positive number"),
        (dict(scale=math.nan), ValueError, "`scale` must be a positive number"),
        (dict(scale="2"), TypeError, "`scale` must be a positive number, but got '2'"),
        (dict(scale=True), TypeError, "`scale` must be a positive number, but got True"),
        (dict(scale=2, height=9), ValueError, "`scale` 2 takes the place of `height` and `width`"),
        (dict(height=0), ValueError, "`height` must be an integer of at least 1, but got 0"),
        (dict(height=8.0), TypeError, "`height` must be an integer of at least 1, but got 8.0"),
        (dict(width=8.5), TypeError, "`width` must be an integer of at least 1, but got 8.5"),
        (dict(noise_level=0.1), ValueError, "`noise_level` 0.1 needs a refiner: load the pipeline with"),
        (dict(noise_level=-0.1), ValueError, r"`noise_level` must lie in \[0, 2\], .* but got -0.1"),
        (dict(noise_level=math.nan), ValueError, "`noise_level` must lie in"),
        (dict(noise_level=True), TypeError, r"`noise_level` must be a number in \[0, 2\], but got True"),
        (dict(tile_size=8), TypeError, "`tile_size` was retired: .* see `enable_tiling`"),
        (dict(scale=0.9, consistency=True), ValueError, "no side may shrink, but 4x6 would become 4x5: ask for"),
        (dict(height=3, width=60, consistency=True), ValueError, "no side may shrink, but 4x6 would become 3x60"),
    ],
)
def test_wrong_arguments(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        enlarge(pipe, noise_image(1, 3, 4, 6), **arguments)


# --- Area averages ---


@settings(max_examples=50, deadline=None)
@given(SIDES, st.integers(0, 30))
def test_area_matrix_is_the_area_average_of_the_models(cells, more):
    matrix = area_matrix(cells, cells + more)
    expected = resample(torch.eye(cells + more).double()[None, None], (cells, cells + more))[0, 0]
    torch.testing.assert_close(matrix, expected, atol=1e-12, rtol=0)


@settings(max_examples=50, deadline=None)
@given(SIDES, SIDES, st.integers(0, 9), st.integers(0, 9))
def test_projection_is_the_nearest_image_with_the_averages(h, w, more_rows, more_columns):
    size = (h + more_rows, w + more_columns)
    image, x = torch.randn(1, 1, h, w, dtype=torch.float64), torch.randn(1, 1, *size, dtype=torch.float64)
    projected = AreaAverage(image, size).project(x)
    torch.testing.assert_close(resample(projected, (h, w)), image, atol=1e-9, rtol=0)
    matrix = torch.kron(area_matrix(h, size[0]), area_matrix(w, size[1]))  # of the image as one vector
    nearest = x.flatten() + torch.linalg.pinv(matrix) @ (image.flatten() - matrix @ x.flatten())
    torch.testing.assert_close(projected.flatten(), nearest, atol=1e-9, rtol=0)


@settings(max_examples=12, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_whole_factors_keep_every_image_to_a_level_of_8_bits(pipe, h, w, rows, columns, binary):
    small = noise_image(2, 3, h, w).mul(255).round() / 255
    small = small.round() if binary else small
    images = enlarge(pipe, small, h * rows, w * columns, consistency=True)
    assert consistency_error(images, small) <= 1


@settings(max_examples=12, deadline=None)
@given(SIDES, SIDES, st.floats(1, 4))
def test_other_factors_keep_what_has_a_larger_image(pipe, h, w, scale):
    height, width = round(scale * h), round(scale * w)
    small = resample(noise_image(2, 3, height, width, low=0.1, high=0.9), (h, w))
    assert consistency_error(enlarge(pipe, small, scale=scale, consistency=True), small) <= 1


def test_every_output_type_is_consistent(pipe):
    small = noise_image(1, 3, 5, 4)
    for output_type in ("pt", "np", "latent"):
        result = torch.as_tensor(enlarge(pipe, small, scale=3, output_type=output_type))
        result = result.permute(0, 3, 1, 2) if output_type == "np" else result
        result = result / 2 + 0.5 if output_type == "latent" else result
        assert (resample(result, (5, 4)) - small).abs().max() < 0.5 / 255


def test_what_no_image_can_do_is_said(pipe, monkeypatch):
    warned = []
    monkeypatch.setattr(module.logger, "warning", warned.append)
    small = torch.tensor([0.0, 1.0]).expand(1, 3, 1, 2)  # at three pixels the middle one belongs to both
    images = enlarge(pipe, small, height=1, width=3, consistency=True)
    assert "1x3 in [0, 1] was found" in warned[0] and "/255" in warned[0]
    assert 1 < consistency_error(images, small) <= 255 / 3


def test_without_consistency_the_network_is_free(pipe):
    small = noise_image(1, 3, 5, 4)
    assert consistency_error(enlarge(pipe, small, consistency=False), small) > 5


def test_consistency_is_the_default_where_both_sides_double(pipe):
    small = noise_image(1, 3, 5, 4)
    for size, expected in [((10, 8), True), ((10, 7), False), ((9, 8), False)]:
        assert (consistency_error(enlarge(pipe, small, *size), small) <= 1) == expected


# --- The analytic answer ---


@pytest.mark.parametrize("size", [(6, 8), (7, 13)])
@pytest.mark.parametrize(
    "scheduler, steps",
    [(EDMHeunScheduler(), 60), (EDMEulerScheduler(), 400), (EDMDPMSolverMultistepScheduler(), 60)],
    ids=["heun", "euler", "dpm"],
)
def test_an_exact_denoiser_gives_samples_of_the_posterior(scheduler, steps, size):
    """Images of independent pixels N(m, s^2) with averages y are A^+ y + (1 - A^+ A)(m + s z)."""
    pipe = silent(DFUSuperResolutionPipeline(GaussianDenoiser(), scheduler))
    small = noise_image(3, 2, 4, 5, low=0.5, high=0.8)
    noise = torch.randn(3, 2, *size, generator=seeded(1))
    kwargs = dict(strength=1.0, num_inference_steps=steps, consistency=True, latents=noise, output_type="latent")
    result = enlarge(pipe, small, *size, **kwargs)
    expected = AreaAverage(2 * small - 1, size).project(0.3 + 0.2 * noise)
    torch.testing.assert_close(result, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_an_exact_denoiser_takes_the_noise_of_the_level_back(strength):
    """The probability flow from level sigma carries x + sigma z to m + s (x + sigma z - m) / sqrt(s^2 + sigma^2)."""
    pipe = silent(DFUSuperResolutionPipeline(GaussianDenoiser(), EDMHeunScheduler()))
    small, noise = noise_image(1, 2, 6, 4), torch.randn(1, 2, 6, 4, generator=seeded(1))
    kwargs = dict(num_inference_steps=100, consistency=False, latents=noise, output_type="latent")
    result = enlarge(pipe, small, scale=1, strength=strength, **kwargs)
    steps = round(100 * strength)
    sigma = (80 ** (1 / 7) + (100 - steps) / 99 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    expected = 0.3 + 0.2 * (2 * small - 1 + sigma * noise - 0.3) / math.hypot(0.2, sigma)
    torch.testing.assert_close(result, expected, atol=5e-3, rtol=0)


def test_weak_strength_keeps_the_bicubic_image(make_model):
    pipe = silent(DFUSuperResolutionPipeline(make_model(), EDMHeunScheduler()))
    small = noise_image(1, 3, 6, 4, low=0.3, high=0.7)
    result = enlarge(pipe, small, strength=0.01, consistency=False, num_inference_steps=18, output_type="pt")
    expected = torch.nn.functional.interpolate(small, (12, 8), mode="bicubic")
    torch.testing.assert_close(result, expected, atol=0.01, rtol=0)


# --- Images of every form ---


def test_forms_of_an_image():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
    floats = pixels.astype(np.float64) / 255
    forms = [Image.fromarray(pixels), pixels, floats, expected[0], expected, torch.from_numpy(pixels).movedim(-1, 0)]
    for form in [*forms, pixels[None], expected.double()]:
        read = read_images(form, 3)
        assert read.dtype == torch.float32
        torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(read_images([form, form], 3), expected.repeat(2, 1, 1, 1), atol=1e-6, rtol=0)
    mixed = read_images(forms, 3)
    torch.testing.assert_close(mixed, expected.expand(len(forms), -1, -1, -1), atol=1e-6, rtol=0)


def test_arrays_with_flipped_axes():
    array = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    flipped = torch.from_numpy(array).flip(1, 2).permute(2, 0, 1)[None]
    assert torch.equal(read_images(array[:, ::-1, ::-1], 3), flipped)


def test_grey_images():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 50
    expected = torch.from_numpy(grey).float()[None, None] / 255
    for form in (Image.fromarray(grey), grey, expected[0, 0], expected[0]):
        assert torch.equal(read_images(form, 1), expected)
    assert torch.equal(read_images(Image.fromarray(grey), 3), expected.expand(-1, 3, -1, -1))
    palette = Image.fromarray(grey).convert("RGB").convert("P")
    assert read_images(palette, 3).shape == (1, 3, 2, 3)


# --- The script ---


@pytest.fixture(scope="module")
def upscale(make_model, tmp_path_factory):
    """Run it on the CPU with a tiny model; returns its files."""
    folder = tmp_path_factory.mktemp("script")
    DFUPipeline(make_model(), EDMHeunScheduler()).save_pretrained(folder / "model")

    def run(*options):
        fixed = ["--model", folder / "model", "--device", "cpu", "--output_dir", folder / "out"]
        return upscale_dfu.main([str(option) for option in [*options, *fixed, "--num_inference_steps", 4]])

    return run


def test_the_script_enlarges_files(upscale, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, as cameras store pictures taken upright
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=turned)
    files = upscale(tmp_path / "a.png", tmp_path / "b.png", "--scale", 2, "--seed", 3)
    assert [file.name for file in files] == ["a_10x16.png", "b_16x10.png"]
    first, second = (Image.open(file) for file in files)
    assert consistency_error([first], torch.from_numpy(pixels).movedim(-1, 0)[None] / 255) <= 1
    assert consistency_error([second], torch.from_numpy(np.rot90(pixels, 3).copy()).movedim(-1, 0)[None] / 255) <= 1
    assert upscale(tmp_path / "a.png", "--width", 12)[0].name == "a_8x12.png"


@pytest.mark.parametrize(
    "options, message",
    [
        (["missing.png"], "No such file"),
        (["a.png", "--scale", 2, "--height", 9], "takes the place of `height` and `width`"),
        (["a.png", "--strength", 2], "`strength` must lie in"),
        (["a.png", "x/a.png"], "two images have one name"),
        (["a.png", "--model", "missing"], "there is no folder missing"),
    ],
)
def test_the_script_says_what_is_wrong(upscale, tmp_path, monkeypatch, capsys, options, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        upscale(*options) if "--model" not in options else upscale_dfu.main([str(each) for each in options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
