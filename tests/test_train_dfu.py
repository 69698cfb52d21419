"""The training script, end to end on the tiny preset: what a run leaves, and what it shares."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_runs import losses, train, weights

from dfu_diffusers import DFUPipeline
from dfu_diffusers.training import reports

pytest_plugins = ["hub_stand_in", "training_runs"]


def test_a_run_leaves_a_pipeline_pictures_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "STEPS", 3)  # enough for colours
    train(tmp_path, "--max_train_steps", "5", "--report_to", "tensorboard", "--report_images", "8")
    pipe = DFUPipeline.from_pretrained(tmp_path)
    assert list(pipe.unet.config.sample_size) == [8, 12]
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1, height=5).images[0].size == (12, 5)

    raw = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert any(not torch.equal(raw[name], p) for name, p in pipe.unet.state_dict().items())

    assert [int(row["step"]) for row in losses(tmp_path)] == [1, 2, 3, 4, 5]
    assert {row["resolution"] for row in losses(tmp_path)} <= {"8x8", "8x12"}
    validation = list(csv.DictReader(open(tmp_path / "validation.csv")))
    assert [(row["step"], row["resolution"]) for row in validation] == [
        (step, size) for step in "245" for size in ("8x8", "8x12")
    ]
    assert len(validation[0]) == 3 + 4 and all(0.1 < float(row["loss"]) < 2 for row in validation)
    # Four rows: two training sizes, 12x18 and 16x24.
    sheet = Image.open(tmp_path / "samples.png")
    assert sheet.size[1] == 4 * 130 and len(set(sheet.getdata())) > 1000
    assert Image.open(tmp_path / "loss.png").size[0] > 300
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))

    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["options"]["max_train_steps"] == 5 and facts["options"]["resolutions"] == ["8x8", "8x12"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["parameters"] == sum(tensor.numel() for tensor in raw.values())
    assert facts["data"]["fingerprint"] == "portraits-0" and facts["model"]["conv_type"] == "dual"
    card = (tmp_path / "README.md").read_text()
    assert "| 8x12 | yes |" in card and "learning_rate: " in card and str(tmp_path) not in card
    assert sorted(path.name for path in tmp_path.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


def test_training_lowers_the_loss(tmp_path):
    train(
        tmp_path, "--max_train_steps", "80", "--learning_rate", "5e-3", "--checkpointing_steps", "80",
        "--report_images", "160", "--num_validation_images", "16",
    )  # fmt: skip
    values = [float(row["loss"]) for row in losses(tmp_path)]
    assert np.mean(values[-20:]) < 0.85 * np.mean(values[:10])
    held_out = [float(row["loss"]) for row in csv.DictReader(open(tmp_path / "validation.csv"))]
    assert held_out[2] < held_out[0] and held_out[3] < held_out[1]


def test_micro_batches_do_not_change_the_result(tmp_path, finished):
    whole, split = weights(finished), train(tmp_path, "--max_pixels_per_batch", "100")
    assert max((whole[name] - split[name]).abs().max() for name in whole) < 1e-5


def test_bf16_learns_about_the_same(tmp_path, finished):
    train(tmp_path, "--mixed_precision", "bf16")
    single, half = ([float(row["loss"]) for row in losses(folder)] for folder in (finished, tmp_path))
    assert single == pytest.approx(half, rel=0.02) and single != half


@pytest.mark.slow
def test_compiled_and_checkpointed_it_learns_the_same(tmp_path):
    plain = train(tmp_path / "plain", "--max_train_steps", "3")
    for option in ("--torch_compile", "--gradient_checkpointing"):
        other = train(tmp_path / option, "--max_train_steps", "3", option)
        assert max((plain[name] - other[name]).abs().max() for name in plain) < 1e-4


def test_push_to_the_hub(tmp_path, hub):
    about = ["--hub_license", "cc-by-4.0", "--hub_advised_sizes", "6 to 9 px", "--hub_limits", "Eyes are blurred."]
    train(tmp_path, "--push_to_hub", "--hub_model_id", "tiny-portraits", "--hub_private", *about)
    ((name, repo),) = hub.repos.items()
    assert name.endswith("/tiny-portraits") and repo.private
    assert {"checkpoint-4", "run.json"} <= {path.name for path in tmp_path.iterdir()}
    pipeline = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    pipeline |= {"unet/diffusion_pytorch_model.safetensors"}
    beside = {"README.md", "samples.png", "loss.png", "loss.csv", "validation.csv"}
    assert set(repo.files) - {".gitattributes"} == pipeline | beside
    card = repo.files["README.md"].decode()
    assert f'DFUPipeline.from_pretrained("{name}")' in card
    assert all(text in card for text in ("license: cc-by-4.0\n", "Advised are 6 to 9 px.", "Eyes are blurred."))


def test_a_push_that_cannot_succeed_ends_the_run_before_it_begins(tmp_path, hub):
    hub.fail("whoami", 401, times=99)
    with pytest.raises(SystemExit, match="log in|login|token"):
        train(tmp_path / "run", "--push_to_hub")
    hub.faults.clear()
    with pytest.raises(SystemExit, match="'CC BY' names no licence as the Hub does"):
        train(tmp_path / "run", "--hub_license", "CC BY")
    hub.fail("validate-yaml", 400)
    with pytest.raises(SystemExit, match="me/new could not be pushed"):
        train(tmp_path / "run", "--push_to_hub", "--hub_model_id", "new", "--hub_license", "a-licence-of-mine")
    assert not (tmp_path / "run").exists() and not hub.repos
