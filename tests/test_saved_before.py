"""Folders that version 0.1.0 saved load as ever: with this package, and the self-contained ones without it."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from sampling import sample, silent

import dfu_diffusers
from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.hub import files_to_push

ARCHIVE = Path(__file__).parent / "fixtures" / "saved_by_0.1.0.tar.xz"
CLASSES = {
    "plain": "DFUPipeline",
    "self_contained": "DFUPipeline",
    "self_contained_inpaint": "DFUInpaintPipeline",
    "self_contained_super_resolution": "DFUSuperResolutionPipeline",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def draw(pipe) -> np.ndarray:
    """The picture that is in the archive, too."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(height=6, width=9, num_inference_steps=2, output_type="np", generator=generator).images


def assert_same_image(image: np.ndarray, saved: Path) -> None:
    """Within 1e-4 of values in [0, 1]: another CPU rounds its float32 sums otherwise, at a noise level of 20."""
    np.testing.assert_allclose(image, np.load(saved / "image.npy"), atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_with_this_package(saved, name):
    pipe = getattr(dfu_diffusers, CLASSES[name]).from_pretrained(saved / name)
    assert (type(pipe.unet), type(pipe.scheduler)) == (DFUModel, EDMHeunScheduler)
    assert pipe.scheduler.config.sigma_max == 20.0
    assert_same_image(draw(DFUPipeline.from_pipe(pipe)), saved)
    assert type(DFUModel.from_pretrained(saved / name, subfolder="unet")) is DFUModel


def test_a_refiner_joins_a_saved_pipeline(saved, make_refiner, tmp_path):
    refiner, size = make_refiner(coarse_size=1), dict(height=24, width=31)
    for loader in (DFUPipeline, DiffusionPipeline):
        pipe = silent(loader.from_pretrained(saved / "plain", refiner=refiner))
        assert type(pipe) is DFUPipeline and pipe.refiner is refiner
    pipe.save_pretrained(tmp_path)
    again = silent(DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(sample(again, octave_steps=2, **size), sample(pipe, octave_steps=2, **size))
    without = silent(DFUPipeline.from_pretrained(tmp_path, refiner=None))
    assert without.refiner is None and sample(without, **size).shape == (1, 3, 24, 31)


def test_plain_ones_with_diffusers_own_loaders(saved):
    assert type(DiffusionPipeline.from_pretrained(saved / "plain")) is DFUPipeline
    assert type(AutoModel.from_pretrained(str(saved / "plain"), subfolder="unet")) is DFUModel


def test_modules_that_import_each_other_are_pushed_together(saved):
    code = {path for path, _ in files_to_push(saved / "self_contained_inpaint") if path.endswith(".py")}
    inside = {"unet/modeling_dfu.py", "scheduler/scheduling_edm_heun.py"}
    assert code == inside | {"pipeline_dfu.py", "pipeline_dfu_inpaint.py", "pipeline_dfu_super_resolution.py"}


WITHOUT = """
import sys
sys.modules["dfu_diffusers"] = None
import numpy, torch
from diffusers import DiffusionPipeline
saved = sys.argv[1]
for name in ("self_contained", "self_contained_inpaint", "self_contained_super_resolution"):
    pipe = DiffusionPipeline.from_pretrained(f"{saved}/{name}", trust_remote_code=True)
    assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
    pipe.save_pretrained(f"{saved}/again/{name}")
    if name == "self_contained":
        generator = torch.Generator().manual_seed(0)
        pipe = pipe(height=6, width=9, num_inference_steps=2, output_type="np", generator=generator)
        numpy.save(f"{saved}/without.npy", pipe.images)
"""


def test_self_contained_ones_without_this_package_and_a_round_trip(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", WITHOUT, saved], check=True, timeout=300)
    assert_same_image(np.load(saved / "without.npy"), saved)
    for name in ("self_contained", "self_contained_inpaint", "self_contained_super_resolution"):
        again = getattr(dfu_diffusers, CLASSES[name]).from_pretrained(saved / "again" / name)
        assert_same_image(draw(DFUPipeline.from_pipe(again)), saved)
