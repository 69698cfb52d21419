"""The EDM loss against what it must be for networks whose answer is known."""

import math
from types import SimpleNamespace

import torch

from dfu_diffusers import EDMHeunScheduler
from dfu_diffusers.losses import edm_loss

SCHEDULER = EDMHeunScheduler()


def images(std, batch=4000):
    return std * torch.randn(batch, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def loss(model, clean, **options):
    return edm_loss(model, SCHEDULER, clean, generator=torch.Generator().manual_seed(0), **options)


def nothing_learned(sample, timestep, class_labels=None):
    return SimpleNamespace(sample=torch.zeros_like(sample))


def test_a_network_that_learned_nothing_scores_one():
    """With data of standard deviation sigma_data, the weight makes every noise level count 1 at the start (eq. 8)."""
    per_image = loss(nothing_learned, images(0.5))
    assert per_image.shape == (4000,)
    assert abs(per_image.mean().item() - 1) < 0.02


def test_the_ideal_denoiser_of_gaussian_data_scores_what_theory_says():
    """For N(0, s^2) data the least loss at sigma is weight * s^2 sigma^2 / (s^2 + sigma^2)."""
    std, sigma_data = 0.2, 0.5

    def ideal(sample, timestep, class_labels=None):
        sigma = torch.exp(4 * timestep).view(-1, 1, 1, 1)
        noisy = sample * (sigma**2 + sigma_data**2).sqrt()
        denoised = noisy * std**2 / (std**2 + sigma**2)
        total = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
        return SimpleNamespace(sample=(denoised - c_skip * noisy) / c_out)

    got = loss(ideal, images(std)).mean().item()
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sigma = torch.exp(-1.2 + 1.2 * normal)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    expected = (weight * std**2 * sigma**2 / (std**2 + sigma**2)).mean().item()
    assert abs(got / expected - 1) < 0.02
    assert got < 0.9 * loss(nothing_learned, images(std)).mean().item()


def test_noise_levels_are_log_normal_and_reach_the_network_unrounded():
    seen = []

    def spy(sample, timestep, class_labels=None):
        seen.append((sample, timestep))
        return nothing_learned(sample, timestep)

    loss(spy, images(0.5), p_mean=0.4, p_std=0.8)
    (sample, timestep), logs = seen[0], 4 * seen[0][1]
    assert timestep.shape == (4000,)
    assert abs(logs.mean().item() - 0.4) < 0.06 and abs(logs.std().item() - 0.8) < 0.04
    assert abs(sample.std().item() - 1) < 0.02  # c_in gives the network inputs of unit variance


def test_class_labels_reach_the_network():
    labels = torch.arange(4)

    def spy(sample, timestep, class_labels=None):
        assert torch.equal(class_labels, labels)
        return nothing_learned(sample, timestep)

    assert math.isfinite(loss(spy, images(0.5, batch=4), class_labels=labels).mean())
