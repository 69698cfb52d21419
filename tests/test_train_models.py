"""The training script with models of all kinds: refiners, models to fine-tune, and those it cannot train."""

import csv
import hashlib
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from training_runs import TINY, assert_same, dropout_config, losses, parse, run, state, train, weights

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.data.portraits import PortraitDataset
from dfu_diffusers.data.resolutions import MixedResolutionBatchSampler
from dfu_diffusers.training import losses as losses_module
from dfu_diffusers.training.freezing import parameter_groups
from dfu_diffusers.training.losses import fit_size
from examples import train_dfu

pytest_plugins = "training_runs"


@pytest.fixture
def refiner_config(tmp_path):
    config = {"_class_name": "DFURefiner", "hidden_channels": 8, "num_layers": 1, "detail_std": None}
    (tmp_path / "refiner.json").write_text(json.dumps(config))
    return ["--model_config", tmp_path / "refiner.json"]


def test_flat_pictures_are_nothing_for_a_refiner(tmp_path, refiner_config):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (90 * i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(
        SystemExit,
        match="flat: the images have no detail to learn .*: they are flat or enlarged. Take larger originals",
    ):
        run(*TINY, *refiner_config, "--train_data_dir", tmp_path / "flat", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_law_of_detail_is_given_whole_or_measured(tmp_path, refiner_config):
    config = {"_class_name": "DFURefiner", "hidden_channels": 8, "num_layers": 1, "detail_exponent": -0.4}
    (tmp_path / "refiner.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="`detail_exponent` -0.4, but no `detail_std`: give both, or none"):
        run(*TINY, *refiner_config, "--output_dir", tmp_path / "run")
    (tmp_path / "refiner.json").write_text(json.dumps(config | {"detail_std": 0.2, "detail_exponent": None}))
    run(*TINY, *refiner_config, "--max_train_steps", "1", "--output_dir", tmp_path / "run")
    config = DFUSuperResolutionPipeline.from_pretrained(tmp_path / "run").refiner.config
    assert (config.detail_std, config.detail_exponent) == (0.2, 0)


def test_a_refiner_is_trained_and_resumed_and_goes_with_a_trunk(tmp_path, refiner_config):
    options = [*TINY, *refiner_config, "--resolutions", "8", "12", "12x8", "--max_train_steps", "5"]
    run(*options, "--output_dir", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run(*options, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert_same(state(tmp_path / "resumed", 5), state(tmp_path / "whole", 5))
    # One that was saved when all octaves had one deviation goes on with it.
    config = json.loads((tmp_path / "whole" / "checkpoint-4" / "config.json").read_text())
    del config["detail_exponent"]
    older = tmp_path / "older" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", older)
    (older / "config.json").write_text(json.dumps(config))
    manifest = json.loads((older / "manifest.json").read_text())
    manifest["config.json"] = hashlib.sha256((older / "config.json").read_bytes()).hexdigest()
    (older / "manifest.json").write_text(json.dumps(manifest))
    run(*options, "--output_dir", tmp_path / "older", "--resume_from_checkpoint", "latest")
    assert DFUSuperResolutionPipeline.from_pretrained(tmp_path / "older").refiner.config.detail_exponent == 0

    upscaler = DFUSuperResolutionPipeline.from_pretrained(tmp_path / "whole")
    config = upscaler.refiner.config
    assert (config.sample_size, config.coarse_size) == (12, 4) and 0.02 < config.detail_std < 0.5
    assert -1 < config.detail_exponent < 0
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


def test_fine_tuning_moves_what_is_not_frozen_and_nothing_else(tmp_path, finished):
    before = weights(finished)
    run(
        *TINY[2:], "--init_from", finished, "--freeze", "spatial", "level:0.norm", "embedding",
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


@pytest.mark.parametrize(
    "change", [{"out_channels": 1}, {"in_channels": 5, "out_channels": 5}, {"num_class_embeds": 3}]
)
def test_models_this_script_cannot_train_are_refused(tmp_path, change):
    config = {**json.loads((train_dfu.CONFIGS / "tiny.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="in_channels, out_channels = |num_class_embeds=3"):
        train(tmp_path / "run", "--model_config", tmp_path / "config.json")
    assert not (tmp_path / "run").exists()
