"""Faults injected on purpose: kills, signals, dead workers, full disks, flipped bits, hostile files.

A few of each in `make test`, many by `make test-slow`. Each test counts them, and pytest prints the counts at its end.
docs/reliability.md says what they show.
"""

import functools
import itertools
import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from forks import forked
from inject_faults import NOT_READ, READ, SmallRun, attack, interrupt_again_and_again, write_attacks
from safetensors.torch import load_file
from training_runs import run

from dfu_diffusers.training.checkpoints import CheckpointError, find_corruption, read_object, replace_contents
from examples import train_dfu

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent


def few_or(many: int, few: int = 1):
    """How often in `make test`, and in `make test-slow`."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


@pytest.fixture
def say(record_property):
    """Prints a line of counts at the end of the tests (conftest.py)."""
    return lambda text: record_property("faults", text)


@pytest.fixture
def new_run():
    """Factory of small runs in this process alone."""

    def make(steps=3):
        AcceleratorState._reset_state(reset_partial_state=True)
        return SmallRun(steps)

    return make


@pytest.fixture
def saved(new_run, tmp_path):
    """A small run and its checkpoint-3."""
    run = new_run()
    return run, run.save(tmp_path, 3)


# --- What a checkpoint holds ---


def test_the_state_comes_back_to_the_bit(saved, new_run):
    run, folder = saved
    fresh = new_run(steps=1)
    fresh.load(folder)
    for name, value in run.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value)
    before, after = run.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for index, values in before["state"].items():
        assert all(torch.equal(after["state"][index][name], value) for name, value in values.items())
    assert after["param_groups"][0]["lr"] == 1e-3 and fresh.average.average.optimization_step == 3
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


@few_or(500, 20)
def test_flipped_bits_are_noticed(saved, say, count):
    folder, random = saved[1], np.random.default_rng(0)
    files, noticed = sorted(folder.iterdir()), 0
    for number in range(count):
        path = files[number % len(files)]
        data = path.read_bytes()
        position, bit = int(random.integers(len(data))), int(random.integers(8))
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        noticed += find_corruption(folder) is not None
        path.write_bytes(data)
        assert find_corruption(folder) is None
    say(f"{count} bits of a checkpoint flipped, one at a time: {noticed} noticed")
    assert noticed == count


def test_an_average_that_is_not_finite_is_noticed(new_run):
    run = new_run()
    assert run.average.is_finite()
    run.average.average.shadow_params[-1].view(-1)[-1] = float("nan")
    assert not run.average.is_finite()


@pytest.mark.parametrize("text", ["[]", "3", "{", "null"])
def test_json_of_another_shape_is_named(saved, new_run, text):
    folder = saved[1]
    (folder / "optimizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="optimizer.json (cannot be read|must hold a JSON object)"):
        new_run().load(folder)
    (folder / "optimizer.json").write_text('{"groups": 1, "numbers": [2]}')
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        new_run().load(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_object(folder / "nowhere.json")


# --- Hostile files ---


def check_attacks(results, say, processes):
    """Results are of (name, zipped, refused, ran): no code ran, and all of our own names were refused."""
    refused = {name for name, _, refused, _ in results if refused}
    ran = [name for name, _, _, ran in results if ran]
    say(f"{len(results)} pickles that run code in a checkpoint, {processes}: {len(ran)} ran")
    assert not ran and refused == {*READ, "pytorch_model.bin", "pytorch_model_fsdp.bin"}


def test_no_file_of_a_checkpoint_runs_code(saved, new_run, tmp_path, say):
    """At every name that this package or Accelerate looks for."""
    trap, run = tmp_path / "ran", new_run()
    check_attacks(
        [
            (name, zipped, *attack(run, saved[1], name, zipped, trap))
            for name in READ + NOT_READ
            for zipped in (False, True)
        ],
        say,
        "one process",
    )


def test_the_attack_works_on_who_unpickles(saved, new_run, tmp_path, monkeypatch):
    """So that the two tests around it mean something: as Accelerate once did it."""
    trap, run = tmp_path / "ran", new_run()
    monkeypatch.setattr(SmallRun, "load", lambda self, folder: torch.load(folder / "scaler.pt", weights_only=False))
    assert attack(run, saved[1], "scaler.pt", True, trap) == (False, True)


def test_no_file_of_a_checkpoint_runs_code_in_two_processes(tmp_path, say):
    """DistributedDataParallel over gloo; each process resumes from checkpoints of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(write_attacks, (tmp_path,), num_processes=2)
    told = json.loads((tmp_path / "attacks.json").read_text())
    assert told["processes"] == 2 and told["kind"] == "MULTI_CPU"
    assert len(told["results"]) == 2 * 2 * len(READ + NOT_READ)
    check_attacks(told["results"], say, "two processes")


# --- Full disks ---


@pytest.mark.parametrize("limits", [[3_000], pytest.param(range(0, 120_000, 2_000), marks=pytest.mark.slow)])
def test_a_disk_that_fills_while_a_checkpoint_is_written(new_run, tmp_path, say, limits):
    """No file may grow beyond a limit, so that each of the writes fails for one of them."""
    run, failed = new_run(), 0
    run.save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            run.save(tmp_path, 2)
        except CheckpointError as error:
            failed += 1
            assert "checkpoint-2 could not be written" in str(error) and "checkpoint-1 is intact" in str(error)
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
            assert find_corruption(tmp_path / "checkpoint-1") is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert find_corruption(tmp_path / "checkpoint-1") is None
    say(
        f"{len(limits)} disks that fill while a checkpoint is written: {failed} errors, each of one line, nothing lost"
    )
    assert failed


# --- Kills and signals ---


@few_or(40)
def test_killed_while_it_replaces_files_it_leaves_old_or_new_ones(tmp_path, say, count):
    """SIGKILL at random moments of a loop that replaces a pipeline."""
    files, random = ("unet/config.json", "unet/weights", "model_index.json"), np.random.default_rng()

    def save(folder, number):
        (folder / "unet").mkdir(parents=True)
        for path in files:
            (folder / path).write_text(str(number) * 5000)

    def replace_again_and_again():
        for number in itertools.count():
            replace_contents(tmp_path, functools.partial(save, number=number))

    for _ in range(count):
        with forked(replace_again_and_again) as process:
            while not (tmp_path / files[-1]).exists():
                time.sleep(0.001)
            time.sleep(0.3 * random.random())
            assert process.is_alive()
        for path in files:
            text = (tmp_path / path).read_text()
            assert text and text == text[: len(text) // 5000] * 5000
    say(f"{count} kills while a pipeline is replaced: {count} left whole files")


OPTIONS = [
    "--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--resolutions", "8", "8x12", "--batch_size", "4",
    "--checkpointing_steps", "3", "--lr_scheduler", "constant", "--report_images", "1000000000", "--report_to", "none",
    "--num_validation_images", "0", "--augment_probability", "0.4",
]  # fmt: skip
ENDLESS = ["--max_train_steps", "1000000"]


def interrupt(kind, count, seconds, output, *options):
    """The training, ended so often within so many seconds of its start; see inject_faults.py."""
    return interrupt_again_and_again(kind, count, seconds, output, [*OPTIONS, *ENDLESS, *options])


def train_to(step, output, *options):
    """In this process; the weights, their average and moments of its last checkpoint."""
    run(*OPTIONS, "--max_train_steps", step, "--output_dir", output, *options)
    folder = output / f"checkpoint-{step}"
    assert find_corruption(folder) is None
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def assert_it_goes_on_to_the_bit(results, output, whole):
    """The interrupted run ends with the bits of one that never was; both go two steps further."""
    step = results["step"] + 2
    resume = ["--resume_from_checkpoint", "latest"] if results["step"] else []
    states = train_to(step, output, *resume), train_to(step, whole)
    assert all(states[0][name].keys() == states[1][name].keys() for name in states[1])
    for name, tensors in states[1].items():
        assert all(torch.equal(states[0][name][key], value) for key, value in tensors.items()), name


@few_or(40, 2)
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path, say, count):
    results = interrupt("SIGKILL", count, 3, tmp_path / "killed", "--num_workers", 1)
    assert results["ends"] == [None] * count and results["damaged"] == []
    assert_it_goes_on_to_the_bit(results, tmp_path / "killed", tmp_path / "whole")
    say(
        f"{count} kills of one training of {results['step'] + 2} steps: no checkpoint damaged, "
        "the same bits at its end"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_training_that_is_signalled_again_and_again_saves_each_time(tmp_path, say, name, count=10):
    """The small version is in test_train_resume.py. A signal before the first step ends the program as it is."""
    results = interrupt(name, count, 8, tmp_path / "stopped", "--num_workers", 1)
    returned = results["ends"].count("returned")
    early = sum(end is None or end.startswith("interrupted") for end in results["ends"])
    assert returned + early == count and returned and results["damaged"] == []
    assert results["saved"] >= returned
    assert_it_goes_on_to_the_bit(results, tmp_path / "stopped", tmp_path / "whole")
    say(
        f"{count} {name} to one training: {returned} saved the step they were in, {early} came before the first step, "
        f"the same bits at its end; the slowest took {results['slowest']:.1f} s"
    )


@pytest.mark.slow
def test_a_training_whose_workers_are_killed_says_so_and_goes_on(tmp_path, say, count=10):
    """The small version is in test_train_faults.py."""
    results = interrupt("worker", count, 3, tmp_path / "robbed", "--num_workers", 2)
    told = [end for end in results["ends"] if end and "process that loads images died" in end]
    assert len(told) == count and results["damaged"] == [] and results["slowest"] < 60
    assert_it_goes_on_to_the_bit(results, tmp_path / "robbed", tmp_path / "whole")
    say(
        f"{count} workers killed: {len(told)} errors of one line, the slowest after {results['slowest']:.1f} s, "
        "the same bits at the end"
    )
