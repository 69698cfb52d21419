"""The demo's measure of agreement, and the demo on a tiny model."""

import math

import pytest
from PIL import Image

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from examples import demo


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
