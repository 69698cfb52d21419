"""Measures against closed forms, slow direct sums, scipy and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.evaluation import metrics
from dfu_diffusers.evaluation.metrics import (
    FeatureStatistics,
    agreement,
    box_downsample,
    frechet_distance,
    kernel_distance,
    octave_power,
    precision_recall,
    radial_spectrum,
    random_patches,
    repetition_score,
    sliced_wasserstein,
    spectrum_distance,
    wrap_seam,
)

SIZES = [(8, 8), (13, 13), (7, 12), (17, 11), (31, 64)]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def portraits(count, height, width=None, first=0):
    return render_portraits(portrait_parameters(range(first, first + count)), height, width)


def statistics(*parts):
    result = FeatureStatistics()
    for part in parts:
        result.update(part)
    return result


def gaussian(mean, covariance, count=10**6):
    """Statistics that have exactly this mean and covariance."""
    result = FeatureStatistics()
    result.count, result.mean = count, torch.tensor(mean, dtype=torch.float64)
    result._scatter = torch.tensor(np.asarray(covariance) * (count - 1))
    return result


def random_covariance(d, rank, seed):
    factor = normals(d, rank, seed=seed).numpy()
    return factor @ factor.T


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_numpy():
    features = 3 + normals(50, 6) * torch.arange(1, 7)
    found = statistics(features)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.numpy().mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().T), rtol=1e-9)


@settings(deadline=None, max_examples=20)
@given(cuts=st.lists(st.integers(1, 99), unique=True), offset=st.sampled_from([0.0, 1e4]))
def test_statistics_of_any_batches_are_those_of_one(cuts, offset):
    features = offset + normals(100, 5)
    parts, whole = statistics(*features.tensor_split(sorted(cuts))), statistics(features)
    assert parts.count == whole.count
    # float64 rounds 1e4 by 1e-12.
    torch.testing.assert_close(parts.mean, whole.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=0, atol=1e-9)


def test_statistics_keep_their_digits_far_from_zero():
    features = normals(1000, 3)
    torch.testing.assert_close(
        statistics(features + 1e6).covariance, statistics(features).covariance, rtol=0, atol=1e-8
    )


def test_half_precision_features_are_summed_in_double_precision():
    features = normals(200, 3).half()
    assert statistics(features).mean.dtype == torch.float64
    torch.testing.assert_close(statistics(features).mean, features.double().mean(0))


# --- Frechet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [np.linalg.qr(normals(4, 4).numpy())[0], np.eye(4)], ids=["rotated", "aligned"])
@pytest.mark.parametrize("null", [0, 1e-16, -1e-16])  # what rounding makes of a zero depends on the CPU
def test_frechet_distance_of_commuting_gaussians(axes, null):
    a, b = (axes * np.array(values) @ axes.T for values in ([1.0, 4, 9, null], [4.0, 4, 1, 25]))
    expected = 3**2 + 4**2 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2 + 5**2
    assert frechet_distance(gaussian([0.0] * 4, a), gaussian([3.0, 0, -4, 0], b)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    a, b = np.array([[2.0, 1], [1, 3]]), np.array([[5.0, -2], [-2, 1]])
    # Of a 2x2 matrix M with positive eigenvalues, Tr M^(1/2) = sqrt(Tr M + 2 sqrt(det M)).
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 1 + np.trace(a) + np.trace(b) - 2 * root
    assert not np.allclose(a @ b, b @ a)
    assert frechet_distance(gaussian([0.0, 0], a), gaussian([1.0, 0], b)) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_regular_covariances_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_covariance(20, 40, 0), random_covariance(20, 40, 1)
    expected = np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real
    assert frechet_distance(gaussian(np.zeros(20), a), gaussian(np.zeros(20), b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_frechet_distance_of_singular_covariances(rank):
    # Gaussians in two planes at an angle: the nuclear norm of F^T G in the planes' own coordinates.
    f, g = normals(30, rank, seed=2).numpy(), normals(30, 7, seed=3).numpy()
    nuclear = np.linalg.svd(f.T @ g, compute_uv=False).sum() if rank else 0
    a, b = gaussian(np.zeros(30), f @ f.T), gaussian(np.zeros(30), g @ g.T)
    expected = (f**2).sum() + (g**2).sum() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10 * (f**2).sum() + 1e-300)


def test_frechet_distance_is_symmetric_and_grows_with_noise():
    real, fake = statistics(normals(200, 8)), [statistics(s * normals(200, 8, seed=1)) for s in (1, 1.2, 2)]
    near, middle, far = (frechet_distance(real, other) for other in fake)
    assert near < middle < far
    assert frechet_distance(fake[2], real) == pytest.approx(far, rel=1e-9)


class Pooled(nn.Module):
    """Six features of an image, as torchmetrics wants its extractors."""

    num_features = 6

    def forward(self, images):
        return torch.cat([images.double().mean((2, 3)), images.double().std((2, 3))], 1)


def test_frechet_distance_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric, extract, ours = fid.FrechetInceptionDistance(feature=Pooled()).set_dtype(torch.float64), Pooled(), []
    for real, images in ((True, portraits(60, 24)), (False, portraits(50, 24, first=60) * 0.8)):
        metric.update(images, real=real)
        ours.append(statistics(extract(images)))
    assert frechet_distance(*ours) == pytest.approx(metric.compute().item(), rel=1e-5)


# --- kernel distance -------------------------------------------------------------------------------------------------


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy, pair by pair."""
    k = [[[(a @ b / len(a) + 1) ** 3 for b in v] for a in u] for u, v in ((x, x), (y, y), (x, y))]
    xx, yy = (sum(v for i, row in enumerate(rows) for j, v in enumerate(row) if i != j) for rows in k[:2])
    n, m = len(x), len(y)
    return xx / n / (n - 1) + yy / m / (m - 1) - 2 * sum(map(sum, k[2])) / n / m


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch):
    x, y = normals(9, 4), normals(7, 4, seed=1) + 0.3
    expected = float(mmd(x.numpy(), y.numpy()))
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("dfu_diffusers.evaluation.metrics._CHUNK", 20)  # two rows at a time
    assert kernel_distance(x, y)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kernel_distance_is_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = normals(40, 6), 0.8 * normals(40, 6, seed=1)
    assert kernel_distance(x, y)[0] == pytest.approx(kid.poly_mmd(x, y).item(), rel=1e-9)
    torch.manual_seed(0)
    metric = kid.KernelInceptionDistance(feature=nn.Identity(), subsets=400, subset_size=20).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    mean, deviation = (value.item() for value in metric.compute())
    assert kernel_distance(x, y)[0] == pytest.approx(mean, abs=4 * deviation / 20)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    values = [kernel_distance(normals(40, 5, seed=2 * i), normals(30, 5, seed=2 * i + 1), 1)[0] for i in range(300)]
    assert min(values) < 0
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_interval_holds_the_truth_about_as_often_as_it_says(shift):
    # E k(x, y) over Gaussians of d = 4: with t = x.y, E (t/d + 1)^3 = 1 + 3 E t/d + 3 E t^2/d^2 + E t^3/d^3.
    def expectation(a, b):  # of means a, b: t = (a + e).(b + f)
        ab, aa, bb, d = a @ b, a @ a, b @ b, 4
        second = ab**2 + aa + bb + d
        third = ab**3 + 3 * ab * (aa + bb) + 3 * ab * d + 6 * ab
        return 1 + 3 * ab / d + 3 * second / d**2 + third / d**3

    zero, mean = np.zeros(4), np.full(4, shift)
    truth = expectation(zero, zero) + expectation(mean, mean) - 2 * expectation(zero, mean)
    inside = 0
    for i in range(100):
        fake = normals(80, 4, seed=2 * i + 1) + shift
        _, low, high = kernel_distance(normals(80, 4, seed=2 * i), fake, resamples=100, seed=i)
        inside += low <= truth <= high
    assert inside >= 85


def test_kernel_distance_and_its_interval_follow_from_the_seed():
    x, y = normals(20, 3), normals(20, 3, seed=1)
    assert kernel_distance(x, y, seed=1) == kernel_distance(x, y, seed=1)
    assert kernel_distance(x, y, seed=1)[0] == pytest.approx(kernel_distance(x, y, seed=2)[0], rel=1e-9)
    assert kernel_distance(x, y, seed=1)[1:] != kernel_distance(x, y, seed=2)[1:]


# --- precision and recall --------------------------------------------------------------------------------------------


def test_precision_and_recall_count_what_balls_cover():
    real = torch.tensor([[0.0], [1], [2], [10], [11], [12]])  # two clusters
    fake = torch.tensor([[0.5], [1.5], [1.1], [100.0]])  # of the first only, and an outlier
    # With one neighbour, balls of radius 1 around the real points hold the first three of the fakes. These have radii
    # of 0.6, 0.4, 0.4 and hold 0 and 1; the outlier's, 98.5, reaches down to 1.5 and holds the others.
    assert precision_recall(real, fake, neighbours=1) == (3 / 4, 1)
    assert precision_recall(real, fake[:3], neighbours=1) == (1, 2 / 6)


def test_precision_and_recall_of_equal_and_of_distant_sets(monkeypatch):
    x = normals(50, 6)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    expected = precision_recall(x, 0.7 * normals(40, 6, seed=1))
    monkeypatch.setattr("dfu_diffusers.evaluation.metrics._CHUNK", 300)
    assert precision_recall(x, 0.7 * normals(40, 6, seed=1)) == expected
    assert expected[0] > expected[1]  # less spread than there should be


def test_precision_and_recall_against_a_direct_count():
    real, fake = normals(30, 3), normals(25, 3, seed=1) * torch.tensor([0.1, 1, 1.5])

    def covered(points, centres):
        radius = [sorted(np.linalg.norm(centres - c, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius)) for p in points])

    expected = covered(fake.numpy(), real.numpy()), covered(real.numpy(), fake.numpy())
    assert 0 < min(expected) and max(expected) < 1
    assert precision_recall(real, fake) == pytest.approx(expected)
    assert precision_recall(real + 1e6, fake + 1e6) == pytest.approx(expected)


# --- patches and averages --------------------------------------------------------------------------------------------


def integral_mean(row, cells):
    """Means of the step function with the values `row` on [0, 1] over equal cells, by its integral's differences."""
    integral = np.concatenate([[0], np.cumsum(row)]) / len(row)
    edges = np.interp(np.linspace(0, 1, cells + 1), np.linspace(0, 1, len(row) + 1), integral)
    return np.diff(edges) * cells


@pytest.mark.parametrize("size", SIZES)
def test_box_downsample_is_the_integral_over_cells(size):
    images = normals(2, 3, *size)
    for target in ((5, 7), (1, 1), (size[0], 4), (7, size[1]), (size[0] // 2, size[1] // 2)):
        expected = np.apply_along_axis(integral_mean, 2, images.numpy(), target[0])
        expected = np.apply_along_axis(integral_mean, 3, expected, target[1])
        np.testing.assert_allclose(box_downsample(images, target), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_cut_at_the_same_places_of_every_set(size):
    places = torch.arange(size[0] * size[1], dtype=torch.float32).view(1, 1, *size).expand(6, 1, *size)
    patches = random_patches(places, 5, per_image=9, seed=3)
    assert patches.shape == (54, 1, 5, 5)
    corner = patches[:, 0, 0, 0].long()  # tells where a patch was cut
    y, x = corner // size[1], corner % size[1]
    assert (y <= size[0] - 5).all() and (x <= size[1] - 5).all()
    np.testing.assert_array_equal(patches[17], places[1, :, y[17] : y[17] + 5, x[17] : x[17] + 5])
    halves = [random_patches(places[:3], 5, 9, 3, numbers=part) for part in ([0, 1, 2], [3, 4, 5])]
    assert torch.equal(torch.cat(halves), patches)
    assert not torch.equal(random_patches(places, 5, per_image=9, seed=4), patches)


def test_patches_reach_every_place():
    images = torch.arange(30.0).view(1, 1, 5, 6).expand(40, 1, 5, 6)
    corners = random_patches(images, 3, per_image=20)[:, 0, 0, 0].unique()
    assert corners.tolist() == [6 * y + x for y in range(3) for x in range(4)]


# --- spectrum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 5), (6, 9)])
def test_radial_spectrum_is_that_of_a_direct_transform(size):
    height, width = size
    images = normals(2, 3, *size).numpy()
    rings = {k: [] for k in range(1, min(size) // 2 + 1)}
    for k in range(-((height - 1) // 2), height // 2 + 1):
        for l in range(-((width - 1) // 2), width // 2 + 1):
            wave = np.exp(-2j * np.pi * (k * np.arange(height)[:, None] / height + l * np.arange(width) / width))
            power = np.abs((images * wave).mean((2, 3))) ** 2
            ring = round(math.hypot(k, l))
            if ring in rings:
                rings[ring].append(power.mean())
    np.testing.assert_allclose(radial_spectrum(torch.from_numpy(images)), [np.mean(r) for r in rings.values()])


def wave_at(height, width, phase=0.0):
    y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    y, x = y.double()[:, None], x.double()[None]
    field = torch.cos(2 * math.pi * (3 * x - y) + phase) + 0.5 * torch.sin(2 * math.pi * 2 * y)
    return (field / 2).expand(1, 3, height, width)


def test_spectra_of_one_function_agree_at_all_sizes():
    spectra = [radial_spectrum(wave_at(*size))[:4] for size in ((16, 16), (17, 11), (48, 31), (9, 64))]
    for spectrum in spectra[1:]:
        torch.testing.assert_close(spectrum, spectra[0], rtol=1e-6, atol=1e-15)
        assert spectrum_distance(spectrum, spectra[0]) < 1e-6


def test_spectrum_distance_is_zero_for_one_field_and_known_for_a_scaled_one():
    images = portraits(8, 33, 40)
    spectrum = radial_spectrum(images)
    assert spectrum.shape == (16,)
    assert spectrum_distance(spectrum, spectrum) == 0
    assert spectrum_distance(spectrum, radial_spectrum(images.roll((5, 3), (2, 3)))) < 1e-5  # phases do not count
    assert spectrum_distance(spectrum, radial_spectrum(images / 10)) == pytest.approx(2, abs=1e-5)
    assert spectrum_distance(radial_spectrum(torch.zeros(1, 3, 8, 8)), radial_spectrum(torch.ones(1, 3, 8, 8))) == 0


def test_spectrum_distance_is_a_root_mean_square_of_decades():
    a, b = torch.tensor([1e-3, 1e-5, 1e-7, 1e-30]), torch.tensor([1e-2, 1e-7, 1e-7, 0])
    assert spectrum_distance(a, b) == pytest.approx(math.sqrt((1 + 4) / 4), rel=1e-5)


def test_spectra_of_batches_average(monkeypatch):
    images = portraits(7, 20, 15)
    spectrum, parts = radial_spectrum(images), [radial_spectrum(part) for part in images.split([3, 4])]
    torch.testing.assert_close((3 * parts[0] + 4 * parts[1]) / 7, spectrum)
    monkeypatch.setattr("dfu_diffusers.evaluation.metrics._CHUNK", 2000)  # two images at a time
    torch.testing.assert_close(radial_spectrum(images), spectrum)


# --- sliced Wasserstein distance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, levels", [((7, 9), 1), ((30, 64), 1), ((31, 31), 2), ((64, 96), 3), ((61, 127), 3)])
def test_sliced_wasserstein_goes_down_to_sixteen_pixels(size, levels):
    images = portraits(4, *size)
    distances, mean = sliced_wasserstein(images, images, per_image=16, directions=8)
    assert len(distances) == levels and distances == [0] * levels and mean == 0


@pytest.mark.parametrize("size", [(32, 32), (31, 47), (64, 37)])
def test_laplacian_pyramid_is_that_of_scipys_convolution(size):
    ndimage = pytest.importorskip("scipy.ndimage")
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[None, None] / 256
    images = normals(2, 3, *size)
    levels = metrics._laplacian_pyramid(images)
    for level in levels[:-1]:
        assert level.shape == images.shape
        coarse = ndimage.convolve(images.numpy(), taps, mode="mirror")[..., ::2, ::2]
        spread = np.zeros(images.shape)
        spread[..., ::2, ::2] = coarse
        np.testing.assert_allclose(level, images - 4 * ndimage.convolve(spread, taps, mode="mirror"), atol=1e-12)
        images = torch.from_numpy(coarse)
    torch.testing.assert_close(levels[-1], images)
    assert min(levels[-1].shape[-2:]) in range(16, 31)


def test_sliced_wasserstein_tells_at_which_scale_images_differ():
    real, other = portraits(64, 64), portraits(64, 64, first=64)
    arguments = dict(per_image=32, directions=16)
    floor, _ = sliced_wasserstein(real, other, **arguments)
    noisy, _ = sliced_wasserstein(real, other + 0.2 * normals(*other.shape).float(), **arguments)
    assert noisy[0] > 3 * floor[0] and noisy[2] < 3 * floor[2]
    assert sliced_wasserstein(real, other, **arguments) == sliced_wasserstein(real, other, **arguments)


def test_sliced_wasserstein_is_blind_to_brightness_and_contrast():
    real = portraits(8, 32)
    distances, _ = sliced_wasserstein(real, 0.5 * real + 0.25, per_image=32, directions=16)
    assert max(distances) < 1e-4


def test_sliced_wasserstein_of_white_noise_of_known_shape():
    # At 16 px the descriptors are the pixels. Patches of a single value z ~ N(0, 1) and of white noise project onto a
    # direction a as N(0, (sum a)^2) and as N(0, 1): W1 = |1 - |sum a|| E|z|, and sum a ~ N(0, 1) for random a.
    flat, white = normals(400, 1, 1, 1).expand(400, 1, 16, 16), normals(400, 1, 16, 16, seed=1)
    (distance,), _ = sliced_wasserstein(flat, white, per_image=8, directions=512)
    gaps = (1 - normals(10**5, seed=2).abs()).abs().mean().item() * math.sqrt(2 / math.pi)
    assert distance == pytest.approx(gaps, rel=0.12)


def test_power_by_octave():
    y, x = ((torch.arange(n) + 0.5) / n for n in (12, 24))
    picture = 7 + torch.cos(5 * torch.pi * y)[:, None] + 0.1 * torch.cos(9 * torch.pi * x)  # modes (5, 0) and (0, 9)
    power = octave_power(picture.expand(2, 3, -1, -1), (8, 8))
    torch.testing.assert_close(power, torch.tensor([0.5, 0.005, 0.0]).double(), atol=1e-5, rtol=0)


# --- repetition, agreement, seam -------------------------------------------------------------------------------------


def tiled(count, size, rows, columns):
    return portraits(count, size).repeat(1, 1, rows, columns)


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (61, 97), (48, 96), (128, 31)])
def test_faces_do_not_repeat(size):
    scores = repetition_score(portraits(64, *size))
    assert scores.shape == (64,)
    assert scores.median() < 0.25 and scores.quantile(0.9) < 0.4, scores.quantile(0.9)


@pytest.mark.parametrize("rows, columns", [(2, 2), (1, 2), (2, 1), (4, 4), (3, 3), (1.5, 1.5)])
def test_tiled_faces_repeat(rows, columns):
    images = portraits(32, 48).repeat(1, 1, math.ceil(rows), math.ceil(columns))
    scores = repetition_score(images[..., : int(48 * rows), : int(48 * columns)])
    assert scores.min() > 0.8, scores.min()
    assert scores.max() < 1 + 1e-6


def test_repetition_score_is_a_correlation_coefficient_of_overlaps():
    # At 16 px nothing is averaged: windows of 5 px are subtracted, then every shift is tried in a loop.
    image = normals(1, 2, 16, 11)
    y = nn.functional.pad(image, (1, 1, 2, 2), mode="replicate")
    x = (image - nn.functional.avg_pool2d(y, (5, 3), 1))[0].numpy()
    total, found = (x**2).sum() - (x.sum((1, 2)) ** 2).sum() / 176, {}
    for s in range(-15, 16):
        for t in range(-10, 11):
            a = x[:, max(0, s) : 16 + min(0, s), max(0, t) : 11 + min(0, t)]
            b = x[:, max(0, -s) : 16 + min(0, -s), max(0, -t) : 11 + min(0, -t)]
            pixels = a[0].size
            a, b = (part - part.mean((1, 2), keepdims=True) for part in (a, b))
            floor = 0.1 * pixels / 176 * total
            found[s, t] = (a * b).sum() / math.sqrt(max((a**2).sum(), floor) * max((b**2).sum(), floor))
    peaks = [
        value
        for (s, t), value in found.items()
        if max(abs(s) / 16, abs(t) / 11) > 0.22
        and (16 - abs(s)) * (11 - abs(t)) >= 44
        and all(value >= found.get((s + i, t + j), -1) for i in (-1, 0, 1) for j in (-1, 0, 1))
    ]
    assert repetition_score(image).item() == pytest.approx(max(peaks), rel=1e-9)


def test_repetition_of_noise_and_of_images_without_content():
    assert repetition_score(normals(32, 3, 40, 40)).max() < 0.2
    assert repetition_score(torch.zeros(1, 3, 24, 24)).item() == 0
    stripes = torch.cos(torch.arange(40.0)).expand(1, 3, 40, 40)  # its own copy at every vertical shift
    assert repetition_score(stripes).item() == pytest.approx(1, abs=1e-5)


def test_agreement_of_a_portrait_at_two_sizes_and_of_two_portraits():
    small = portraits(8, 33, 32)
    for size in ((64, 64), (97, 131), (33, 32)):
        large = portraits(8, *size)
        assert agreement(small, large).min() > 25
        assert agreement(small.roll(1, 0), large).max() < 20


def test_agreement_in_decibels():
    large = normals(2, 3, 10, 10).clamp(-0.9, 0.9)
    small = box_downsample(large, (5, 5))
    assert agreement(small + 0.02, large).tolist() == pytest.approx([40, 40])  # a hundredth of the range
    assert agreement(small, large).tolist() == [math.inf] * 2


@pytest.mark.parametrize("size", [(24, 24), (31, 17), (64, 40)])
def test_seam_of_tileable_images_is_about_one(size):
    phases = torch.linspace(0, 2 * math.pi, 41)[:-1]
    periodic = torch.cat([wave_at(*size, phase) for phase in phases])
    assert wrap_seam(periodic).mean().item() == pytest.approx(1, abs=0.1)
    assert wrap_seam(normals(200, 3, *size)).mean().item() == pytest.approx(1, abs=0.02)
    assert wrap_seam(torch.full((1, 3, *size), 0.3)).item() == 1


@pytest.mark.parametrize("size", [24, 31])
def test_seam_of_a_ramp_is_its_number_of_steps(size):
    ramp = torch.linspace(-1, 1, size).view(1, 1, 1, -1).expand(1, 1, 10, size)
    for image in (ramp, ramp.mT):
        assert wrap_seam(image).item() == pytest.approx(size - 1, rel=1e-3)


# --- bad input -------------------------------------------------------------------------------------------------------


def error(call):
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: FeatureStatistics().update(torch.zeros(0, 4)), ["0 rows", "take more images"]),
        (lambda: FeatureStatistics().update(torch.zeros(4)), ["(n, d)", "(4,)"]),
        (lambda: FeatureStatistics().update(torch.tensor([[0.0, 1], [math.nan, 0]])), ["1 of 2 rows", "row 1"]),
        (lambda: statistics(normals(5, 3), normals(5, 4)), ["of 3 and of 4 numbers", "same extractor"]),
        (lambda: FeatureStatistics().covariance, ["at least 2", "there are 0"]),
        (lambda: statistics(normals(1, 3)).covariance, ["at least 2", "there are 1"]),
        (
            lambda: frechet_distance(statistics(normals(9, 3)), statistics(normals(3, 3))),
            ["needs more than 3 images", "there are 3", "kernel_distance"],
        ),
        (lambda: frechet_distance(statistics(normals(9, 3)), FeatureStatistics()), ["there are 0"]),
        (lambda: frechet_distance(statistics(normals(9, 3)), statistics(normals(9, 4))), ["of 3 and of 4 numbers"]),
        (lambda: kernel_distance(normals(1, 3), normals(5, 3)), ["real has 1 rows", "2 are needed"]),
        (lambda: kernel_distance(normals(5, 3), normals(5, 3), resamples=0), ["resamples", "at least 1", "0"]),
        (lambda: precision_recall(normals(9, 3), normals(3, 3)), ["fake has 3 rows", "4 are needed"]),
        (lambda: precision_recall(normals(9, 3), normals(9, 3), neighbours=0), ["neighbours", "at least 1", "0"]),
        (lambda: precision_recall(normals(9, 3), normals(9, 2)), ["of 3 and of 2 numbers"]),
    ],
)
def test_bad_features_are_named_with_a_remedy(call, words):
    message = error(call)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: radial_spectrum(torch.zeros(0, 3, 8, 8)), ["(0, 3, 8, 8)"]),
        (lambda: repetition_score(torch.zeros(3, 8, 8)), ["(3, 8, 8)"]),
        (lambda: wrap_seam(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), ["torch.uint8", "127.5"]),
        (lambda: wrap_seam(torch.full((2, 3, 8, 8), math.nan)), ["NaN"]),
        (lambda: wrap_seam(torch.zeros(1, 3, 8, 1)), ["8x1", "at least 2 px"]),
        (lambda: repetition_score(torch.zeros(1, 3, 7, 9)), ["7x9", "at least 8 px"]),
        (lambda: box_downsample(torch.zeros(1, 3, 8, 8), (9, 4)), ["8x8", "9x4"]),
        (lambda: random_patches(torch.zeros(1, 3, 8, 5), 6), ["6 px", "8x5"]),
        (lambda: random_patches(torch.zeros(2, 3, 8, 8), 6, numbers=[1]), ["1 numbers for 2 images"]),
        (lambda: spectrum_distance(torch.ones(4), torch.ones(5)), ["(4,)", "(5,)", "one length"]),
        (lambda: sliced_wasserstein(torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8)), ["(3, 3, 8, 8)", "equal"]),
        (lambda: sliced_wasserstein(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 9)), ["(2, 3, 8, 9)"]),
        (lambda: agreement(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 7, 9)), ["7x9", "8x8"]),
        (lambda: agreement(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 9, 9)), ["(1, 3, 9, 9)", "equal"]),
    ],
)
def test_bad_images_are_named_with_a_remedy(call, words):
    message = error(call)
    assert all(word in message for word in words), message


def test_half_precision_images_are_measured_in_single_precision():
    images = portraits(4, 32)
    for measure in (repetition_score, wrap_seam, lambda x: agreement(x, x.roll(1, 0))):
        torch.testing.assert_close(measure(images.bfloat16()), measure(images.bfloat16().float()))
