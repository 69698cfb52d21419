"""DFUModel against itself in other modes and diffusers' machinery. Its layers are tested in test_layers.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw, redraw
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling import assert_near, relative_error

import dfu_diffusers
from dfu_diffusers import DFUPipeline
from dfu_diffusers.evaluation.metrics import wrap_seam
from dfu_diffusers.models.dfu import DFUModel
from dfu_diffusers.models.layers import DualConv2d
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.models.spectral import SpectralConv2d, _cached_fourier_matrices
from measure import LiveMemory

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
PORTRAITS = Path(__file__).parent.parent / "checkpoints" / "dfu-portraits"
PARAMETERS = {
    "church-96": 630_576_131,
    "cifar-32": 183_735_811,
    "ffhq-160": 2_248_364_035,
    "ffhq-96": 630_576_131,
    "ffhq-96-compact": 155_662_389,
    "landscape-upscaler": 1_208_460,
    "portraits": 7_192_771,
    "portraits-refiner": 1_208_460,
    "portraits-trunk": 4_277_123,
    "digits": 5_223_889,
    "tiny": 78_227,
}
side = st.integers(1, 40)


# --- Compilation ---


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layer(backend):
    torch._dynamo.reset()
    layer = redraw(DualConv2d(3, 4, (4, 3), spectral_boundary=("periodic", "mirror")))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = draw(2, 3, 16, 16)
    for periodic in ((False, False), (True, False)):
        assert_near(compiled(x, (9, 20), periodic), layer(x, (9, 20), periodic))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer_of_dynamic_size(backend):
    torch._dynamo.reset()
    layer = redraw(DualConv2d(3, 4, (4, 3)))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for size in ((16, 16), (24, 20), (33, 50)):
        x = draw(2, 3, *size)
        assert_near(compiled(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_model(make_model, backend):
    torch._dynamo.reset()
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for size in ((16, 16), (13, 20)):
        x = draw(2, 3, *size)
        assert_near(compiled(x, -0.3).sample, model(x, -0.3).sample)


@pytest.mark.slow
def test_compiled_repeated_blocks(make_model):
    torch._dynamo.reset()
    model, x = make_model(), draw(2, 3, 16, 16)
    expected = model(x, -0.3).sample
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=64):
        assert_near(model(x, -0.3).sample, expected)


# --- DFUModel: shapes and parameters ---


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(side, side), conv_type=st.sampled_from(["dual", "spatial", "spectral"]))
@example((1, 1), "spectral")
@example((1, 40), "dual")
def test_every_size(make_model, size, conv_type):
    model = make_model(conv_type=conv_type, fourier_modes=((4, 3), 2, (1, 1)))
    with torch.no_grad():
        result = model(draw(1, 3, *size), -0.5).sample
    assert result.shape == (1, 3, *size)
    assert result.isfinite().all() and result.abs().max() > 1e-3


def test_conv_types(make_model):
    def names(conv_type):
        return set(make_model(conv_type=conv_type, fourier_modes=(4, 2, 1)).state_dict())

    dual, spatial, fourier = names("dual"), names("spatial"), names("spectral")
    assert dual == spatial | fourier
    assert not any(".spectral." in name for name in spatial)
    assert not any(".spatial." in name for name in fourier)
    mixed = make_model()  # the lowest level has no modes: its 3x3 convolutions stay alone
    assert mixed.mid_blocks[0].conv1.spectral is None
    assert mixed.conv_in.spectral is not None and mixed.conv_out.spectral is not None
    assert [b.level for b in mixed.up_blocks] == [2, 2, 2, 1, 1, 1, 0, 0]  # "up" works with the modes it comes from
    assert mixed.up_blocks[2].conv1.spectral is None and mixed.up_blocks[5].conv1.spectral.modes == (2, 3)
    assert mixed.down_blocks[1].conv1.spectral.modes == (2, 3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_parameter_count_of_presets(path):
    config = DFUModel.load_config(path)
    with torch.device("meta"):
        model = getattr(dfu_diffusers, config["_class_name"]).from_config(config)
    assert model.num_parameters() == PARAMETERS[path.stem]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 630_576_131 - 1_152),
        ({"num_augment_labels": 9}, 630_576_131),
        (
            dict(
                block_out_channels=(128, 256, 256, 256, 256, 256),
                fourier_modes=((32, 17), (16, 9), (8, 5), (4, 3), None, None),
                attention_levels=(4,),
                num_augment_labels=9,
            ),
            2_248_364_035,
        ),
    ],
)
def test_parameter_count_of_the_authors_models(changes, expected):
    with torch.device("meta"):
        assert DFUModel(**changes).num_parameters() == expected


def test_starts_at_zero():
    model = DFUModel(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, 2), attention_levels=(1,))
    result = model(draw(1, 3, 16, 12), 0.0).sample
    assert 0 < result.abs().max() < 1e-3


def test_every_parameter_has_a_gradient(make_model):
    """So DDP needs no find_unused_parameters."""
    model = make_model(num_class_embeds=1, num_augment_labels=2).train()
    model(draw(2, 3, 32, 32), 0.1, torch.tensor([0, 0]), augment_labels=draw(2, 2)).sample.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# --- DFUModel: inputs ---


def test_outputs(make_model):
    model, x = make_model(), draw(2, 3, 9, 12)
    expected = model(x, 0.2).sample
    assert torch.equal(model(x, 0.2, return_dict=False)[0], expected)
    assert len(model(x, 0.2, return_dict=False)) == 1
    assert torch.equal(model(x, 0.2).sample, expected)  # deterministic
    assert torch.equal(make_model()(x, 0.2)[0], expected)
    assert not expected.isnan().any() and expected.is_contiguous()


def test_timesteps(make_model):
    model, x = make_model(), draw(2, 3, 8, 8)
    for t in (-1.25, 3, -0.37):
        expected = model(x, t).sample
        for same in (torch.tensor(t), torch.tensor([t]), torch.tensor([t, t]), torch.tensor([t, t]).double()):
            assert_near(model(x, same).sample, expected)
    assert (model(x, -0.6).sample - model(x, -0.4).sample).abs().max() > 1e-3
    assert (model(x, -0.4).sample - model(x, 0).sample).abs().max() > 1e-3
    both = model(x, torch.tensor([-0.6, 0.7])).sample
    assert_near(both, torch.cat([model(x[:1], -0.6).sample, model(x[1:], 0.7).sample]))


def test_images_of_a_batch_are_independent(make_model):
    model = make_model(num_class_embeds=4)
    x, t, labels = draw(3, 3, 13, 10), torch.tensor([-1.0, 0.3, 1.1]), torch.tensor([3, 0, 1])
    together = model(x, t, labels).sample
    for i in range(3):
        assert_near(together[i], model(x[i : i + 1], t[i], labels[i : i + 1]).sample[0])


def test_labels(make_model):
    model, x = make_model(num_class_embeds=3, num_augment_labels=2), draw(2, 3, 8, 8)
    base = model(x, 0.1, torch.tensor([0, 2])).sample
    assert (model(x, 0.1, torch.tensor([0, 1])).sample - base)[1].abs().max() > 1e-3
    zeros = model(x, 0.1, torch.tensor([0, 2]), augment_labels=torch.zeros(2, 2)).sample
    assert_near(zeros, base)
    augmented = model(x, 0.1, torch.tensor([0, 2]), augment_labels=torch.tensor([[0, 0], [0, 1]])).sample
    assert_near(augmented[0], base[0])
    assert (augmented - base)[1].abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(block_out_channels=()), ["block_out_channels", "()"]),
        (dict(block_out_channels=(7, 8, 8)), ["even", "7"]),
        (dict(block_out_channels=(2, 8, 8)), ["at least 4", "2"]),
        (dict(block_out_channels=(8, 8.0, 8)), ["integers", "8.0"]),
        (dict(block_out_channels=64), ["block_out_channels", "64"]),
        (dict(fourier_modes=(4, 2)), ["3 levels", "(4, 2)"]),
        (dict(fourier_modes=4), ["fourier_modes", "list or tuple", "4"]),
        (dict(fourier_modes=(4, 2, 0)), ["at least 1", "0"]),
        (dict(fourier_modes=(4, 2, (1, 2, 3))), ["(rows, columns)", "(1, 2, 3)"]),
        (dict(fourier_modes=(4, 2, 1.5)), ["integer", "1.5"]),
        (dict(fourier_modes=(4, 2, True)), ["integer", "True"]),
        (dict(conv_type="fourier"), ["'spatial'", "'fourier'"]),
        (dict(conv_type="spectral"), ["fourier_modes[2]", "'dual'"]),
        (dict(attention_levels=(3,)), ["0 to 2", "(3,)"]),
        (dict(attention_levels=(-1,)), ["0 to 2", "(-1,)"]),
        (dict(attention_levels=2), ["attention_levels", "2"]),
        (dict(dropout=1.0), ["[0, 1)", "1.0"]),
        (dict(dropout=-0.1), ["[0, 1)", "-0.1"]),
        (dict(dropout="no"), ["[0, 1)", "no"]),
        (dict(in_channels=0), ["in_channels", "at least 1", "0"]),
        (dict(out_channels=1.5), ["out_channels", "integer", "1.5"]),
        (dict(layers_per_block=0), ["layers_per_block", "at least 1", "0"]),
        (dict(norm_num_groups=0), ["norm_num_groups", "at least 1", "0"]),
        (dict(num_augment_labels=-1), ["num_augment_labels", "at least 0", "-1"]),
        (dict(sample_size=0), ["sample_size", "0"]),
        (dict(sample_size=(8, 8, 8)), ["sample_size", "(8, 8, 8)"]),
        (dict(sample_size="big"), ["sample_size", "big"]),
        (dict(norm_eps=-1.0), ["norm_eps", "-1.0"]),
        (dict(spectral_boundary="reflect"), ["'mirror'", "'reflect'"]),
        (dict(spectral_boundary=("mirror",)), ["(rows, columns)", "('mirror',)"]),
        (dict(spectral_boundary=None), ["'periodic'", "None"]),
        (dict(tileable="rows"), ["'xy'", "'rows'"]),
        (dict(num_class_embeds=0), ["num_class_embeds", "0", "None"]),
        (dict(num_class_embeds=2.5), ["num_class_embeds", "2.5", "None"]),
    ],
    ids=str,
)
def test_bad_arguments(make_model, changes, words):
    with pytest.raises((ValueError, TypeError)) as error:
        make_model(**changes)
    for word in words:
        assert word in str(error.value)


def test_bad_arguments_of_layers():
    with pytest.raises(ValueError, match="needs Fourier modes, but got None"):
        DualConv2d(3, 4, None, "spectral")
    with pytest.raises(ValueError, match="'dual', 'spatial' or 'spectral', but got 'both'"):
        DualConv2d(3, 4, 4, "both")
    for modes in (0, (4, -1), "ab", (1,), 2.5, None):
        with pytest.raises(ValueError, match="must be"):
            SpectralConv2d(3, 4, modes)
    with pytest.raises(ValueError, match="positive, but got 0 and 4"):
        SpectralConv2d(0, 4, 2)


@pytest.mark.parametrize("layer", [SpectralConv2d(3, 4, 2), DualConv2d(3, 4, 2), DualConv2d(3, 4, None)])
def test_bad_inputs_of_layers(layer):
    for shape in ((3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ValueError, match=r"\(batch, 3, height, width\)"):
            layer(torch.zeros(shape))
    for size in (5, (0, 5), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"`size` must be \(height, width\)"):
            layer(torch.zeros(1, 3, 8, 8), size=size)


def test_fake_and_meta_tensors_leave_nothing_behind(make_model):
    """Whoever plans memory with them must not spoil the cached matrices of later calls."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    _cached_fourier_matrices.clear()
    model, x = make_model(), draw(1, 3, 9, 14)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(x), 0.1).sample.shape == x.shape
    with torch.device("meta"):
        twin = make_model()
    assert twin.to("meta")(x.to("meta"), 0.1).sample.shape == x.shape
    assert model(x, 0.1).sample.isfinite().all()


def test_without_augment_labels_their_weights_still_get_a_gradient(make_model):
    """Of zero: DistributedDataParallel waits for a gradient of every parameter."""
    model, x = make_model(num_augment_labels=9), draw(2, 3, 8, 8)
    assert_near(model(x, 0.1).sample, model(x, 0.1, augment_labels=torch.zeros(2, 9)).sample)
    model(x, 0.1).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_and_timesteps_of_other_types(make_model, dtype):
    model, x = make_model(num_class_embeds=3), draw(2, 3, 5, 6)
    expected = model(x, -0.5, torch.tensor([0, 2])).sample
    assert torch.equal(model(x, np.float32(-0.5), torch.tensor([0, 2], dtype=dtype)).sample, expected)


X = torch.zeros(2, 3, 8, 8)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    "config, arguments, error, words",
    [
        ({}, dict(sample=X.long()), TypeError, ["floating point", "int64"]),
        ({}, dict(sample=X.numpy()), TypeError, ["floating point tensor", "ndarray"]),
        ({}, dict(sample=X[0]), ValueError, ["(batch, 3, height, width)", "(3, 8, 8)"]),
        ({}, dict(sample=X[:, :2]), ValueError, ["in_channels=3", "(2, 2, 8, 8)"]),
        ({}, dict(sample=X[..., :0]), ValueError, ["without empty dimensions", "(2, 3, 8, 0)"]),
        ({}, dict(class_labels=LABELS), ValueError, ["unconditional", "num_class_embeds"]),
        ({}, dict(augment_labels=torch.zeros(2, 9)), ValueError, ["(2, 0)", "(2, 9)"]),
        ({}, dict(timestep=None), TypeError, ["timestep", "NoneType"]),
        ({}, dict(timestep=torch.zeros(3)), ValueError, ["timestep", "(3,)", "2"]),
        ("classes", dict(), ValueError, ["class_labels", "[0, 3)"]),
        ("classes", dict(class_labels=LABELS[:1]), ValueError, ["2 integers", "(1,)"]),
        ("classes", dict(class_labels=LABELS[:, None]), ValueError, ["2 integers", "(2, 1)"]),
        ("classes", dict(class_labels=LABELS.float()), ValueError, ["integers", "float32"]),
        ("classes", dict(class_labels=LABELS.bool()), ValueError, ["2 integers", "torch.bool"]),
        ("classes", dict(class_labels=LABELS + 1), ValueError, ["[0, 3)", "[1, 3]"]),
        ("classes", dict(class_labels=LABELS - 1), ValueError, ["[0, 3)", "[-1, 1]"]),
        ("classes", dict(class_labels=[0, 1]), TypeError, ["class_labels", "tensor", "list"]),
        ("augment", dict(augment_labels=torch.zeros(9)), ValueError, ["(2, 9)", "(9,)"]),
        ("augment", dict(augment_labels=[[0.0] * 9] * 2), TypeError, ["augment_labels", "tensor", "list"]),
    ],
)
def test_bad_inputs(make_model, config, arguments, error, words):
    config = {"classes": dict(num_class_embeds=3), "augment": dict(num_augment_labels=9)}.get(config or None, {})
    with pytest.raises(error) as raised:
        make_model(**config)(**{"sample": X, "timestep": 0.1, **arguments})
    for word in words:
        assert word in str(raised.value)


# --- DFUModel: images that tile the plane ---


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(side, side), new_size=st.none() | st.tuples(side, side))
@example((1, 1), None)
@example((7, 9), (4, 5))
def test_periodic_convolution_continues_the_image(size, new_size):
    """As if copies of the resampled image lay around it, along the periodic axes only."""
    layer, x = redraw(DualConv2d(2, 3, None)).double(), draw(2, 2, *size, dtype=torch.float64)
    height, width = new_size or size
    for rows, columns in ((True, True), (True, False), (False, True), (False, False)):
        plane = resample(x, (height, width)).repeat(1, 1, 3 if rows else 1, 3 if columns else 1)
        expected = layer.spatial(plane)[:, :, rows * height :, columns * width :][:, :, :height, :width]
        torch.testing.assert_close(layer(x, new_size, (rows, columns)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes, shift", [("xy", (4, -8)), ("x", (0, 4)), ("y", (8, 0))])
@pytest.mark.parametrize("size", [(16, 24), (12, 16)])
def test_tileable_model_commutes_with_shifts(make_model, axes, shift, size):
    """By multiples of 4, what three levels divide a side by; and along the other axis it does not."""
    model, x = make_model(), draw(2, 3, *size)

    def error(shift, **tileable):
        shifted, expected = (images.roll(shift, (2, 3)) for images in (x, model(x, -0.3, **tileable).sample))
        return (model(shifted, -0.3, **tileable).sample - expected).abs().max()

    with torch.no_grad():
        plain = model(x, -0.3).sample
        assert error(shift) > 1e-2
        assert error(shift, tileable=axes) < 1e-4  # rounding
        assert axes == "xy" or error(shift[::-1], tileable=axes) > 1e-2
        assert torch.equal(model(x, -0.3).sample, plain)  # a call leaves nothing behind
        always = make_model(tileable=axes)
        assert_near(always(x, -0.3).sample, model(x, -0.3, tileable=axes).sample)
        other = "y" if axes == "x" else "x"
        assert_near(always(x, -0.3, tileable=other).sample, model(x, -0.3, tileable=other).sample)


def test_tileable_in_training_and_other_modes(make_model):
    model, x = make_model().train(), draw(2, 3, 9, 12).to(memory_format=torch.channels_last)
    assert model.conv_in(x, periodic=(True, True)).is_contiguous(memory_format=torch.channels_last)
    model(x, 0.4, tileable="xy").sample.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(x, 0.4, tileable="xy").sample.square().mean().backward()
    for name, p in model.named_parameters():
        assert_near(p.grad, gradients[name])
    expected = model.eval()(x, 0.4, tileable="xy").sample
    half = model.bfloat16()(x.bfloat16(), 0.4, tileable="xy").sample
    assert relative_error(half, expected.double()) < 0.05


def test_tileable_needs_periodic_waves(make_model):
    x = draw(1, 3, 8, 8)
    for axes in ("z", "yx", "", True):
        with pytest.raises(ValueError, match="must be 'x', 'y', 'xy' or None"):
            make_model()(x, 0.1, tileable=axes)
    model = make_model(spectral_boundary=("mirror", "periodic"))
    assert model(x, 0.1, tileable="x").sample.isfinite().all()
    for axes in ("y", "xy"):
        with pytest.raises(ValueError, match="keeps apart"):
            model(x, 0.1, tileable=axes)
    with pytest.raises(ValueError, match="tileable='x'.*'mirror'"):
        make_model(spectral_boundary="mirror", tileable="x")


def test_samples_have_no_seam(generator):
    """Of the shipped model, whose edges stayed apart in training: jumps across the seam are about those within."""
    pipe = DFUPipeline.from_pretrained(PORTRAITS)
    pipe.set_progress_bar_config(disable=True)

    def seam(tileable):
        arguments = dict(batch_size=6, height=32, width=32, num_inference_steps=8, output_type="pt")
        images = pipe(**arguments, tileable=tileable, generator=generator.manual_seed(0)).images
        return wrap_seam(2 * images - 1).mean()

    assert seam("xy") < 1.4 < 1.5 < seam(None)


# --- DFUModel: saving ---


@pytest.mark.parametrize("modes", [((4, 3), 2, None), [[4, 3], 2, None], (4, (2, 1), 1)])
def test_save_and_load(make_model, tmp_path, modes):
    model = make_model(fourier_modes=modes, num_class_embeds=3)
    x, labels = draw(2, 3, 11, 8), torch.tensor([0, 2])
    expected = model(x, -0.3, labels).sample
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert saved["fourier_modes"] == json.loads(json.dumps(modes))
    loaded = DFUModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(x, -0.3, labels).sample, expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    again = DFUModel.from_config(loaded.config)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("boundary, axes", [("mirror", None), (("mirror", "periodic"), "x"), ("periodic", "xy")])
def test_boundaries_are_saved(make_model, tmp_path, boundary, axes):
    model, x = make_model(spectral_boundary=boundary, tileable=axes), draw(2, 3, 11, 8)
    expected = model(x, -0.3).sample
    assert (make_model()(x, -0.3).sample - expected).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["spectral_boundary"], saved["tileable"]) == (json.loads(json.dumps(boundary)), axes)
    assert torch.equal(DFUModel.from_pretrained(tmp_path)(x, -0.3).sample, expected)


def test_configs_without_boundaries_are_periodic_waves_and_edges_apart(make_model):
    config = {k: v for k, v in make_model().config.items() if k not in ("spectral_boundary", "tileable")}
    model, x = redraw(DFUModel.from_config(config)).eval(), draw(2, 3, 11, 8)
    expected = make_model(spectral_boundary="periodic", tileable=None)(x, 0.1).sample
    assert torch.equal(model(x, 0.1).sample, expected)


# --- DFUModel: factorised spectral weights ---


def test_factorised_model(make_model, tmp_path):
    """Of all channels it is the model it comes from; of fewer a smaller one, whose config and weights can be saved."""
    model, x = make_model(block_out_channels=(16, 24, 16)).eval(), draw(2, 3, 11, 8)
    assert_near(model.factorized(0.999)(x, 0.1).sample, model(x, 0.1).sample)
    small = model.factorized(0.5)
    assert small.num_parameters() < model.num_parameters() and not small.training
    small.save_pretrained(tmp_path)
    loaded = DFUModel.from_pretrained(tmp_path)
    assert loaded.config.spectral_rank == 0.5 and torch.equal(loaded(x, 0.1).sample, small(x, 0.1).sample)
    with torch.no_grad():
        small.conv_in.spatial.weight.zero_()
    assert model.conv_in.spatial.weight.any()  # it has weights of its own


def test_factorising_what_cannot_be_factorised(make_model):
    with pytest.raises(ValueError, match="no spectral weights"):
        make_model(conv_type="spatial").factorized(0.5)
    with pytest.raises(ValueError, match="factorised already, with rank=0.5"):
        make_model(spectral_rank=0.5).factorized(0.5)
    for rank in (0, 1, 1.5, "0.5", float("nan")):
        with pytest.raises(ValueError, match="A spectral rank is a share"):
            make_model(spectral_rank=rank)


# --- DFUModel: training ---


def test_gradient_checkpointing(make_model):
    model, x = make_model().train(), draw(2, 3, 9, 12)
    blocks = [*model.down_blocks, *model.mid_blocks, *model.up_blocks]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: calls.append(block))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(x, 0.4).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}, len(calls)

    expected, count = gradients()
    assert count == len(blocks)
    model.enable_gradient_checkpointing()
    result, count = gradients()
    assert count == 2 * len(blocks)  # every block ran again on the way back
    for name, gradient in result.items():
        assert_near(gradient, expected[name])
    model.enable_gradient_checkpointing(levels=[0])
    result, count = gradients()
    assert count == len(blocks) + sum(block.level == 0 for block in blocks)
    for name, gradient in result.items():
        assert_near(gradient, expected[name])
    for wrong in ([0, 3], [], 3):
        with pytest.raises(ValueError, match=r"levels 0 to 2, but got levels=\("):
            model.enable_gradient_checkpointing(levels=wrong)
    model.enable_gradient_checkpointing(levels=0)
    with torch.no_grad():
        calls.clear()
        model(x, 0.4)
        assert len(calls) == len(blocks)


def test_dropout_acts_in_training_only(make_model):
    model, x = make_model(dropout=0.5), draw(1, 3, 8, 8)
    expected = make_model(dropout=0.0)(x, 0.1).sample
    assert torch.equal(model(x, 0.1).sample, expected)
    model.train()
    assert (model(x, 0.1).sample - model(x, 0.1).sample).abs().max() > 1e-3


# --- DFUModel: memory ---


def test_memory_of_a_forward_without_gradients():
    """Of the portrait model, in units of the features of the finest level: the memory that the guide promises."""
    with torch.device("meta"):
        model, x = DFUModel.from_config(DFUModel.load_config(CONFIGS / "portraits.json")).eval(), draw(1, 3, 256, 256)
        with torch.no_grad(), LiveMemory() as memory:
            model(x.to("meta"), 0.1)
    features = 4 * model.config.block_out_channels[0] * 256 * 256
    assert 6 * features < memory.peak < 10.5 * features  # 8.7 with torch 2.13, 10.2 with torch 2.6


def test_work_in_place_changes_nothing(make_model):
    model, x = make_model(), draw(2, 3, 11, 8)
    expected, before = model(x, 0.1).sample, x.clone()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_near(model(x, 0.1).sample, expected)
        assert torch.equal(x, before)


# --- DFUModel: dtypes, offloading, pipelines ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(make_model, dtype):
    model, x = make_model(num_class_embeds=2, num_augment_labels=2), draw(2, 3, 12, 11)
    arguments = dict(class_labels=torch.tensor([1, 0]), augment_labels=draw(2, 2))
    expected = model(x, -0.4, **arguments).sample.double()
    result = model.to(dtype)(x.to(dtype), -0.4, **arguments).sample
    assert result.dtype == dtype
    assert relative_error(result, expected) < (1e-5 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting(make_model, compute):
    model, x = make_model(), draw(2, 3, 12, 11)
    expected = model(x, -0.4).sample.double()
    model.to(compute)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    assert model.embedding_in.weight.dtype == torch.float8_e4m3fn
    spectral = {name: p.dtype for name, p in model.named_parameters() if name.endswith("spectral.weight")}
    inner = {name: dtype for name, dtype in spectral.items() if not name.startswith(("conv_in", "conv_out"))}
    assert inner and set(inner.values()) == {torch.float8_e4m3fn} and spectral["conv_in.spectral.weight"] == compute
    result = model(x.to(compute), -0.4).sample
    assert result.dtype == compute
    assert relative_error(result, expected) < 0.15


@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "cpu_offload", "disk_offload"])
def test_offloading(make_model, tmp_path, kind):
    from accelerate import cpu_offload, disk_offload

    model, x = make_model(), draw(2, 3, 12, 11)
    expected = model(x, -0.4).sample
    cpu = torch.device("cpu")
    if kind == "cpu_offload":
        cpu_offload(model, execution_device=cpu)
    elif kind == "disk_offload":
        disk_offload(model, tmp_path, execution_device=cpu)
        assert model.conv_in.spectral.weight.is_meta
    else:
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(
            onload_device=cpu, offload_device=cpu, offload_type=kind, offload_to_disk_path=str(tmp_path), **groups
        )
    with torch.no_grad():
        assert_near(model(x, -0.4).sample, expected)


def test_device_map_with_disk(make_model, tmp_path):
    model, x = make_model(), draw(1, 3, 8, 8)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.named_children()} | {"mid_blocks": "disk"}
    loaded = DFUModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.mid_blocks[0].conv2.spatial.weight.is_meta
    with torch.no_grad():
        assert_near(loaded(x, 0.1).sample, model(x, 0.1).sample)


def test_channels_last(make_model):
    model, x = make_model(), draw(2, 3, 9, 12)
    expected = model(x, 0.1).sample
    result = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), 0.1).sample
    assert_near(result, expected)


@pytest.mark.parametrize("pipeline, scheduler", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_stock_pipelines(make_model, generator, pipeline, scheduler):
    pipe = pipeline(make_model(), scheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=3, output_type="np", generator=generator).images
    assert images.shape == (2, 16, 16, 3) and F.l1_loss(*map(torch.tensor, images)) > 0
    pipe.unet.register_to_config(sample_size=(8, 12))
    assert pipe(num_inference_steps=2, output_type="np", generator=generator).images.shape == (1, 8, 12, 3)
