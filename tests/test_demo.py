"""The demo's noise, and the demo on a tiny model."""

import math

import pytest
import torch
from PIL import Image
from reference.spectral import coefficient

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from examples import demo

SIZES = [(32, 32), (33, 47), (128, 64), (7, 200), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_the_noise_is_white_and_of_unit_variance(size):
    noise = torch.stack([demo.noise_of_portrait(seed, *size) for seed in range(max(4, 20_000 // (size[0] * size[1])))])
    spread = 4 / noise.numel() ** 0.5
    assert abs(noise.mean()) < spread and abs(noise.square().mean() - 1) < 1.5 * spread
    power = torch.fft.fft2(noise, norm="ortho").abs().square().mean((0, 1))  # per mode; 1 for white noise
    samples = noise.shape[0] * noise.shape[1]
    assert power.sub(1).abs().max() < 7.5 * (2 / samples) ** 0.5


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_low_modes_are_shared_by_all_sizes(size):
    """Coefficients of one seed at two sizes, in the units of white noise of unit variance."""
    for k, l in ((0, 0), (3, 5), (-7, 11), (2, 0)):
        if 2 * abs(k) >= size[0] or 2 * l >= size[1]:
            continue
        here, base = (
            coefficient(demo.noise_of_portrait(5, *n)[None], k, l) * (n[0] * n[1]) ** 0.5 for n in (size, (32, 32))
        )
        assert torch.allclose(here, base, atol=1e-5)


def test_agreement_is_the_psnr_after_area_averaging():
    coarse = [Image.new("L", (2, 1)).convert("RGB") for _ in range(2)]
    fine = [image.resize((4, 2)) for image in coarse]
    for image in fine:
        image.putpixel((0, 0), (204, 204, 204))  # 0.8 in one of four pixels: an error of 0.2 in one of two cells
    assert abs(demo.agreement(fine, coarse) - -10 * math.log10(0.2**2 / 2)) < 1e-4


def test_the_demo_draws_a_sheet(tmp_path):
    unet = DFUModel(block_out_channels=(4, 8), layers_per_block=1, fourier_modes=(2, None), attention_levels=())
    scheduler = EDMHeunScheduler()
    DFUPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:  # one step of each size is enough to see the sheet
        original, output = DFUPipeline.__call__, tmp_path / "out" / "demo.png"
        patch.setattr(DFUPipeline, "__call__", lambda self, **given: original(self, num_inference_steps=1, **given))
        demo.main(["--model", str(tmp_path / "model"), "--output", str(output), "--large", "64"])
    sheet = Image.open(output)
    grid = [(x, y) for x in range(64, 640, 128) for y in range(80, 528, 128)]
    odd, large = [(x, 576) for x in range(16, 768, 128)], [(896, 272)]
    assert all(sheet.getpixel(place) != (255, 255, 255) for place in grid + odd + large)
    assert sheet.getpixel((1100, 600)) == (255, 255, 255)
