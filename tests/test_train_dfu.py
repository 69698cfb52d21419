"""The training script, end to end on the tiny preset."""

import csv
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.data.portraits import PortraitDataset
from dfu_diffusers.data.resolutions import MixedResolutionBatchSampler
from dfu_diffusers.training import losses as losses_module
from dfu_diffusers.training import options as options_module
from dfu_diffusers.training import reporter
from dfu_diffusers.training import setup as training_setup
from dfu_diffusers.training.checkpoints import sole_user
from dfu_diffusers.training.ema import reconstruct
from dfu_diffusers.training.freezing import parameter_groups
from dfu_diffusers.training.losses import fit_size
from dfu_diffusers.training.reporter import Reporter
from examples import train_dfu

pytest_plugins = "hub_stand_in"
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
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


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
    """All that a checkpoint holds: weights, averages, optimizer."""
    folder = folder / f"checkpoint-{step}"
    tensors = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    return {**tensors, "settings": json.loads((folder / "optimizer.json").read_text())}


def assert_same(a, b):
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


# --- What a run leaves ---


def test_a_run_leaves_a_pipeline_pictures_and_tables(tmp_path):
    train(
        tmp_path, "--max_train_steps", "5", "--report_to", "tensorboard", "--report_images", "8",
        "--power_ema", "0.05", "0.1",
    )  # fmt: skip
    pipe = DFUPipeline.from_pretrained(tmp_path)
    assert list(pipe.unet.config.sample_size) == [8, 12]
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=1, height=5).images[0].size == (12, 5)

    raw = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    assert any(not torch.equal(raw[name], p) for name, p in pipe.unet.state_dict().items())
    assert reconstruct(tmp_path / "power_ema", 0.07).keys() == raw.keys()

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
    assert "| 8x12 | yes |" in card and "power_ema: " in card and str(tmp_path) not in card
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


# --- The same result, come what may ---

THOROUGH = [
    "--max_train_steps", "9", "--max_pixels_per_batch", "200", "--augment_probability", "0.4", "--random_flip",
    "--random_crop", "--power_ema", "0.1", "--upsample_resolutions", "12x16", "--upsample_weight", "0.3",
]  # fmt: skip


def dropout_config(folder):
    config = json.loads((train_dfu.CONFIGS / "tiny.json").read_text()) | {"dropout": 0.3, "num_augment_labels": 9}
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model_config", str(folder / "config.json")]


def test_killed_moved_and_resumed_it_ends_where_the_uninterrupted_run_does(tmp_path, photos):
    """kill -9 with loader workers, mixed and upsampled resolutions, accumulation, dropout, augmentation, two averages;
    then the output folder moves, and the run goes on with another number of workers."""
    options = [*TINY, *dropout_config(tmp_path), *THOROUGH, "--train_data_dir", photos]
    train(tmp_path / "whole", *options[len(TINY) :])

    stopped = tmp_path / "stopped"
    command = [sys.executable, ROOT / "examples" / "train_dfu.py", *options, "--num_workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # for the same bits
    process = subprocess.Popen(
        [*command, "--output_dir", str(stopped)], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    kill_after, deadline = np.random.default_rng().integers(3, 9), time.time() + 120
    while not (stopped / "loss.csv").exists() or len(losses(stopped)) < kill_after:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    stopped.rename(tmp_path / "moved")
    assert list((tmp_path / "moved").glob("checkpoint-*")), f"killed after step {kill_after}"
    train(tmp_path / "moved", *options[len(TINY) :], "--num_workers", "1", "--resume_from_checkpoint", "latest")
    assert losses(tmp_path / "moved") == losses(tmp_path / "whole")
    assert_same(state(tmp_path / "moved", 9), state(tmp_path / "whole", 9))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_ends_the_run(tmp_path, name, monkeypatch, capsys):
    train(tmp_path / "whole", "--max_train_steps", "6")

    def log_and_signal(self, done, *values, original=Reporter.log):
        original(self, done, *values)
        if done == 3:
            signal.raise_signal(getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "log", log_and_signal)
        run(*TINY, "--output_dir", tmp_path / "stopped", "--max_train_steps", 6)
    # The signal came while step 3 was reported, so step 4 is the first to know.
    assert f"Stopped by {name} after step 4" in capsys.readouterr().out
    assert not (tmp_path / "stopped" / "unet").exists()
    train(tmp_path / "stopped", "--max_train_steps", "6", "--resume_from_checkpoint", "latest")
    assert_same(state(tmp_path / "stopped", 6), state(tmp_path / "whole", 6))


def test_a_signal_to_the_whole_group_saves_too(tmp_path, photos):
    """Launchers signal the workers that load images as well, and more than once."""
    command = [sys.executable, ROOT / "examples" / "train_dfu.py", *TINY, "--output_dir", tmp_path / "run"]
    command += ["--train_data_dir", photos, "--num_workers", 2, "--max_train_steps", 10_000]
    command += ["--checkpointing_steps", 10_000]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), env=environment, start_new_session=True, stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "run" / "loss.csv").exists() or len(losses(tmp_path / "run")) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM), os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped by SIGTERM after step" in printed
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
    facts = launch("multi_gpu.yaml", tmp_path / "two", *DISTRIBUTED)
    assert facts["processes"] == 2
    assert_close(tmp_path / "one", tmp_path / "two")
    assert {row["resolution"] for row in losses(tmp_path / "two")} == {"8x8", "8x12"}

    (tmp_path / "two" / "checkpoint-10").rename(tmp_path / "checkpoint-10")
    run(*DISTRIBUTED, "--output_dir", tmp_path / "two", "--resume_from_checkpoint", "latest")
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("config, kind", [("fsdp.yaml", "FSDP"), ("deepspeed_zero2.yaml", "DEEPSPEED")])
def test_sharded_training_does_what_one_process_does(tmp_path, config, kind):
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


def test_micro_batches_do_not_change_the_result(tmp_path):
    whole = train(tmp_path / "whole")
    split = train(tmp_path / "split", "--max_pixels_per_batch", "100")
    assert max((whole[name] - split[name]).abs().max() for name in whole) < 1e-5


# --- Octaves ---


@pytest.fixture
def refiner_config(tmp_path):
    config = {"_class_name": "DFURefiner", "hidden_channels": 8, "num_layers": 1, "detail_std": None}
    (tmp_path / "refiner.json").write_text(json.dumps(config))
    return ["--model_config", tmp_path / "refiner.json"]


def test_flat_pictures_are_nothing_for_a_refiner(tmp_path, refiner_config):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(SystemExit, match="flat have no detail to learn: they are flat or enlarged"):
        run(*TINY, *refiner_config, "--train_data_dir", tmp_path / "flat", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refiner_is_trained_and_resumed_and_goes_with_a_trunk(tmp_path, refiner_config):
    options = [*TINY, *refiner_config, "--resolutions", "8", "12", "12x8", "--max_train_steps", "5"]
    run(*options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run(*options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert_same(state(tmp_path / "resumed", 5), state(tmp_path / "whole", 5))

    upscaler = DFUSuperResolutionPipeline.from_pretrained(tmp_path / "whole")
    config = upscaler.refiner.config
    assert (config.sample_size, config.coarse_size) == (12, 4) and 0.02 < config.detail_std < 0.5
    assert upscaler.unet is None
    # Held-out portraits of 4 px, and what the refiner makes of them at 8, 16 and 32 px.
    assert Image.open(tmp_path / "whole" / "samples.png").size == (56 + 4 * 130, 4 * 130)
    validation = list(csv.DictReader(open(tmp_path / "whole" / "validation.csv")))
    assert [row["resolution"] for row in validation] == ["8x8", "12x12", "12x8"]
    assert len(validation[0]) == 3 + 4 and all(0.05 < float(row["loss"]) < 5 for row in validation)

    trunk = ["--model_config", train_dfu.CONFIGS / "tiny.json", "--resolutions", "8", "--source_resolution", "16"]
    train(tmp_path / "trunk", *trunk, "--max_train_steps", "1")
    refiner = DFURefiner.from_pretrained(tmp_path / "whole", subfolder="refiner")
    pipe = DFUPipeline.from_pretrained(tmp_path / "trunk", refiner=refiner)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(height=20, width=13, num_inference_steps=1, octave_steps=1).images[0].size == (13, 20)

    several = [*trunk[:3], "8", "6x11", *trunk[-2:], "--max_train_steps", "1"]
    train(tmp_path / "several", *several)
    assert DFUPipeline.from_pretrained(tmp_path / "several").unet.config.coarse_sizes == [[8, 8], [6, 11]]

    tuned = ["--init_from", tmp_path / "whole", "--resolutions", "8", "--output_dir", tmp_path / "tuned"]
    run(*TINY[2:], *tuned, "--max_train_steps", "1")
    assert DFUSuperResolutionPipeline.from_pretrained(tmp_path / "tuned").refiner.config.coarse_size == 4

    pipe.save_pretrained(tmp_path / "both")
    both = ["--init_from", tmp_path / "both", "--component", "refiner", "--resolutions", "8", "--max_train_steps", "1"]
    run(*TINY[2:], *both, "--output_dir", tmp_path / "part")
    upscaler = DFUSuperResolutionPipeline.from_pretrained(tmp_path / "part")
    assert upscaler.unet is None and upscaler.refiner.config.detail_std == refiner.config.detail_std
    with pytest.raises(SystemExit, match="whole has no unet, only: refiner"):
        run(*TINY[2:], *tuned[:-1], tmp_path / "none", "--component", "unet")


def test_pictures_cut_by_modes_are_seen(tmp_path, monkeypatch):
    """A trunk's pictures have the modes of the large ones; area averages of the same portraits differ."""
    seen = []

    def spy(model, scheduler, images, *others, original=losses_module.edm_loss):
        seen.append(images.detach().clone())
        return original(model, scheduler, images, *others)

    monkeypatch.setattr(losses_module, "edm_loss", spy)
    options = ["--resolutions", "8", "--max_train_steps", "1", "--num_validation_images", "0"]
    train(tmp_path / "cut", *options, "--source_resolution", "32")
    train(tmp_path / "averaged", *options)
    cut, averaged = seen
    draws = MixedResolutionBatchSampler(1_000_000, 4, [(8, 8)], num_steps=1).micro_batches(0)[0]
    large = PortraitDataset(1_000_000).__getitems__([(draw.index, (32, 32)) for draw in draws])
    expected = fit_size(torch.stack([item["image"] for item in large]), (8, 8))
    torch.testing.assert_close(cut, expected, rtol=0, atol=1e-6)  # rendered in batches of other sizes
    assert 0.01 < (cut - averaged).square().mean().sqrt() < 0.2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--freeze", "norm"], "--freeze is for a DFUModel"),
        (["--augment_probability", "0.1"], "--augment_probability is for a DFUModel"),
        (["--resolutions", "1x8"], "at least 2 pixels a side"),
    ],
)
def test_what_a_refiner_cannot_have(tmp_path, refiner_config, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", *refiner_config, *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must hold the arguments of a model"),
        ("{", "Expecting"),
        ('{"_class_name": "UNet2DModel"}', "is of a UNet2DModel"),
    ],
)
def test_files_that_describe_no_model_of_ours(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", "--model_config", tmp_path / "config.json")


# --- Data ---


def test_a_cache_a_zip_and_workers_give_the_same_run(tmp_path, photos):
    options = ["--random_flip", "--num_validation_images", "1", "--train_data_dir"]
    plain = train(tmp_path / "plain", *options, photos)
    cached = train(tmp_path / "cached", *options, photos, "--cache_dir", tmp_path / "cache", "--num_workers", "1")
    assert_same(cached, plain)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3  # two sizes, and the sizes of the originals
    archive = shutil.make_archive(tmp_path / "photos", "zip", photos)
    assert train(tmp_path / "zip", *options, archive).keys() == plain.keys()


def test_a_stream(tmp_path, photos):
    options = ["--train_data_dir", photos, "--streaming", "--class_conditional", "--num_validation_images", "3"]
    first = train(tmp_path / "first", *options)
    assert_same(train(tmp_path / "again", *options, "--num_workers", "2"), first)
    assert DFUPipeline.from_pretrained(tmp_path / "first").unet.config.num_class_embeds == 2
    assert json.loads((tmp_path / "first" / "run.json").read_text())["data"]["class_names"] == ["cat", "dog"]
    assert "Classes: 0 cat, 1 dog" in (tmp_path / "first" / "README.md").read_text()
    assert len(list(csv.DictReader(open(tmp_path / "first" / "validation.csv")))) == 2


def test_classes_of_folders(tmp_path, photos):
    train(tmp_path / "run", "--train_data_dir", photos, "--class_conditional")
    pipe = DFUPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 2
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    cat, dog = (pipe(num_inference_steps=2, class_labels=i, latents=latents, output_type="pt").images for i in (0, 1))
    assert not torch.equal(cat, dog)
    with pytest.raises(SystemExit, match="num_class_embeds=2, but with --class_conditional False"):
        config = tmp_path / "run" / "unet" / "config.json"
        train(tmp_path / "plain", "--train_data_dir", photos, "--model_config", config)


def test_dropped_labels_have_a_class_of_their_own(tmp_path, photos):
    options = ["--train_data_dir", photos, "--class_conditional", "--label_dropout", "0.5"]
    train(tmp_path / "run", *options)
    pipe = DFUPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 3, "the cat, the dog, and no class"
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, class_labels=0, output_type="pt")
    plain, guided = (
        pipe(generator=torch.Generator().manual_seed(0), guidance_scale=scale, **options).images for scale in (1, 3)
    )
    assert guided.isfinite().all() and not torch.equal(plain, guided)


def test_a_stream_with_nothing_left_and_one_that_breaks(tmp_path, photos):
    stream = ["--train_data_dir", photos, "--streaming"]
    with pytest.raises(SystemExit, match="holds no image to train on: lower --num_validation_images"):
        train(tmp_path / "run", *stream, "--num_validation_images", 12)
    with pytest.raises(SystemExit, match="small"):
        train(tmp_path / "run", *stream, "--resolutions", 17, "--num_validation_images", 0)


def test_broken_images_are_named_and_left_out(tmp_path, photos, caplog):
    (photos / "cat" / "empty.png").write_bytes(b"")
    (photos / "cat" / "text.jpg").write_text("not a picture")
    whole = (photos / "dog" / "1.png").read_bytes()
    (photos / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not even named like one")
    train(tmp_path / "run", "--train_data_dir", photos, "--max_train_steps", "6")
    named = caplog.text
    assert "empty.png" in named and "text.jpg" in named and "cut.png" in named and "notes.txt" not in named
    assert "notes" not in json.loads((tmp_path / "run" / "run.json").read_text())["data"]["description"]


def test_photographs_that_ship_inside_scikit_image(tmp_path):
    data = pytest.importorskip("skimage.data")
    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "camera", "coins"):  # colour, grey, grey
        Image.fromarray(getattr(data, name)()).save(tmp_path / "photos" / f"{name}.png")
    train(tmp_path / "run", "--max_train_steps", "2", "--train_data_dir", tmp_path / "photos", "--random_flip")
    assert (tmp_path / "run" / "model_index.json").is_file()


# --- Fine-tuning ---


def test_fine_tuning_moves_what_is_not_frozen_and_nothing_else(tmp_path):
    train(tmp_path / "base")
    before = load_file(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    run(
        *TINY[2:], "--init_from", tmp_path / "base", "--freeze", "spatial", "level:0.norm", "embedding",
        "--upsample_resolutions", 16, "--upsample_weight", 0.9, "--output_dir", tmp_path / "tuned",
    )  # fmt: skip
    after = load_file(tmp_path / "tuned" / "checkpoint-4" / "model.safetensors")
    pipe = DFUPipeline.from_pretrained(tmp_path / "tuned")
    groups = parameter_groups(pipe.unet)
    frozen = {n for n, group in groups.items() if group[1] in ("spatial", "embedding") or group == (0, "norm")}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    moments = state(tmp_path / "tuned", 4)["optimizer.safetensors"]
    assert len({name.split(".")[0] for name in moments}) == len(before) - len(frozen)
    assert "16x16" in {row["resolution"] for row in losses(tmp_path / "tuned")}
    assert pipe.unet.config.sample_size == 16
    # Rows of the sheet: 8x8, 8x12, the 16x16 that was trained for, 24x24, 32x32.
    assert Image.open(tmp_path / "tuned" / "samples.png").size[1] == 5 * 130


def test_fine_tuning_a_factorised_model(tmp_path):
    config = dict(block_out_channels=(16, 16), layers_per_block=1, fourier_modes=(2, None), attention_levels=())
    DFUPipeline(DFUModel(**config), EDMHeunScheduler()).save_pretrained(tmp_path / "base")
    options = ["--init_from", tmp_path / "base", "--spectral_rank", 0.6, "--output_dir", tmp_path / "small"]
    run(*TINY[2:], *options, "--gradient_checkpointing", "--checkpointed_levels", 0)
    small = DFUPipeline.from_pretrained(tmp_path / "small").unet
    assert small.config.spectral_rank == 0.6 and small.num_parameters() < DFUModel(**config).num_parameters()
    assert small.mid_blocks[0].conv1.spectral is None and small.conv_out.spectral.reduce.shape == (16, 10)


def test_a_pipeline_to_fine_tune_brings_its_dropout_and_its_scalings(tmp_path):
    train(tmp_path / "base", *dropout_config(tmp_path), "--augment_probability", 0.1)
    EDMHeunScheduler(sigma_data=0.7).save_pretrained(tmp_path / "base" / "scheduler")
    again = [*TINY[2:], "--init_from", tmp_path / "base", "--output_dir", tmp_path / "tuned"]
    args = parse(*again, "--augment_probability", 0.1)
    AcceleratorState._reset_state(reset_partial_state=True)
    prepared = train_dfu.Run(args)
    assert prepared.network.training and prepared.network.config.dropout == 0.3
    assert prepared.scheduler.config.sigma_data == 0.7


# --- Things that go wrong ---


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
def test_what_has_diverged_is_neither_saved_nor_exported(tmp_path, monkeypatch, rate, log, message):
    train(tmp_path, "--max_train_steps", "2")
    exported = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    monkeypatch.setattr(Reporter, "log", log)
    with pytest.raises(SystemExit, match=f"{message}.*diverged.*Go on from .*checkpoint-2") as error:
        train(tmp_path, "--resume_from_checkpoint", "latest", "--learning_rate", rate, "--lr_scheduler", "constant")
    assert error.value.code != 0
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == exported


FAILING = """
import sys
from dfu_diffusers.training import setup
from examples import train_dfu

class Failing(setup.PortraitDataset):
    def __getitems__(self, draws):
        if any(draw[-1] == 12 for draw in draws):
            raise OSError("portrait 12 cannot be read")
        return super().__getitems__(draws)

setup.PortraitDataset = Failing
train_dfu.main(sys.argv[1:])
"""


def test_an_error_of_a_loader_ends_the_run_at_once(tmp_path):
    """Its workers ignore SIGTERM, for which Python would wait in vain."""
    options = [*TINY, "--output_dir", tmp_path / "run", "--num_workers", "2", "--num_validation_images", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, *map(str, options)], env=environment, stderr=subprocess.PIPE, text=True
    )
    lines = process.stderr.read().splitlines()  # until all that could write there, workers included, have ended
    process.wait(timeout=30)
    assert process.returncode == 1 and lines[-1] == "train_dfu.py: portrait 12 cannot be read"


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


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, caplog):
    train(tmp_path)
    resume = ["--resume_from_checkpoint", "latest", "--max_train_steps", "6"]
    with pytest.raises(SystemExit, match="another architecture: conv_type is dual there and spatial here"):
        config = json.loads((train_dfu.CONFIGS / "tiny.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "conv_type": "spatial"}))
        train(tmp_path, *resume, "--model_config", tmp_path / "config.json")
    with pytest.raises(SystemExit, match="made with --batch_size 4, not 8"):
        train(tmp_path, *resume, "--batch_size", "8")
    with pytest.raises(SystemExit, match="holds no average 'power-0.1'"):
        train(tmp_path, *resume, "--power_ema", "0.1")
    with pytest.raises(SystemExit, match="has done 4 steps"):
        train(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", 3)
    (tmp_path / "checkpoint-4" / "optimizer.json").write_bytes(b"cut")
    with pytest.raises(SystemExit, match="optimizer.json is not as it was written.* Resume from .*checkpoint-2"):
        train(tmp_path, "--max_train_steps", "6", "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    (tmp_path / "loss.csv").write_text((tmp_path / "loss.csv").read_text().replace("\n1,", "\none,"))
    train(tmp_path, *resume)
    assert "checkpoint-4 is damaged" in caplog.text and "1 damaged rows of" in caplog.text
    assert [row["step"] for row in losses(tmp_path)] == list("23456")


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


def test_an_earlier_run_is_not_overwritten(tmp_path):
    train(tmp_path, "--max_train_steps", "2")
    kept = (tmp_path / "loss.csv").read_text()
    with pytest.raises(SystemExit, match="holds checkpoint-2 of an earlier run"):
        train(tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "loss.csv").read_text() == kept


# --- Options ---


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolutions", "0"], "HEIGHTxWIDTH"),
        (["--batch_size", "0"], "0 must be at least 1"),
        (["--learning_rate", "-1"], "-1 must be greater than 0"),
        (["--learning_rate", "1e38"], "argument --learning_rate: 1e38 must be greater than 0, at most 1e+30"),
        (["--learning_rate", "nan"], "argument --learning_rate: nan must be"),
        (["--p_mean", "nan"], "argument --p_mean: nan must be"),
        (["--p_std", "inf"], "argument --p_std: inf must be"),
        (["--seed", "4294967296"], "argument --seed: 4294967296 must be"),
        (["--augment_probability", "1.5"], "1.5 must be at least 0, at most 1"),
        (["--max_train_steps", "many"], "invalid int value: 'many'"),
        (["--resolution_weights", "1"], "needs 2 numbers"),
        (["--model_config", "nowhere.json"], "nowhere.json is not a file; presets"),
        (["--random_flip"], "--random_flip is for pictures of your own"),
        (["--class_conditional"], "--class_conditional is for pictures of your own"),
        (["--label_dropout", "0.1"], "--label_dropout drops the labels of --class_conditional: give both"),
        (["--streaming"], "--streaming needs --dataset_name"),
        (["--dataset_name", "a", "--train_data_dir", "b"], "give one of them"),
        (["--train_data_dir", "b", "--cache_dir", "c", "--random_crop"], "give one of them"),
        (["--init_from", "somewhere"], "leave out --model_config"),
        (["--component", "refiner"], "--component is a part of the pipeline of --init_from"),
        (["--spectral_rank", "0.4"], "--spectral_rank factorises the model of --init_from"),
        (["--checkpointed_levels", "0"], "--gradient_checkpointing asks for it"),
        (["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--conf", "options.yaml"], "unrecognized arguments: --conf"),
        (["--lr_scheduler", "piecewise_constant"], "invalid choice"),
        (["--train_data_dir", ""], "it is empty"),
        (["--train_data_dir", ".", "--output_dir", "outputs/run"], "samples would be trained on"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", *options)
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--dataset_name", "nobody/nothing"], "nobody/nothing"),
        (["--resume_from_checkpoint", "latest"], "latest: no such checkpoint-STEP"),
        (["--resume_from_checkpoint", "here/checkpoint-7"], "checkpoint-7: no such checkpoint-STEP"),
        (["--batch_size", "3", "--max_pixels_per_batch", "60"], "max_pixels=60 is less than one image"),
        (["--upsample_weight", "0.3"], "upsample_weight=0.3"),
        (["--freeze", "level:7"], "level:7"),
        (["--power_ema", "0.5"], "sigma_rel must lie in"),
        (["--mixed_precision", "fp16"], "fp16 needs a GPU"),
        (["--report_to", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_had_is_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"out_channels": 1}, {"in_channels": 5, "out_channels": 5}, {"num_class_embeds": 3}]
)
def test_models_this_script_cannot_train_are_refused(tmp_path, change):
    config = {**json.loads((train_dfu.CONFIGS / "tiny.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="in_channels, out_channels = |num_class_embeds=3"):
        train(tmp_path / "run", "--model_config", tmp_path / "config.json")
    assert not (tmp_path / "run").exists()


def test_small_images_and_empty_folders(tmp_path, photos):
    for size in ("17", "10x28"):  # each side counts: all are 16 high and 20 to 31 wide
        with pytest.raises(SystemExit, match="small"):
            train(tmp_path / "run", "--train_data_dir", photos, "--resolutions", "16", size)
    train(tmp_path / "run", "--train_data_dir", photos, "--resolutions", "17", "--small_images", "upscale")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty"):
        train(tmp_path / "none", "--train_data_dir", tmp_path / "empty")
    assert not (tmp_path / "none").exists()


def test_a_file_of_options_comes_before_the_command_line(tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("batch_size: 16\nlearning_rate: 5e-4\nresolutions: [32, 48x64]\nmixed_precision: no\ntf32: true\n")
    args = parse("--config", path, "--batch_size", "8")
    assert (args.batch_size, args.learning_rate, args.tf32, args.mixed_precision) == (8, 5e-4, True, "no")
    assert args.max_train_steps == 2000 and args.freeze == []
    assert args.resolutions == [(32, 32), (48, 64)]
    assert not parse("--config", path, "--no-tf32").tf32
    for text, message in [
        ("batch_sise: 3", "no option 'batch_sise', perhaps 'batch_size'"),
        ("batch_size: -3", "-3 must be at least 1"),
        ("just words", "must hold lines such as"),
        ("a: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit):
            parse(f"--config={path}")
        assert message in capsys.readouterr().err


def test_options_that_are_gone_are_refused_in_a_file(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("optimizer: adam\nbatch_size: 8\n")
    with pytest.raises(SystemExit) as error:
        parse("--config", tmp_path / "options.yaml")
    assert error.value.code == 2 and "no option 'optimizer'" in capsys.readouterr().err


def test_help_has_a_line_for_each_option_in_its_group(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    text = capsys.readouterr().out
    titles = [group.__doc__ for group in options_module.GROUPS]
    starts = [text.index(f"\n{title}:\n") for title in titles]
    assert error.value.code == 0 and starts == sorted(starts)
    for group, start, end in zip(options_module.GROUPS, starts, [*starts[1:], len(text)]):
        for field in dataclasses.fields(group):
            assert re.search(rf"^  --{field.name}\b", text[start:end], re.M), field.name
    assert "(default: 2000)" in " ".join(text.split())


def test_what_the_launcher_and_the_shell_would_do(tmp_path, monkeypatch, capsys):
    """Its precision counts unless the options say otherwise; `~` is the home directory in a file of options, too."""
    path = tmp_path / "options.yaml"
    path.write_text("train_data_dir: ~/photos\noutput_dir: ~/run\n")
    args = parse("--config", path)
    assert args.train_data_dir == os.path.expanduser("~/photos") and args.output_dir == os.path.expanduser("~/run")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for options, precision in ([], "bf16"), (["--mixed_precision", "no"], "no"):
        AcceleratorState._reset_state(reset_partial_state=True)
        args = parse(*TINY, "--output_dir", tmp_path / "run", *options, "--dry_run")
        assert train_dfu.Run(args).accelerator.mixed_precision == precision == args.mixed_precision
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(SystemExit, match="fp16 needs a GPU"):
        run(*TINY, "--output_dir", tmp_path / "run", "--dry_run")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    for schedule, warns in ("cosine", True), ("constant", False):  # which has no warm-up
        train(tmp_path / schedule, "--max_train_steps", 1, "--lr_warmup_images", 5, "--lr_scheduler", schedule)
        assert ("--lr_warmup_images is longer" in capsys.readouterr().out) is warns


@pytest.mark.parametrize("preset", sorted(train_dfu.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_describe_runs_that_could_start(preset, tmp_path, capsys):
    """--dry_run of each, on a few pictures in place of its data set."""
    options = yaml.safe_load(preset.read_text())
    for name in ("dataset_name", "image_column", "init_from", "component"):  # what this machine may not have
        options.pop(name, None)
    if "cache_dir" in options:
        options["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        Image.effect_noise((256, 256), 10 * i + 10).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
    data = ["--train_data_dir", tmp_path / "pictures"] if preset.stem != "portraits" else []
    run("--config", tmp_path / "preset.yaml", *data, "--dry_run", "--output_dir", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "GiB of activations" in printed and f"steps of {options['batch_size']} images" in printed
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    run(*TINY, "--dry_run", "--output_dir", tmp_path / "run", "--max_pixels_per_batch", 200, "--freeze", "norm")
    printed = capsys.readouterr().out
    assert "4 steps of 4 images, 16 in all" in printed and "parameters train" in printed
    assert "8x12:" in printed and "2 x 2 images a process" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_compiled_and_checkpointed_it_learns_the_same(tmp_path):
    plain = train(tmp_path / "plain", "--max_train_steps", "3")
    for option in ("--torch_compile", "--gradient_checkpointing"):
        other = train(tmp_path / option, "--max_train_steps", "3", option)
        assert max((plain[name] - other[name]).abs().max() for name in plain) < 1e-4


def test_bf16_learns_about_the_same(tmp_path):
    train(tmp_path / "single"), train(tmp_path / "half", "--mixed_precision", "bf16")
    single, half = ([float(row["loss"]) for row in losses(tmp_path / name)] for name in ("single", "half"))
    assert single == pytest.approx(half, rel=0.02) and single != half


# --- Sharing ---


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


def test_the_data_sets_of_the_examples_can_be_made_and_trained_on(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("skimage")
    from examples import make_data

    make_data.main(["--output_dir", str(tmp_path), "--portraits", "30"])
    assert len(list((tmp_path / "photos").iterdir())) == 8
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == list("0123456789")
    train(tmp_path / "run", "--dataset_name", tmp_path / "portraits", "--streaming", "--max_train_steps", 2)
