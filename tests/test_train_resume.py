"""The training script ends with the same result, come what may: kills, signals, more processes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from forks import forked
from safetensors.torch import load_file
from training_runs import ROOT, TINY, assert_same, dropout_config, losses, run, state, train

from dfu_diffusers import DFUPipeline
from dfu_diffusers.training.checkpoints import sole_user
from dfu_diffusers.training.reporter import Reporter

pytestmark = pytest.mark.usefixtures("one_thread")

pytest_plugins = "training_runs"


THOROUGH = [
    "--max_train_steps", "9", "--max_pixels_per_batch", "200", "--augment_probability", "0.4", "--random_flip",
    "--random_crop", "--upsample_resolutions", "12x16", "--upsample_weight", "0.3",
]  # fmt: skip


def wait_for_steps(count, process, folder):
    """Until the process has taken so many."""
    deadline = time.monotonic() + 120
    while not (folder / "loss.csv").exists() or len(losses(folder)) < count:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_moved_and_resumed_it_ends_where_the_uninterrupted_run_does(tmp_path, photos):
    """kill -9 with loader workers, mixed and upsampled resolutions, accumulation, dropout, augmentation, two averages;
    then the output folder moves, and the run goes on with another number of workers."""
    options = [*TINY, *dropout_config(tmp_path), *THOROUGH, "--train_data_dir", photos]
    train(tmp_path / "whole", *options[len(TINY) :])

    stopped, kill_after = tmp_path / "stopped", np.random.default_rng().integers(3, 9)
    with forked(run, *options, "--num_workers", 2, "--output_dir", stopped) as process:
        wait_for_steps(kill_after, process, stopped)

    stopped.rename(tmp_path / "moved")
    assert list((tmp_path / "moved").glob("checkpoint-*")), f"killed after step {kill_after}"
    train(tmp_path / "moved", *options[len(TINY) :], "--num_workers", "1", "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "moved") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "moved", 9), state(tmp_path / "whole", 9))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run(tmp_path, finished, name, monkeypatch, capsys):
    def log_and_signal(self, done, *values, original=Reporter.log):
        original(self, done, *values)
        if done == 2:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "log", log_and_signal)
        run(*TINY, "--output_dir", tmp_path)
    # The signal came while step 2 was reported, so step 3 is the first to know.
    assert f"Stopped by {name} after step 3" in capsys.readouterr().out
    assert not (tmp_path / "unet").exists()
    train(tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-3")
    assert_same(state(tmp_path, 4), state(finished, 4))


def test_a_signal_to_the_whole_group_saves_too(tmp_path, photos, capfd):
    """Launchers signal the workers that load images as well, and more than once."""
    options = ["--train_data_dir", photos, "--num_workers", 2, "--output_dir", tmp_path / "run"]
    options += ["--max_train_steps", 10_000, "--checkpointing_steps", 10_000]
    with forked(run, *TINY, *options) as process:
        wait_for_steps(2, process, tmp_path / "run")
        os.killpg(process.pid, signal.SIGTERM), os.killpg(process.pid, signal.SIGTERM)
        process.join(60)
    assert process.exitcode == 0 and "Stopped by SIGTERM after step" in capfd.readouterr().out
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def validation_rows(folder):
    return [(row["step"], row["resolution"]) for row in csv.DictReader(open(folder / "validation.csv"))]


def test_a_report_that_a_signal_cut_off_is_made_and_none_twice(tmp_path, monkeypatch):
    options = ["--max_train_steps", "4", "--report_images", "8", "--checkpointing_steps", "2"]
    train(tmp_path / "whole", *options)

    def log_and_signal(self, done, *values, original=Reporter.log):
        original(self, done, *values)
        if done == 1:
            signal.raise_signal(signal.SIGTERM)  # so step 2, which reports, is the last

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "log", log_and_signal)
        run(*TINY, "--output_dir", stopped, *options)
    assert validation_rows(stopped) == validation_rows(tmp_path / "whole")[:2]
    (stopped / "validation.csv").unlink()  # as if the report had been killed
    train(stopped, *options, "--resume_from_checkpoint", "latest")
    assert (stopped / "validation.csv").read_text() == (tmp_path / "whole" / "validation.csv").read_text()
    train(stopped, *options, "--resume_from_checkpoint", "latest")
    assert (stopped / "validation.csv").read_text() == (tmp_path / "whole" / "validation.csv").read_text()
    assert losses(stopped) == losses(tmp_path / "whole")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with sole_user(tmp_path), pytest.raises(SystemExit, match="Another run writes to"):
        train(tmp_path)
    assert not list(tmp_path.glob("*.csv"))


def test_compiled_by_the_launcher_the_names_of_weights_stay(tmp_path, monkeypatch):
    """As by `accelerate launch --dynamo_backend eager`, but run uncompiled, which is quicker and has the same names.
    The checkpoint is one of an ordinary run."""
    options = ["--resolutions", "8"]
    with monkeypatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
        train(tmp_path, *options, "--max_train_steps", "1", "--checkpointing_steps", "1")
    weights = state(tmp_path, 1)["model.safetensors"]
    assert weights.keys() == DFUPipeline.from_pretrained(tmp_path).unet.state_dict().keys()
    train(tmp_path, *options, "--max_train_steps", "2", "--resume_from_checkpoint", "latest")


def launch(config, folder, *options):
    """The script under `accelerate launch` with two processes on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", ROOT / "examples" / "accelerate" / config, "--main_process_port", "0"]
    command += [ROOT / "tests" / "launch_on_cpu.py", *options, "--output_dir", folder]
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((folder / "run.json").read_text())


DISTRIBUTED = [
    *TINY, "--batch_size", "8", "--max_train_steps", "10", "--checkpointing_steps", "5",
    "--augment_probability", "0.5", "--max_pixels_per_batch", "200",
]  # fmt: skip


def assert_close(folder, other, bound=1e-5):
    weights, others = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (folder, other))
    assert max((weights[name] - others[name]).abs().max() for name in weights) < bound
    rows = [{name: row[name] for name in ("step", "resolution")} for row in losses(folder)]
    assert rows == [{name: row[name] for name in ("step", "resolution")} for row in losses(other)]
    for row, same in zip(losses(folder), losses(other)):
        assert float(row["loss"]) == pytest.approx(float(same["loss"]), rel=1e-5)


def test_two_processes_do_what_one_does(tmp_path):
    """Ten steps of 2 x 4 images equal ten steps of 8, resolutions, losses and averaged weights; and a run may go on
    with another number of processes."""
    run(*DISTRIBUTED, "--output_dir", tmp_path / "one")
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(run, (*DISTRIBUTED, "--output_dir", tmp_path / "two"), num_processes=2)  # forks
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    assert_close(tmp_path / "one", tmp_path / "two")
    assert {row["resolution"] for row in losses(tmp_path / "two")} == {"8x8", "8x12"}

    (tmp_path / "two" / "checkpoint-10").rename(tmp_path / "checkpoint-10")
    run(*DISTRIBUTED, "--output_dir", tmp_path / "two", "--resume_from_checkpoint", "latest")
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, kind", [("multi_gpu.yaml", "MULTI_CPU"), ("fsdp.yaml", "FSDP"), ("deepspeed_zero2.yaml", "DEEPSPEED")]
)
def test_launched_training_does_what_one_process_does(tmp_path, config, kind):
    """With the configurations for `accelerate launch`, sharded ones included."""
    if kind == "DEEPSPEED":
        pytest.importorskip("deepspeed")
    run(*DISTRIBUTED, "--output_dir", tmp_path / "one")
    facts = launch(config, tmp_path / "two", *DISTRIBUTED)
    assert (facts["processes"], facts["distributed"]) == (2, kind)
    assert_close(tmp_path / "one", tmp_path / "two")
    before = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "two" / "checkpoint-10").rename(tmp_path / "checkpoint-10")
    launch(config, tmp_path / "two", *DISTRIBUTED, "--resume_from_checkpoint", "latest")
    assert_same(load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors"), before)
