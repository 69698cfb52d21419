"""The EDM loss against what it must be for networks whose answer is known, and its independence of batching."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dfu_diffusers import EDMHeunScheduler
from dfu_diffusers.training.augment import GeometricAugment
from dfu_diffusers.training.losses import TrainingLoss, ValidationLoss, image_normals

SCHEDULER = EDMHeunScheduler()


def images(std, batch=4000):
    return std * torch.randn(batch, 2, 3, 5, generator=torch.Generator().manual_seed(1))


def training_loss(model, clean, size=(3, 5), numbers=None, class_labels=None, **options):
    loss = TrainingLoss(model, SCHEDULER, **options)
    return loss(clean, numbers or list(range(len(clean))), size, class_labels)


def nothing_learned(sample, timestep, class_labels=None, augment_labels=None):
    return SimpleNamespace(sample=torch.zeros_like(sample))


def test_a_network_that_learned_nothing_scores_one():
    """With data of standard deviation sigma_data, the weight makes every noise level count 1 at the start (eq. 8)."""
    per_image = training_loss(nothing_learned, images(0.5))
    assert per_image.shape == (4000,)
    assert abs(per_image.mean().item() - 1) < 0.02


def test_the_ideal_denoiser_of_gaussian_data_scores_what_theory_says():
    """For N(0, s^2) data the least loss at sigma is weight * s^2 sigma^2 / (s^2 + sigma^2)."""
    std, sigma_data = 0.2, 0.5

    def ideal(sample, timestep, class_labels=None, augment_labels=None):
        sigma = torch.exp(4 * timestep).view(-1, 1, 1, 1)
        noisy = sample * (sigma**2 + sigma_data**2).sqrt()
        denoised = noisy * std**2 / (std**2 + sigma**2)
        total = sigma**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, sigma * sigma_data / total.sqrt()
        return SimpleNamespace(sample=(denoised - c_skip * noisy) / c_out)

    got = training_loss(ideal, images(std)).mean().item()
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sigma = torch.exp(-1.2 + 1.2 * normal)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    expected = (weight * std**2 * sigma**2 / (std**2 + sigma**2)).mean().item()
    assert abs(got / expected - 1) < 0.02
    assert got < 0.9 * training_loss(nothing_learned, images(std)).mean().item()

    # Held-out images at stratified noise levels estimate the same number, with fewer of them.
    items = [{"image": image} for image in images(std, batch=400)]
    held_out = type("HeldOut", (), {"__len__": lambda self: 400, "__getitem__": lambda self, key: items[key[0]]})()
    validation = ValidationLoss(held_out, [(3, 5)], SCHEDULER)
    model = torch.nn.Linear(1, 1)
    model.forward = ideal
    assert abs(validation(model)[3, 5][0].item() / expected - 1) < 0.05


def test_noise_levels_are_log_normal_and_reach_the_network_unrounded():
    seen = []

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        seen.append((sample, timestep))
        return nothing_learned(sample, timestep)

    training_loss(spy, images(0.5), p_mean=0.4, p_std=0.8)
    (sample, timestep), logs = seen[0], 4 * seen[0][1]
    assert timestep.shape == (4000,)
    assert abs(logs.mean().item() - 0.4) < 0.06 and abs(logs.std().item() - 0.8) < 0.04
    assert abs(sample.std().item() - 1) < 0.02  # c_in gives the network inputs of unit variance


def test_labels_reach_the_network():
    labels = torch.arange(4)

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        assert torch.equal(class_labels, labels) and augment_labels.shape == (4, 9)
        assert augment_labels.any()
        return nothing_learned(sample, timestep)

    loss = training_loss(spy, images(0.5, batch=4), class_labels=labels, augment=GeometricAugment(0.5))
    assert math.isfinite(loss.mean())


def test_some_labels_are_dropped_and_nothing_else_changes():
    seen = []

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        seen.append(class_labels)
        return nothing_learned(sample, timestep)

    clean, labels = images(0.5, batch=2000), torch.arange(2000) % 7
    options = dict(class_labels=labels, label_dropout=0.2, no_class=7)
    training_loss(spy, clean, **options)
    training_loss(spy, clean[50:60], numbers=list(range(50, 60)), **{**options, "class_labels": labels[50:60]})
    dropped = seen[0] == 7
    assert abs(dropped.float().mean() - 0.2) < 0.04 and torch.equal(seen[0][~dropped], labels[~dropped])
    assert torch.equal(seen[1], seen[0][50:60]), "a function of the image's number"
    assert not torch.equal(dropped[:500], dropped[500:1000])


def test_noise_levels_grow_with_the_side():
    seen = []

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        seen.append(4 * timestep)
        return nothing_learned(sample, timestep)

    clean = images(0.5, batch=5)
    for size, shift in (((3, 5), 0.0), ((12, 20), 1.0), ((12, 20), 0.5)):  # their sides are as 1 : 4
        training_loss(spy, clean.expand(-1, 2, -1, -1), size=size, noise_shift=shift, noise_size=math.sqrt(15))
    # The noise level is the first draw of an image, whatever its size.
    torch.testing.assert_close(seen[1], seen[0] + math.log(4))
    torch.testing.assert_close(seen[2], seen[0] + math.log(4) / 2)


def test_images_of_another_size_are_enlarged_as_pixel_centred_bilinear_interpolation():
    seen = []

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        seen.append(sample)
        return nothing_learned(sample, timestep)

    clean = images(0.5, batch=2)
    training_loss(spy, clean, size=(6, 10), p_mean=-9.0, p_std=0.1)  # hardly any noise
    shown = seen[0] * 0.5  # c_in is 1 / sigma_data there
    assert torch.allclose(shown, F.interpolate(clean, (6, 10), mode="bilinear"), atol=1e-2)


def test_image_normals_are_standard_normal_and_depend_on_seed_and_number_alone():
    numbers = [0, 1, 17, 10**9]
    drawn = image_normals(3, numbers, 5000)
    assert torch.equal(drawn, image_normals(3, numbers[::-1], 5000).flip(0))
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03
    assert (torch.corrcoef(torch.cat([drawn, image_normals(4, numbers, 5000)])) - torch.eye(8)).abs().max() < 0.07


@pytest.mark.parametrize("augment", [None, GeometricAugment(0.5)])
def test_micro_batches_add_up_to_the_whole_batch(make_model, augment):
    """Gradients of accumulated micro-batches equal those of one batch, to rounding, in float64."""
    model = make_model(num_augment_labels=9).double()
    clean, numbers = 0.5 * images(1.0, batch=7)[:, :1].expand(-1, 3, -1, -1).double(), list(range(40, 47))
    loss = TrainingLoss(model, SCHEDULER, augment=augment)

    def gradients(splits):
        model.zero_grad()
        for part, part_numbers in zip(clean.split(splits), torch.tensor(numbers).split(splits)):
            (loss(part, part_numbers.tolist(), (9, 11)).sum() / 7).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradients([7])
    assert whole.abs().max() > 1e-3
    assert (gradients([3, 2, 2]) - whole).abs().max() < 1e-6 * whole.abs().max()


def test_dropout_is_a_function_of_the_images(make_model):
    model = make_model(dropout=0.5).train()
    loss = TrainingLoss(model, SCHEDULER)
    clean = 0.5 * torch.randn(2, 3, 8, 8)
    first = loss(clean, [4, 5], (8, 8))
    torch.randn(10)
    assert torch.equal(loss(clean, [4, 5], (8, 8)), first)
    assert not torch.equal(loss(clean, [6, 7], (8, 8)), first)


class HeldOut:
    """Ten images of each size asked for."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        index, size = index
        return {"image": 0.5 * torch.randn(3, *size, generator=torch.Generator().manual_seed(index))}


def test_validation_repeats_itself_and_sorts_by_noise_level(make_model):
    validation = ValidationLoss(HeldOut(), [(8, 8), (5, 12)], SCHEDULER, bins=3, max_pixels=200)
    model = make_model()
    first, second = validation(model), validation(model)
    assert list(first) == [(8, 8), (5, 12)]
    assert all(torch.equal(first[size], second[size]) and first[size].shape == (4,) for size in first)
    assert torch.bincount(validation.bin_of).tolist() == [4, 3, 3]
    assert len(validation.bin_names) == 3 and validation.bin_names[0].startswith("0 to ")
    for low, high in ((0, 1), (1, 2)):
        assert validation.sigmas[validation.bin_of == low].max() < validation.sigmas[validation.bin_of == high].min()
    # One batch or many: the same numbers to rounding.
    at_once = ValidationLoss(HeldOut(), [(8, 8)], SCHEDULER, bins=3)(model)[8, 8]
    assert torch.allclose(at_once, first[8, 8], rtol=1e-4)
