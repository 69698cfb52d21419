"""The augmentation against what each transformation must do to pictures whose answer is known."""

import math

import numpy as np
import pytest
import torch

from dfu_diffusers.training.augment import GeometricAugment

AUGMENT = GeometricAugment(probability=0.5)
YES, NO = -9.0, 9.0  # normals that choose an augmentation, or leave it out


def make_draws(
    x_flip=NO, y_flip=NO, scale=None, angle=None, stretch=None, direction=0.0, shift=None, batch=1
) -> torch.Tensor:
    """Draws (batch, 12) for these transformations: normals for scale, stretch and shift (x, y), angles in radians."""

    def normal(angle):
        return torch.special.ndtri(torch.tensor((angle / math.pi + 1) / 2, dtype=torch.float64)).item()

    picks = [x_flip, y_flip, *(NO if value is None else YES for value in (scale, angle, stretch, shift))]
    values = [scale or 0, normal(angle or 0), stretch or 0, normal(direction), *(shift or (0, 0))]
    return torch.tensor([picks + values], dtype=torch.float64).expand(batch, -1)


def noise(*shape, dtype=torch.float64):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) - 1


def plane(height, width):
    """Coordinates of the pixels from the centre, x to the right and y down, (height, width) each."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5 - height / 2,
        torch.arange(width, dtype=torch.float64) + 0.5 - width / 2,
        indexing="ij",
    )
    return x, y


@pytest.mark.parametrize("height, width", [(6, 6), (7, 7), (5, 8), (1, 1)])
def test_flips_are_exact(height, width):
    images = noise(1, 3, height, width)
    flipped, labels = AUGMENT(images, make_draws(x_flip=YES))
    assert torch.equal(flipped, images.flip(3)) and labels.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0]]
    flipped, labels = AUGMENT(images, make_draws(y_flip=YES))
    assert torch.equal(flipped, images.flip(2)) and labels.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("turns", [-1, 1])
def test_a_quarter_turn_is_rot90(size, turns):
    images = noise(1, 3, size, size)
    turned, labels = AUGMENT(images, make_draws(angle=turns * math.pi / 2))
    assert (turned - torch.rot90(images, -turns, (2, 3))).abs().max() < 1e-9  # from x towards y: clockwise
    assert (labels - torch.tensor([0, 0, 0, -1, turns, 0, 0, 0, 0])).abs().max() < 1e-9


@pytest.mark.parametrize("height, width", [(8, 8), (5, 12)])
def test_a_half_turn_is_both_flips(height, width):
    images = noise(1, 2, height, width)
    turned, _ = AUGMENT(images, make_draws(angle=math.pi * (1 - 1e-12)))
    assert (turned - images.flip(2, 3)).abs().max() < 1e-9


@pytest.mark.parametrize("right, down", [(3, 0), (0, -2), (-5, 4), (9, 9)])
def test_a_shift_by_whole_pixels_moves_the_image_and_mirrors_its_border(right, down):
    height, width = 9, 12
    images = noise(2, 3, height, width)
    shift = right / (0.125 * width), down / (0.125 * height)
    moved, labels = AUGMENT(images, make_draws(shift=shift, batch=2))
    pad = 10
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="symmetric")
    expected = padded[:, :, pad - down : pad - down + height, pad - right : pad - right + width]
    assert np.abs(moved.numpy() - expected).max() < 1e-9
    assert labels[0, 7:].tolist() == pytest.approx(shift) and not labels[:, :7].any()


@pytest.mark.parametrize("height, width", [(40, 40), (31, 54)])
@pytest.mark.parametrize("normal", [-2.0, 1.5])
def test_scale_and_stretch_change_the_slope_of_a_ramp(height, width, normal):
    x, y = plane(height, width)
    images = torch.stack([x, y])[None] / 30
    s = 2 ** (0.2 * normal)
    across = math.pi / 2  # direction of the stretch: along y
    slopes = {(1 / s, 1 / s): {"scale": normal}, (1 / s, s): {"stretch": normal}}
    slopes[s, 1 / s] = {"stretch": normal, "direction": across}
    for (slope_x, slope_y), transformation in slopes.items():
        moved, _ = AUGMENT(images, make_draws(**transformation))
        expected = torch.stack([slope_x * x, slope_y * y])[None] / 30
        inside = ((slope_x * x).abs() < width / 2 - 2) & ((slope_y * y).abs() < height / 2 - 2)
        # torch's bicubic kernel (a = -3/4) bends a ramp by up to a twentieth of a pixel.
        assert ((moved - expected).abs() * inside).max() < 0.05 / 30


def matrix(a, b, c, d, e=0.0, f=0.0):
    """(x, y) -> (a x + b y + e, c x + d y + f)."""
    return np.array([[a, b, e], [c, d, f], [0, 0, 1]])


def rotation(angle):
    return matrix(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))


@pytest.mark.parametrize("height, width", [(64, 64), (48, 81)])
def test_all_together_is_the_product_of_the_matrices(height, width):
    """A smooth function is known everywhere: the image must be that function at the sources of the pixels."""
    scale, angle, stretch, direction, shift = 0.8, 0.7, -1.3, 2.1, (0.9, -0.6)
    s, r = 2 ** (0.2 * scale), 2 ** (0.2 * stretch)
    forward = (
        matrix(1, 0, 0, 1, 0.125 * shift[0] * width, 0.125 * shift[1] * height)
        @ rotation(direction) @ matrix(r, 0, 0, 1 / r) @ rotation(-direction)
        @ rotation(angle) @ matrix(s, 0, 0, s) @ matrix(-1, 0, 0, -1)
    )  # fmt: skip

    def function(x, y):
        return 0.7 * torch.sin(0.20 * x + 0.1 * y + 0.3) + 0.2 * torch.cos(0.15 * y - 0.05 * x)

    x, y = plane(height, width)
    images = function(x, y)[None, None]
    draws = make_draws(YES, YES, scale, angle, stretch, direction, shift)
    moved, labels = AUGMENT(images, draws)
    a, b, e, c, d, f = np.linalg.inv(forward)[:2].flatten()
    source_x, source_y = a * x + b * y + e, c * x + d * y + f
    inside = (source_x.abs() < width / 2 - 2) & (source_y.abs() < height / 2 - 2)
    assert inside.sum() > 0.3 * inside.numel()
    assert ((moved[0, 0] - function(source_x, source_y)).abs() * inside).max() < 0.02
    expected = [1, 1, scale, math.cos(angle) - 1, math.sin(angle)]
    expected += [stretch * math.cos(direction), stretch * math.sin(direction), *shift]
    assert labels[0].tolist() == pytest.approx(expected)


def test_a_disc_stays_a_disc_on_a_non_square_image():
    x, y = plane(41, 80)
    disc = torch.sigmoid(12 - (x**2 + y**2).sqrt())[None, None]
    for angle in (0.4, 1.2, -2.0):
        turned, _ = AUGMENT(disc, make_draws(angle=angle))
        inside = ((x**2 + y**2).sqrt() < 19)[None, None]  # beyond, the mirrored border comes in
        assert ((turned - disc).abs() * inside).max() < 0.02


def test_labels_are_zero_exactly_where_an_image_is_untouched(generator):
    images, draws = noise(400, 2, 5, 7, dtype=torch.float32), torch.randn(400, 12, generator=generator)
    augmented, labels = GeometricAugment(0.12)(images, draws)
    untouched = (augmented == images).flatten(1).all(1)
    assert torch.equal(untouched, (labels == 0).all(1))
    only_flipped = (labels[:, 1:] == 0).all(1) & (labels[:, 0] == 1)
    assert torch.equal(augmented[only_flipped], images[only_flipped].flip(3))
    assert 100 < untouched.sum() < 150  # 400 (1 - 0.06) 0.88^4 / 2 = 113 expected


def test_labels_follow_their_distributions(generator):
    count, p = 100_000, 0.3
    draws = torch.randn(count, 12, generator=generator)
    _, labels = GeometricAugment(p)(torch.zeros(count, 1, 1, 1), draws)
    x_flip, y_flip, scale, cos, sin, along, across, shift_x, shift_y = labels.T
    assert x_flip.mean().item() == pytest.approx(0.5, abs=0.01)
    assert y_flip.mean().item() == pytest.approx(p / 2, abs=0.01)
    for label in (scale, sin, along, shift_x, shift_y):
        assert (label != 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert torch.equal(shift_x != 0, shift_y != 0)
    for label in (scale, shift_x, shift_y):
        assert label[label != 0].std().item() == pytest.approx(1, abs=0.02)
        assert label[label != 0].mean().item() == pytest.approx(0, abs=0.02)
    angle = torch.atan2(sin, cos + 1)[sin != 0]
    assert angle.std().item() == pytest.approx(math.pi / math.sqrt(3), abs=0.03)  # of the uniform on [-pi, pi]
    assert (along**2 + across**2)[along != 0].mean().item() == pytest.approx(1, abs=0.03)
    assert along[along != 0].std().item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    chosen = torch.stack([y_flip, scale, sin, along, shift_x]) != 0  # independently
    off_diagonal = torch.corrcoef(chosen.float()) - torch.eye(5)
    assert off_diagonal.abs().max() < 0.02


def test_without_probability_only_mirrors_and_with_certainty_moves_all(generator):
    images, draws = noise(500, 1, 4, 4, dtype=torch.float32), torch.randn(500, 12, generator=generator)
    augmented, labels = GeometricAugment(0)(images, draws)
    mirrored = labels[:, 0] == 1
    assert not labels[:, 1:].any() and 200 < mirrored.sum() < 300
    assert torch.equal(augmented[mirrored], images[mirrored].flip(3))
    assert torch.equal(augmented[~mirrored], images[~mirrored])
    _, labels = GeometricAugment(1)(images, draws)
    assert (labels[:, 2:] != 0).all()


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_an_image_does_not_depend_on_its_neighbours(generator, parts):
    images, draws = noise(50, 3, 11, 17, dtype=torch.float32), torch.randn(50, 12, generator=generator)
    before = images.clone()
    augmented, labels = AUGMENT(images, draws)
    pieces = [AUGMENT(x, d) for x, d in zip(images.split(parts), draws.split(parts))]
    # Sources of pixels are rounded by 1e-6 of a pixel; from pixel to pixel, noise changes by up to 2.
    torch.testing.assert_close(augmented, torch.cat([piece[0] for piece in pieces]), rtol=0, atol=1e-4)
    torch.testing.assert_close(labels, torch.cat([piece[1] for piece in pieces]))
    assert torch.equal(images, before)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 6), (5, 1), (2, 3), (13, 7)])
def test_every_size_stays_in_range(generator, height, width):
    images = noise(200, 3, height, width, dtype=torch.float32).sign()  # the worst case for overshoot
    augmented, labels = GeometricAugment(1)(images, torch.randn(200, 12, generator=generator))
    assert augmented.shape == images.shape and augmented.dtype == labels.dtype == torch.float32
    assert augmented.isfinite().all() and augmented.abs().max() <= 1


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_rejects_probabilities_out_of_range(probability):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        GeometricAugment(probability)


def test_rejects_wrong_inputs():
    images, draws = torch.zeros(2, 3, 4, 4), torch.zeros(2, 12)
    with pytest.raises(ValueError, match=r"num_draws\) = \(2, 12\), but got \(2, 9\)"):
        AUGMENT(images, draws[:, :9])
    with pytest.raises(ValueError, match="but got \\(1, 12\\)"):
        AUGMENT(images, draws[:1])
    with pytest.raises(ValueError, match="batch, channels"):
        AUGMENT(images[0], draws)
    with pytest.raises(TypeError, match="uint8"):
        AUGMENT(images.to(torch.uint8), draws)
