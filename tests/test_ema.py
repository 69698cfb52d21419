"""Averages against brute force: all weights of a random walk kept, and averaged with the profile's numbers."""

import math
import os

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from torch import nn

from dfu_diffusers.training.ema import (
    HalfLifeEMA,
    PowerEMA,
    fit_profile,
    gamma_from_sigma_rel,
    profile_product,
    reconstruct,
    save_snapshot,
)

AVERAGES = {
    "half-life": lambda parameters: HalfLifeEMA(parameters, batch_size=32, halflife_images=500),
    "power": lambda parameters: PowerEMA(parameters, sigma_rel=0.1),
}


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


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25, math.sqrt(1 / 12)])
def test_power_is_the_brute_force_average(sigma_rel):
    """Step k counts what its interval [k-1, k] holds of the continuous profile; gamma 0 is the plain mean."""
    model, steps = Walker(torch.float64), 300
    ema = PowerEMA(model.parameters(), sigma_rel)
    history = track(model, [ema], steps)
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (ema.gamma + 1)
    assert (flat(ema) - edges.diff() @ history).abs().max() < 1e-12
    if ema.gamma == 0:
        assert (flat(ema) - history.mean(0)).abs().max() < 1e-12


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.05, 0.2, math.sqrt(1 / 12)])
def test_sigma_rel_is_the_deviation_of_the_profile(sigma_rel):
    gamma = gamma_from_sigma_rel(sigma_rel)
    tau = (np.arange(200_000) + 0.5) / 200_000
    profile = (gamma + 1) * tau**gamma / len(tau)
    mean = (profile * tau).sum()
    assert gamma >= 0 and profile.sum() == pytest.approx(1, rel=1e-4)
    assert math.sqrt((profile * (tau - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)


@pytest.mark.parametrize("name", AVERAGES)
def test_the_first_step_copies_and_frozen_parameters_stay(name):
    model = Walker()
    ema = AVERAGES[name](model.parameters())
    assert isinstance(ema, EMAModel)
    track(model, [ema], steps=1)
    assert (flat(ema) - model.flat()).abs().max() < 1e-6
    track(model, [ema], steps=5)
    assert torch.equal(ema.shadow_params[2], model.frozen)
    assert not torch.equal(ema.shadow_params[0], model.weight)


@pytest.mark.parametrize("name", AVERAGES)
def test_resume_is_the_uninterrupted_run_bit_for_bit(name, tmp_path):
    straight, model = Walker(), Walker()
    expected, ema = AVERAGES[name](straight.parameters()), AVERAGES[name](model.parameters())
    track(straight, [expected], steps=20)
    track(model, [ema], steps=11)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    resumed = AVERAGES[name](Walker(seed=1).walk().parameters())
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


def test_profile_product_is_the_integral():
    for t, gamma, u, delta in [(300.0, 0.0, 500.0, 2.5), (400.0, 16.97, 250.0, 6.94), (7.0, 0.3, 7.0, 0.3)]:
        m = min(t, u)
        tau = (np.arange(1_000_000) + 0.5) / 1_000_000 * m
        p = (gamma + 1) * (tau / t) ** gamma / t
        q = (delta + 1) * (tau / u) ** delta / u
        assert profile_product(t, gamma, u, delta) == pytest.approx((p * q).mean() * m, rel=1e-5)


def snapshot(ema, model, folder):
    weights = dict(zip([name for name, _ in model.named_parameters()], ema.shadow_params))
    return save_snapshot(weights, ema.sigma_rel, ema.optimization_step, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A walk of 400 steps, snapshots of two widths every 25, and the truth for other widths at steps 300 and 400."""
    folder, model, truth = tmp_path_factory.mktemp("snapshots"), Walker(), {}
    stored = [PowerEMA(model.parameters(), sigma_rel) for sigma_rel in (0.05, 0.1)]
    others = [PowerEMA(model.parameters(), sigma_rel) for sigma_rel in (0.07, 0.15)]
    for step in range(25, 401, 25):
        track(model, stored + others, steps=25)
        for ema in stored:
            snapshot(ema, model, folder)
        if step in (300, 400):
            truth |= {(ema.sigma_rel, step): flat(ema).clone() for ema in stored + others}
            truth["weights", step] = model.flat()
    return folder, truth


@pytest.mark.parametrize("sigma_rel, step", [(0.05, 400), (0.1, 300), (0.07, 400), (0.07, 300), (0.15, 400)])
def test_reconstruction_finds_averages_never_stored(run, sigma_rel, step):
    """Widths stored or not come back to float16's precision: errors of 0.02 to 0.03% of the weights, which is 0.08 to
    0.16% of the distance between the average and the last weights, that is, of what averaging changes."""
    folder, truth = run
    state, expected = reconstruct(folder, sigma_rel, step), truth[sigma_rel, step]
    error = (torch.cat([state["weight"].flatten(), state["bias"]]) - expected).norm()
    print(f"{error / expected.norm():.1e} {error / (truth['weights', step] - expected).norm():.1e}")
    assert error < 4e-4 * expected.norm()
    assert error < 3e-3 * (truth["weights", step] - expected).norm()


def test_reconstruction_leaves_constant_parameters_alone(run):
    state = reconstruct(run[0], 0.07)
    assert list(state["frozen"].shape) == [300] and {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert (state["frozen"] / Walker().frozen - 1).abs().max() < 2**-10  # float16's rounding, no more
    weights, error = fit_profile([100, 200, 300, 400] * 2, [16.97] * 4 + [6.94] * 4, 400, 10.94)
    assert weights.sum() == pytest.approx(1, abs=1e-12) and error < 0.04


def test_a_models_average_loads_back_into_it(make_model, tmp_path):
    model = make_model()
    ema = PowerEMA(model.parameters(), 0.1)
    ema.step(model.parameters())
    snapshot(ema, model, tmp_path)
    twin = make_model()
    twin.load_state_dict(reconstruct(tmp_path, 0.1))
    for parameter, expected in zip(twin.parameters(), model.parameters()):
        assert torch.equal(parameter, expected.half().float())


def test_a_poor_fit_is_said(run):
    with pytest.warns(UserWarning, match="sigma_rel=0.01 at step 400 poorly: the profile is off by"):
        reconstruct(run[0], 0.01)


def test_snapshots_are_named_typed_and_atomic(tmp_path, monkeypatch):
    model = Walker()
    ema = PowerEMA(model.parameters(), 0.05)
    track(model, [ema], steps=3)
    assert snapshot(ema, model, tmp_path / "new").name == "ema-0.05-3.safetensors"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ema-0.05-3.safetensors"]
    assert (tmp_path / "new" / "ema-0.05-3.safetensors").stat().st_size < 2 * (1000 + 7 + 300) + 1000

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        snapshot(ema, model, tmp_path / "full")
    assert not list((tmp_path / "full").iterdir())


def test_errors_of_snapshots(run, tmp_path):
    folder, _ = run
    model = Walker()
    ema = PowerEMA(model.parameters(), 0.05)
    with pytest.raises(ValueError, match="no step yet"):
        snapshot(ema, model, tmp_path)
    track(model, [ema], steps=2)
    with pytest.raises(ValueError, match="no snapshot"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ValueError, match="reach from step 1 to 400, but step 401"):
        reconstruct(folder, 0.1, step=401)
    for sigma_rel in (0, 0.29, -1, float("nan")):
        with pytest.raises(ValueError, match="sigma_rel must lie in"):
            reconstruct(folder, sigma_rel)
    snapshot(ema, model, tmp_path)
    other = nn.Linear(3, 3)
    ema_of_other = PowerEMA(other.parameters(), 0.1)
    ema_of_other.step(other.parameters())
    snapshot(ema_of_other, other, tmp_path)
    with pytest.raises(ValueError, match="different models"):
        reconstruct(tmp_path, 0.1)
    save_file({"weight": torch.zeros(1)}, tmp_path / "ema-other.safetensors")
    with pytest.raises(ValueError, match="does not say its step"):
        reconstruct(tmp_path, 0.1)
    (tmp_path / "ema-other.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="ema-other.safetensors cannot be read"):
        reconstruct(tmp_path, 0.1)
    with torch.no_grad():
        ema.shadow_params[1][3] = 7e4
    with pytest.raises(ValueError, match="average of bias reaches 7e.04"):
        snapshot(ema, model, tmp_path)


def test_rejects_settings_out_of_range():
    parameters = list(Walker().parameters())
    with pytest.raises(ValueError, match="halflife_images must be positive"):
        HalfLifeEMA(parameters, batch_size=32, halflife_images=0)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        HalfLifeEMA(parameters, batch_size=0, halflife_images=100)
    with pytest.raises(ValueError, match="rampup_ratio must be positive, or None"):
        HalfLifeEMA(parameters, batch_size=32, halflife_images=100, rampup_ratio=0.0)
    with pytest.raises(ValueError, match="sigma_rel must lie in"):
        PowerEMA(parameters, sigma_rel=0.3)
