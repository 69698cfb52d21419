"""One training step against a loop written out in full, and the averages' files."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dfu_diffusers import EDMHeunScheduler
from dfu_diffusers.training.ema import HalfLifeEMA
from dfu_diffusers.training.losses import TrainingLoss
from dfu_diffusers.training.step import WeightAverage
from examples import train_dfu


@pytest.mark.parametrize("max_pixels", [600, 200, 64])
def test_steps_equal_a_textbook_loop(tmp_path, max_pixels):
    """A step on the gradient of the mean loss of all images, clipped; whole batches against micro-batches. In float64
    but for noise levels, which are float32. By SGD: Adam would turn the rounding of a small gradient into a step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = [
        "--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--resolutions", "8", "6x9", "--batch_size", "6",
        "--max_pixels_per_batch", str(max_pixels), "--max_grad_norm", "0.5", "--output_dir", str(tmp_path),
        "--report_to", "none",
    ]  # fmt: skip
    run = train_dfu.Run(train_dfu.parse_args(options, train_dfu.CONFIGS))
    run.model.double()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    batches = ({"image": torch.stack([image(draw) for draw in draws])} for draws in run.sampler)

    textbook = copy.deepcopy(run.network)
    sgd = torch.optim.SGD(textbook.parameters(), lr=0.1, momentum=0.9)
    loss_of, whole = TrainingLoss(textbook, EDMHeunScheduler()), copy.copy(run.sampler)
    whole.max_pixels = None
    for step in range(4):
        loss, norm, stopping = run.step(step, batches, stopping=step == 2)
        (draws,) = whole.micro_batches(step)
        expected = loss_of(
            torch.stack([image(d) for d in draws]), [d.number for d in draws], whole.resolution(step)
        ).mean()
        expected.backward()
        gradient = torch.cat([p.grad.flatten() for p in textbook.parameters()])
        scale = min(1, 0.5 / (gradient.norm().item() + 1e-6))
        for p in textbook.parameters():
            p.grad *= scale
        sgd.step(), sgd.zero_grad()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        assert stopping == (step == 2)
    for ours, theirs in zip(run.model.parameters(), textbook.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def image(draw):
    generator = torch.Generator().manual_seed(draw.number)
    return 0.5 * torch.randn(3, *draw.size, generator=generator, dtype=torch.float64)


def test_the_average_is_saved_and_loaded_whole(make_model, tmp_path):
    accelerator, model = Accelerator(cpu=True), make_model()
    average = WeightAverage(accelerator, model, lambda p: HalfLifeEMA(p, 4, 100))
    for _ in range(3):
        with torch.no_grad():
            [p.add_(0.1 * torch.randn_like(p)) for p in model.parameters()]
        average.step()
    average.save(tmp_path)
    loaded = WeightAverage(accelerator, make_model(), lambda p: HalfLifeEMA(p, 4, 100))
    loaded.load(tmp_path)
    first, second = average.weights(), loaded.weights()
    assert first.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.average.optimization_step == 3
    name = "conv_in.spatial.weight"
    assert not torch.equal(first[name], model.get_parameter(name))


FREED_MEMORY = """
import resource
import torch
from dfu_diffusers.training.step import keep_freed_memory
pages = []
for step in range(8):
    assert step != 4 or keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(10 * 2**20) for _ in range(2)]  # more than the 32 MiB up to which glibc keeps any
    del tensors
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert pages[3] > 1000 and pages[7] < pages[3] / 10, pages
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept():
    """Pages that the system has to hand out for tensors like those just freed, before and after. In a fresh process:
    in this one, and in a fork of it, an earlier test may have trained, and the option cannot be taken back."""
    subprocess.run([sys.executable, "-c", FREED_MEMORY], check=True, timeout=300)
