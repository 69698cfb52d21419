"""The layers of DFUModel against direct sums, other grids, and textbook formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import draw, redraw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import spectral as ref
from sampling import assert_near, relative_error

from dfu_diffusers.models import cpu_kernels
from dfu_diffusers.models import spectral as spectral_module
from dfu_diffusers.models.cache import TensorCache
from dfu_diffusers.models.layers import DFUBlock, DualConv2d
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.models.spectral import SpectralConv2d, _cached_fourier_matrices

side = st.integers(1, 40)


def spectral(in_channels, out_channels, modes, dtype=torch.float32):
    return redraw(SpectralConv2d(in_channels, out_channels, modes)).to(dtype)


def identity(channels, modes, dtype=torch.float64, boundary="periodic"):
    """A SpectralConv2d that passes its modes on as they are."""
    layer = SpectralConv2d(channels, channels, modes, boundary=boundary).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.eye(channels), torch.zeros(channels, channels)], 1))
    return layer


# --- SpectralConv2d: values ---


@settings(max_examples=50, deadline=None)
@given(
    size=st.tuples(side, side),
    new_size=st.none() | st.tuples(side, side),
    modes=st.integers(1, 4) | st.tuples(st.integers(1, 5), st.integers(1, 6)),
)
@example((1, 1), None, 3)
@example((1, 40), (40, 1), (5, 2))
@example((8, 8), None, (4, 5))  # modes exactly at the Nyquist frequency
@example((7, 11), (8, 10), (4, 5))
@example((97, 131), None, (2, 3))
@example((13, 17), (97, 131), 3)
def test_spectral_conv_equals_direct_sum(size, new_size, modes):
    x = draw(2, 3, *size, seed=hash(size) % 1000, dtype=torch.float64)
    layer = spectral(3, 4, modes, torch.float64)
    expected = ref.spectral_conv2d(x, layer.weight, layer.modes, new_size)
    assert layer(x, new_size).shape == expected.shape
    assert relative_error(layer(x, new_size), expected) < 1e-10
    layer.float()
    expected = ref.spectral_conv2d(x.float(), layer.weight, layer.modes, new_size)
    assert relative_error(layer(x.float(), new_size), expected) < 1e-5


def test_product_is_complex_mode_by_mode():
    """One wave a cos(2 pi (k y + l x) + p) through a mode R = |R| exp(i q) leaves as a |R| cos(... + p + q)."""
    size = (10, 12)
    y, x = torch.meshgrid((torch.arange(10.0) + 0.5) / 10, (torch.arange(12.0) + 0.5) / 12, indexing="ij")
    layer = spectral(1, 1, (3, 4))
    for k in range(-3, 3):
        for l in range(1, 4):  # noqa: E741
            real, imaginary = layer.weight[(k + 3) * 4 + l, 0].tolist()
            angle = 2 * math.pi * (k * y + l * x) + 0.7
            gain, turn = math.hypot(real, imaginary), math.atan2(imaginary, real)
            result = layer(2 * torch.cos(angle)[None, None], size)[0, 0]
            # Angles of up to 40 are rounded by 2e-6.
            torch.testing.assert_close(result, 2 * gain * torch.cos(angle + turn), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size, new_size", [((16, 16), (16, 16)), ((16, 21), (32, 13)), ((19, 23), (9, 11))])
def test_spectral_conv_equals_fft_with_half_pixel_phases(size, new_size):
    r, c = modes = (4, 5)
    layer, x = spectral(3, 2, modes, torch.float64), draw(2, 3, *size, dtype=torch.float64)
    k = torch.arange(-r, r)

    def half_pixel(height, width):
        rows, columns = k.double() / height, torch.arange(c, dtype=torch.float64) / width
        return torch.exp(1j * math.pi * (rows[:, None] + columns))

    coefficients = torch.fft.rfft2(x, norm="forward")[:, :, k % size[0]][..., :c] / half_pixel(*size)
    weight = torch.complex(*layer.weight.chunk(2, -1)).view(2 * r, c, 3, 2)
    spectrum = torch.zeros(2, 2, new_size[0], new_size[1] // 2 + 1, dtype=torch.complex128)
    spectrum[:, :, k % new_size[0], :c] = torch.einsum("bikl,klio->bokl", coefficients, weight) * half_pixel(*new_size)
    expected = torch.fft.irfft2(spectrum, s=new_size, norm="forward")
    torch.testing.assert_close(layer(x, new_size), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("new_size", [None, (11, 40)])
def test_spectral_conv_in_low_precision(dtype, new_size):
    """Five products in a row, each of rounded factors and rounded itself: an eps each at most."""
    layer, x = spectral(16, 16, (4, 5), dtype), draw(2, 16, 32, 24, dtype=dtype)
    result = layer(x, new_size)
    assert result.dtype == dtype
    expected = ref.spectral_conv2d(x, layer.weight, layer.modes, new_size)
    assert relative_error(result, expected) < 5 * torch.finfo(dtype).eps


def test_autocast():
    layer = redraw(DualConv2d(16, 16, (4, 5)))
    x = draw(2, 16, 17, 12)
    expected = layer.double()(x.double(), (9, 24))
    for inputs in (x, x.bfloat16()):
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            result, part = layer(inputs, (9, 24)), layer.spectral(inputs)
        assert result.dtype == part.dtype == torch.bfloat16
        assert relative_error(result, expected) < 5 * torch.finfo(torch.bfloat16).eps  # as in the last test
    result.float().sum().backward()
    assert layer.spectral.weight.grad.dtype == torch.float32
    layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x.double(), (9, 24)), expected, rtol=0, atol=1e-12)  # in float64


# --- SpectralConv2d: boundary ---


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(side, side),
    new_size=st.none() | st.tuples(side, side),
    modes=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    boundary=st.sampled_from(["mirror", ("mirror", "periodic"), ["periodic", "mirror"]]),
)
@example((1, 1), None, (3, 3), "mirror")
@example((1, 40), (40, 1), (5, 2), "mirror")
@example((4, 5), None, (4, 6), "mirror")  # modes at the Nyquist frequency of the doubled grid and beyond it
@example((13, 17), (97, 31), (3, 4), "mirror")
def test_mirror_is_the_periodic_layer_on_the_continued_image(size, new_size, modes, boundary):
    x = draw(2, 3, *size, seed=hash(size) % 1000, dtype=torch.float64)
    layer = redraw(SpectralConv2d(3, 4, modes, boundary=boundary)).double()
    axes = (2, 3) if boundary == "mirror" else (2,) if boundary[0] == "mirror" else (3,)
    expected = ref.mirror_conv2d(x, layer.weight, layer.modes, new_size, axes)
    torch.testing.assert_close(layer(x, new_size), expected, rtol=0, atol=1e-12)
    expected = ref.mirror_conv2d(x.float(), layer.float().weight, layer.modes, new_size, axes)
    assert_near(layer(x.float(), new_size).double(), expected)


@pytest.mark.parametrize("size", [(5, 6), (12, 9), (64, 37), (4, 100)])
def test_mirror_on_two_grids(size):
    layer = redraw(SpectralConv2d(3, 4, (4, 5), boundary="mirror")).double()
    coarse, fine = (layer(ref.band_limited_cosines(*grid, 3, 4), size) for grid in (size, (30, 31)))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-12)
    layer = identity(3, (4, 5), boundary="mirror")
    result = layer(ref.band_limited_cosines(30, 31, 3, 4), size)
    torch.testing.assert_close(result, ref.band_limited_cosines(*size, 3, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize("boundary, echo", [("periodic", True), ("mirror", False), (("mirror", "periodic"), True)])
def test_opposite_edges_hear_each_other_only_if_periodic(boundary, echo):
    """A blur whose kernel reaches a tenth of the image, applied to a line along the left edge."""
    layer = identity(1, (16, 17), boundary=boundary)
    period = 1 if layer.boundary[1] == "periodic" else 2
    with torch.no_grad():
        columns = torch.arange(17.0).repeat(32) / period
        layer.weight *= torch.exp(-(columns[:, None, None] ** 2) / 16)
    line = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    line[..., 0] = 1
    result = layer(line)[0, 0, 20].abs()
    assert result[1] > 0.5 * result[0] and result[20] < 1e-2 * result[0]
    assert (result[-1] > 0.5 * result[0]) == echo
    assert echo or result[20:].max() < 1e-2 * result[0]


@pytest.mark.parametrize("boundary", ["periodic", "mirror"])
def test_initial_weights_keep_the_power(boundary):
    torch.manual_seed(0)
    layer = SpectralConv2d(96, 96, (6, 6), boundary=boundary)
    function = ref.band_limited_cosines if boundary == "mirror" else ref.band_limited
    x = torch.cat([function(20, 24, 5, 5, seed) for seed in range(32)], 1).float()
    assert 0.85 < layer(x).square().mean() / x.square().mean() < 1.15


# --- Grids ---


@pytest.mark.parametrize("size", [(9, 10), (12, 9), (27, 27), (64, 37), (10, 100)])
def test_same_layer_on_two_grids(size):
    """A band-limited input gives the same function on every grid that resolves it: in float32 to 1e-5."""
    layer = spectral(3, 4, (4, 5))
    expected = layer(ref.band_limited(30, 30, 4, 4).float(), size)
    result = layer(ref.band_limited(*size, 4, 4).float())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_same_function_at_shared_points():
    layer = spectral(3, 4, (4, 5), torch.float64)
    coarse, fine = (layer(ref.band_limited(*size, 4, 4)) for size in ((9, 11), (27, 55)))
    # (3 j + 1 + 1/2) / 27 = (j + 1/2) / 9
    torch.testing.assert_close(fine[:, :, 1::3, 2::5], coarse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (31, 16)])
@pytest.mark.parametrize("new_size", [(7, 7), (16, 16), (8, 33), (53, 9)])
def test_identity_weights_resample_exactly(size, new_size):
    layer = identity(3, (4, 4))
    x, expected = (ref.band_limited(*grid, 3, 3) for grid in (size, new_size))
    torch.testing.assert_close(layer(x, new_size), expected, rtol=0, atol=1e-12)
    assert relative_error(layer.float()(x.float(), new_size), expected) < 1e-5


@pytest.mark.parametrize("size", [(24, 24), (48, 48), (12, 40), (16, 9), (23, 12), (17, 31)])
def test_spatial_and_spectral_path_stay_aligned(size):
    """Half a pixel of 24 is a phase of 0.13: both paths must show the lowest modes where they were."""
    layer = DualConv2d(1, 1, (2, 2)).double()
    layer.spectral = identity(1, (2, 2))
    with torch.no_grad():
        layer.spatial.weight.zero_()[:, :, 1, 1] = 1
    x = ref.band_limited(24, 24, 1, 1)[:, :1]
    spatial, both = layer.spatial(resample(x, size)), layer(x, size)
    for mode in ((1, 0), (0, 1)):
        original = ref.coefficient(x, *mode)
        for image in (spatial, both, both - spatial):
            assert abs((ref.coefficient(image, *mode) / original).angle()) < 0.02


@pytest.mark.parametrize("size", [(10, 4), (5, 8), (20, 24)])
def test_ramp_keeps_its_place(size):
    def ramp(height, width):
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
        return (3 * y[:, None] - 2 * x)[None, None]

    result, expected = resample(ramp(20, 24), size), ramp(*size)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def area_matrix(old, new):
    """Share of pixel j in cell i, from the overlap of their intervals."""
    rows = []
    for i in range(new):
        rows.append([max(0.0, min((i + 1) / new, (j + 1) / old) - max(i / new, j / old)) * new for j in range(old)])
    return torch.tensor(rows, dtype=torch.float64)


def nearest_matrix(old, new):
    """The pixel whose cell holds the centre (2 i + 1) / (2 new)."""
    return torch.eye(old, dtype=torch.float64)[[(2 * i + 1) * old // (2 * new) for i in range(new)]]


def lies_between_pixels(old, new):
    """Whether some new centre has two nearest pixels, either of which will do."""
    return any((2 * i + 1) * old % (2 * new) == 0 for i in range(new))


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(side, side), new_size=st.tuples(side, side))
@example((40, 39), (20, 20))
@example((24, 26), (12, 13))
def test_spatial_resampling(size, new_size):
    x = draw(1, 2, *size, dtype=torch.float64)
    if not any(old < new and lies_between_pixels(old, new) for old, new in zip(size, new_size)):
        rows, columns = ((area_matrix if new <= old else nearest_matrix)(old, new) for old, new in zip(size, new_size))
        torch.testing.assert_close(resample(x, new_size), rows @ x @ columns.T, rtol=0, atol=1e-12)
    constant = resample(torch.full((1, 1, *size), 0.3), new_size)
    torch.testing.assert_close(constant, torch.full((1, 1, *new_size), 0.3))


# --- SpectralConv2d and DualConv2d as modules ---


def test_state_is_real_and_of_rank_four_at_most(make_model):
    layer = SpectralConv2d(3, 5, modes=(4, 6))
    layer(draw(1, 3, 8, 8))
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {"weight": (2 * 4 * 6, 3, 2 * 5)}
    assert SpectralConv2d(3, 5, modes=4).modes == (4, 5)
    model = make_model(num_class_embeds=3, num_augment_labels=2)
    model(draw(1, 3, 9, 9), 0.1, torch.tensor([1]))
    assert not list(model.buffers())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and tensor.ndim <= 4, name


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_residual_is_added(memory_format):
    layer, x = spectral(3, 4, 2), draw(2, 3, 9, 7)
    residual = draw(2, 4, 5, 11, seed=1).to(memory_format=memory_format)
    expected = residual + layer(x, (5, 11))
    assert_near(layer(x, (5, 11), residual=residual.clone()), expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("old, new", [((33, 20), (17, 10)), ((32, 32), (8, 8)), ((9, 7), (18, 14)), ((8, 8), (4, 4))])
def test_resampling_keeps_the_layout_that_convolutions_want(batch, old, new):
    x = draw(batch, 3, *old).contiguous(memory_format=torch.channels_last)
    assert resample(x, new).is_contiguous(memory_format=torch.channels_last)
    assert DualConv2d(3, 4, 2)(x, new).is_contiguous(memory_format=torch.channels_last)


def test_dual_conv_is_the_sum_of_its_parts():
    layer, x = redraw(DualConv2d(3, 4, 2)), draw(2, 3, 9, 7)
    assert_near(layer(x), layer.spatial(x) + layer.spectral(x))
    assert_near(layer(x, (5, 11)), layer.spatial(resample(x, (5, 11))) + layer.spectral(x, (5, 11)))


def test_gradients():
    layer = redraw(DualConv2d(2, 3, (2, 2))).double()
    x = draw(2, 2, 5, 4, dtype=torch.float64).requires_grad_()
    parameters = dict(layer.named_parameters())

    for size in (None, (3, 2), (4, 7)):

        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(parameters, values)), (x, size))  # noqa: B023

        assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("context", ["inference_mode", "grad", "jvp", "vmap"])
def test_cached_matrices_serve_later_calls(context):
    layer, x = spectral(2, 3, 2), draw(1, 2, 6, 5)
    _cached_fourier_matrices.clear()
    if context == "inference_mode":
        with torch.inference_mode():
            first = layer(x)
    elif context == "grad":
        torch.func.grad(lambda x: layer(x).sum())(x)
        first = layer(x)
    elif context == "jvp":
        first = torch.func.jvp(layer, (x,), (x,))[1]  # the layer is linear
    else:
        first = torch.func.vmap(lambda x: layer(x[None])[0])(x)
    second = layer(x.requires_grad_())
    second.sum().backward()
    assert_near(second, first)
    assert x.grad.abs().min() > 0 and layer.weight.grad is not None


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (12, 40), (32, 9)])  # from one mode to all of them
@pytest.mark.parametrize("lowered", [False, True])
def test_large_weights_pass_in_blocks(size, lowered, monkeypatch):
    """Values and gradients as autograd has them: blocks of one row, of several with a shorter last one, and all."""
    layer, x = spectral(3, 4, (5, 4)), draw(2, 3, *size).requires_grad_()

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            y = layer(x)
        return y, *torch.autograd.grad((y * y).sum(), [x, layer.weight])

    expected, dtype = gradients(), torch.bfloat16 if lowered else torch.float32
    for numbers in (1, 3 * layer.weight[:4].numel(), layer.weight.numel()):
        for module in (cpu_kernels, spectral_module):
            monkeypatch.setattr(module, "LARGE_WEIGHT", numbers)
        for ours, reference in zip(gradients(), expected):
            # Products of other blocks may round differently.
            assert relative_error(ours, reference.double()) < 5 * torch.finfo(dtype).eps
    layer.weight.requires_grad_(False)  # frozen: only the gradient of x is left to find
    layer(x).square().sum().backward()
    assert x.grad.abs().min() > 0 and layer.weight.grad is None


def test_the_cache_of_transforms_is_bounded_by_bytes():
    cached = TensorCache(torch.zeros, max_bytes=100)
    for count in range(1, 20):
        cached(count)
    assert cached.bytes == 76 and cached(19) is cached(19)  # the last one, of 76 bytes, leaves no room for another


def test_large_weights_under_torch_func(monkeypatch):
    """Which cannot look into functions of our own."""
    for module in (cpu_kernels, spectral_module):
        monkeypatch.setattr(module, "LARGE_WEIGHT", 1)
    layer, x = spectral(3, 4, (5, 4)), draw(2, 3, 7, 5)
    assert_near(torch.func.vmap(lambda x: layer(x[None])[0])(x), layer(x))
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    assert_near(gradient, torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0])


# --- SpectralConv2d: factorised weights ---


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (24, 33)])
@pytest.mark.parametrize("channels", [(3, 20), (20, 3), (16, 24)])
def test_factors_are_a_full_weight(size, channels):
    """The layer is the one whose weights are the products U S V."""
    layer, x = redraw(SpectralConv2d(*channels, (4, 3), rank=0.5)), draw(2, channels[0], *size, dtype=torch.float64)
    p, q = layer.reduce.shape[1], layer.expand.shape[0]
    assert (p, q) == tuple(SpectralConv2d.reduced(n, 0.5) for n in channels) and layer.weight.shape == (24, p, 2 * q)
    layer, full = layer.double(), SpectralConv2d(*channels, (4, 3)).double()
    with torch.no_grad():
        core = layer.weight.unflatten(2, (2, q))
        full.weight.copy_(torch.einsum("ia,mapb,bo->mipo", layer.reduce, core, layer.expand).flatten(2))
    torch.testing.assert_close(layer(x), full(x))


def test_factorising_keeps_the_subspaces_that_matter():
    """Weights of low rank are kept as they are; of others more than by factors taken at random."""
    low = redraw(SpectralConv2d(16, 24, (4, 3), rank=0.5)).double()
    full = SpectralConv2d(16, 24, (4, 3)).double()
    with torch.no_grad():
        core = low.weight.unflatten(2, (2, 12))
        full.weight.copy_(torch.einsum("ia,mapb,bo->mipo", low.reduce, core, low.expand).flatten(2))
    x = draw(2, 16, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(full.factorized(0.5)(x), full(x))
    redraw(full)
    near, u = full.factorized(0.5), torch.linalg.qr(draw(16, 8, dtype=torch.float64))[0]
    kept = near.weight.square().sum() / full.weight.square().sum()
    assert kept > torch.einsum("mio,ia->mao", full.weight, u).square().sum() / full.weight.square().sum() * 12 / 24


# --- Group normalisation ---


@pytest.mark.parametrize("size", [(1, 1), (7, 1), (3, 5), (8, 8), (27, 31)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_group_norm_and_its_gradients(size, dtype, bound):
    torch.manual_seed(0)
    norm = DFUBlock(12, 12, 8, 1, "dual", 0, None, False, 0.0, 3, 1e-6).norm1.to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(2, 12, *size) + 2).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 12, *size).to(dtype)
    leaves = [x, norm.weight, norm.bias]
    precise = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.group_norm(precise[0], 3, *precise[1:], eps=1e-6)
    with torch.no_grad():
        assert (norm(x).double() - expected).norm() < bound * expected.norm()
    y = norm(x)
    assert (y.double() - expected).norm() < bound * expected.norm()
    gradients = torch.autograd.grad(y, leaves, dy)
    for ours, reference in zip(gradients, torch.autograd.grad(expected, precise, dy.double())):
        assert (ours.double() - reference).norm() < bound * reference.norm() + bound
