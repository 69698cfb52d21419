"""Beyond the training size: nested noise, the strategies, guidance; with tiny models and analytic denoisers."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, UNet2DModel
from reference.spectral import band_limited, coefficient
from sampling import GaussianDenoiser, assert_near, pipe_calls, relative_error, sample, seeded, silent, spy

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.pipelines.noise import fourier_basis, fourier_resample, growing_sizes, nested_noise, resize_bicubic

SCHEDULERS = [EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


# --- Nested noise ---

NOISE_SIZES = [(1, 1), (1, 9), (7, 200), (16, 16), (33, 47), (97, 131), (128, 64)]


@pytest.mark.parametrize("size", NOISE_SIZES)
def test_modes_of_nested_noise_are_one_draw_at_all_sizes(size):
    """By the direct sum in complex128: coefficients of a seed at two sizes, in units of white noise."""
    large = (150, 211)
    fine, coarse = (nested_noise((1, 2, *each), seeded(5)) for each in (large, size))
    compared = 0
    for k, l in ((0, 0), (1, 1), (3, -5), (-7, 7), (0, 4), (2, 0), (-3, 90), (48, 65), (0, 31)):  # noqa: E741
        if 2 * abs(k) < size[0] and 2 * abs(l) < size[1]:
            here, there = (coefficient(x, k, l) * math.prod(x.shape[2:]) ** 0.5 for x in (coarse, fine))
            assert torch.allclose(here, there, atol=5e-5), (k, l)  # of order 1, from float32 sums over 211 numbers
            compared += 1
    assert compared >= (1 if size == (1, 1) else 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (4, 6), (8, 3)])
def test_nested_noise_is_white(size):
    """Mean and the whole covariance of a small grid, two channels of it, over many draws."""
    draws = nested_noise((2000, 2, *size), seeded(0)).flatten(1).double()
    spread = len(draws) ** -0.5
    assert draws.mean(0).abs().max() < 4.5 * spread
    off = draws.T @ draws / len(draws) - torch.eye(draws.shape[1])
    assert off.abs().max() < 5 * 2**0.5 * spread
    assert (draws.pow(4).mean(0) / 3 - 1).abs().max() < 0.3, "a Gaussian's fourth moment is 3"


def test_nested_noise_is_an_orthogonal_transform():
    """So it is white exactly: what the last test can only see to 1 / sqrt(draws)."""
    for n in (1, 2, 3, 7, 16, 31, 64):
        basis = fourier_basis(n, n)
        assert torch.allclose(basis @ basis.T, torch.eye(n, dtype=torch.float64), atol=1e-12)  # sums in float64


def test_nested_noise_follows_its_generators():
    together = nested_noise((2, 3, 5, 8), seeded(3, 4))
    assert_near(together[:1], nested_noise((1, 3, 5, 8), seeded(3)))
    assert_near(together[1:], nested_noise((1, 3, 5, 8), [seeded(4)]))
    pair = nested_noise((2, 3, 5, 8), seeded(3))
    assert_near(pair[0], together[0])
    assert not torch.allclose(pair[0], pair[1])
    torch.manual_seed(3)
    assert_near(nested_noise((1, 3, 5, 8)), together[:1])
    assert nested_noise((1, 3, 5, 8), seeded(3), dtype=torch.float64).dtype == torch.float64


def test_nested_noise_is_the_same_under_another_default_device():
    expected = nested_noise((1, 3, 5, 8), seeded(3))
    with torch.device("meta"):
        assert torch.equal(nested_noise((1, 3, 5, 8), seeded(3)), expected)


def test_nested_noise_leaves_its_generator_in_one_state_at_all_sizes():
    generators = [seeded(3) for _ in NOISE_SIZES]
    for generator, size in zip(generators, NOISE_SIZES):
        nested_noise((1, 3, *size), generator)
    states = [generator.get_state() for generator in generators]
    assert all(torch.equal(state, states[0]) for state in states) and not torch.equal(states[0], seeded(3).get_state())


@pytest.mark.parametrize("s_churn", [0.0, 40.0])
def test_one_seed_is_one_picture_at_all_sizes(s_churn):
    """The network knows its images to be white, so a mode of the result comes from that of the noise alone."""
    small, large = (
        sample(gaussian_pipe(EDMHeunScheduler(s_churn=s_churn)), 20, height=n, width=n, generator=seeded(1))
        for n in (12, 31)
    )
    shared = fourier_resample(large - 0.3, (12, 12)) * 31 / 12
    assert relative_error(shared, small - 0.3) < 1e-2


def gaussian_pipe(scheduler):
    return silent(DFUPipeline(GaussianDenoiser(), scheduler))


# --- Strategies ---


@pytest.mark.parametrize("size, new", [((9, 14), (21, 30)), ((9, 14), (9, 14)), ((21, 30), (9, 15)), ((8, 8), (1, 5))])
def test_fourier_resample_keeps_a_band_limited_function(size, new):
    rows, columns = ((min(a, b) - 1) // 2 for a, b in zip(size, new))
    expected = band_limited(*new, min(rows, 3), min(columns, 3))
    torch.testing.assert_close(fourier_resample(band_limited(*size, min(rows, 3), min(columns, 3)), new), expected)


@pytest.mark.parametrize(
    "small, size", [((1, 1), (2, 3)), ((64, 64), (512, 512)), ((16, 31), (50, 97)), ((5, 5), (5, 5))]
)
def test_growing_sizes_end_where_asked_and_at_most_double(small, size):
    sizes = [small, *growing_sizes(small, size)]
    assert sizes[-1] == size
    assert all(b <= 2 * a + 1 for old, new in zip(sizes, sizes[1:]) for a, b in zip(old, new))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_the_cascade_is_direct_sampling_within_the_training_size(make_pipe, scheduler_class):
    pipe = make_pipe(scheduler_class(), sample_size=(8, 10))
    for size in ((8, 10), (5, 9), (1, 1)):
        kwargs = dict(height=size[0], width=size[1])
        assert_near(sample(pipe, strategy="cascade", **kwargs), sample(pipe, **kwargs))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_cascade_grows_by_at_most_two_and_counts_its_calls(make_pipe, scheduler_class):
    pipe = make_pipe(scheduler_class(), sample_size=8)
    sizes, steps = [], []
    with spy(pipe.unet, lambda x, *_: sizes.append(tuple(x.shape[2:]))):
        result = sample(
            pipe, 6, height=24, width=18, strategy="cascade", batch_size=2,
            callback_on_step_end=lambda pipe, i, t, kwargs: steps.append((i, tuple(kwargs["latents"].shape[2:]))),
        )  # fmt: skip
    assert result.shape == (2, 3, 24, 18) and result.isfinite().all()
    whole = pipe_calls(6) if scheduler_class is EDMHeunScheduler else 6
    stages = [(size, sizes.count(size)) for size in dict.fromkeys(sizes)]
    assert [size for size, _ in stages] == [(8, 6), (14, 10), (24, 18)]
    assert stages[0][1] == whole and 1 <= stages[1][1] == stages[2][1] < whole
    assert pipe.num_timesteps == len(sizes) and steps == list(enumerate(sizes))


def test_cascade_by_hand(make_pipe):
    """To twice the size: the small picture, enlarged, noised to the level next to 0.25, and denoised with the lowest
    quarter of the small picture's frequencies held."""
    pipe = make_pipe(sample_size=(6, 7))
    result = sample(pipe, 5, strategy="cascade", height=12, width=14)

    generator, scheduler = seeded(0), EDMHeunScheduler()
    nested_noise((1, 3, 12, 14), generator)
    small = sample(pipe, 5)
    scheduler.set_timesteps(5)
    levels = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]])[:5]
    start = int((levels / 0.25).log().abs().argmin())
    scheduler.set_timesteps(sigmas=levels[start:].tolist())
    large = torch.nn.functional.interpolate(small, (12, 14), mode="bicubic")
    x = large + levels[start] * nested_noise(large.shape, generator)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist()):
        output = pipe.unet(scheduler.scale_model_input(x, t), t).sample.detach()
        lack = fourier_resample(large - scheduler.precondition_outputs(x, output, sigma), (2, 2))
        output = output + fourier_resample(lack, (12, 14)) * math.hypot(sigma, 0.5) / (0.5 * sigma)
        x = scheduler.step(output, t, x).prev_sample
    assert 0 < start < 4 and relative_error(result, x) < 1e-3  # rounding, enlarged by a network of random weights


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_cascade_holds_low_frequencies_of_the_small_picture(make_pipe, scheduler_class):
    pipe = make_pipe(scheduler_class(), sample_size=(9, 8))
    small = sample(pipe, 5, latents=fourier_resample(nested_noise((1, 3, 18, 14), seeded(0)), (9, 7)) * 2, width=7)
    enlarged = torch.nn.functional.interpolate(small, (18, 14), mode="bicubic")
    large = sample(pipe, 5, height=18, width=14, strategy="cascade")
    held, whole = (2, 2), (9, 7)  # a quarter of 9 and 7
    assert relative_error(fourier_resample(large, held), fourier_resample(enlarged, held)) < 1e-3
    assert relative_error(fourier_resample(large, whole), fourier_resample(enlarged, whole)) > 1e-2


@pytest.mark.parametrize("old, new", [((8, 6), (16, 9)), ((7, 5), (13, 8)), ((1, 3), (2, 7)), ((9, 12), (4, 5))])
@pytest.mark.parametrize("periodic", [(True, True), (False, True), (False, False)])
def test_bicubic_resizing_wraps_along_periodic_axes(old, new, periodic):
    """As the middle of an enlarged sheet of three by three copies, or of one where edges stay apart."""
    x = torch.randn(2, 3, *old, generator=seeded(0))
    copies = [3 if joined else 1 for joined in periodic]
    options = dict(mode="bicubic", align_corners=False, antialias=new < old)
    sheet = torch.nn.functional.interpolate(
        x.repeat(1, 1, *copies), [n * count for n, count in zip(new, copies)], **options
    )
    (height, width), (top, left) = new, [n * (count // 2) for n, count in zip(new, copies)]
    expected = sheet[..., top : top + height, left : left + width]
    assert_near(resize_bicubic(x, new, periodic, antialias=new < old), expected)  # places are rounded, in float32


def test_the_cascade_keeps_the_contract(make_pipe):
    pipe = make_pipe(EDMHeunScheduler(s_churn=10), sample_size=6, num_class_embeds=5)
    kwargs = dict(strategy="cascade", height=9, width=12, steps=4, class_labels=[4, 3, 2], batch_size=3)
    whole = sample(pipe, generator=seeded(1, 2, 3), **kwargs)
    assert torch.equal(whole, sample(pipe, generator=seeded(1, 2, 3), **kwargs))
    parts = sample(pipe, generator=seeded(1, 2, 3), max_batch_size=2, **kwargs)
    alone = sample(pipe, generator=seeded(2), **{**kwargs, "batch_size": 1, "class_labels": 3})
    assert relative_error(parts, whole) < 1e-4 and relative_error(alone, whole[1:2]) < 1e-4
    noise = nested_noise((1, 3, 9, 12), seeded(9))
    one = {**kwargs, "batch_size": 1, "class_labels": 0}
    assert not torch.allclose(sample(pipe, latents=noise, **one), sample(pipe, **one))

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i == 1

    calls = []
    with spy(pipe.unet, lambda *_: calls.append(1)):
        sample(pipe, callback_on_step_end=stop, **one)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(strategy="guided"), ValueError, r"one of \('octaves', 'direct', 'cascade'\), .* but got 'guided'"),
        (dict(strategy="octaves"), ValueError, "strategy='octaves' needs a refiner: load the pipeline with `refiner="),
        (
            dict(guidance_scale=2.0),
            ValueError,
            "`guidance_scale` 2.0 needs a class-conditional model, or a weaker one",
        ),
        (dict(guidance_scale=-1.0), ValueError, "`guidance_scale` must be a positive number, but got -1.0"),
        (dict(guidance_scale=True), TypeError, "`guidance_scale` must be a positive number, but got True"),
    ],
)
def test_wrong_strategies_and_guidance(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        pipe(num_inference_steps=1, **arguments)


def test_the_cascade_needs_a_sample_size():
    unet = UNet2DModel(
        block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    with pytest.raises(ValueError, match="strategy='cascade' needs a model with a `sample_size` in its config"):
        DFUPipeline(unet, EDMHeunScheduler())(num_inference_steps=1, height=4, width=4, strategy="cascade")


# --- Guidance ---


def test_classifier_free_guidance_leads_away_from_no_class(make_pipe):
    """One Euler step from noise is linear in the output: D_none + w (D - D_none). The last class means none."""
    pipe = make_pipe(EDMEulerScheduler(), num_class_embeds=4)
    kwargs = dict(steps=1, batch_size=2, height=5, width=6)
    given, none = (sample(pipe, class_labels=labels, **kwargs) for labels in ([0, 1], 3))
    labels = []
    with spy(pipe.unet, lambda x, t, label: labels.append(label.tolist())):
        guided = sample(pipe, class_labels=[0, 1], guidance_scale=2.5, **kwargs)
    assert labels == [[0, 1], [3, 3]]
    torch.testing.assert_close(guided, none + 2.5 * (given - none), atol=1e-3, rtol=1e-4)
    assert relative_error(guided, given) > 1e-4


def test_autoguidance_leads_away_from_the_guide(make_pipe, make_model):
    pipe, guide = make_pipe(EDMEulerScheduler()), make_model(block_out_channels=(8, 8, 8))
    kwargs = dict(steps=1, height=5, width=6)
    strong, weak = sample(pipe, **kwargs), sample(DFUPipeline(guide, EDMEulerScheduler()), **kwargs)
    pipe = silent(DFUPipeline(pipe.unet, pipe.scheduler, guide))
    assert_near(sample(pipe, **kwargs), strong)  # a scale of 1 does not ask the guide
    torch.testing.assert_close(sample(pipe, guidance_scale=2.0, **kwargs), 2 * strong - weak, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "own, weak",
    [
        (dict(num_class_embeds=3), dict()),
        (dict(), dict(num_class_embeds=3)),
        (dict(num_class_embeds=3), dict(num_class_embeds=2)),
        (dict(), dict(in_channels=1, out_channels=1)),
    ],
)
def test_a_guide_of_other_images_or_classes(make_model, own, weak):
    pipe = DFUPipeline(make_model(**own), EDMHeunScheduler(), make_model(**weak))
    labels = 2 if own else None
    with pytest.raises(ValueError, match="`guide` must take the images and class labels of `unet`, {'in_channels': 3"):
        pipe(guidance_scale=2.0, class_labels=labels)


def test_a_guide_is_saved_loaded_and_shared(make_pipe, make_model, tmp_path):
    pipe = silent(DFUPipeline(make_model(), EDMHeunScheduler(), make_model(block_out_channels=(8, 8, 8))))
    expected = sample(pipe, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "guided")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "guided")
    for each in (loaded, DFUPipeline.from_pipe(pipe)):
        assert type(each.guide) is DFUModel and torch.equal(sample(silent(each), guidance_scale=2.0), expected)
    plain = DFUPipeline.from_pretrained(tmp_path / "guided", guide=None)
    assert plain.guide is None
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "guide").exists()
    assert DFUPipeline.from_pretrained(tmp_path / "plain").guide is None
