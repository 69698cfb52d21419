"""The demo on a tiny model, with a refiner and without."""

import pytest
from PIL import Image

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from examples import demo


@pytest.mark.parametrize("refined", [True, False])
def test_the_demo_draws_the_same_portraits_at_each_size(tmp_path, capsys, refined):
    unet = DFUModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, fourier_modes=(2, None), attention_levels=()
    )
    refiner = DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=16) if refined else None
    DFUPipeline(unet, EDMHeunScheduler(), refiner=refiner).save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "demo.png"
    demo.main(
        ["--model", str(tmp_path / "model"), "--output", str(output), "--sizes", "16", "32", "--seeds", "0", "5"]
    )
    sheet = Image.open(output)
    assert sheet.size == (2 * 258, 16 + 2 * (16 + 256 + 2))
    middles = [(x, y) for x in (128, 386) for y in (160, 434)]
    assert all(sheet.getpixel(place) != (255, 255, 255) for place in middles)
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 32")]
    ((_, same, other, _),) = table
    assert float(same) > float(other) + 3
