"""The average against brute force: all weights of a random walk kept, and averaged with the decays' numbers."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from dfu_diffusers.training.ema import HalfLifeEMA


def average(parameters):
    return HalfLifeEMA(parameters, batch_size=32, halflife_images=500)


class Walker(nn.Module):
    """Some parameters of different shapes that take random steps, `frozen` excepted."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.ones(40, 25, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(7, dtype=dtype))
        self.frozen = nn.Parameter(torch.linspace(0.5, 2, 300, dtype=dtype), requires_grad=False)

    @torch.no_grad()
    def walk(self):
        for parameter in (self.weight, self.bias):
            parameter += 0.1 * torch.randn(parameter.shape, generator=self.generator).to(parameter)
        return self

    def flat(self):
        return torch.cat([self.weight.detach().flatten(), self.bias.detach()]).clone()


def flat(ema):
    return torch.cat([shadow.flatten() for shadow in ema.shadow_params[:2]])


def track(model, averages, steps):
    """Weights after each step, (steps, n), while `averages` follow."""
    history = []
    for _ in range(steps):
        history.append(model.walk().flat())
        for ema in averages:
            ema.step(model.parameters())
    return torch.stack(history)


@pytest.mark.parametrize("rampup_ratio", [0.05, None])
def test_half_life_is_the_brute_force_average(rampup_ratio):
    """Step k counts (1 - d_k) d_(k+1) ... d_n, with decays written down from the images seen."""
    model = Walker(torch.float64)
    ema = HalfLifeEMA(model.parameters(), batch_size=32, halflife_images=500, rampup_ratio=rampup_ratio)
    history = track(model, [ema], steps=400)
    decays = []
    for images in range(0, 400 * 32, 32):  # seen before the step
        halflife = 500 if rampup_ratio is None else min(500, 0.05 * images)
        decays.append(0.5 ** (32 / halflife) if images else 0)
    later = np.append(np.cumprod(decays[::-1])[::-1][1:], 1)
    profile = torch.from_numpy((1 - np.array(decays)) * later)
    assert profile.sum().item() == pytest.approx(1)
    assert (flat(ema) - profile @ history).abs().max() < 1e-12


def test_weights_count_half_after_a_half_life():
    ema = HalfLifeEMA(Walker().parameters(), batch_size=50, halflife_images=1000)
    late = range(401, 421)  # 20 steps of 50 images, once the ramp-up is over: 0.05 * 400 * 50 = 1000
    assert math.prod(ema.get_decay(step) for step in late) == pytest.approx(0.5)
    assert ema.get_decay(400) < ema.get_decay(401) == ema.get_decay(10_000)


def test_the_first_step_copies_and_frozen_parameters_stay():
    model = Walker()
    ema = average(model.parameters())
    assert isinstance(ema, EMAModel)
    track(model, [ema], steps=1)
    assert (flat(ema) - model.flat()).abs().max() < 1e-6
    track(model, [ema], steps=5)
    assert torch.equal(ema.shadow_params[2], model.frozen)
    assert not torch.equal(ema.shadow_params[0], model.weight)


def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    straight, model = Walker(), Walker()
    expected, ema = average(straight.parameters()), average(model.parameters())
    track(straight, [expected], steps=20)
    track(model, [ema], steps=11)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    resumed = average(Walker(seed=1).walk().parameters())
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt"))
    track(model, [resumed], steps=9)
    assert resumed.optimization_step == expected.optimization_step == 20
    assert all(torch.equal(a, b) for a, b in zip(resumed.shadow_params, expected.shadow_params))


def test_loading_keeps_this_runs_half_life():
    model = Walker()
    saved = HalfLifeEMA(model.parameters(), batch_size=32, halflife_images=500)
    track(model, [saved], steps=3)
    ema = HalfLifeEMA(model.parameters(), batch_size=64, halflife_images=9000, rampup_ratio=None)
    ema.load_state_dict(saved.state_dict())
    assert ema.optimization_step == 3 and ema.get_decay(4) == 0.5 ** (64 / 9000)
    assert ema.shadow_params[0].data_ptr() != saved.shadow_params[0].data_ptr()


def test_averages_of_half_precision_weights_are_float32():
    """With decays near 1 an average in bfloat16 would not move at all."""
    model = Walker(torch.bfloat16)
    ema = HalfLifeEMA(model.parameters(), batch_size=1, halflife_images=10_000, rampup_ratio=None)
    history = track(model, [ema], steps=2).float()
    assert {shadow.dtype for shadow in ema.shadow_params} == {torch.float32}
    decay = 0.5**1e-4
    assert (flat(ema) - (decay * history[0] + (1 - decay) * history[1])).abs().max() < 1e-6
    assert not torch.equal(flat(ema), history[0])
    ema.copy_to(model.parameters())
    assert torch.equal(model.flat(), flat(ema).bfloat16())


def test_rejects_settings_out_of_range():
    parameters = list(Walker().parameters())
    with pytest.raises(ValueError, match="halflife_images must be positive"):
        HalfLifeEMA(parameters, batch_size=32, halflife_images=0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        HalfLifeEMA(parameters, batch_size=0, halflife_images=100)
    with pytest.raises(ValueError, match="rampup_ratio must be positive, or None"):
        HalfLifeEMA(parameters, batch_size=32, halflife_images=100, rampup_ratio=0.0)
