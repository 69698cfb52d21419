# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measures of generated images: distances between sets of features, and measures that need no network.

Images are (n, channels, height, width), floating point in [-1, 1]: functions on the unit square, averaged over cells.
Features are (n, d), one row per image or patch, from a network that the caller chose: nothing is loaded here.

Two distances measure a model at sizes that it was not trained at. Both are Frechet distances of features:

- coherence: of whole images after `box_downsample` to a training size, against real images of that size;
- patch distance: of `random_patches`, crops that are not resized, from the same places of real and generated images.

`kernel_distance` suits small sets, and `precision_recall` separates the two kinds of failure. `radial_spectrum`,
`octave_power`, `sliced_wasserstein`, `repetition_score`, `agreement` and `wrap_seam` need no network.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..models.modes import octave_sizes, to_modes
from ..models.resampling import resample

_CHUNK = 2**22  # numbers in a temporary array: 32 MiB in float64

# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets of features


class FeatureStatistics:
    """Number, mean and covariance of feature vectors, in float64, added batch by batch.

    Keeps the mean and the sum of outer products around it. Adding a batch is exact (Chan, Golub and LeVeque 1979,
    "Updating formulae and a pairwise algorithm for computing sample variances", equation 2.1): unlike sums of squares,
    it loses no digits. Needs d^2 numbers: 32 MiB for the 2048 features of InceptionV3.

    >>> whole, parts = FeatureStatistics(), FeatureStatistics()
    >>> features = torch.randn(100, 3)
    >>> whole.update(features)
    >>> parts.update(features[:40])
    >>> parts.update(features[40:])
    >>> parts.count, torch.allclose(parts.covariance, whole.covariance)
    (100, True)
    """

    def __init__(self):
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean) (x - mean)^T

    def update(self, features: torch.Tensor) -> None:
        """Add features (n, d) on any device.

        Raises:
            ValueError: no features, not a matrix, another d than before, infinite ones or NaN.
        """
        features = _features("features", features)
        count, mean = len(features), features.mean(0)
        scatter = (features - mean).T @ (features - mean)
        if not self.count:
            self.mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        _check_dimensions(self.mean, mean)
        total, difference = self.count + count, mean - self.mean
        self._scatter += scatter + torch.outer(difference, difference) * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """(d, d), unbiased: divided by count - 1.

        Raises:
            ValueError: fewer than two feature vectors.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 feature vectors, but there are {self.count}: add images.")
        return self._scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance of the Gaussians with these means and covariances, "FID" (arXiv 1706.08500, eq. 6).

    |m_a - m_b|^2 + Tr(A + B - 2 (A B)^(1/2)). With factors A = F F^T and B = G G^T the eigenvalues of A B are the
    squared singular values of F^T G, so the trace of the root is the sum of the singular values. Unlike the root of
    the product A B, this needs no offset on the diagonal for singular covariances. Eigenvalues of A and B below
    d * 2.2e-16 of the largest are set to zero: they are rounding noise, whose square root would be much larger.

    The distance falls as sets grow, with a bias that depends on the model: compare only values of equal counts.

    Raises:
        ValueError: features of different d, or at most d of them, so that the covariance has no full rank.

    >>> a, b = FeatureStatistics(), FeatureStatistics()
    >>> a.update(torch.tensor([[-1.0], [1.0], [0.0]]))
    >>> b.update(torch.tensor([[1.0], [5.0], [3.0]]))
    >>> round(frechet_distance(a, b), 6)  # (3 - 0)^2 + (2 - 1)^2
    10.0
    """
    for statistics in (a, b):
        if statistics.count <= len(statistics.mean):
            raise ValueError(
                f"The covariance of {len(statistics.mean)} features needs more than {len(statistics.mean)} images, "
                f"but there are {statistics.count}. Take more, or an extractor with fewer features; "
                f"`kernel_distance` is unbiased for any number."
            )
    _check_dimensions(a.mean, b.mean)
    root = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    return max(0.0, distance.item())


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F (d, d) with F F^T = covariance, which may be singular: eigenvalues as small as rounding errors become zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values.max()
    return vectors * values.where(values > noise, 0).sqrt()


def kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, resamples: int = 200, seed: int = 0
) -> tuple[float, float, float]:
    """Kernel distance "KID" and its 95% interval (Binkowski et al., arXiv 1801.01401, section 4).

    The squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, as the unbiased mean over all pairs of
    different images. The usual mean over random subsets estimates the same value, but adds noise. It may be negative.

    The interval contains the middle 95% of `resamples` Bayesian bootstraps (Rubin 1981): images get random weights,
    and pairs of an image with itself, which would bias the distance upwards, are left out. If the distributions agree,
    the interval is rather too wide.

    Args:
        real, fake: (n, d) and (m, d), at least two of each. Time grows as (n + m)^2 (d + resamples); memory does not.
        resamples: at least 1.
        seed: of the bootstrap.

    Returns:
        distance, low, high; often reported times 1000.

    Raises:
        ValueError: an argument out of its range; too few features, not matrices, different d, infinite ones or NaN.
    """
    _check_positive("resamples", resamples)
    real, fake = _two_features(real, fake, least=2)
    rng = np.random.default_rng(seed)
    u, v = (_bootstrap_weights(rng, resamples, len(features)) for features in (real, fake))
    distances = _mean_kernel(real, u) + _mean_kernel(fake, v) - 2 * _kernel_sums(real, fake, u, v)
    low, high = np.quantile(distances[1:].numpy(), (0.025, 0.975))
    return distances[0].item(), float(low), float(high)


def _bootstrap_weights(rng: np.random.Generator, resamples: int, count: int) -> torch.Tensor:
    """(1 + resamples, count), rows that sum to 1: equal weights, then weights uniform on the simplex."""
    weights = np.concatenate([np.ones((1, count)), rng.exponential(size=(resamples, count))])
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


def _kernel(dots: torch.Tensor, d: int) -> torch.Tensor:
    return (dots / d + 1) ** 3


def _kernel_sums(x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Sum over i, j of u_i v_j k(x_i, y_j) for each row of the weights u (r, n) and v (r, m): (r,)."""
    chunk = max(1, _CHUNK // len(y))
    parts = zip(x.split(chunk), u.split(chunk, dim=1))
    return sum((weights @ _kernel(rows @ y.T, x.shape[1]) * v).sum(1) for rows, weights in parts)


def _mean_kernel(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Weighted mean of k over pairs of different rows of x."""
    squares = u.square()
    same = squares @ _kernel(x.square().sum(1), x.shape[1])
    return (_kernel_sums(x, x, u, u) - same) / (1 - squares.sum(1))


def precision_recall(real: torch.Tensor, fake: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2).

    A set covers a ball around each of its points, up to the point's `neighbours`-th nearest neighbour in the set.
    Precision is the share of `fake` that `real` covers: low if images look wrong. Recall is the share of `real` that
    `fake` covers: low if kinds of images are missing. Both depend on the counts: compare only equal counts.

    Args:
        real, fake: (n, d) and (m, d), more than `neighbours` of each.
        neighbours: at least 1; the paper takes 3 for 50,000 images.

    Returns:
        precision, recall in [0, 1].

    Raises:
        ValueError: an argument out of its range; too few features, not matrices, different d, infinite ones or NaN.
    """
    _check_positive("neighbours", neighbours)
    real, fake = _two_features(real, fake, least=neighbours + 1)
    centre = real.mean(0)  # distances are computed from dot products, which lose fewer digits around zero
    real, fake = real - centre, fake - centre
    return _covered(fake, real, neighbours), _covered(real, fake, neighbours)


def _covered(points: torch.Tensor, centres: torch.Tensor, neighbours: int) -> float:
    """Share of points within at least one ball around the centres."""
    chunk = max(1, _CHUNK // len(centres))
    # A point is its own nearest neighbour, hence + 1.
    radii = [torch.cdist(rows, centres).kthvalue(neighbours + 1).values for rows in centres.split(chunk)]
    inside = [(torch.cdist(rows, centres) <= torch.cat(radii)).any(1) for rows in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Parts and sizes of images for features


def box_downsample(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Exact mean over the cells of a coarser grid, also if the ratio of sizes is not an integer.

    Shape: (n, c, H, W) -> (n, c, height, width), `size` being (height, width), at most (H, W).

    Raises:
        ValueError: a size beyond the images', or bad images.

    >>> box_downsample(torch.tensor([[[[0.0, 0.3, 0.6]]]]), (1, 2))  # cells of 1.5 pixels
    tensor([[[[0.1000, 0.5000]]]])
    """
    images, (height, width) = _images("images", images), size
    if not (1 <= height <= images.shape[-2] and 1 <= width <= images.shape[-1]):
        raise ValueError(
            f"Images of {_size(images)} px cannot be averaged to {height}x{width} px. Give a size of at least 1 and "
            f"at most theirs."
        )
    return resample(images, (height, width))


def random_patches(
    images: torch.Tensor, size: int, per_image: int = 1, seed: int = 0, numbers: Sequence[int] | None = None
) -> torch.Tensor:
    """Square crops, not resized, for measures of texture.

    Their places depend only on (seed, number of the image) and on the size of the images. So sets of real and of
    generated images of one size are cut at the same places, for all batches and processes.

    Args:
        images: sides at least `size`.
        size: side of a crop, in pixels.
        per_image: crops of each image.
        seed: of the places.
        numbers: of the images in their set; 0, 1, ... by default.

    Shape: (n, c, H, W) -> (n per_image, c, size, size), the crops of an image side by side.

    Raises:
        ValueError: a size beyond the images', numbers that are not one per image, or bad images.
    """
    images = _images("images", images)
    numbers = range(len(images)) if numbers is None else numbers
    if len(numbers) != len(images):
        raise ValueError(f"{len(numbers)} numbers for {len(images)} images: give one each.")
    free = np.array(images.shape[-2:]) - size + 1
    if size < 1 or free.min() < 1:
        raise ValueError(f"Crops of {size} px do not fit into images of {_size(images)} px: choose a smaller size.")
    places = [np.random.default_rng((seed, number)).integers(free, size=(per_image, 2)) for number in numbers]
    top, left = torch.from_numpy(np.concatenate(places)).T.to(images.device)
    image = torch.arange(len(images), device=images.device).repeat_interleave(per_image)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view (n, c, rows, columns, size, size)
    return windows[image, :, top, left]


# ---------------------------------------------------------------------------------------------------------------------
# Distances between two sets of images, without features


def radial_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Power at 1, 2, ... cycles per image: (bins,) in float64, bins = half the shorter side, rounded down.

    Coefficients have a factor 1/(HW), so that a band-limited function has the same spectrum at every size. Bin k is
    the mean power of the modes (row frequency, column frequency) whose radius rounds to k, over images and channels.
    The corners beyond the Nyquist frequency of the shorter side and the mean brightness, at zero, are left out.

    Spectra of batches of one size average to that of the set, weighted by their numbers of images.

    Raises:
        ValueError: a side below 2 px, or bad images.

    >>> wave = torch.cos(2 * torch.pi * 2 * (torch.arange(8) + 0.5) / 8).expand(1, 1, 6, 8)
    >>> (12 * radial_spectrum(wave)).round(decimals=6)  # coefficients 1/2 at two of the ring's twelve modes
    tensor([0.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    images = _images("images", images, side=2)
    height, width = images.shape[-2:]
    power = torch.zeros(height, width, dtype=torch.float64)
    for batch in _batches(images):
        power += torch.fft.fft2(batch.double(), norm="forward").abs().square().mean(1).sum(0).cpu()
    rows, columns = (torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) for n in (height, width))
    ring = torch.hypot(rows[:, None], columns).round().long().flatten()
    sums = torch.bincount(ring, power.flatten() / len(images))
    return (sums / torch.bincount(ring).clamp(min=1))[1 : min(height, width) // 2 + 1]


def spectrum_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square difference of the log10 of two radial spectra, in decades of power: zero if they are equal.

    Powers below 1e-15 are set to 1e-15; even the rounding of a megapixel picture to 8 bits has more.

    Raises:
        ValueError: spectra of different lengths.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(
            f"Spectra of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared. Give two of one length; for "
            f"images of different sizes cut both to the frequencies they share."
        )
    difference = a.double().clamp(min=1e-15).log10() - b.double().clamp(min=1e-15).log10()
    return difference.square().mean().sqrt().item()


def octave_power(images: torch.Tensor, base: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """Power in the cosine modes that each octave adds, a channel, without the mean brightness: (octaves,) in float64.

    The first octave has the modes of the grid `base`, each further one those of a grid of twice the sides.

    >>> wave = torch.cos(torch.pi * 9 * (torch.arange(16) + 0.5) / 16).expand(1, 1, 16, 16)  # 4.5 cycles
    >>> octave_power(wave).round(decimals=6)
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    images = _images("images", images)
    power = sum(to_modes(image).double().square().mean(0).cpu() for image in images) / len(images)
    power[0, 0] = 0
    within = [power[:height, :width].sum() for height, width in octave_sizes(images.shape[-2:], base)]
    return torch.stack(within).diff(prepend=torch.zeros(1, dtype=torch.float64))


def sliced_wasserstein(
    real: torch.Tensor, fake: torch.Tensor, seed: int = 0, per_image: int = 128, directions: int = 512
) -> tuple[list[float], float]:
    """Sliced Wasserstein distance of patches at each scale (Karras et al., arXiv 1710.10196, section 5).

    Each level of a Laplacian pyramid gives 7x7 patches, normalised per channel by the mean and standard deviation of
    their own set. So the distance compares structure, not brightness and contrast. There are levels as long as the
    shorter side is at least 16 px; the last one is the remaining small image. Patches come from the same places of
    both sets.

    Args:
        real, fake: equal numbers of images of one size, sides at least 7 px.
        seed: of places and directions.
        per_image: patches of each image and level.
        directions: number of projections to average over.

    Returns:
        Distances by level, finest first, and their mean. The paper reports them times 1000.

    Raises:
        ValueError: sets of different shapes, a side too short, or bad images.
    """
    real, fake = _images("real", real, side=7), _images("fake", fake, side=7)
    if real.shape != fake.shape:
        raise ValueError(
            f"The sets differ: real is {tuple(real.shape)}, fake is {tuple(fake.shape)}. Give equal numbers of images "
            f"of one size."
        )
    generator, distances = torch.Generator().manual_seed(seed), []
    for level, (x, y) in enumerate(zip(_laplacian_pyramid(real), _laplacian_pyramid(fake))):
        x, y = (_descriptors(random_patches(images, 7, per_image, seed + level)) for images in (x, y))
        axes = F.normalize(torch.randn(directions, x.shape[1], generator=generator)).to(x)
        gaps = [np.abs(_sorted(axis @ x.T) - _sorted(axis @ y.T)).mean() for axis in axes.split(8)]
        distances.append(float(np.average(gaps, weights=[len(axis) for axis in axes.split(8)])))
    return distances, sum(distances) / len(distances)


def _sorted(projections: torch.Tensor) -> np.ndarray:
    """Each row sorted, by NumPy, which is several times as fast as PyTorch on a CPU."""
    return np.sort(projections.cpu().numpy(), axis=1)


def _descriptors(patches: torch.Tensor) -> torch.Tensor:
    """(n, c, 7, 7) -> (n, 49 c), each channel with mean 0 and deviation 1 over the set; a constant one stays 0."""
    deviation, mean = torch.std_mean(patches, (0, 2, 3), keepdim=True)
    return ((patches - mean) / deviation.clamp(min=1e-5)).flatten(1)


def _laplacian_pyramid(images: torch.Tensor) -> list[torch.Tensor]:
    """The detail that each halving removes, finest first, then the remaining image, whose shorter side is at least
    16 px (if that of the images is)."""
    levels = []
    while min(images.shape[-2:]) >= 31:  # of which every other pixel makes 16
        coarse = _blur(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = 4 * coarse
        levels.append(images - _blur(spread))
        images = coarse
    return [*levels, images]


def _blur(images: torch.Tensor) -> torch.Tensor:
    """The binomial filter (1, 4, 6, 4, 1)/16 along both axes, mirrored at the edges."""
    blurred = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for dim in (2, 3):
        shifted = (blurred.narrow(dim, shift, images.shape[dim]) for shift in range(5))
        blurred = sum(tap / 16 * part for tap, part in zip((1, 4, 6, 4, 1), shifted))
    return blurred


# ---------------------------------------------------------------------------------------------------------------------
# Measures of single images


def repetition_score(images: torch.Tensor) -> torch.Tensor:
    """How much an image repeats itself, by the highest peak of its autocorrelation away from zero shift: (n,) float64,
    up to 1 for a tiled image.

    1. To compare layout and not texture, images are averaged to at most 32 px a side, and the mean over windows of
       about a quarter of the side is subtracted.
    2. For each shift, the correlation coefficient of the image and its shifted copy is computed over their overlap,
       with pixels and channels together. If one of them has less than a tenth of the image's mean energy there, a
       tenth is used, so that empty parts do not match by accident.
    3. The score is the highest local maximum among shifts of more than 0.22 of the side along an axis with an overlap
       of at least a quarter of the area; 0 if none is positive. This leaves out the central peak and its neighbours
       (and the two eyes of a portrait).

    Tiled portraits score 0.84 to 1 (less than 1 because windows at an edge and at a seam differ), single portraits
    0.09 to 0.38, white noise about 0.1. An image that is constant along an axis equals its copy at every shift, and
    scores 1.

    Raises:
        ValueError: a side below 8 px, or bad images.
    """
    images = _images("images", images, side=8)
    return torch.cat([_highest_peak(batch) for batch in _batches(images, 128 * 128)])


def _highest_peak(images: torch.Tensor) -> torch.Tensor:
    height, width = (min(n, 32) for n in images.shape[-2:])
    x = resample(images.double(), (height, width))
    y_window, x_window = height // 8, width // 8  # on either side
    padded = F.pad(x, (x_window, x_window, y_window, y_window), mode="replicate")
    correlation, overlap = _autocorrelation(x - F.avg_pool2d(padded, (2 * y_window + 1, 2 * x_window + 1), 1))
    y, x = (torch.fft.fftfreq(2 * n, 0.5, device=images.device).abs() for n in (height, width))  # shifts, in sides
    far = torch.maximum(y[:, None], x) > 0.22
    around = F.max_pool2d(F.pad(correlation[:, None], (1, 1, 1, 1), mode="circular"), 3, 1)[:, 0]
    peaks = far & (overlap >= 0.25) & (correlation >= around)
    return (correlation.clamp(min=0) * peaks).amax((1, 2))


def _autocorrelation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlation coefficients (n, 2 H, 2 W) of x (n, c, H, W) and its shifted copies over their overlap, and the
    share of the area that overlaps, (2 H, 2 W). Shifts as in `torch.fft.fftfreq`; the image is padded, not wrapped.

    The sums over the overlap are correlations with the image's support (Padfield 2012, "Masked object registration in
    the Fourier domain"). A shift by -s has the same overlap with the two parts exchanged, hence the flip.
    """
    size = [2 * n for n in x.shape[-2:]]
    area = x.shape[-2] * x.shape[-1]

    def correlate(a, b):
        return torch.fft.irfft2(torch.fft.rfft2(a, size).conj() * torch.fft.rfft2(b, size), size)

    def opposite(sums):
        return sums.flip((-2, -1)).roll((1, 1), (-2, -1))

    support = torch.ones_like(x[:1, :1])
    pixels = correlate(support, support).round().clamp(min=1)  # shifts by H or W have none
    sums, energies = correlate(support, x), correlate(support, x.square())
    energies = (energies - sums.square() / pixels).sum(1)
    pixels = pixels[0, 0]
    covariance = correlate(x, x).sum(1) - (sums * opposite(sums)).sum(1) / pixels
    floor = 0.1 * pixels / area * energies[:, :1, :1] + 1e-9
    scale = torch.maximum(energies, floor) * torch.maximum(opposite(energies), floor)
    return covariance / scale.sqrt(), pixels / area


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, (n,), of images and others in [-1, 1], (n, c, h, w); infinite where equal.

    >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.02))  # a hundredth of the range
    tensor([40.])
    """
    return 10 * torch.log10(4 / (images - others).square().mean((1, 2, 3)))


def agreement(small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """PSNR in dB, (n,), between each image of `small` and the same one of `large`, averaged down to its size.

    High if one seed gives one picture at both sizes; infinite if the two are equal. To judge a value, compare it with
    that of different seeds, `agreement(small.roll(1, 0), large)`.

    Raises:
        ValueError: different numbers of images or channels, `large` smaller than `small`, or bad images.
    """
    small, large = _images("small", small), _images("large", large)
    if small.shape[:2] != large.shape[:2]:
        raise ValueError(
            f"The sets differ: small is {tuple(small.shape)}, large is {tuple(large.shape)}. Give equal numbers of "
            f"images and channels."
        )
    return psnr(box_downsample(large, small.shape[-2:]), small)


def wrap_seam(images: torch.Tensor) -> torch.Tensor:
    """The jump from an edge to the opposite edge, divided by the jump between neighbouring pixels: (n,).

    The mean absolute difference of first and last column and of first and last row, divided by that of neighbours
    along both axes. About 1 for an image that could tile the plane, as periodic Fourier layers may produce. Real
    images have more, and more at larger sizes: compare with real images of the same size. A constant image has 1.

    Raises:
        ValueError: a side below 2 px, or bad images.

    >>> wrap_seam(torch.linspace(-1, 1, 5).expand(1, 1, 5, 5))  # 2 across the seam, 1/2 within
    tensor([4.0000])
    """
    images = _images("images", images, side=2)
    seam = sum((images.select(dim, 0) - images.select(dim, -1)).abs().mean((1, 2)) for dim in (2, 3))
    inside = sum(images.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (2, 3))
    least = 1e-7  # far below a step of 8 bits
    return (seam + least) / (inside + least)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _features(name: str, features: torch.Tensor, least: int = 1) -> torch.Tensor:
    """Features (n, d) as float64 on the CPU, n >= least."""
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be (n, d), a row per image, but has shape {tuple(features.shape)}.")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} rows, but {least} are needed at least: take more images.")
    features = features.detach().cpu().double()
    bad = (~features.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} is not finite in {len(bad)} of {len(features)} rows, first in row {bad[0]}. Look at that image, "
            f"and run the extractor in float32 if it ran in half precision."
        )
    return features


def _two_features(real: torch.Tensor, fake: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    real, fake = _features("real", real, least), _features("fake", fake, least)
    _check_dimensions(real[0], fake[0])
    return real, fake


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")


def _check_dimensions(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"Features of {len(a)} and of {len(b)} numbers cannot be compared: take both from the same extractor."
        )


def _images(name: str, images: torch.Tensor, side: int = 1) -> torch.Tensor:
    """Images (n, c, h, w), at least in float32, both sides >= side."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"{name} must be (n, channels, height, width), none of them 0, but has shape {tuple(images.shape)}. "
            f"Measure images of several sizes one size at a time."
        )
    if not images.is_floating_point():
        raise ValueError(f"{name} must be in [-1, 1], but is of type {images.dtype}: convert bytes by x / 127.5 - 1.")
    if min(images.shape[-2:]) < side:
        raise ValueError(f"{name} of {_size(images)} px are too small: both sides must be at least {side} px.")
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    if not images.isfinite().all():
        raise ValueError(f"{name} hold infinite values or NaN: leave out what a sampler in trouble has returned.")
    return images


def _size(images: torch.Tensor) -> str:
    return "x".join(map(str, images.shape[-2:]))


def _batches(images: torch.Tensor, temporary: int = 0) -> Sequence[torch.Tensor]:
    """Parts of `images`, small enough for temporaries of their own size, or of `temporary` numbers per image."""
    return images.split(max(1, _CHUNK // max(images[0].numel(), temporary)))
