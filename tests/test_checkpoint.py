"""The shipped models: small, safe to load, and good at pictures that they never saw."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_diffusers import DFUPipeline, DFUSuperResolutionPipeline
from dfu_diffusers.data.portraits import PortraitDataset
from dfu_diffusers.models.modes import beyond
from experiments.heldout_loss import HELD_OUT, heldout_loss

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
FOLDER, UPSCALER = CHECKPOINTS / "dfu-portraits", CHECKPOINTS / "dfu-upscaler"


@pytest.fixture(scope="module")
def pipe():
    pipe = DFUPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def portraits(count, size):
    dataset = PortraitDataset(count, size, seed=HELD_OUT)
    return torch.stack([item["image"] for item in dataset.__getitems__(range(count))])


@pytest.mark.parametrize("folder, limit", [(FOLDER, 15e6), (UPSCALER, 5e6)])
def test_a_folder_is_small_holds_no_pickle_and_names_no_machine(folder, limit):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".png"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= limit
    index = json.loads((folder / "model_index.json").read_text())
    assert index["refiner"] == ["dfu_diffusers", "DFURefiner"]
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")


def test_it_denoises_portraits_it_never_saw(pipe):
    """On the trunk's own grid. The loss is 1 for a network that learned nothing."""
    loss, _ = heldout_loss(pipe, pipe._sample_size("the trunk"), count=64)
    assert loss < 0.15


def test_samples_look_like_the_mean_portrait(pipe):
    """Heads, hair and shoulders stand where they stand in portraits: the mean images agree, the single ones vary."""
    real = portraits(128, 32)
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    samples = pipe(batch_size=16, height=32, width=32, generator=generators, output_type="pt").images * 2 - 1
    grey_real, grey_samples = real.mean((0, 1)), samples.mean((0, 1))
    assert torch.corrcoef(torch.stack([grey_real.flatten(), grey_samples.flatten()]))[0, 1] > 0.8
    assert 0.6 < samples.std(0).mean() / real.std(0).mean() < 1.4


@pytest.mark.parametrize("scale", [1.5, 2])
def test_the_upscaler_draws_as_much_detail_as_photographs_have(scale):
    """Of another kind than its own. Power beyond the modes of the given picture, in decades: Lanczos lacks one."""
    photo, side = Image.fromarray(pytest.importorskip("skimage.data").coffee()[100:292, 200:392]), round(96 * scale)
    small, truth = (photo.resize((n, n), Image.Resampling.BOX) for n in (96, side))
    upscale = DFUSuperResolutionPipeline.from_pretrained(UPSCALER)
    upscale.set_progress_bar_config(disable=True)

    def power(picture):
        pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1) / 127.5 - 1
        return beyond(pixels, (96, 96)).square().sum().log10().item()

    sample = upscale(small, side, side, generator=torch.Generator().manual_seed(0)).images[0]
    assert abs(power(sample) - power(truth)) < 0.3
    assert power(small.resize((side, side), Image.Resampling.LANCZOS)) < power(truth) - 0.9


@pytest.mark.slow
def test_a_1024_pixel_portrait_fits_in_4_gigabytes():
    """In a process of its own, torch and diffusers included; every network call needs the same, so two suffice."""
    code = f"""
import resource
from dfu_diffusers import DFUPipeline
pipe = DFUPipeline.from_pretrained({str(FOLDER)!r})
image = pipe(height=1024, width=1024, num_inference_steps=2, octave_steps=2).images[0]
assert image.size == (1024, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[-1]) < 4
