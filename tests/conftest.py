"""Shared by all test files."""

import math
import os

import pytest
import torch
from sampling import silent

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.training import reports

pytest.register_assert_rewrite("training_runs")

# On tensors this small one thread is far faster than two, here and in processes that tests start.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def short_sheets():
    """Sheets of samples take one step: 18 would be most of the time of the tests that train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "STEPS", 1)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For tests that fork: the pool of threads does not live on in a fork, which would wait for it forever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_steps(monkeypatch):
    """Function that makes samplers hasten: whether a page runs shows after two steps."""
    set_timesteps = EDMHeunScheduler.set_timesteps

    def hasten(most=2):
        def few(scheduler, num_inference_steps=None, *args, **kwargs):
            set_timesteps(scheduler, min(num_inference_steps, most) if num_inference_steps else None, *args, **kwargs)

        monkeypatch.setattr(EDMHeunScheduler, "set_timesteps", few)

    return hasten


@pytest.fixture(scope="session")
def make_model():
    """Factory of tiny models in eval mode, `overrides` replacing constructor arguments.

    All parameters are drawn anew: those that start near zero would hide the difference that a test looks for.
    """

    def make(**overrides) -> DFUModel:
        config = dict(
            sample_size=16, block_out_channels=(8, 12, 16), layers_per_block=1, fourier_modes=((4, 3), 2, None),
            attention_levels=(1,), dropout=0.0,
        )  # fmt: skip
        return redraw(DFUModel(**{**config, **overrides})).eval()

    return make


@pytest.fixture(scope="session")
def make_refiner():
    """Factory of tiny refiners in eval mode, `overrides` replacing constructor arguments."""

    def make(**overrides) -> DFURefiner:
        config = dict(hidden_channels=8, num_layers=1, sample_size=16, coarse_size=4)
        return redraw(DFURefiner(**{**config, **overrides})).eval()

    return make


@pytest.fixture(scope="session")
def make_pipe(make_model):
    """Factory of tiny silent pipelines; keyword arguments are the model's."""

    def make(scheduler=None, **overrides) -> DFUPipeline:
        return silent(DFUPipeline(make_model(**overrides), scheduler or EDMHeunScheduler()))

    return make


def redraw(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Replace every parameter by random numbers of a size that keeps the power of features about the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
            else:  # a spectral weight is (modes, in, 2 * out)
                parameter.copy_(noise / math.sqrt(parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()))
    return module


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pytest_terminal_summary(terminalreporter):
    """What test_faults.py counted, also where the output of tests is not shown."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    calls = [report for report in reports if getattr(report, "when", None) == "call"]
    lines = [text for call in calls for name, text in call.user_properties if name == "faults"]
    if lines:
        terminalreporter.section("injected faults")
        for line in lines:
            terminalreporter.write_line(line)
