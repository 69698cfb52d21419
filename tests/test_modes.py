# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The nested spaces of modes against direct sums in float64."""

import math
import threading

import numpy as np
import pytest
import torch
from conftest import draw
from hypothesis import given
from hypothesis import strategies as st

from dfu_diffusers.models import modes, spectral
from dfu_diffusers.models.cache import TensorCache
from dfu_diffusers.models.modes import (
    beyond,
    cell_averages,
    from_modes,
    mode_basis,
    num_modes,
    octave_sizes,
    resize_modes,
    share_beyond,
    to_modes,
)

ALL_AXES = [(False, False), (True, False), (False, True), (True, True)]
CLOSE = dict(rtol=1e-5, atol=1e-5)  # sums of some hundred float32 products
sides = st.one_of(st.sampled_from([1, 2, 3, 7, 16, 17, 31, 32]), st.integers(1, 40))


def direct_mode(k: int, position: np.ndarray, periodic: bool) -> np.ndarray:
    """The k-th mode of the unit interval at `position`, of unit mean square for all k on a fine grid."""
    if not periodic:
        return np.cos(math.pi * k * position) * (math.sqrt(2) if k else 1)
    wave = np.sin if k % 2 else np.cos
    return wave(2 * math.pi * ((k + 1) // 2) * position) * (math.sqrt(2) if k else 1)


def centres(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 16, 97])
def test_the_basis_is_orthonormal_and_made_of_the_stated_waves(n, periodic):
    basis = mode_basis(n, periodic).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    for k in range(num_modes(n, periodic)):
        expected = direct_mode(k, centres(n), periodic) / math.sqrt(n)
        np.testing.assert_allclose(basis[k], expected, atol=1e-7)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("cells, count", [(1, 1), (1, 4), (5, 3), (6, 17), (13, 26)])
def test_averages_of_modes_over_cells(cells, count, periodic):
    fine = [direct_mode(k, centres(500 * cells), periodic).reshape(cells, 500).mean(1) for k in range(count)]
    np.testing.assert_allclose(cell_averages(cells, count, periodic), np.stack(fine, 1), atol=1e-4)


@given(height=sides, width=sides, axes=st.sampled_from(ALL_AXES))
def test_coefficients_are_means_of_the_picture_times_a_mode(height, width, axes):
    x = draw(2, height, width, dtype=torch.float64)
    modes = to_modes(x, periodic=axes)
    assert modes.shape == (2, num_modes(height, axes[0]), num_modes(width, axes[1]))
    for k, l in {(0, 0), (modes.shape[1] - 1, modes.shape[2] // 2)}:
        wave = np.outer(direct_mode(k, centres(height), axes[0]), direct_mode(l, centres(width), axes[1]))
        np.testing.assert_allclose(modes[:, k, l], (x.numpy() * wave).mean((1, 2)), atol=1e-6)


@given(small=st.tuples(sides, sides), more=st.tuples(sides, sides), axes=st.sampled_from(ALL_AXES))
def test_cutting_undoes_extending_and_spaces_are_nested(small, more, axes):
    large = tuple(a + b for a, b in zip(small, more))
    between = tuple((a + b) // 2 for a, b in zip(small, large))
    x = resize_modes(draw(1, *small), small, axes)  # which drops a lone Nyquist mode
    torch.testing.assert_close(resize_modes(resize_modes(x, large, axes), small, axes), x, **CLOSE)
    y = draw(1, *large)
    direct, in_two_steps = resize_modes(y, small, axes), resize_modes(resize_modes(y, between, axes), small, axes)
    torch.testing.assert_close(in_two_steps, direct, **CLOSE)


@pytest.mark.parametrize("axes", ALL_AXES)
def test_white_noise_stays_white_and_its_deviation_is_told(axes):
    noise = draw(4000, 12, 10)
    small = resize_modes(noise, (7, 5), axes).flatten(1)  # odd sides: no lone Nyquist mode
    expected = torch.eye(35) * (7 * 5) / (12 * 10)
    covariance = small.T @ small / len(small)
    assert (covariance - expected).abs().max() < 6 * expected.max() / math.sqrt(4000)  # six standard errors


@given(size=st.tuples(sides, sides), axes=st.sampled_from(ALL_AXES))
def test_what_lies_beyond_has_no_coarse_modes_and_the_rest_is_the_coarse_picture(size, axes):
    coarse = tuple((n + 1) // 2 for n in size)
    x = draw(1, *size)
    detail = beyond(x, coarse, axes)
    torch.testing.assert_close(resize_modes(detail, coarse, axes), torch.zeros(1, *coarse), **CLOSE)
    torch.testing.assert_close(x - detail, resize_modes(resize_modes(x, coarse, axes), size, axes), **CLOSE)
    basis = [mode_basis(n, axis, num_modes(c, axis)) for n, c, axis in zip(size, coarse, axes)]
    kept = basis[0].square().sum() * basis[1].square().sum()
    assert share_beyond(size, coarse, axes) == pytest.approx(1 - kept.item() / math.prod(size), abs=1e-6)


@pytest.mark.parametrize("periodic", [False, True])
def test_a_pixel_averages_its_area(periodic):
    """The mean of a mode over each of 9 pixels, by the midpoint rule on 9 x 400 points."""
    for k in range(9):
        fine = direct_mode(k, centres(9 * 400), periodic)
        pixels = torch.from_numpy(fine.reshape(9, 400).mean(1)).float()
        modes = to_modes(pixels[None], periodic=(False, periodic), averaged=True)[0]
        torch.testing.assert_close(modes, torch.eye(9)[k], rtol=0, atol=1e-5)
        again = from_modes(modes[None], (1, 9), (False, periodic), averaged=True)[0]
        torch.testing.assert_close(again, pixels, rtol=0, atol=1e-5)


@given(size=st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_octaves_at_most_double_and_end_at_the_size(size):
    sizes = octave_sizes(size, (16, 16))
    assert sizes[0] == (16, 16) and sizes[-1] == size
    for before, after in zip(sizes, sizes[1:]):
        assert all(b == min(2 * a, n) for a, b, n in zip(before, after, size))
    assert all(16 * 2**j in (max(each), min(each)) or j == 0 or each[0] in size or each[1] in size
               for j, each in enumerate(sizes))  # fmt: skip


def test_a_cache_is_bounded_by_bytes():
    calls = []
    cache = TensorCache(lambda *key: calls.append(key) or (torch.zeros(*key), 7), max_bytes=100)
    assert cache(10) is cache(10) and cache.bytes == 40
    assert cache(12) is cache(12) and cache(10) is cache(10) and cache.bytes == 88
    cache(4)  # in place of what was used longest ago
    assert cache.bytes == 56 and calls == [(10,), (12,), (4,)]
    assert cache(26)[0].shape == (26,) and cache.bytes == 56  # too large to be kept
    cache.clear()
    with torch.inference_mode():
        assert not cache(5)[0].is_inference()
    for each in (modes._cached_basis, spectral._cached_fourier_matrices):
        assert isinstance(each, TensorCache) and each.max_bytes <= 2**29


def test_a_cache_serves_threads():
    cache, results = TensorCache(lambda n: torch.arange(n), max_bytes=200), []

    def work():
        results.extend(torch.equal(cache(n), torch.arange(n)) for _ in range(50) for n in range(1, 20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 50 * 19 and all(results) and cache.bytes <= 200
