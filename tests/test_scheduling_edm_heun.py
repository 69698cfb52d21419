"""EDMHeunScheduler against the loops of tests/reference/edm_sampler.py, exact Gaussians and stock schedulers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import edm_sampler as ref

from dfu_diffusers.schedulers.edm_heun import EDMHeunScheduler


def network_of(denoise, sigma_data=0.5, sign=1.0):
    """The raw network F whose preconditioned output is `denoise(x, sigma)`: Table 1, written a second time."""

    def network(network_input, timestep):
        sigma = math.exp(4 * float(timestep))
        c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
        x = network_input.double() / c_in
        return (sign * (denoise(x, sigma) - c_skip * x) / c_out).to(network_input.dtype)

    return network


def run_scheduler(scheduler, network, sample, timesteps=None, generator=None):
    """The loop of a Diffusers pipeline; returns the sample after every network call."""
    path = [sample]
    for t in scheduler.timesteps if timesteps is None else timesteps:
        output = network(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
        path.append(sample)
    return path


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Schedule ---


def test_eighteen_steps_are_thirty_five_network_calls():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    calls = []
    network = network_of(ref.two_peaks_denoiser)
    run_scheduler(scheduler, lambda x, t: calls.append(float(t)) or network(x, t), draw(1, 3, 4, 4))
    assert len(calls) == 35
    assert calls == scheduler.timesteps.tolist()
    assert scheduler.step_index == 35
    assert scheduler.order == 2
    assert scheduler.num_inference_steps == 18


def test_order_two_layout_of_equation_5():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(5)
    t = ref.time_steps(5)
    expected = torch.tensor([t[0], t[1], t[1], t[2], t[2], t[3], t[3], t[4], t[4], 0.0], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=1e-6, atol=0)  # they are float32
    torch.testing.assert_close(scheduler.timesteps.double(), expected[:-1].log() / 4, rtol=1e-6, atol=1e-6)
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas[0] == 80.0
    assert scheduler.init_noise_sigma == 80.0  # exactly, and a Python float: latents keep their dtype
    assert isinstance(scheduler.init_noise_sigma, float)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("count", [2, 7, 18])
def test_levels_equal_those_of_stock_euler(schedule, count):
    stock = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0, sigma_schedule=schedule)
    ours = EDMHeunScheduler.from_config(stock.config)
    stock.set_timesteps(count)
    ours.set_timesteps(count)
    torch.testing.assert_close(ours.sigmas[::2][:count], stock.sigmas[:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.timesteps[::2], stock.timesteps, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.sigmas[1:-1:2], ours.sigmas[2::2])
    assert ours.sigmas[-1] == stock.sigmas[-1] == 0


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    s_churn=st.sampled_from([0.0, 0.1, 7.0, 40.0, 1000.0]),
    limits=st.tuples(st.floats(0, 90), st.floats(0, 90)).map(sorted),
    schedule=st.sampled_from(["karras", "exponential"]),
)
def test_churned_schedule_of_algorithm_2(count, s_churn, limits, schedule):
    scheduler = EDMHeunScheduler(sigma_schedule=schedule, s_churn=s_churn, s_tmin=limits[0], s_tmax=limits[1])
    scheduler.set_timesteps(count)
    plain = EDMHeunScheduler(sigma_schedule=schedule)
    plain.set_timesteps(count)
    levels = plain.sigmas[::2].double()
    assert scheduler.sigmas.shape == (2 * count,)
    assert scheduler.timesteps.shape == (2 * count - 1,)
    assert scheduler.sigmas[-1] == 0
    correctors = scheduler.sigmas[1:-1:2].double()
    torch.testing.assert_close(correctors, levels[1:], rtol=1e-6, atol=0)  # not churned; rounded, as all levels here
    rounded = torch.tensor(limits, dtype=torch.float32).tolist()  # levels are float32: so are comparisons with them
    gammas = torch.tensor(ref.churn_factors(levels.tolist() + [0.0], s_churn, *rounded), dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigmas[::2].double(), levels * (1 + gammas), rtol=1e-6, atol=0)
    told = torch.exp(4 * scheduler.timesteps.double())
    torch.testing.assert_close(told, scheduler.sigmas[:-1].double(), rtol=4e-6, atol=0)  # exp enlarges the rounding


def test_churn_limits_include_the_levels_they_name():
    for low, high in [
        (0.002, 80.0),
        (0.3, 7.7),
        (0.004, 14.2),
    ]:  # float64 rounding takes the last pair's levels outside
        scheduler = EDMHeunScheduler(sigma_min=low, sigma_max=high, s_tmin=low, s_tmax=high, s_churn=1e6)
        scheduler.set_timesteps(9)
        levels = torch.cat([torch.tensor([high]), scheduler.sigmas[1:-1:2]])
        torch.testing.assert_close(scheduler.sigmas[::2], levels * math.sqrt(2))


def test_single_level_starts_at_sigma_max():
    for schedule in ["karras", "exponential"]:  # stock's exponential schedule gives sigma_min here
        scheduler = EDMHeunScheduler(sigma_schedule=schedule)
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == [80.0, 0.0]


def test_schedule_ignores_the_default_device():
    with torch.device("meta"):
        scheduler = EDMHeunScheduler(s_churn=5.0)
        scheduler.set_timesteps(3)
    assert scheduler.sigmas.device.type == "cpu"
    assert scheduler.timesteps.device.type == "cpu"
    scheduler.set_timesteps(3, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"


def test_final_sigma_min_keeps_the_lowest_noise():
    scheduler = EDMHeunScheduler(final_sigmas_type="sigma_min", sigma_min=0.1)
    scheduler.set_timesteps(6)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2] == torch.tensor(0.1)
    path = run_scheduler(scheduler, network_of(ref.two_peaks_denoiser), 80 * draw(1, 1, 4, 4))
    assert len(path) == 12
    torch.testing.assert_close(path[-1], path[-2])
    assert scheduler.state_in_first_order  # the last call completed its step
    t = ref.time_steps(6, sigma_min=0.1)[:-1]
    expected = ref.algorithm_1(ref.two_peaks_denoiser, path[0], t)[-1]
    torch.testing.assert_close(path[-1], expected, rtol=1e-5, atol=1e-5)


# --- Custom noise levels ---


@pytest.mark.parametrize("final", [[], [0.0]])
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64).numpy()])
def test_custom_sigmas_are_noise_levels(kind, final):
    scheduler = EDMHeunScheduler(s_churn=0.6, s_tmin=0.5, s_tmax=5.0)
    scheduler.set_timesteps(sigmas=kind([10.0, 4.0, 0.25] + final), device="cpu")
    expected = torch.tensor([10.0, 4.0, 4.8, 0.25, 0.25, 0.0])  # gamma = 0.6 / 3
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=1e-6, atol=0)  # both are float32
    assert len(scheduler.timesteps) == 5
    assert scheduler.num_inference_steps == 3
    assert scheduler.init_noise_sigma == 10.0


def test_explicit_final_zero_overrides_final_sigmas_type():
    scheduler = EDMHeunScheduler(final_sigmas_type="sigma_min")
    scheduler.set_timesteps(2, sigmas=[3.0, 1.0, 0.0])
    assert scheduler.sigmas.tolist() == [3.0, 1.0, 1.0, 0.0]
    scheduler.set_timesteps(2, sigmas=[3.0, 1.0])
    assert scheduler.sigmas.tolist() == [3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "sigmas",
    [[], [0.0], [1.0, 2.0], [2.0, 2.0], [2.0, 2.0 - 1e-9], [2.0, -1.0], [2.0, 0.0, 0.0], [math.nan], [math.inf, 1.0]]
    + [[[2.0, 1.0]], 2.0, [2.0, math.nan], [1.0, 1e-60]],
)
def test_bad_sigmas_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas"):
        EDMHeunScheduler().set_timesteps(sigmas=sigmas)


@pytest.mark.parametrize("arguments", [{}, {"num_inference_steps": 3, "sigmas": [2.0, 1.0]}])
@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "18"])
def test_bad_step_counts_are_refused(arguments, steps):
    with pytest.raises(ValueError, match="num_inference_steps"):
        EDMHeunScheduler().set_timesteps(**arguments)
    with pytest.raises(ValueError, match="num_inference_steps"):
        EDMHeunScheduler().set_timesteps(steps)


# --- Algorithm 1 ---


def test_trajectory_equals_algorithm_1():
    x = 80 * draw(2, 3, 5, 6)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    ours = run_scheduler(scheduler, network_of(ref.two_peaks_denoiser), x)
    textbook = ref.algorithm_1(ref.two_peaks_denoiser, x, ref.time_steps(18))
    assert len(textbook) == 19
    for i, expected in enumerate(textbook):  # x_i is the sample after call 2i - 1, x_N that after the last call
        torch.testing.assert_close(ours[min(2 * i, 35)], expected, rtol=1e-5, atol=1e-5)  # levels are float32
    assert ours[-1].abs().mean() > 0.5  # the peaks are at -1 and 1: the loop did denoise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rounding_is_not_amplified_at_low_noise(prediction_type):
    """The corrector at sigma 0.002 makes a step of 80: a slope that lost digits there would ruin two-step samples."""
    ends = {}
    for dtype in (torch.float32, torch.float64):
        scheduler = EDMHeunScheduler(prediction_type=prediction_type)
        scheduler.set_timesteps(2)
        sample = draw(1, 3, 16, 16).to(dtype) * scheduler.init_noise_sigma
        output = draw(1, 3, 16, 16, seed=1).to(dtype)  # a network that does not depend on the sample and its rounding
        ends[dtype] = run_scheduler(scheduler, lambda x, t, output=output: output, sample)[-1]
    assert (ends[torch.float32] - ends[torch.float64]).abs().max() < 5e-5


def test_trajectory_equals_algorithm_1_to_rounding_on_the_same_levels():
    """Storing levels in float32 (as stock does) is the only difference: on these very levels agreement is exact."""
    x = 80 * draw(1, 1, 5, 6)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(18)
    by_time = {float(t): float(s) for t, s in zip(scheduler.timesteps, scheduler.sigmas[:-1])}

    def network(network_input, t):  # told exactly which level it is at
        sigma = by_time[float(t)]
        norm = math.sqrt(sigma**2 + 0.25)
        x = network_input * norm
        return (ref.two_peaks_denoiser(x, sigma) - 0.25 / norm**2 * x) / (0.5 * sigma / norm)

    ours = run_scheduler(scheduler, network, x)
    levels = scheduler.sigmas[::2].tolist() + [0.0]
    textbook = ref.algorithm_1(ref.two_peaks_denoiser, x, levels)
    torch.testing.assert_close(ours[-1], textbook[-1], rtol=1e-9, atol=1e-9)  # in float64, from noise of 80


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    sigma_data=st.sampled_from([0.1, 0.5, 1.0, 2.3]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    schedule=st.sampled_from([(0.002, 80.0, 7.0), (0.05, 20.0, 1.0), (0.5, 3.0, 3.0)]),
)
def test_algorithm_1_for_any_settings(count, sigma_data, prediction, schedule):
    sigma_min, sigma_max, rho = schedule
    scheduler = EDMHeunScheduler(
        sigma_min=sigma_min, sigma_max=sigma_max, rho=rho, sigma_data=sigma_data, prediction_type=prediction
    )
    scheduler.set_timesteps(count)
    x = scheduler.init_noise_sigma * draw(1, 1, 3, 4)
    network = network_of(ref.two_peaks_denoiser, sigma_data, sign=1.0 if prediction == "epsilon" else -1.0)
    result = run_scheduler(scheduler, network, x)[-1]
    expected = ref.algorithm_1(ref.two_peaks_denoiser, x, ref.time_steps(count, sigma_min, sigma_max, rho))[-1]
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)


def test_heun_converges_at_second_order_and_euler_does_not():
    x = 80 * draw(1, 1, 8, 8)
    exact = ref.gaussian_flow(x, 80.0, 0.002, variance=0.3, mean=0.2)
    network = network_of(lambda x, sigma: ref.gaussian_denoiser(x, sigma, variance=0.3, mean=0.2))

    def errors(scheduler_class):
        scheduler = scheduler_class(final_sigmas_type="sigma_min")  # stop at sigma_min: the last Euler step is no-op
        found = []
        for count in [16, 32, 64, 128]:
            scheduler.set_timesteps(count)
            found.append((run_scheduler(scheduler, network, x)[-1] - exact).abs().max().item())
        return torch.tensor(found)

    heun, euler = errors(EDMHeunScheduler), errors(EDMEulerScheduler)
    heun_ratios, euler_ratios = heun[:-1] / heun[1:], euler[:-1] / euler[1:]
    assert (heun_ratios > 3.0).all(), f"{heun=}"
    assert (euler_ratios < 2.5).all(), f"{euler=}"
    assert heun[-1] < 2e-3


# --- Algorithm 2 ---


@pytest.mark.parametrize("s_noise", [1.0, 1.007])
@pytest.mark.parametrize("s_churn", [2.0, 40.0])
def test_churn_equals_algorithm_2_with_the_same_noise(s_churn, s_noise):
    """s_tmax lies below sigma_max: step 0 has no churn, and every later draw comes from the generator."""
    scheduler = EDMHeunScheduler(s_churn=s_churn, s_tmin=0.05, s_tmax=50.0, s_noise=s_noise)
    scheduler.set_timesteps(18)
    x = 80 * draw(2, 1, 4, 5)
    generator = torch.Generator().manual_seed(5)
    ours = run_scheduler(scheduler, network_of(ref.two_peaks_denoiser), x, generator=generator)

    generator = torch.Generator().manual_seed(5)
    drawn_at = []

    def unit_noise(i):
        drawn_at.append(i)
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).double()

    t = ref.time_steps(18)
    textbook = ref.algorithm_2(ref.two_peaks_denoiser, x, t, s_churn, 0.05, 50.0, s_noise, unit_noise)
    assert drawn_at == [i for i in range(18) if 0.05 <= t[i] <= 50.0]
    assert len(drawn_at) > 8
    torch.testing.assert_close(ours[-1], textbook[-1], rtol=1e-5, atol=1e-5)
    for i in range(18):  # each step's start; where it is churned ours holds x_hat, which the next test covers
        if i not in drawn_at:
            torch.testing.assert_close(ours[2 * i], textbook[i], rtol=1e-5, atol=1e-5)
    plain = ref.algorithm_1(ref.two_peaks_denoiser, x, t)[-1]
    assert (plain - textbook[-1]).abs().max() > 1e-2  # the churn mattered


def test_churn_noise_of_a_noise_sampler():
    """The same noise by a function of the shape gives the same path, and the generator is not touched."""
    network, x = network_of(ref.two_peaks_denoiser), 80 * draw(2, 1, 4, 5)
    scheduler = EDMHeunScheduler(s_churn=20.0, s_tmax=50.0)
    scheduler.set_timesteps(9)
    expected = run_scheduler(scheduler, network, x, generator=torch.Generator().manual_seed(5))[-1]

    source, untouched, shapes = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6), []

    def noise_sampler(shape):
        shapes.append(tuple(shape))
        return torch.randn(shape, generator=source)

    scheduler.set_timesteps(9)
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=untouched, noise_sampler=noise_sampler).prev_sample
    torch.testing.assert_close(x, expected)
    assert set(shapes) == {(2, 1, 4, 5)} and len(shapes) > 3
    assert torch.equal(untouched.get_state(), torch.Generator().manual_seed(6).get_state())


def test_network_is_called_at_the_raised_level_after_the_noise():
    """With D = 0 the sample is white noise, of the very level told at every predictor call."""
    scheduler = EDMHeunScheduler(s_churn=9.0)
    scheduler.set_timesteps(10)
    network = network_of(lambda x, sigma: 0 * x)
    x = scheduler.init_noise_sigma * draw(1, 1, 200, 200)
    generator = torch.Generator().manual_seed(1)
    path = run_scheduler(scheduler, network, x, generator=generator)
    ratios = torch.stack(path[:-1])[::2].std(dim=(1, 2, 3, 4)) / scheduler.sigmas[::2]
    assert (ratios - 1).abs().max() < 0.02, ratios


@pytest.mark.parametrize("s_churn, s_noise, s_tmax", [(30.0, 1.0, None), (30.0, 1.1, None), (4.0, 1.0, 1.0)])
def test_churned_variance_is_that_of_algorithm_2(s_churn, s_noise, s_tmax):
    """Statistics, with churn at step 0 too: for Gaussian data Algorithm 2's result has a variance known exactly."""
    scheduler = EDMHeunScheduler(s_churn=s_churn, s_noise=s_noise, s_tmax=s_tmax)
    scheduler.set_timesteps(6)
    count = 200_000
    x = scheduler.init_noise_sigma * draw(count, dtype=torch.float32)
    network = network_of(lambda x, sigma: ref.gaussian_denoiser(x, sigma, variance=0.3))
    result = run_scheduler(scheduler, network, x, generator=torch.Generator().manual_seed(2))[-1].double()
    limit = math.inf if s_tmax is None else s_tmax
    expected = ref.algorithm_2_variance(0.3, ref.time_steps(6), s_churn, 0.0, limit, s_noise)
    assert result.mean().abs() < 5 * math.sqrt(expected / count)
    assert abs(result.var().item() / expected - 1) < 5 * math.sqrt(2 / count)


def test_initial_noise_includes_the_churn_of_step_0():
    scheduler = EDMHeunScheduler(s_churn=1e6, s_noise=1.5, s_tmin=79.0)
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(80**2 + 1.5**2 * 80**2), rel=1e-6)
    assert scheduler.sigmas[0].item() == pytest.approx(80 * math.sqrt(2))
    scheduler = EDMHeunScheduler(s_churn=1e6, s_noise=1.5, s_tmax=79.0)
    scheduler.set_timesteps(4)
    assert scheduler.init_noise_sigma == 80.0


def test_without_churn_no_noise_is_drawn():
    scheduler = EDMHeunScheduler(s_noise=1.5)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    run_scheduler(scheduler, network_of(ref.two_peaks_denoiser), 80 * draw(1, 1, 4, 4), generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_each_image_follows_its_own_generator():
    network = network_of(ref.two_peaks_denoiser)
    x = 80 * draw(3, 1, 4, 4, dtype=torch.float32)

    def run(images):
        scheduler = EDMHeunScheduler(s_churn=20.0)
        scheduler.set_timesteps(8)
        generators = [torch.Generator().manual_seed(100 + i) for i in images]
        return run_scheduler(scheduler, network, x[list(images)], generator=generators)[-1]

    together = run([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(run([i])[0], together[i], rtol=0, atol=1e-4)  # float32 rounds a noise of 80 by 4e-6
    torch.testing.assert_close(run([2, 0]), together[[2, 0]], rtol=0, atol=1e-4)
    x[1] = x[0]
    same_start = run([0, 1])
    assert (same_start[0] - same_start[1]).abs().max() > 1e-3


def test_churn_noise_does_not_depend_on_the_dtype():
    network = network_of(ref.two_peaks_denoiser)
    results = []
    for dtype in [torch.float32, torch.float64]:
        scheduler = EDMHeunScheduler(s_churn=20.0)
        scheduler.set_timesteps(8)
        x = 80 * draw(1, 1, 4, 4, dtype=torch.float32).to(dtype)
        results.append(run_scheduler(scheduler, network, x, generator=torch.Generator().manual_seed(4))[-1])
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-3, atol=1e-3)


# --- Gaussian random fields at several sizes ---


@pytest.mark.parametrize("size", [(16, 16), (33, 33), (24, 40)])
def test_power_spectrum_of_a_gaussian_random_field(size):
    spectrum = ref.power_spectrum(*size)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(64)  # Heun's own error raises the spectrum by 1 % here (and by 9 to 19 % at 18 levels)
    network = network_of(lambda x, sigma: ref.field_denoiser(x, sigma, spectrum))
    count = 256
    noise = draw(count, 1, *size, dtype=torch.float32)
    samples = run_scheduler(scheduler, network, scheduler.init_noise_sigma * noise)[-1]
    power = torch.fft.fft2(samples.double(), norm="ortho").abs().square()[:, 0]

    ratio = power.mean(dim=0) / spectrum  # mode by mode; real modes (at Nyquist, constant) scatter the most
    assert (ratio - 1).abs().max() < 5.5 * math.sqrt(2 / count), ratio
    assert abs(ratio.mean().item() - 1) < 5 * math.sqrt(2 / (count * spectrum.numel())) + 0.015

    # Without statistics: the sampler multiplies every mode by a number, whose square is the spectrum over 80^2 + it.
    gain = power / (80 * torch.fft.fft2(noise.double(), norm="ortho").abs()[:, 0]).square()
    torch.testing.assert_close(gain.median(dim=0).values, spectrum / (spectrum + 80**2), rtol=0.015, atol=0)


# --- Dtypes ---


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_loop_stays_finite_and_close(dtype, tolerance, s_churn):
    network = network_of(lambda x, sigma: ref.gaussian_denoiser(x, sigma, variance=0.3))
    x = 80 * draw(2, 3, 8, 8, dtype=torch.float32)
    results = []
    for kind in [torch.float32, dtype]:
        scheduler = EDMHeunScheduler(s_churn=s_churn)
        scheduler.set_timesteps(18)
        path = run_scheduler(scheduler, network, x.to(kind), generator=torch.Generator().manual_seed(0))
        assert all(sample.dtype == kind and sample.isfinite().all() for sample in path)
        results.append(path[-1].float())
    assert (results[0] - results[1]).abs().max() < tolerance


def test_half_precision_network_with_float32_samples():
    """The usual mix: samples stay in float32, the step is computed in float32, only the network rounds."""
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(1)
    x = draw(1, 1, 4, 4, dtype=torch.float32)
    output = draw(1, 1, 4, 4, seed=1, dtype=torch.float16)
    result = scheduler.step(output, scheduler.timesteps[0], x)
    assert result.prev_sample.dtype == result.pred_original_sample.dtype == torch.float32
    expected = scheduler.precondition_outputs(x, output.float(), 80.0)
    torch.testing.assert_close(result.prev_sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_step_rounds_once(dtype):
    """Both halves of a Heun step are computed in float32: on the same inputs only the result is rounded."""
    half, full = EDMHeunScheduler(), EDMHeunScheduler()
    x, outputs = (10 * draw(1, 1, 8, 8)).to(dtype), draw(2, 1, 1, 8, 8, seed=1).to(dtype)
    for scheduler in (half, full):
        scheduler.set_timesteps(sigmas=[10.0, 3.0, 1.0])
    for t, output in zip(half.timesteps, outputs):
        result = half.step(output, t, x)
        expected = full.step(output.float(), t, x.float())
        # Rounding once is off by half an eps at most, twice by more. Some 1e-5 are float32's own rounding.
        once = dict(rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)
        torch.testing.assert_close(result.prev_sample.float(), expected.prev_sample, **once)
        torch.testing.assert_close(result.pred_original_sample.float(), expected.pred_original_sample, **once)
        x = result.prev_sample


# --- Preconditioning ---


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_preconditioning_meets_its_design_goals(sigma_data):
    """Section 5 and appendix B.6: unit-variance input and target, and a weight that cancels c_out^2."""
    scheduler = EDMHeunScheduler(sigma_data=sigma_data)
    sigma = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)[:, None, None, None]
    images, noise = sigma_data * draw(4, 1, 200, 200), draw(4, 1, 200, 200, seed=1)
    noisy = images + sigma * noise
    spread = scheduler.precondition_inputs(noisy, sigma).std(dim=(1, 2, 3))
    torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0.02, atol=0)
    skipped = scheduler.precondition_outputs(noisy, torch.zeros_like(noisy), sigma)
    c_out = scheduler.precondition_outputs(0 * noisy, torch.ones_like(noisy), sigma)
    target = (images - skipped) / c_out
    torch.testing.assert_close(target.std(dim=(1, 2, 3)), torch.ones_like(spread), rtol=0.02, atol=0)
    weighted = scheduler.loss_weight(sigma) * c_out.square()
    torch.testing.assert_close(weighted, torch.ones_like(weighted), rtol=1e-12, atol=0)
    correlation = (target * noisy).mean(dim=(1, 2, 3)) / noisy.std(dim=(1, 2, 3))
    assert correlation.abs().max() < 0.02  # c_skip leaves nothing linear to predict


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
def test_preconditioning_equals_stock(sigma, prediction_type):
    stock = EDMEulerScheduler(sigma_data=0.8, prediction_type=prediction_type)
    ours = EDMHeunScheduler.from_config(stock.config)
    x, output = draw(2, 1, 3, 3), draw(2, 1, 3, 3, seed=1)
    column = torch.full((2, 1, 1, 1), sigma, dtype=torch.float64)
    for level in [sigma, column]:
        torch.testing.assert_close(ours.precondition_inputs(x, level), stock.precondition_inputs(x, level))
        torch.testing.assert_close(
            ours.precondition_outputs(x, output, level), stock.precondition_outputs(x, output, level)
        )
    torch.testing.assert_close(ours.precondition_noise(column), stock.precondition_noise(column))
    assert ours.precondition_noise(sigma).shape == ()
    assert ours.precondition_noise(sigma).item() == pytest.approx(math.log(sigma) / 4, rel=1e-6)
    assert ours.loss_weight(2.0) == pytest.approx((4 + 0.64) / (2 * 0.8) ** 2)


def test_v_prediction_recovers_the_image_from_its_velocity():
    scheduler = EDMHeunScheduler(sigma_data=0.8, prediction_type="v_prediction")
    image, noise, sigma = draw(1, 1, 4, 4), draw(1, 1, 4, 4, seed=1), 1.3
    norm = math.sqrt(sigma**2 + 0.8**2)
    velocity = 0.8 / norm * noise - sigma / norm * image / 0.8
    torch.testing.assert_close(scheduler.precondition_outputs(image + sigma * noise, velocity, sigma), image)


# --- The Diffusers interface ---


def test_scale_model_input_follows_the_calls():
    scheduler = EDMHeunScheduler(sigma_data=0.3, s_churn=3.0)
    scheduler.set_timesteps(3)
    x = draw(1, 1, 2, 2)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        torch.testing.assert_close(scheduler.scale_model_input(x, t), x / math.sqrt(sigma**2 + 0.09))
        scheduler.step(x, t, x, generator=torch.Generator())


def test_step_returns_an_output_or_a_tuple_with_the_denoised_image():
    scheduler = EDMHeunScheduler()
    x = draw(1, 1, 3, 3)
    network = network_of(ref.two_peaks_denoiser)
    for return_dict in [True, False]:
        scheduler.set_timesteps(4)
        sample = 80 * x
        for index, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(sample, t), t)
            result = scheduler.step(output, t, sample, return_dict=return_dict)
            assert isinstance(result, tuple) is not return_dict
            prev_sample, denoised = (result["prev_sample"], result.pred_original_sample) if return_dict else result
            expected = ref.two_peaks_denoiser(sample, scheduler.sigmas[index].item())
            torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)
            sample = prev_sample
        expected = ref.algorithm_1(ref.two_peaks_denoiser, 80 * x, ref.time_steps(4))[-1]
        torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)  # levels are float32


@pytest.mark.parametrize("timestep", [0, True, torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
def test_integer_timesteps_are_refused(timestep):
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(4)
    x = draw(1, 1, 2, 2)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    with pytest.raises(ValueError, match=r"integer.*scheduler\.timesteps"):
        scheduler.step(x, timestep, x)


def test_python_float_timesteps_work():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(4)
    x = 80 * draw(1, 1, 2, 2)
    network = network_of(ref.two_peaks_denoiser)
    by_float = run_scheduler(scheduler, network, x, scheduler.timesteps.tolist())[-1]
    scheduler.set_timesteps(4)
    torch.testing.assert_close(by_float, run_scheduler(scheduler, network, x)[-1])


def test_set_timesteps_forgets_an_interrupted_run():
    network, x = network_of(ref.two_peaks_denoiser), 80 * draw(1, 1, 3, 3)
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(5)
    expected = run_scheduler(scheduler, network, x)[-1]
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    run_scheduler(scheduler, network, x, scheduler.timesteps[2:3])
    assert not scheduler.state_in_first_order
    scheduler.set_timesteps(5)
    assert scheduler.state_in_first_order
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    assert torch.equal(run_scheduler(scheduler, network, x)[-1], expected)


def test_a_finished_schedule_says_so():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(2)
    x = draw(1, 1, 2, 2)
    run_scheduler(scheduler, lambda x, t: x, x)
    for call in [lambda t: scheduler.step(x, t, x), lambda t: scheduler.scale_model_input(x, t)]:
        with pytest.raises(ValueError, match="set_timesteps"):
            call(scheduler.timesteps[0])


def test_step_warns_once_without_scale_model_input(caplog):
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(2)
    x = draw(1, 1, 2, 2)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    assert sum("scale_model_input" in record.message for record in caplog.records) == 1


# --- Starting in the middle ---


@pytest.mark.parametrize("begin_index_set", [True, False])
@pytest.mark.parametrize("s_churn", [0.0, 20.0])
@pytest.mark.parametrize("start", [0, 3, 6])
def test_starting_in_the_middle(start, s_churn, begin_index_set):
    """As an img2img pipeline does: noise the image to timesteps[start * order], then run the rest."""
    scheduler = EDMHeunScheduler(s_churn=s_churn)
    scheduler.set_timesteps(7)
    t = ref.time_steps(7)
    timesteps = scheduler.timesteps[start * scheduler.order :]
    if begin_index_set:
        scheduler.set_begin_index(start * scheduler.order)
        assert scheduler.begin_index == 2 * start
    image, noise = draw(2, 1, 3, 3), draw(2, 1, 3, 3, seed=1)
    x = scheduler.add_noise(image, noise, timesteps[:1].repeat(2))
    gamma = min(s_churn / 7, math.sqrt(2) - 1)
    torch.testing.assert_close(x, image + t[start] * (1 + gamma) * noise, rtol=0, atol=1e-4)  # float32 levels to 113

    network = network_of(ref.two_peaks_denoiser)
    result = run_scheduler(scheduler, network, x, timesteps, torch.Generator().manual_seed(6))[-1]
    generator = torch.Generator().manual_seed(6)
    fresh = [torch.randn(x.shape, generator=generator, dtype=torch.float32).double() for _ in range(start + 1, 7)]
    if s_churn == 0:
        expected = ref.algorithm_1(ref.two_peaks_denoiser, x, t[start:])[-1]
    else:  # Algorithm 2 divides s_churn by its number of steps, here 7 - start; its first noise is part of x
        first = (x - image) / (t[start] * (1 + gamma))
        x_start = image + t[start] * first
        first_noise = (x - x_start) / (t[start] * math.sqrt((1 + gamma) ** 2 - 1))
        draws = [first_noise] + fresh
        expected = ref.algorithm_2(
            ref.two_peaks_denoiser, x_start, t[start:], gamma * (7 - start), unit_noise=lambda i: draws[i]
        )[-1]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_index_for_timestep_takes_the_predictor_of_equal_timesteps():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(4)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 2, 2, 4, 4, 6, 6]
    assert scheduler.index_for_timestep(scheduler.timesteps[3].item()) == 4
    churned = EDMHeunScheduler(s_churn=1.0)
    churned.set_timesteps(4)
    assert [churned.index_for_timestep(t) for t in churned.timesteps] == list(range(7))
    with pytest.raises(ValueError, match="not in this schedule"):
        scheduler.index_for_timestep(0.123)


def test_a_run_cannot_begin_with_a_corrector():
    scheduler = EDMHeunScheduler(s_churn=1.0)
    scheduler.set_timesteps(4)
    for index in [-2, 3]:
        with pytest.raises(ValueError, match="begin"):
            scheduler.set_begin_index(index)
    with pytest.raises(ValueError, match="begin"):
        scheduler.scale_model_input(draw(1, 1, 2, 2), scheduler.timesteps[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_add_noise_takes_one_timestep_per_image(dtype):
    scheduler = EDMHeunScheduler(s_churn=1e6, s_tmax=10.0, s_noise=1.2)
    scheduler.set_timesteps(6)
    t = torch.tensor(ref.time_steps(6), dtype=torch.float64)
    image, noise = draw(3, 2, 3, 3).to(dtype), draw(3, 2, 3, 3, seed=1).to(dtype)
    noisy = scheduler.add_noise(image, noise, scheduler.timesteps[[0, 5, 8]])
    assert noisy.dtype == dtype
    # call 0: level 0, not churned; call 5: corrector at level 3; call 8: predictor at level 4, churned
    std = torch.stack([t[0], t[3], (t[4] ** 2 + 1.2**2 * t[4] ** 2).sqrt()])[:, None, None, None]
    expected = (image.double() + std * noise.double()).to(dtype)
    torch.testing.assert_close(noisy, expected)

    alone = scheduler.add_noise(image[:1], noise[:1], scheduler.timesteps[0])  # a 0-d timestep serves all images
    torch.testing.assert_close(alone, noisy[:1])

    scheduler.set_begin_index(4)  # img2img: the begin index decides
    expected = image.double() + math.sqrt(1 + 1.2**2) * t[2] * noise.double()
    torch.testing.assert_close(
        scheduler.add_noise(image, noise, scheduler.timesteps[:1].repeat(3)), expected.to(dtype)
    )
    x = draw(1, 1, 2, 2)
    scheduler.step(x, scheduler.timesteps[4], x)  # inpainting: later, the running step does
    expected = image.double() + t[3] * noise.double()
    torch.testing.assert_close(
        scheduler.add_noise(image, noise, scheduler.timesteps[:1].repeat(3)), expected.to(dtype)
    )


# --- Config, saving, interchange ---


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


def public_config(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def test_defaults_equal_those_of_stock_euler():
    stock, ours = public_config(EDMEulerScheduler()), public_config(EDMHeunScheduler())
    assert {k: ours[k] for k in stock} == stock
    assert {k: v for k, v in ours.items() if k not in stock} == {
        "s_churn": 0.0,
        "s_tmin": 0.0,
        "s_tmax": None,
        "s_noise": 1.0,
    }
    assert len(EDMHeunScheduler(num_train_timesteps=77)) == 77


@pytest.mark.parametrize("s_tmax, saved", [(math.inf, None), (None, None), (50.0, 50.0)])
def test_save_and_load(tmp_path, s_tmax, saved):
    scheduler = EDMHeunScheduler(sigma_max=60, s_churn=10.0, s_tmin=0.1, s_tmax=s_tmax, s_noise=1.003, rho=5.0)
    scheduler.save_pretrained(tmp_path)
    written = strict_json(tmp_path / "scheduler_config.json")
    assert written["_class_name"] == "EDMHeunScheduler"
    assert written["s_tmax"] == saved
    loaded = EDMHeunScheduler.from_pretrained(tmp_path)
    assert public_config(loaded) == public_config(scheduler)
    loaded.set_timesteps(12)
    scheduler.set_timesteps(12)
    assert torch.equal(loaded.sigmas, scheduler.sigmas)
    assert loaded.init_noise_sigma == scheduler.init_noise_sigma


@pytest.mark.parametrize("stock_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_interchange_with_stock_schedulers(stock_class):
    """from_config both ways keeps the levels, and both samplers find the same image on the same loop."""
    stock = stock_class(sigma_min=0.01, sigma_max=40.0, sigma_data=0.7, rho=6.0, prediction_type="v_prediction")
    ours = EDMHeunScheduler.from_config(stock.config)
    back = stock_class.from_config(ours.config)
    names = ["sigma_min", "sigma_max", "sigma_data", "rho", "prediction_type", "sigma_schedule", "final_sigmas_type"]
    assert [ours.config[n] for n in names] == [stock.config[n] for n in names] == [back.config[n] for n in names]

    x = 40 * draw(1, 1, 6, 6, dtype=torch.float32)
    network = network_of(lambda x, sigma: ref.gaussian_denoiser(x, sigma, variance=0.3), sigma_data=0.7, sign=-1.0)
    exact = ref.gaussian_flow(x.double(), 40.0, 0.0, variance=0.3)
    for scheduler, count in [(stock, 200), (back, 200), (ours, 40)]:
        scheduler.set_timesteps(count)
        result = run_scheduler(scheduler, network, x)[-1]
        assert (result - exact).abs().max() < 0.02, scheduler.__class__


def test_settings_of_other_schedulers_survive_a_detour():
    dpm = EDMDPMSolverMultistepScheduler(solver_order=3, euler_at_final=True)
    back = EDMDPMSolverMultistepScheduler.from_config(EDMHeunScheduler.from_config(dpm.config).config)
    assert back.config.solver_order == 3
    assert back.config.euler_at_final is True
    assert {c.__name__ for c in EDMHeunScheduler().compatibles} >= {
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    }


@pytest.mark.parametrize(
    "name, value",
    [("sigma_min", v) for v in (0, -1.0, math.nan, "0.1", True, 80.0, 90.0, 1e-60)]
    + [("sigma_max", v) for v in (0.002, 0.001, math.inf, math.nan, None, 1e38)]
    + [("sigma_data", v) for v in (0.0, -0.5, math.inf, torch.tensor([0.5]))]
    + [("rho", v) for v in (0, -7.0, 1e9, math.nan)]
    + [("s_churn", v) for v in (-1.0, math.inf, math.nan, None)]
    + [("s_tmin", v) for v in (-0.1, math.inf, math.nan, np.bool_(True))]
    + [("s_tmax", v) for v in (-1.0, math.nan, -math.inf, "inf")]
    + [("s_noise", v) for v in (0.0, -1.0, math.nan, math.inf)]
    + [("num_train_timesteps", v) for v in (0, -5, 10.0, True)]
    + [("sigma_schedule", v) for v in ("linear", None)]
    + [("prediction_type", v) for v in ("sample", "v")]
    + [("final_sigmas_type", v) for v in ("one", 0)],
)
def test_constructor_refuses(name, value):
    with pytest.raises(ValueError) as error:
        EDMHeunScheduler(**{name: value})
    named = "sigma_max" if name == "sigma_min" and value in (80.0, 90.0) else name  # these clash with sigma_max
    assert f"`{named}`" in str(error.value)
    assert repr(value) in str(error.value) or named != name


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_are_numbers(number, tmp_path):
    scheduler = EDMHeunScheduler(sigma_max=number(64.0), s_tmax=number(32.0), num_train_timesteps=np.int64(9))
    scheduler.save_pretrained(tmp_path)
    assert strict_json(tmp_path / "scheduler_config.json")["sigma_max"] == 64
    expected = EDMHeunScheduler(sigma_max=64.0, s_tmax=32.0, num_train_timesteps=9)
    assert (
        public_config(scheduler)
        == public_config(expected)
        == public_config(EDMHeunScheduler.from_pretrained(tmp_path))
    )
    for each, steps in ((scheduler, torch.tensor(7)), (expected, 7)):
        each.set_timesteps(steps)
    assert torch.equal(scheduler.sigmas, expected.sigmas)


@pytest.mark.parametrize("rho", [0.1, 0.28, 1000.0])
@pytest.mark.parametrize("low, high", [(0.002, 80.0), (1e-18, 1e18)])
def test_schedules_at_the_ends_of_what_is_allowed(rho, low, high):
    scheduler = EDMHeunScheduler(sigma_min=low, sigma_max=high, rho=rho)
    scheduler.set_timesteps(5)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([high, low]), rtol=1e-5, atol=0)
    assert (levels.diff() < 0).all() and scheduler.timesteps.isfinite().all()
    x = torch.full((1, 1, 2, 2), high)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.zeros_like(x), t, scheduler.scale_model_input(x, t) * 0 + x).prev_sample
        assert x.isfinite().all()


def test_s_tmax_must_not_be_below_s_tmin():
    with pytest.raises(ValueError, match="`s_tmax`.*s_tmin"):
        EDMHeunScheduler(s_tmin=2.0, s_tmax=1.0)
    EDMHeunScheduler(s_tmin=2.0, s_tmax=2.0)
