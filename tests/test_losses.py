"""The EDM loss against what it must be for networks whose answer is known, and its independence of batching."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import draw, redraw

from dfu_diffusers import DFURefiner, EDMHeunScheduler
from dfu_diffusers.models.modes import average_pixels, from_modes, octave_std
from dfu_diffusers.models.resampling import resample
from dfu_diffusers.pipelines.octaves import octave_scheduler
from dfu_diffusers.training.augment import GeometricAugment
from dfu_diffusers.training.losses import (
    OctaveLoss,
    OctaveValidationLoss,
    TrainingLoss,
    ValidationLoss,
    coarse_grids,
    detail_law,
    detail_std,
    fit_size,
    image_normals,
    octave_scalings,
    refiner_loss,
)

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


def test_images_of_another_size_are_enlarged_as_pixel_centred_bilinear_interpolation():
    seen = []

    def spy(sample, timestep, class_labels=None, augment_labels=None):
        seen.append(sample)
        return nothing_learned(sample, timestep)

    clean = images(0.5, batch=2)
    training_loss(spy, clean, size=(6, 10), p_mean=-9.0, p_std=0.1)  # hardly any noise
    shown = seen[0] * 0.5  # c_in is 1 / sigma_data there
    assert torch.allclose(shown, F.interpolate(clean, (6, 10), mode="bilinear"), atol=1e-2)


def test_larger_images_are_cut_to_the_modes_of_the_size():
    """Against averages over pixels of a picture whose modes are known."""

    def averages(n):
        """cos(2 pi x) + cos(9 pi x), averaged over n cells of [0, 1]."""
        edges = torch.arange(n + 1, dtype=torch.float64) / n
        return sum(torch.diff(torch.sin(k * math.pi * edges)) * n / (k * math.pi) for k in (2, 9))

    large = averages(24)[:, None] * averages(24)
    # Eight cells have no 9th mode: what is left is the 2nd.
    edges = torch.arange(9, dtype=torch.float64) / 8
    low = torch.diff(torch.sin(2 * math.pi * edges)) * 8 / (2 * math.pi)
    cut = fit_size(large[None, None].expand(1, 2, -1, -1), (8, 8))
    torch.testing.assert_close(cut, (low[:, None] * low).expand(1, 2, -1, -1), rtol=0, atol=1e-6)  # float32 bases


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


# --- Octaves ---


def make_refiner(**config):
    return redraw(DFURefiner(**{**dict(hidden_channels=8, num_layers=1, detail_std=0.2), **config}))


def waves(n, count):
    """The lowest cosine modes on n pixels, (count, n), of mean square 1."""
    row = torch.arange(count, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi * row * (torch.arange(n) + 0.5) / n)
    return torch.where(row > 0, math.sqrt(2), 1) * basis


def picture(modes, height, width):
    return torch.einsum("ckl,ki,lj->cij", modes, waves(height, modes.shape[1]), waves(width, modes.shape[2]))


def reference_loss(model, modes, coarse, sigma, told, noise, detail_deviation):
    """The loss of one picture in float64, written from the definitions: modes (channels, height, width)."""
    (_, height, width), (rows, columns) = modes.shape, coarse
    low, high = modes.clone(), modes.clone()
    low_noise, high_noise = noise.clone(), noise.clone()
    for values in (low, low_noise):
        values[:, rows:], values[:, :, columns:] = 0, 0
    for values in (high, high_noise):
        values[:, :rows, :columns] = 0
    condition = picture(low, height, width) + told / math.sqrt(rows * columns) * picture(low_noise, height, width)
    detail = picture(high, height, width)
    noisy = detail + sigma * picture(high_noise, height, width) / math.sqrt(height * width)
    total = sigma**2 + detail_deviation**2
    output = model(
        noisy[None] / math.sqrt(total), torch.tensor([math.log(sigma) / 4]), condition[None], torch.tensor([told])
    ).sample[0]
    denoised = detail_deviation**2 / total * noisy + sigma * detail_deviation / math.sqrt(total) * output
    error = denoised - detail
    coefficients = torch.einsum("cij,ki,lj->ckl", error, waves(height, height), waves(width, width)) / (height * width)
    coefficients[:, :rows, :columns] = 0
    share = 1 - rows * columns / (height * width)
    weight = total / (sigma * detail_deviation) ** 2
    return weight * picture(coefficients, height, width).square().mean() / share


def test_the_loss_of_the_refiner_is_what_its_definition_says():
    model = make_refiner().double()
    modes, noise = draw(3, 3, 9, 12, dtype=torch.float64) / 9, draw(3, 3, 9, 12, seed=1, dtype=torch.float64)
    coarse, sigma, told = [(5, 6), (9, 7), (4, 12)], [0.02, 0.3, 5.0], [0.003, 0.05, 0.3]
    got = refiner_loss(
        model, EDMHeunScheduler(sigma_data=0.2), modes, torch.tensor(coarse), torch.tensor(sigma), torch.tensor(told),
        noise,
    )  # fmt: skip
    for i in range(3):
        expected = reference_loss(model, modes[i], coarse[i], sigma[i], told[i], noise[i], 0.2)
        assert got[i].item() == pytest.approx(expected.item(), rel=1e-4)  # noise levels and bases are float32


def test_a_refiner_that_learned_nothing_scores_one():
    """For white detail of deviation detail_std, whatever the octave."""
    model = make_refiner(in_channels=1)
    model.forward = lambda sample, *others: SimpleNamespace(sample=torch.zeros_like(sample))
    modes = 0.2 / math.sqrt(12 * 10) * draw(3000, 1, 12, 10)
    loss = refiner_loss(
        model, EDMHeunScheduler(sigma_data=0.2), modes, coarse_grids((12, 10), torch.rand(3000, 7)),
        draw(3000).exp(), torch.full((3000,), 0.01), draw(3000, 1, 12, 10, seed=1),
    )  # fmt: skip
    assert abs(loss.mean().item() - 1) < 0.02


def test_coarse_grids_grow_by_factors_from_one_to_two():
    grids = coarse_grids((40, 24), torch.rand(4000, 7, generator=torch.Generator().manual_seed(0)))
    assert grids.amin(0).tolist() == [20, 12] and grids.amax(0).tolist() == [40, 24]
    doubled = (grids == torch.tensor([20, 12])).all(1).float().mean()
    assert 0.4 < doubled < 0.55 and not (grids == torch.tensor([40, 24])).all(1).any()
    for axis, side in enumerate((40, 24)):
        assert 0.03 < (grids[:, axis] == side).float().mean() < 0.15
    assert coarse_grids((1, 2), torch.rand(50, 7)).unique(dim=0).tolist() == [[1, 1]]


def test_the_deviation_of_detail_is_that_of_white_noise():
    """On averages over pixels of pictures whose modes are white."""
    white = draw(200, 2, 16, 12)
    assert detail_std(average_pixels(0.3 * white)) == pytest.approx(0.3, rel=0.02)
    smooth = torch.ones(2, 3, 16, 12) * draw(2, 3, 1, 1)
    assert detail_std(smooth) < 1e-6


@pytest.mark.parametrize("exponent", [-0.1, -0.4])
def test_the_power_law_of_detail_is_found(exponent):
    """In large pictures whose modes have, in units of white noise, the deviation 0.1 (side / 64)^exponent. An average
    over pixels mixes modes with finer ones, in the same way at each size."""
    count, size = 60, (256, 256)
    order = torch.arange(256) + 1
    side = 2 ** torch.maximum(order[:, None], order).float().log2().ceil()  # at which a mode's octave ends
    modes = 0.1 * (side / 64) ** exponent / side * draw(count, 1, *size)  # white noise of 0.1 has modes of 0.1 / side
    images = resample(from_modes(modes, size, averaged=True), (32, 32))
    std, measured = detail_law(images, share=1)
    assert measured == pytest.approx(exponent, abs=0.05)
    half_std, half = detail_law(images)
    assert half == pytest.approx(measured / 2)
    assert half_std * (16 / 64) ** half == pytest.approx(std * (16 / 64) ** measured)  # equal at the middle size


def test_the_power_law_of_flat_and_of_tiny_images():
    with pytest.raises(ValueError, match=r"no detail to learn \(deviation"):
        detail_law(torch.ones(2, 3, 8, 8))
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(5, 3, 8, 8)  # of which averages leave nothing
    std, exponent = detail_law(stripes)
    assert std == pytest.approx(detail_std(stripes)) and exponent == 0
    std, exponent = detail_law(stripes + 0.01 * draw(5, 3, 8, 8))
    assert exponent == 1  # not 2.5, which no larger pictures have
    std, exponent = detail_law(draw(50, 1, 2, 1))
    assert std > 0 and exponent == 0


def test_training_and_sampling_take_the_same_deviation_of_each_octave():
    model = make_refiner(detail_std=0.1, detail_exponent=-0.5)
    loss = OctaveLoss(model, octave_scalings(model.config))
    for size, expected in (((64, 64), 0.1), ((16, 16), 0.2), ((128, 512), 0.05)):
        assert loss.scalings(size).config.sigma_data == pytest.approx(expected)
        sampler = octave_scheduler(EDMHeunScheduler(), model, size, 4)
        assert sampler.config.sigma_data == pytest.approx(expected)
    clean = 0.5 * draw(2, 3, 16, 16)
    old = OctaveLoss(model, octave_scalings(make_refiner(detail_std=0.2).config))
    assert torch.equal(loss(clean, [0, 1], (16, 16)), old(clean, [0, 1], (16, 16)))


def test_the_octaves_of_an_image_depend_on_its_number_alone():
    model = make_refiner()
    loss = OctaveLoss(model, octave_scalings(model.config), seed=3)
    clean = 0.5 * draw(6, 3, 13, 10)
    whole = loss(clean, list(range(40, 46)), (13, 10))
    parts = [loss(clean[part], list(range(40, 46))[part], (13, 10)) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)  # sums of float32 in another order
    torch.randn(10)
    assert torch.equal(loss(clean, list(range(40, 46)), (13, 10)), whole)
    assert (loss(clean, list(range(46, 52)), (13, 10)) - whole).abs().min() > 0
    # Larger images are cut first.
    large = 0.5 * draw(6, 3, 26, 20)
    torch.testing.assert_close(
        loss(large, range(6), (13, 10)), loss(fit_size(large, (13, 10)), range(6), (13, 10)), rtol=1e-5, atol=1e-6
    )


def test_a_refiner_learns():
    """Detail that follows from the coarse picture: stripes of the sign of its mean."""
    torch.manual_seed(0)
    model = DFURefiner(in_channels=1, hidden_channels=16, num_layers=1, detail_std=0.3)
    loss_of = OctaveLoss(model, octave_scalings(model.config))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    stripes = 0.5 * torch.cos(math.pi * 11 * (torch.arange(12) + 0.5) / 12).expand(1, 1, 12, 12)
    losses = []
    for step in range(60):
        numbers = list(range(16 * step, 16 * step + 16))
        sign = torch.tensor([1.0 if n % 2 else -1.0 for n in numbers]).view(-1, 1, 1, 1)
        loss = loss_of(sign * (0.3 + stripes), numbers, (12, 12)).mean()
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_validation_of_octaves_is_the_loss_from_half_the_size():
    model = make_refiner(detail_exponent=-0.4).eval()
    scalings = octave_scalings(model.config)
    validation = OctaveValidationLoss(HeldOut(), [(8, 8), (5, 12)], scalings, p_mean=-2.3, p_std=1.4, bins=2)
    one_std = octave_scalings({"detail_std": octave_std(model.config, (5, 12))})
    alone = OctaveValidationLoss(HeldOut(), [(5, 12)], one_std, p_mean=-2.3, p_std=1.4, bins=2)
    assert torch.equal(alone(model)[5, 12], validation(model)[5, 12])
    first, second = validation(model), validation(model)
    assert list(first) == [(8, 8), (5, 12)] and all(torch.equal(first[size], second[size]) for size in first)
    assert all(values.shape == (3,) and values.isfinite().all() for values in first.values())
    cut = OctaveValidationLoss(HeldOut(), [(8, 8)], scalings, source_resolution=(16, 16))
    sizes = []
    cut.dataset = type(
        "Spy", (HeldOut,), {"__getitem__": lambda s, i: sizes.append(i[1]) or HeldOut.__getitem__(s, i)}
    )()
    cut(model)
    assert set(sizes) == {(16, 16)}
