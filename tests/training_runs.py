"""Runs of the training script on the tiny preset, and what they leave: for the tests of it.

Its fixtures are used by `pytest_plugins = "training_runs"`.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from examples import train_dfu

ROOT = Path(__file__).parent.parent
TINY = [
    "--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--resolutions", "8", "8x12", "--batch_size", "4",
    "--checkpointing_steps", "2", "--lr_warmup_images", "4", "--report_images", "1000", "--report_to", "none",
    "--num_validation_images", "4", "--max_train_steps", "4",
]  # fmt: skip


def parse(*options):
    return train_dfu.parse_args([str(option) for option in options], train_dfu.CONFIGS)


def run(*options):
    """The script in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dfu.main([str(option) for option in options])


def train(folder, *options):
    run(*TINY, "--output_dir", folder, *options)
    return weights(folder)


def weights(folder):
    """Those of its pipeline."""
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run by the options of TINY alone, which stays as it is."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


@pytest.fixture
def finished_copy(finished, tmp_path):
    """One that a test may change."""
    return shutil.copytree(finished, tmp_path / "finished")


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in two folders, cat and dog, of several shapes and kinds."""
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((20 + i, 16), Image.Resampling.BICUBIC).convert("L" if i == 7 else "RGB").save(path)
    return tmp_path / "photos"


def losses(folder):
    """loss.csv without the column that holds times."""
    return [{**row, "seconds": ""} for row in csv.DictReader(open(folder / "loss.csv"))]


def state(folder, step):
    """All that a checkpoint holds: weights, average, optimizer."""
    folder = folder / f"checkpoint-{step}"
    tensors = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {**tensors, "settings": json.loads((folder / "optimizer.json").read_text())}


def assert_same(a, b):
    """Nested containers of tensors, equal to the bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        [assert_same(a[key], b[key]) for key in a]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        [assert_same(x, y) for x, y in zip(a, b)]
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


def dropout_config(folder):
    """Options of a model with dropout and augmentation labels."""
    config = json.loads((train_dfu.CONFIGS / "tiny.json").read_text()) | {"dropout": 0.3, "num_augment_labels": 9}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model_config", str(folder / "config.json")]
