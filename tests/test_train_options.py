"""Options of the training script: on the command line, in files, and those that cannot be had."""

import dataclasses
import os
import re
import shutil

import pytest
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from training_runs import ROOT, TINY, parse, run, train

from dfu_diffusers.training import options as options_module
from examples import train_dfu

pytest_plugins = "training_runs"


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
        (["--mixed_precision", "fp16"], "fp16 needs a GPU"),
        (["--report_to", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_had_is_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


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
        ("optimizer: adam\nbatch_size: 8", "no option 'optimizer'"),  # it is gone
        ("batch_size: -3", "-3 must be at least 1"),
        ("just words", "must hold lines such as"),
        ("a: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit) as error:
            parse(f"--config={path}")
        assert error.value.code == 2 and message in capsys.readouterr().err


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
        if name in options and not (ROOT / options[name]).exists():
            del options[name]
    if "cache_dir" in options:
        options["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "pictures").mkdir()
    Image.effect_noise((256, 256), 100).convert("RGB").save(tmp_path / "pictures" / "0.png")
    for i in range(1, 20):
        shutil.copy(tmp_path / "pictures" / "0.png", tmp_path / "pictures" / f"{i}.png")
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
