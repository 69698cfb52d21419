"""The training script, end to end on the tiny preset."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("accelerate")
from dfu_diffusers import DFUPipeline
from examples import train_dfu

TINY = [
    "--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--resolutions", "8", "8x12", "--batch_size", "4",
    "--checkpointing_steps", "2", "--lr_warmup_steps", "1",
]  # fmt: skip


def train(folder, *options):
    train_dfu.main([*TINY, "--output_dir", str(folder), *options])
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_leaves_a_pipeline_pictures_and_losses(tmp_path):
    train(tmp_path, "--max_train_steps", "5")
    pipe = DFUPipeline.from_pretrained(tmp_path)
    assert list(pipe.unet.config.sample_size) == [8, 12]
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1, height=5).images[0].size == (12, 5)
    assert Image.open(tmp_path / "samples.png").size == (6 * 24, 3 * 16)
    assert Image.open(tmp_path / "loss.png").size[0] > 300
    rows = list(csv.DictReader(open(tmp_path / "loss.csv")))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert {row["resolution"] for row in rows} <= {"8x8", "8x12"}
    assert json.loads((tmp_path / "args.json").read_text())["max_train_steps"] == 5


def test_training_lowers_the_loss(tmp_path):
    train(tmp_path, "--max_train_steps", "80", "--learning_rate", "5e-3", "--sample_steps", "1000")
    losses = [float(row["loss"]) for row in csv.DictReader(open(tmp_path / "loss.csv"))]
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:10])


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    whole = train(tmp_path / "whole", "--max_train_steps", "4", "--sample_steps", "2")

    class Interrupted(Exception):
        pass

    def stop_after_two(*args, original=train_dfu.edm_loss, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 2:
            raise Interrupted
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train_dfu, "edm_loss", stop_after_two)
        train(tmp_path / "stopped", "--max_train_steps", "4", "--sample_steps", "2")
    resumed = train(tmp_path / "stopped", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    steps = [row["step"] for row in csv.DictReader(open(tmp_path / "stopped" / "loss.csv"))]
    assert steps == ["1", "2", "3", "4"]
    assert [path.name for path in (tmp_path / "stopped").glob("*checkpoint*")] == ["checkpoint-4"]


def test_photographs_that_ship_inside_scikit_image(tmp_path):
    data = pytest.importorskip("skimage.data")
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "camera", "coins"):  # colour, grey, grey
        Image.fromarray(getattr(data, name)()).save(tmp_path / "photos" / f"{name}.png")
    train(tmp_path / "run", "--max_train_steps", "2", "--train_data_dir", str(tmp_path / "photos"), "--random_flip")
    assert (tmp_path / "run" / "model_index.json").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolutions", "0"], "HEIGHTxWIDTH"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate must be positive"),
        (["--resolution_weights", "1"], "needs 2 numbers"),
        (["--model_config", "nowhere.json"], "nowhere.json is not a file; presets"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        train_dfu.main([*TINY, "--output_dir", str(tmp_path / "run"), *options])
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_data_dir", "nowhere"], "nowhere is not a folder"),
        (["--resume_from_checkpoint", "latest"], "latest: no such checkpoint-STEP"),
        (["--resume_from_checkpoint", "here/checkpoint-7"], "checkpoint-7: no such checkpoint-STEP"),
    ],
)
def test_missing_inputs_are_named(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train_dfu.main([*TINY, "--output_dir", str(tmp_path / "run"), *options])


def test_an_earlier_run_is_not_overwritten(tmp_path):
    train(tmp_path, "--max_train_steps", "2")
    losses = (tmp_path / "loss.csv").read_text()
    with pytest.raises(SystemExit, match="holds checkpoint-2 of an earlier run"):
        train(tmp_path, "--max_train_steps", "4")
    with pytest.raises(SystemExit, match="has done 2 steps already"):
        train(tmp_path, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "loss.csv").read_text() == losses


@pytest.mark.parametrize(
    "change", [{"num_class_embeds": 3}, {"out_channels": 1}, {"in_channels": 5, "out_channels": 5}]
)
def test_models_this_script_cannot_train_are_refused(tmp_path, change):
    config = {**json.loads((train_dfu.CONFIGS / "tiny.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="channels|num_class_embeds"):
        train(tmp_path / "run", "--max_train_steps", "2", "--model_config", str(tmp_path / "config.json"))
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no image"):
        train_dfu.main([*TINY, "--output_dir", str(tmp_path / "run"), "--train_data_dir", str(tmp_path / "empty")])
