"""Checkpoints: whole or not there, and refused when damaged or of another model; test_faults.py does the damage."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from forks import forked

from dfu_diffusers.training.checkpoints import (
    CheckpointError,
    check_architecture,
    choose_checkpoint,
    find_checkpoints,
    find_corruption,
    replace_contents,
    save_checkpoint,
    set_aside,
    sole_user,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("step", [3, 5])  # of the second: it replaces the first, or is one too many beside it
def test_a_kill_while_one_is_removed_leaves_no_half_of_it(save, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def kill(folder, original=shutil.rmtree, **options):
        for file in Path(folder).glob("weights"):
            file.unlink()
            raise Killed
        original(folder, **options)

    save(3)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", kill)
        save(step, total_limit=1)
    assert not any(map(find_corruption, find_checkpoints(tmp_path).values()))
    save(7, total_limit=1)
    assert names(tmp_path) == ["checkpoint-7"]


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
    check_architecture(tmp_path, same)
    other = make_model(fourier_modes=(2, 2, None), conv_type="spatial")
    with pytest.raises(CheckpointError) as error:
        check_architecture(tmp_path, other)
    assert "conv_type is dual there and spatial here" in str(error.value)
    assert "fourier_modes is [[4, 3], 2, None] there and [2, 2, None] here" in str(error.value)
    assert "sample_size" not in str(error.value) and "layers_per_block" not in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["conv_type"] == "dual"


def use(folder):
    with sole_user(folder):
        pass


def test_a_folder_has_one_user(tmp_path, capfd):
    with sole_user(tmp_path), forked(use, tmp_path) as other:
        other.join()
        assert other.exitcode == 1 and "Another run writes to" in capfd.readouterr().err
    use(tmp_path)
