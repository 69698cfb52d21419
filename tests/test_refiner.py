# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The refiner: locality, sizes, precision, saving. That it forgets the size is what the octaves rest on."""

import pytest
import torch
from conftest import draw, redraw

from dfu_diffusers.models.refiner import DFURefiner


@pytest.fixture
def refiner():
    return redraw(DFURefiner(hidden_channels=12, num_layers=1)).eval()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 3), (13, 7), (16, 16), (31, 20)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_number_of_channels(size, channels):
    model = redraw(DFURefiner(in_channels=channels, hidden_channels=8, num_layers=1))
    x = draw(2, channels, *size)
    assert model(x, -0.5, coarse=x).sample.shape == x.shape


@torch.no_grad()
def test_an_output_pixel_depends_on_the_input_within_its_reach_and_no_further(refiner):
    x, coarse = draw(1, 3, 4, 64), draw(1, 3, 4, 64, seed=1)
    changed = x.clone()
    changed[..., 32] += 1
    difference = (refiner(changed, -0.5, coarse).sample - refiner(x, -0.5, coarse).sample).abs().amax((0, 1, 2))
    touched = difference.nonzero().flatten()
    assert 32 - refiner.reach <= touched.min() and touched.max() <= 32 + refiner.reach
    assert touched.max() - touched.min() > refiner.reach  # and it does reach about as far as it says


@torch.no_grad()
def test_it_does_not_know_the_size(refiner):
    """Far from the edges a crop gives what the whole gives, to rounding: convolutions may sum in another order."""
    x, coarse = draw(1, 3, 64, 60), draw(1, 3, 64, 60, seed=1)
    whole = refiner(x, 0.2, coarse).sample
    part = refiner(x[..., 10:50, 8:52], 0.2, coarse[..., 10:50, 8:52]).sample
    inside = slice(refiner.reach, -refiner.reach)
    torch.testing.assert_close(part[..., inside, inside], whole[..., 10:50, 8:52][..., inside, inside])


@torch.no_grad()
@pytest.mark.parametrize("axis", ["x", "y", "xy"])
def test_along_tileable_axes_opposite_edges_are_neighbours(refiner, axis):
    x, coarse = draw(1, 3, 20, 18), draw(1, 3, 20, 18, seed=1)
    dims = [dim for dim, name in ((2, "y"), (3, "x")) if name in axis]
    shift = [6] * len(dims)  # even: pixels are taken two by two
    rolled = refiner(x.roll(shift, dims), 0.1, coarse.roll(shift, dims), tileable=axis).sample
    torch.testing.assert_close(rolled, refiner(x, 0.1, coarse, tileable=axis).sample.roll(shift, dims))


@torch.no_grad()
def test_every_input_matters(refiner):
    x, coarse = draw(1, 3, 8, 8), draw(1, 3, 8, 8, seed=1)
    before = refiner(x, 0.1, coarse, 0.01).sample
    for other in (
        refiner(x + 0.1, 0.1, coarse, 0.01),
        refiner(x, 0.2, coarse, 0.01),
        refiner(x, 0.1, coarse + 0.1, 0.01),
        refiner(x, 0.1, coarse, 0.1),
    ):
        assert (other.sample - before).abs().max() > 1e-3


@torch.no_grad()
def test_timesteps_as_diffusers_gives_them(refiner):
    x = draw(2, 3, 6, 6)
    expected = refiner(x, torch.tensor([-0.5, -0.5]), x, torch.tensor([0.02, 0.02])).sample
    for timestep, level in ((-0.5, 0.02), (torch.tensor(-0.5, dtype=torch.float64), torch.tensor(0.02))):
        torch.testing.assert_close(refiner(x, timestep, x, level).sample, expected)
    assert torch.equal(refiner(x, -0.5, x, 0.02, return_dict=False)[0], refiner(x, -0.5, x, 0.02).sample)


def test_wrong_arguments_are_named(refiner):
    x = draw(1, 3, 6, 6)
    for arguments, message in (
        (dict(sample=x[:, :2]), r"\(batch, 3, height, width\).*\(1, 2, 6, 6\)"),
        (dict(coarse=x[..., :4]), r"`coarse`.*\(1, 3, 6, 6\).*\(1, 3, 6, 4\)"),
        (dict(timestep=torch.tensor(3)), "integer"),
        (dict(coarse_noise=0.0), "`coarse_noise`.*positive.*0"),
        (dict(tileable="z"), "`tileable`.*'z'"),
    ):
        with pytest.raises(ValueError, match=message):
            refiner(**{**dict(sample=x, timestep=-0.5, coarse=x), **arguments})
    for config, message in (
        (dict(in_channels=0), "`in_channels`.*0"),
        (dict(num_layers=1.5), "`num_layers`.*1.5"),
        (dict(detail_std=-1), "`detail_std`.*-1"),
        (dict(detail_exponent=-3), r"`detail_exponent`.*\[-2, 2\].*-3"),
        (dict(detail_exponent="low"), "`detail_exponent`.*'low'"),
        (dict(sigma_max=float("nan")), "`sigma_max`.*nan"),
        (dict(coarse_size=True), "`coarse_size`.*True"),
        (dict(tileable="diagonal"), "`tileable`.*diagonal"),
    ):
        with pytest.raises(ValueError, match=message):
            DFURefiner(**{**dict(hidden_channels=8, num_layers=1), **config})


def test_saving_and_loading(refiner, tmp_path):
    refiner.save_pretrained(tmp_path)
    loaded = DFURefiner.from_pretrained(tmp_path)
    x = draw(1, 3, 9, 9)
    with torch.no_grad():
        assert torch.equal(loaded(x, 0.1, x).sample, refiner(x, 0.1, x).sample)
    assert loaded.config.detail_std == refiner.config.detail_std


def test_pickles_are_neither_saved_nor_loaded(refiner, tmp_path):
    with pytest.raises(ValueError, match="DFURefiner saves safetensors only, but got safe_serialization=False"):
        refiner.save_pretrained(tmp_path, safe_serialization=False)
    refiner.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(refiner.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        DFURefiner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DFURefiner loads safetensors only"):
        DFURefiner.from_pretrained(tmp_path, use_safetensors=False)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(refiner, dtype):
    x, coarse = draw(1, 3, 16, 16), draw(1, 3, 16, 16, seed=1)
    expected = refiner(x, 0.1, coarse).sample
    half = refiner.to(dtype)(x.to(dtype), 0.1, coarse.to(dtype)).sample
    assert half.dtype == dtype
    error = (half.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 8 * torch.finfo(dtype).eps  # the errors of half a dozen layers


def test_gradient_checkpointing_changes_nothing(refiner):
    x = draw(1, 3, 8, 8)
    gradients = []
    for checkpointed in (False, True):
        refiner.enable_gradient_checkpointing() if checkpointed else refiner.disable_gradient_checkpointing()
        refiner.zero_grad()
        refiner.train()(x, 0.1, x).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in refiner.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_lora(make_refiner, tmp_path):
    peft = pytest.importorskip("peft")
    refiner, x = make_refiner(hidden_channels=12), draw(1, 3, 8, 8)
    with torch.no_grad():
        before = refiner(x, 0.1, x).sample
        refiner.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
        adapted = refiner(x, 0.1, x).sample
        assert (adapted - before).abs().max() > 1e-4
        refiner.save_lora_adapter(tmp_path)
        other = make_refiner(hidden_channels=12)  # of the same weights
        other.load_lora_adapter(tmp_path)
        torch.testing.assert_close(other(x, 0.1, x).sample, adapted)
        refiner.disable_adapters()
        torch.testing.assert_close(refiner(x, 0.1, x).sample, before)


@torch.no_grad()
def test_export_with_any_size(refiner):
    x = draw(2, 3, 12, 10)
    coarse = draw(2, 3, 12, 10, seed=1)  # not x itself, which the exported program would take for both
    inputs = (x, torch.tensor([-0.5, 0.1]), coarse, torch.tensor([0.01, 0.02]))
    batch, height, width = (
        torch.export.Dim(name, min=least) for name, least in dict(batch=1, height=3, width=3).items()
    )
    image, level = {0: batch, 2: height, 3: width}, {0: batch}
    shapes = dict(sample=image, timestep=level, coarse=image, coarse_noise=level)
    program = torch.export.export(refiner, inputs, dynamic_shapes=shapes)
    larger = (draw(3, 3, 7, 15), torch.tensor([-0.5, 0.1, 0.3]), draw(3, 3, 7, 15, seed=1), torch.tensor([0.01] * 3))
    torch.testing.assert_close(program.module()(*larger).sample, refiner(*larger).sample)
    torch.testing.assert_close(program.module()(*inputs).sample, refiner(*inputs).sample)
