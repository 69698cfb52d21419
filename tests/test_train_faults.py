"""Things that go wrong in a training run: each ends with one clear error, and nothing is lost."""

import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from forks import forked
from training_runs import TINY, losses, run, state, train

from dfu_diffusers.data.portraits import PortraitDataset
from dfu_diffusers.training import reporter
from dfu_diffusers.training import setup as training_setup
from dfu_diffusers.training.reporter import Reporter
from examples import train_dfu

pytestmark = pytest.mark.usefixtures("one_thread")

pytest_plugins = "training_runs"


class Poisoned(PortraitDataset):
    """Portraits, the images of training with these numbers being NaN."""

    poisoned = range(4, 6)

    def __getitems__(self, draws):
        items = super().__getitems__([draw[:2] for draw in draws])
        for draw, item in zip(draws, items):
            if len(draw) == 3 and draw.number in self.poisoned:
                item["image"] = item["image"] * float("nan")
        return items


def test_a_step_that_is_not_finite_is_skipped_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(training_setup, "PortraitDataset", Poisoned)
    train(tmp_path / "run", "--max_train_steps", "3", "--checkpointing_steps", "1", "--checkpoints_total_limit", "3")
    assert [np.isfinite(float(row["loss"])) for row in losses(tmp_path / "run")] == [True, False, True]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    one, three = (state(tmp_path / "run", step) for step in (1, 3))
    assert all(value == 2 for name, value in three["optimizer.safetensors"].items() if name.endswith(".step"))
    assert not torch.equal(*(s["model.safetensors"]["conv_in.spatial.weight"] for s in (one, three)))


def test_a_run_that_stays_not_finite_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_setup, "PortraitDataset", Poisoned)
    monkeypatch.setattr(Poisoned, "poisoned", range(9, 999))
    with pytest.raises(SystemExit, match="Stopped after 3 steps in a row without a finite loss"):
        train(tmp_path / "run", "--max_train_steps", "9", "--max_nonfinite_steps", "3")
    assert "Step 5 at 8x8 skipped: loss nan" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]  # before step 3


def poison_weights(self, done, *values, original=Reporter.log):
    """As a step that overflows: its loss is finite, its result is not."""
    original(self, done, *values)
    if done == 4:
        with torch.no_grad():
            next(self.network.parameters()).fill_(float("inf"))


@pytest.mark.parametrize(
    "rate, log, message",
    [
        ("1e30", Reporter.log, "The loss is not finite in the last step, 4"),
        ("1e-3", poison_weights, "The weights are not finite after step 4"),
    ],
)
def test_what_has_diverged_is_neither_saved_nor_exported(finished_copy, monkeypatch, rate, log, message):
    folder = finished_copy
    shutil.rmtree(folder / "checkpoint-4")
    exported = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr(Reporter, "log", log)
    with pytest.raises(SystemExit, match=f"{message}.*diverged.*Go on from .*checkpoint-2") as error:
        train(folder, "--resume_from_checkpoint", "latest", "--learning_rate", rate, "--lr_scheduler", "constant")
    assert error.value.code != 0
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-2"]
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == exported


class Failing(PortraitDataset):
    def __getitems__(self, draws):
        if any(draw[-1] == 12 for draw in draws):
            raise OSError("portrait 12 cannot be read")
        return super().__getitems__(draws)


def test_an_error_of_a_loader_ends_the_run_at_once(tmp_path, monkeypatch, capfd):
    """Its workers ignore SIGTERM, for which Python would wait in vain."""
    monkeypatch.setattr(training_setup, "PortraitDataset", Failing)
    options = ["--output_dir", tmp_path / "run", "--num_workers", "2", "--num_validation_images", "0"]
    with forked(run, *TINY, *options) as process:
        process.join(60)
        assert process.exitcode == 1
        assert capfd.readouterr().err.splitlines()[-1] == "train_dfu.py: portrait 12 cannot be read"
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no worker is left


class Killed(PortraitDataset):
    """Portraits whose process is killed, as the system does when memory runs out, at the image numbered 12."""

    def __getitems__(self, draws):
        if torch.utils.data.get_worker_info() and any(draw[-1] == 12 for draw in draws):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(draws)


def test_a_killed_loader_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(training_setup, "PortraitDataset", Killed)
    with pytest.raises(SystemExit, match="loads images died.*Use fewer --num_workers.*--resume_from_checkpoint"):
        train(tmp_path / "run", "--num_workers", "1", "--checkpointing_steps", "1")


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def log_and_fill(self, done, *values, original=Reporter.log):
        original(self, done, *values)
        if done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow beyond it

    monkeypatch.setattr(Reporter, "log", log_and_fill)
    try:
        with pytest.raises(SystemExit, match="checkpoint-4 could not be written.*checkpoint-2 is intact"):
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    train(tmp_path, "--resume_from_checkpoint", "latest")


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="file/run cannot be written to"):
        train(tmp_path / "file" / "run")


def test_checkpoints_that_do_not_fit_are_refused(finished_copy, caplog):
    folder = finished_copy
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "6"]
    with pytest.raises(SystemExit, match="another architecture: conv_type is dual there and spatial here"):
        config = json.loads((train_dfu.CONFIGS / "tiny.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "conv_type": "spatial"}))
        train(folder, *resume, "--model_config", folder / "config.json")
    with pytest.raises(SystemExit, match="made with --batch_size 4, not 8"):
        train(folder, *resume, "--batch_size", "8")
    with pytest.raises(SystemExit, match="has done 4 steps"):
        train(folder, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    (folder / "checkpoint-4" / "optimizer.json").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="optimizer.json is not as it was written.* Resume from .*checkpoint-2"):
        train(folder, "--max_train_steps", "6", "--resume_from_checkpoint", folder / "checkpoint-4")
    (folder / "loss.csv").write_text((folder / "loss.csv").read_text().replace("\n1,", "\none,"))
    train(folder, *resume)
    assert "checkpoint-4 is damaged" in caplog.text and "1 damaged rows of" in caplog.text
    assert [row["step"] for row in losses(folder)] == list("23456")


def test_what_changed_since_the_checkpoint_is_said_and_done(tmp_path, photos, capsys):
    train(tmp_path / "run", "--train_data_dir", photos)
    next(photos.rglob("4.png")).unlink()
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", 5, "--lr_scheduler", "constant"]
    train(tmp_path / "run", "--train_data_dir", photos, *resume, "--learning_rate", 1e-5)
    printed = capsys.readouterr().out
    assert "learning_rate 0.001 -> 1e-05" in printed and "the images: " in printed
    rates = [float(row["learning_rate"]) for row in losses(tmp_path / "run")]
    assert rates[-1] == 1e-5 and rates[0] == 1e-3


def test_a_run_whose_end_failed_can_still_be_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="no room"):
        patch.setattr(reporter, "sample_sheet", lambda *arguments: (_ for _ in ()).throw(OSError("no room")))
        train(tmp_path)
    assert not (tmp_path / "README.md").exists()
    train(tmp_path, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "README.md").exists() and (tmp_path / "samples.png").exists() and len(losses(tmp_path)) == 4


def test_an_earlier_run_is_not_overwritten(finished_copy):
    kept = (finished_copy / "loss.csv").read_text()
    with pytest.raises(SystemExit, match="holds checkpoint-4 of an earlier run"):
        train(finished_copy)
    assert (finished_copy / "checkpoint-4").is_dir() and (finished_copy / "loss.csv").read_text() == kept
