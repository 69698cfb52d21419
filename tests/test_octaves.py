# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Sampling octave by octave: one seed is one picture at every size, exact if the denoisers are, the same in strips.

What pipelines with a refiner share with the others is tested in test_pipeline_contract.py.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import draw
from diffusers import ConfigMixin, EDMEulerScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sampling import GaussianDenoiser, assert_near, relative_error, sample, seeded, silent, spy

from dfu_diffusers import DFUInpaintPipeline, DFUPipeline, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.models.modes import (
    beyond,
    cell_averages,
    from_modes,
    num_modes,
    octave_sizes,
    octave_std,
    to_modes,
)
from dfu_diffusers.models.refiner import DFURefinerOutput
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines import dfu
from dfu_diffusers.pipelines.octaves import NestedNoise, refine_in_strips
from dfu_diffusers.pipelines.super_resolution import ModeAverages

ALL_AXES = [None, "x", "y", "xy"]


def periodic(tileable: str | None) -> tuple[bool, bool]:
    return "y" in (tileable or ""), "x" in (tileable or "")


@pytest.fixture
def make_octaves(make_model, make_refiner):
    """Factory of tiny silent pipelines with a refiner; keyword arguments are those of `unet`."""

    def make(scheduler=None, cls=DFUPipeline, **overrides):
        unet = make_model(**{"sample_size": 8, **overrides})
        refiner = make_refiner(in_channels=unet.config.in_channels)
        return silent(cls(unet, scheduler or EDMHeunScheduler(), refiner=refiner))

    return make


def draw_at(pipe, size, steps=3, **kwargs):
    return sample(pipe, steps, height=size[0], width=size[1], octave_steps=2, **kwargs)


# --- One seed is one picture ---

SIZES = [(32, 32), (48, 48), (64, 64), (97, 97), (128, 128), (192, 96), (40, 160), (9, 200)]


def common_octave(size, other, base):
    """The last complete grid on the way to both sizes."""
    shared = [a for a, b in zip(octave_sizes(size, base), octave_sizes(other, base)) if a == b]
    return shared[-1]


def test_one_seed_is_one_picture_at_every_size(make_octaves):
    """The modes of complete common octaves are the same, amplitudes to 1e-5 in float32."""
    pipe = make_octaves(EDMHeunScheduler(s_churn=10), sample_size=16)
    reference, compared = draw_at(pipe, (256, 256)), []
    for size in SIZES:
        common = common_octave(size, (256, 256), (16, 16))
        modes, expected = (to_modes(x, common, averaged=True) for x in (draw_at(pipe, size), reference))
        expected = expected[..., : modes.shape[-2], : modes.shape[-1]]
        torch.testing.assert_close(modes, expected, rtol=0, atol=1e-5)
        compared.append(common)
    assert compared == [(32, 32), (32, 32), (64, 64), (64, 64), (128, 128), (64, 64), (32, 32), (16, 16)]


def test_a_picture_is_the_same_alone_and_in_a_batch(make_octaves):
    """To rounding, which differs among batch sizes, and which networks of random weights enlarge."""
    pipe = make_octaves(EDMHeunScheduler(s_churn=10))
    batch = draw_at(pipe, (21, 30), batch_size=3, generator=seeded(1, 2, 3))
    for index, seed in enumerate((1, 2, 3)):
        assert_near(batch[index : index + 1], draw_at(pipe, (21, 30), generator=seeded(seed)))
    alone, pair = (draw_at(pipe, (21, 30), batch_size=count, generator=seeded(1)) for count in (1, 2))
    assert_near(pair[:1], alone)
    assert not torch.allclose(pair[1], pair[0], atol=1e-2)
    larger = draw_at(pipe, (40, 33), batch_size=3, generator=seeded(1, 2, 3))
    assert_near(to_modes(larger, (16, 16), averaged=True), to_modes(batch, (16, 16), averaged=True))


def test_latents_are_one_function_too(make_octaves):
    """Noise cut to a smaller grid gives the same picture there, to the complete common octave."""
    pipe, normals = make_octaves(), draw(1, 3, 40, 30)
    white = NestedNoise(1, 3, seeded(0), (False, False), "cpu").white
    large, small = (
        draw_at(pipe, size, latents=white(normals[..., : size[0], : size[1]])) for size in ((40, 30), (19, 20))
    )
    assert_near(to_modes(small, (16, 16), averaged=True), to_modes(large, (16, 16), averaged=True))
    assert draw_at(pipe, (5, 20), latents=white(normals[..., :8, :20])).shape == (1, 3, 5, 20)
    with pytest.raises(ValueError, match=r"`latents` must have shape .* = \(1, 3, 8, 20\), but got \(1, 3, 5, 20\)"):
        draw_at(pipe, (5, 20), latents=draw(1, 3, 5, 20))


@pytest.mark.parametrize("tileable", ALL_AXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (5, 23), (31, 17), (16, 6)])
def test_any_size(make_octaves, size, tileable):
    result = draw_at(make_octaves(), size, 2, tileable=tileable, output_type="pt")
    assert result.shape == (1, 3, *size) and result.isfinite().all()


def test_pictures_of_several_shapes_start_on_grids_of_their_own(make_octaves):
    """The grid of the nearest aspect ratio, at any size of this shape; sizes of one shape share their octaves."""
    pipe = make_octaves(sample_size=8, coarse_sizes=[[4, 4], [8, 8], [6, 11], [11, 6]])
    grids = set()
    spy(pipe.unet, lambda sample, *_: grids.add(tuple(sample.shape[-2:])))
    drawn = {
        (20, 20): (8, 8),
        (40, 33): (8, 8),
        (33, 60): (6, 11),
        (9, 200): (6, 11),
        (90, 50): (11, 6),
        (3, 2): (11, 6),
    }
    for size, grid in drawn.items():
        grids.clear()
        assert draw_at(pipe, size).shape[-2:] == size and grids == {grid}
    small, large = (to_modes(draw_at(pipe, size), (12, 22), averaged=True) for size in ((12, 22), (40, 80)))
    assert_near(small, large)
    with pytest.raises(ValueError, match="pictures of at least 8 pixels a side, but `unet` draws 6x11"):
        pipe.refiner.register_to_config(coarse_size=8)
        pipe.unet.register_to_config(coarse_sizes=[[8, 8], [6, 11]])
        draw_at(pipe, (20, 20))


# --- Exact denoisers ---


def amplitude(rows: int, columns: int, axes=(False, False)) -> torch.Tensor:
    """Deviation of the modes' coefficients: a power law."""
    k, l = torch.arange(rows), torch.arange(columns)  # noqa: E741
    return 0.5 * (1.0 + k[:, None] ** 2 + l**2) ** -0.75


SLOPE = 0.5  # the mean of a new mode (k, l) is this times the coarse mode (k // 3, l // 3)


def mean_of_new_modes(modes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    k, l = (torch.arange(n) // 3 for n in size)  # noqa: E741
    return SLOPE * modes[..., k[:, None], l]


class GaussianTrunk(GaussianDenoiser):
    """The best denoiser of pictures whose modes are independent, N(0, amplitude^2), before pixels average them."""

    def forward(self, sample, timestep, class_labels=None, tileable=None, return_dict=True):
        self.axes = periodic(tileable)
        return super().forward(sample, timestep, return_dict=return_dict)

    def denoise(self, x, sigma):
        size = x.shape[-2:]
        modes = to_modes(x, periodic=self.axes)
        one = torch.ones_like(modes[:1, :1])
        damping = one / to_modes(from_modes(one, size, self.axes), periodic=self.axes, averaged=True)
        variance = (amplitude(*modes.shape[-2:]) * damping).square()
        noise = sigma**2 / math.prod(size)
        return from_modes(variance / (variance + noise) * modes, size, self.axes)


class GaussianRefiner(ModelMixin, ConfigMixin):
    """The best denoiser of detail whose new modes have the mean `mean_of_new_modes` and the deviation `amplitude`. Its
    scalings differ from octave to octave."""

    @register_to_config
    def __init__(
        self, in_channels=1, detail_std=0.1, detail_exponent=-0.3, sigma_max=8.0, sample_size=16, coarse_size=8,
        tileable=None,
    ):  # fmt: skip
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep, coarse, coarse_noise, tileable=None, return_dict=True):
        axes, size, sigma = periodic(tileable), sample.shape[-2:], torch.exp(4 * timestep)
        std = octave_std(self.config, size)
        total = sigma**2 + std**2
        x = sample * total.sqrt()
        modes = to_modes(x, periodic=axes)
        mean = mean_of_new_modes(to_modes(coarse, periodic=axes), modes.shape[-2:])
        variance = amplitude(*modes.shape[-2:]).square()
        shrunk = mean + variance / (variance + sigma**2 / math.prod(size)) * (modes - mean)
        output = (from_modes(shrunk, size, axes) - std**2 / total * x) / (sigma * std / total.sqrt()) * self.one
        return DFURefinerOutput(sample=output) if return_dict else (output,)


@pytest.mark.parametrize("tileable, size", [(None, (20, 13)), ("y", (21, 13))])
def test_exact_denoisers_give_pictures_of_the_stated_covariance(tileable, size):
    """Two octaves, the last of them partial. What a mode has beyond its mean is white; the condition's noise adds."""
    axes, count = periodic(tileable), 500
    trunk, refiner = GaussianTrunk(sample_size=8, in_channels=1, out_channels=1), GaussianRefiner()
    pipe = silent(DFUPipeline(trunk, EDMHeunScheduler(), refiner=refiner))
    options = dict(height=size[0], width=size[1], octave_steps=40, tileable=tileable)
    pictures = sample(pipe, 40, batch_size=count, **options)
    modes = to_modes(pictures, periodic=axes, averaged=True)[:, 0]
    rows, columns = modes.shape[-2:]
    assert (rows, columns) == tuple(num_modes(n, axis) for n, axis in zip(size, axes))

    residual, variance, octave = modes.clone(), amplitude(rows, columns).square(), torch.zeros(rows, columns)
    grids = octave_sizes(size, (8, 8))
    for index, (coarse, fine) in enumerate(zip(grids, grids[1:]), start=1):
        old, new = (tuple(num_modes(n, axis) for n, axis in zip(grid, axes)) for grid in (coarse, fine))
        fresh = torch.zeros(rows, columns, dtype=torch.bool)
        fresh[: new[0], : new[1]] = True
        fresh[: old[0], : old[1]] = False
        octave[fresh] = index
        residual[:, fresh] -= mean_of_new_modes(modes, (rows, columns))[:, fresh]
        variance[fresh] += (SLOPE * dfu.COARSE_NOISE) ** 2 / math.prod(coarse)
    assert set(octave.unique().tolist()) == {0.0, 1.0, 2.0}
    white = residual / variance.sqrt()
    for index in range(3):
        power = white[:, octave == index].square().mean().item()
        expected_error = 6 * math.sqrt(2 / count / (octave == index).sum().item())
        assert abs(power - 1) < expected_error + 0.02, (index, power)  # 2 % for finite steps and highest noise
    covariance = white.flatten(1).T @ white.flatten(1) / count
    assert (covariance - torch.eye(rows * columns)).abs().max() < 7 * math.sqrt(2 / count)


def test_one_call_gives_the_mean_of_the_detail():
    """At sigma_max the best denoiser knows nothing but the coarse picture, less a share of about variance N / 64."""
    trunk = GaussianTrunk(sample_size=8, in_channels=1, out_channels=1)
    pipe = silent(DFUPipeline(trunk, EDMHeunScheduler(), refiner=GaussianRefiner()))
    modes = to_modes(sample(pipe, 18, height=16, width=16, octave_steps=1), averaged=True)[0, 0]
    new = torch.ones(16, 16, dtype=torch.bool)
    new[:8, :8] = False
    difference = (modes - mean_of_new_modes(modes, (16, 16)))[new] / amplitude(16, 16)[new]
    # A sample would have 1. The noise leaves amplitude / (sigma_max / 16), at most 0.05; that of the condition, 0.08.
    assert difference.square().mean().sqrt() < 0.15


# --- Strips ---


@torch.no_grad()
@pytest.mark.parametrize("tileable", ALL_AXES)
@pytest.mark.parametrize("size, max_pixels", [((33, 16), 200), ((40, 21), 1), ((13, 7), 30), ((64, 5), 100)])
def test_strips_give_the_whole(make_refiner, size, max_pixels, tileable):
    refiner = make_refiner()
    x, coarse = draw(2, 3, *size), draw(2, 3, *size, seed=1)
    whole = refiner(x, -0.2, coarse, 0.02, tileable).sample
    areas = []
    with spy(refiner, lambda x, *_: areas.append(x.shape)):
        strips = refine_in_strips(refiner, x, torch.tensor(-0.2), coarse, 0.02, tileable, max_pixels)
    torch.testing.assert_close(strips, whole, rtol=1e-4, atol=1e-5)  # convolutions sum in another order
    rows = max(2, max_pixels // size[1]) + 2 * refiner.reach
    assert len(areas) > 2 and all(area[0] == 1 and area[2] <= rows for area in areas)


def test_a_pipeline_in_strips_draws_the_same_picture(make_octaves):
    pipe = make_octaves()
    whole = draw_at(pipe, (50, 19), batch_size=2)
    pipe.enable_tiling(max_pixels=torch.tensor(150))
    heights = []
    with spy(pipe.refiner, lambda x, *_: heights.append(x.shape[-2])):
        assert_near(draw_at(pipe, (50, 19), batch_size=2), whole)
    assert max(heights) <= 150 // 19 + 2 * pipe.refiner.reach < 50
    pipe.disable_tiling()
    with spy(pipe.refiner, lambda x, *_: heights.append(x.shape[-2])):
        assert torch.equal(draw_at(pipe, (50, 19), batch_size=2), whole)
    assert max(heights) == 50
    with pytest.raises(ValueError, match="`max_pixels` must be an integer of at least 1, but got 0"):
        pipe.enable_tiling(0)


# --- Tileable axes ---


@pytest.mark.parametrize("size", [(32, 32), (16, 64)])
def test_along_tileable_axes_shifted_noise_gives_the_shifted_picture(make_octaves, monkeypatch, size):
    """By half the picture, which is a whole number of pixels on every grid. The condition's noise does not shift."""
    monkeypatch.setattr(dfu, "COARSE_NOISE", 1e-6)
    pipe, latents = make_octaves(), draw(1, 3, *size)
    for tileable, dims in (("x", [3]), ("y", [2]), ("xy", [2, 3])):
        shift = [latents.shape[dim] // 2 for dim in dims]

        def error(axes, shift=shift, dims=dims):
            image, moved = (
                draw_at(pipe, size, latents=x, tileable=axes) for x in (latents, latents.roll(shift, dims))
            )
            return relative_error(moved, image.roll(shift, dims))

        assert error(tileable) < 1e-3 and error(None) > 1e-2


# --- The trunk decides ---


def test_class_labels_and_guidance_act_on_the_trunk(make_octaves, make_model):
    pipe = make_octaves(num_class_embeds=3)
    seen = []
    options = dict(batch_size=2, class_labels=[0, 1])
    with spy(pipe.unet, lambda x, t, labels: seen.append((tuple(x.shape[2:]), labels.tolist()))):
        guided = draw_at(pipe, (20, 24), 2, guidance_scale=2.0, **options)
    assert seen == [((8, 8), [0, 1]), ((8, 8), [2, 2])] * 3
    plain = draw_at(pipe, (20, 24), 2, **options)
    assert relative_error(*(to_modes(x, (8, 8)) for x in (guided, plain))) > 1e-3
    pipe.guide = make_model(num_class_embeds=3, sample_size=8, block_out_channels=(8, 8, 8))
    assert draw_at(pipe, (20, 24), 2, guidance_scale=2.0, **options).isfinite().all()


def test_an_octave_has_the_schedule_of_the_refiner(make_octaves):
    pipe, levels = make_octaves(), []
    with spy(pipe.refiner, lambda x, t, coarse, noise, *_: levels.append((math.exp(4 * t), noise))):
        draw_at(pipe, (12, 30))
    starts = levels[::2]
    assert len(levels) == 4 and all(start == pytest.approx((8.0, 0.01), rel=1e-4) for start in starts)


@pytest.mark.parametrize("levels", [dict(rho=0.1), dict(rho=1000.0), dict(sigma_min=10.0)])
def test_the_schedule_of_the_trunk_is_not_that_of_an_octave(make_octaves, levels):
    pipe, told = make_octaves(EDMHeunScheduler(**levels)), []
    with spy(pipe.refiner, lambda x, t, *_: told.append(math.exp(4 * t))):
        assert draw_at(pipe, (12, 12)).isfinite().all()
    assert told == [pytest.approx(8.0, rel=1e-4), pytest.approx(0.002, rel=1e-4)]


def test_an_interrupted_trunk_is_enlarged_without_detail(make_octaves):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True

    image = draw_at(make_octaves(), (20, 27), callback_on_step_end=stop)
    assert image.shape == (1, 3, 20, 27)
    assert beyond(image, (8, 8)).abs().max() < 1e-5 * image.abs().max()


def test_callbacks_of_diffusers_find_what_they_read_and_set(make_octaves):
    """SDCFGCutoffCallback and its relatives set `_guidance_scale` to 0 half-way."""
    pipe, guided = make_octaves(num_class_embeds=3), []

    def cut_off(pipe, step, timestep, kwargs):
        guided.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps))
        if step == 2:
            pipe._guidance_scale = 0.0

    calls = []
    with spy(pipe.unet, lambda *_: calls.append(1)):
        draw_at(pipe, (12, 12), class_labels=0, guidance_scale=2.5, callback_on_step_end=cut_off)
    assert len(calls) == 3 * 2 + 2
    assert guided[:3] == [(2.5, True, 7)] * 3 and guided[3:] == [(0.0, False, 7)] * 4
    draw_at(pipe, (12, 12), class_labels=0)
    assert pipe.guidance_scale == 1.0 and not pipe.do_classifier_free_guidance


# --- Super-resolution and inpainting ---


@pytest.fixture
def enlarger(make_refiner):
    return silent(DFUSuperResolutionPipeline(None, EDMHeunScheduler(), refiner=make_refiner()))


def enlarge(pipe, image, **kwargs):
    return pipe(image, **{"generator": seeded(0), "octave_steps": 2, "output_type": "latent", **kwargs}).images


@pytest.mark.parametrize("options", [dict(scale=1.25), dict(scale=2), dict(scale=3.3), dict(height=9, width=41)])
@pytest.mark.parametrize("tileable", [None, "xy"])
def test_super_resolution_keeps_the_modes_of_the_picture(enlarger, options, tileable):
    image, axes = torch.rand(2, 3, 9, 12, generator=seeded(1)), periodic(tileable)
    large = enlarge(enlarger, image, consistency=False, tileable=tileable, **options)
    kept, given = (to_modes(x, (9, 12), axes, averaged=True) for x in (large, 2 * image - 1))
    torch.testing.assert_close(kept, given, rtol=0, atol=1e-5)
    assert beyond(large, (9, 12), axes).std() > 1e-3  # and adds to them


@pytest.mark.parametrize("options", [dict(scale=1), dict(scale=1.25), dict(scale=2), dict(height=9, width=41)])
@pytest.mark.parametrize("tileable", [None, "xy"])
def test_super_resolution_keeps_the_averages_of_the_picture_by_default(enlarger, options, tileable):
    """Of the function that the pixels of the result sample, at factors that are no integers, too."""
    image, axes = torch.rand(2, 3, 9, 11, generator=seeded(1)), periodic(tileable)
    large = enlarge(enlarger, image, tileable=tileable, **options)
    modes = to_modes(large, periodic=axes, averaged=True).double()
    rows, columns = map(cell_averages, (9, 11), modes.shape[-2:], axes)
    torch.testing.assert_close(rows @ modes @ columns.T, 2 * image.double() - 1, rtol=0, atol=1e-4)


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    axes=st.sampled_from([(False, False), (True, False), (False, True)]),
)  # fmt: skip
def test_the_nearest_modes_with_the_averages(height, width, more, axes):
    size = height + more[0], width + more[1]
    image, picture = draw(1, 1, height, width), draw(1, 1, *size)
    found = to_modes(ModeAverages(image, axes).project(picture), periodic=axes).flatten().double()
    modes = to_modes(picture, periodic=axes)
    matrices = map(cell_averages, (height, width), modes.shape[-2:], axes)
    average = torch.from_numpy(np.kron(*matrices))  # of all modes as one vector
    modes = modes.flatten().double()
    nearest = modes + torch.linalg.pinv(average, rtol=1e-6) @ (image.flatten().double() - average @ modes)
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [dict(), dict(scale=3), dict(height=14, width=36)])
def test_super_resolution_keeps_area_averages_where_asked(enlarger, options):
    """To one level of 8 bits: where sides double or more that is the default."""
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    (large,) = enlarge(enlarger, Image.fromarray(image), output_type="pil", **options)
    pixels = torch.from_numpy(np.asarray(large).copy()).movedim(-1, 0)[None].double()
    assert (resample(pixels, (7, 9))[0].movedim(0, -1) - torch.from_numpy(image)).abs().max() <= 1


def test_super_resolution_to_the_same_size_asks_no_network(enlarger):
    image = torch.rand(1, 3, 9, 11, generator=seeded(1))
    with spy(enlarger.refiner, lambda *_: pytest.fail("the refiner was called")):
        same = enlarge(enlarger, image, scale=1)
    torch.testing.assert_close(same, 2 * image - 1, rtol=0, atol=1e-5)


def test_a_told_noise_level_reaches_the_refiner(enlarger):
    levels = []
    with spy(enlarger.refiner, lambda x, t, coarse, noise, *_: levels.append(noise)):
        noisy = enlarge(enlarger, torch.full((3, 6, 6), 0.5), noise_level=0.3)
    assert set(levels) == {math.hypot(0.3, 0.01)}
    assert not torch.allclose(noisy, enlarge(enlarger, torch.full((3, 6, 6), 0.5)), atol=1e-4)


def test_inpainting_through_the_octaves_keeps_known_pixels(make_octaves):
    pipe = make_octaves(cls=DFUInpaintPipeline)
    image = torch.rand(2, 3, 20, 27, generator=seeded(1))
    mask = torch.rand(20, 27, generator=seeded(2)) < 0.4
    options = dict(num_inference_steps=3, octave_steps=2, output_type="pt", generator=seeded(0))
    result = pipe(image, mask, **options).images
    known = (~mask).expand_as(image)
    assert torch.equal(result[known], image[known]) and not torch.allclose(result[~known], image[~known], atol=1e-2)
    other = torch.where(mask, torch.rand(2, 3, 20, 27, generator=seeded(3)), image)
    again = pipe(other, mask, **{**options, "generator": seeded(0)}).images
    assert torch.equal(result, again)  # what lay under the mask is forgotten
    plain, seamless = (
        pipe(image, mask, **{**options, "generator": seeded(0), "seamless": on}).images for on in (False, True)
    )
    assert torch.equal(result, plain) and not torch.allclose(result, seamless, atol=1e-3)


def test_inpainting_everything_is_generation(make_octaves):
    pipe = make_octaves(EDMEulerScheduler(), cls=DFUInpaintPipeline)  # few Heun steps would enlarge the rounding
    options = dict(num_inference_steps=3, octave_steps=2, output_type="pt", generator=seeded(0))
    result = pipe(torch.rand(2, 3, 20, 27), torch.ones(20, 27), **options).images
    assert_near(result, draw_at(silent(DFUPipeline.from_pipe(pipe)), (20, 27), batch_size=2, output_type="pt"))


# --- Components ---


def test_the_default_size_is_that_of_the_refiner(make_octaves):
    assert sample(make_octaves(), 2, octave_steps=1).shape == (1, 3, 16, 16)


def test_refiners_that_do_not_fit(make_model, make_refiner, tmp_path):
    def pipe(unet, **refiner):
        return silent(DFUPipeline(make_model(**unet), EDMHeunScheduler(), refiner=make_refiner(**refiner)))

    with pytest.raises(ValueError, match="`refiner` must take the images of `unet`, of 3 channels, but it takes 1"):
        pipe(dict(sample_size=8), in_channels=1)()
    with pytest.raises(ValueError, match="pictures of at least 12 pixels a side, but `unet` draws 8x16"):
        pipe(dict(sample_size=(8, 16)), coarse_size=12)()
    with pytest.raises(ValueError, match="needs a refiner or a unet"):
        DFUSuperResolutionPipeline(None, EDMHeunScheduler())
    with pytest.raises(ValueError, match="DFUPipeline needs a unet"):
        DFUPipeline(None, EDMHeunScheduler(), refiner=make_refiner())
    DFUSuperResolutionPipeline(None, EDMHeunScheduler(), refiner=make_refiner()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without a `unet`, which DFUPipeline needs: load it with DFUSuper"):
        DFUPipeline.from_pretrained(tmp_path)
    unet = make_model(sample_size=8)
    assert DFUPipeline.from_pretrained(tmp_path, unet=unet).unet is unet


def test_a_tileable_refiner_tiles_pictures_by_default(make_refiner):
    pipe = silent(DFUSuperResolutionPipeline(None, EDMHeunScheduler(), refiner=make_refiner(tileable="x")))
    image = torch.rand(1, 3, 8, 8, generator=seeded(1))
    assert torch.equal(enlarge(pipe, image), enlarge(pipe, image, tileable="x"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_refiner_of_dynamic_size(make_octaves, backend):
    torch._dynamo.reset()
    pipe = make_octaves()
    expected = [draw_at(pipe, size) for size in ((19, 27), (32, 40))]
    pipe.refiner = torch.compile(pipe.refiner, dynamic=True, backend=backend)
    for size, image in zip(((19, 27), (32, 40)), expected):
        assert_near(draw_at(pipe, size), image)


@pytest.mark.slow
def test_a_picture_of_8192_pixels_a_side_in_8_gib():
    """With two calls in an octave, more of which keep nothing more; the width of a refiner matters in strips alone."""
    code = """
import resource
import torch
from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
unet = DFUModel(16, block_out_channels=(8,), layers_per_block=1, fourier_modes=(4,), attention_levels=())
pipe = DFUPipeline(unet, EDMHeunScheduler(), refiner=DFURefiner(hidden_channels=8, num_layers=1))
image = pipe(height=8192, width=8192, num_inference_steps=2, octave_steps=2).images[0]
assert image.size == (8192, 8192)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(done.stdout)
    assert float(done.stdout.split()[0]) < 8
