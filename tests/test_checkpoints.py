"""Checkpoints: whole or not there, and refused when damaged or of another model."""

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dfu_diffusers.training.checkpoints import (
    CheckpointError,
    check_architecture,
    choose_checkpoint,
    find_checkpoints,
    find_corruption,
    load_state,
    read_object,
    readable,
    replace_contents,
    save_checkpoint,
    save_state,
    set_aside,
    sole_user,
)
from dfu_diffusers.training.ema import HalfLifeEMA
from dfu_diffusers.training.step import WeightAverages


@pytest.fixture
def save(tmp_path):
    """Saves small checkpoints in tmp_path."""

    def save(step, total_limit=9, contents=lambda folder: (folder / "sub").mkdir()):
        def write(folder):
            (folder / "weights").write_bytes(b"w" * step)
            contents(folder)

        return save_checkpoint(Accelerator(cpu=True), tmp_path, step, write, total_limit)

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_found_in_order(save, tmp_path):
    for step in (2, 10, 6, 9):
        save(step, total_limit=3)
    assert list(find_checkpoints(tmp_path)) == [6, 9, 10]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-6", "checkpoint-9"]
    assert choose_checkpoint("latest", tmp_path).name == "checkpoint-10"
    assert choose_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path).name == "checkpoint-6"


def test_writing_the_same_step_again_replaces_it(save, tmp_path):
    save(3)
    save(3, contents=lambda folder: (folder / "more").write_text("x"))
    assert names(tmp_path / "checkpoint-3") == ["manifest.json", "more", "weights"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_leaves_the_earlier_checkpoint(save, tmp_path, error):
    save(2)

    def fail(folder):
        raise error

    with pytest.raises(CheckpointError, match="checkpoint-4 could not be written.*checkpoint-2 is intact"):
        save(4, contents=fail)
    assert names(tmp_path) == ["checkpoint-2"] and find_corruption(tmp_path / "checkpoint-2") is None


def test_one_interrupted_while_written_is_never_taken_for_a_checkpoint(save, tmp_path):
    class Killed(BaseException):
        pass

    def kill(folder):
        raise Killed

    with pytest.raises(Killed):
        save(4, contents=kill)
    assert not find_checkpoints(tmp_path)
    save(4)
    assert names(tmp_path) == ["checkpoint-4"]


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "weights").write_bytes(b"w"), "weights is not as it was written"),
        (lambda folder: (folder / "weights").write_bytes(b"wwwwwwwv"), "weights is not as it was written"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is missing or damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json names no file"),
        (lambda folder: (folder / "manifest.json").write_text('{"weights": 8}'), "weights is not as it was written"),
    ],
)
def test_a_damaged_one_is_refused_and_the_one_before_is_taken(save, tmp_path, caplog, harm, message):
    save(6), save(8)
    harm(tmp_path / "checkpoint-8")
    with pytest.raises(CheckpointError, match=f"{message}.*Resume from .*checkpoint-6"):
        choose_checkpoint(str(tmp_path / "checkpoint-8"), tmp_path)
    assert choose_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-6"
    assert message in caplog.text and "goes on from" in caplog.text
    harm(tmp_path / "checkpoint-6")
    with pytest.raises(CheckpointError, match="No other one is intact"):
        choose_checkpoint("latest", tmp_path)


def test_going_on_from_an_older_one_sets_the_later_ones_aside(save, tmp_path):
    """Else they would be the latest, and the ones that are kept."""
    for step in (2, 4, 6):
        save(step)
    (tmp_path / "set-aside-checkpoint-6").mkdir()
    assert [path.name for path in set_aside(tmp_path, 2)] == ["set-aside-checkpoint-4", "set-aside-checkpoint-6"]
    save(3, total_limit=1)
    assert list(find_checkpoints(tmp_path)) == [3] and find_corruption(tmp_path / "set-aside-checkpoint-6") is None


def test_contents_are_replaced_whole_or_not_at_all(tmp_path):
    (tmp_path / "unet").mkdir(), (tmp_path / "unet" / "old").write_text("old"), (tmp_path / "notes").write_text("mine")

    def write(folder):
        (folder / "unet").mkdir(parents=True), (folder / "unet" / "new").write_text("new")

    def fail(folder):
        write(folder)
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="could not be written .*disk full"):
        replace_contents(tmp_path, fail)
    assert names(tmp_path) == ["notes", "unet"] and names(tmp_path / "unet") == ["old"]
    replace_contents(tmp_path, write)
    assert names(tmp_path) == ["notes", "unet"] and names(tmp_path / "unet") == ["new"]


def test_missing_ones_and_earlier_runs_are_named(save, tmp_path):
    for resume in ("latest", "elsewhere/checkpoint-7", str(tmp_path)):
        with pytest.raises(CheckpointError, match="no such checkpoint-STEP"):
            choose_checkpoint(resume, tmp_path)
    assert choose_checkpoint(None, tmp_path) is None
    save(2)
    with pytest.raises(CheckpointError, match="holds checkpoint-2 of an earlier run"):
        choose_checkpoint(None, tmp_path)


def test_another_architecture_is_named_field_by_field(make_model, tmp_path):
    make_model().save_config(tmp_path)
    same = make_model(sample_size=99, dropout=0.5)
    check_architecture(tmp_path, same.config)
    other = make_model(fourier_modes=(2, 2, None), conv_type="spatial")
    with pytest.raises(CheckpointError) as error:
        check_architecture(tmp_path, other.config)
    assert "conv_type is dual there and spatial here" in str(error.value)
    assert "fourier_modes is [[4, 3], 2, None] there and [2, 2, None] here" in str(error.value)
    assert "sample_size" not in str(error.value) and "layers_per_block" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["conv_type"] == "dual"


# --- The state of a run ---


@pytest.fixture
def prepared(make_model):
    """Makes an accelerator with a model and an optimizer that has taken three steps."""

    def make(steps=3):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, model = Accelerator(cpu=True), make_model()
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3))
        averages = WeightAverages(accelerator, model, {"ema": lambda p: HalfLifeEMA(p, 4, 100)})
        for _ in range(steps):
            sum(p.square().sum() for p in model.parameters()).backward()
            optimizer.step(), optimizer.zero_grad(), averages.step()
        return accelerator, model, optimizer, averages

    return make


@pytest.fixture
def checkpoint(prepared, tmp_path):
    """A whole checkpoint-3 of it."""
    accelerator, model, optimizer, averages = prepared()

    def save(folder):
        save_state(accelerator, model, optimizer, folder)
        averages.save(folder)

    return save_checkpoint(accelerator, tmp_path, 3, save, 9), model, optimizer


def load(folder, accelerator, model, optimizer, averages):
    with readable(folder):
        load_state(accelerator, model, optimizer, folder)
        averages.load(folder)


def test_the_state_comes_back_to_the_bit(checkpoint, prepared):
    folder, model, optimizer = checkpoint
    fresh = prepared(steps=1)
    load(folder, *fresh)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh[1].state_dict()[name], value)
    saved, loaded = optimizer.state_dict(), fresh[2].state_dict()
    assert saved["state"].keys() == loaded["state"].keys()
    for index, values in saved["state"].items():
        assert all(torch.equal(loaded["state"][index][name], value) for name, value in values.items())
    assert loaded["param_groups"][0]["lr"] == 1e-3 and fresh[3].averages["ema"].optimization_step == 3
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


NAMES = [
    "model.safetensors", "optimizer.safetensors", "optimizer.json", "average-ema.safetensors", "pytorch_model.bin",
    "optimizer.bin", "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "random_states_0.pkl",
    "custom_checkpoint_0.pkl", "pytorch_model_fsdp.bin",
]  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_a_checkpoint_runs_code(checkpoint, prepared, tmp_path, name, zipped):
    """At every name that this package or Accelerate looks for, with a manifest that admits it."""
    folder, trap = checkpoint[0], Hostile(tmp_path / "ran")
    is_read = (folder / name).exists()
    (folder / "pytorch_model.bin").exists() or name.startswith("pytorch") and (folder / "model.safetensors").unlink()
    torch.save(trap, folder / name) if zipped else (folder / name).write_bytes(pickle.dumps(trap))
    if is_read or name.startswith("pytorch"):
        with pytest.raises(CheckpointError, match="cannot be (read|resumed from)"):
            load(folder, *prepared())
    else:
        load(folder, *prepared())
    assert not (tmp_path / "ran").exists()
    if not zipped:
        pickle.loads(pickle.dumps(trap))
        assert (tmp_path / "ran").exists(), "the trap works"


def flip(path, position, bit):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_flipped_bits_are_noticed(checkpoint, count):
    folder, random = checkpoint[0], np.random.default_rng(0)
    files = sorted(folder.iterdir())
    for number in range(count):
        path = files[number % len(files)]
        position, bit = int(random.integers(path.stat().st_size)), int(random.integers(8))
        flip(path, position, bit)
        assert find_corruption(folder), f"bit {bit} of byte {position} of {path.name}"
        flip(path, position, bit)
        assert find_corruption(folder) is None


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_json_of_another_shape_is_named(checkpoint, prepared, text):
    folder = checkpoint[0]
    (folder / "optimizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="optimizer.json (cannot be read|must hold a JSON object)"):
        load(folder, *prepared())
    (folder / "optimizer.json").write_text('{"groups": 1, "numbers": [2]}')
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        load(folder, *prepared())
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_object(folder / "nowhere.json")


@pytest.mark.parametrize("limits", [[3_000], pytest.param(range(0, 120_000, 2_000), marks=pytest.mark.slow)])
def test_a_disk_that_fills_while_a_checkpoint_is_written(prepared, tmp_path, limits):
    """No file may grow beyond a limit, so that each of the writes fails for one of them."""
    accelerator, model, optimizer, averages = prepared()

    def save(folder):
        save_state(accelerator, model, optimizer, folder)
        averages.save(folder)

    save_checkpoint(accelerator, tmp_path, 1, save, 9)
    before, failed = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    for limit in limits:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            save_checkpoint(accelerator, tmp_path, 2, save, 9)
        except CheckpointError as error:
            failed += 1
            assert "checkpoint-2 could not be written" in str(error) and "checkpoint-1 is intact" in str(error)
            assert names(tmp_path) == ["checkpoint-1"] and find_corruption(tmp_path / "checkpoint-1") is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed


# --- Two runs, and one that is killed ---


def test_a_folder_has_one_user(tmp_path):
    script = f"""if True:
        import pathlib
        from dfu_diffusers.training.checkpoints import sole_user
        with sole_user(pathlib.Path({str(tmp_path)!r})):
            pass
    """
    with sole_user(tmp_path):
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert other.returncode and "Another run writes to" in other.stderr
    with sole_user(tmp_path):
        pass


@pytest.mark.parametrize("kills", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_while_it_replaces_files_it_leaves_old_or_new_ones(tmp_path, kills):
    """SIGKILL at random moments of a loop that replaces a pipeline."""
    script = textwrap.dedent(f"""
        import itertools, pathlib
        from dfu_diffusers.training.checkpoints import replace_contents
        def save(folder):
            (folder / "unet").mkdir(parents=True)
            (folder / "unet" / "config.json").write_text(text)
            (folder / "unet" / "weights").write_text(text)
            (folder / "model_index.json").write_text(text)
        for number in itertools.count():
            text = str(number) * 5000
            replace_contents(pathlib.Path({str(tmp_path)!r}), save)
            number == 0 and print("begun", flush=True)
    """)
    random = np.random.default_rng()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        try:
            process.wait(timeout=0.3 * random.random())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        for path in ("unet/config.json", "unet/weights", "model_index.json"):
            text = (tmp_path / path).read_text()
            assert text and text == text[: len(text) // 5000] * 5000
