# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Geometric augmentation that does not leak into samples (Karras et al., arXiv 2206.00364, appendix F.2, table 6).

The network is told what was done to an image, by nine labels that are all zero for an untouched one. Sampling with
zeros then asks for images as they are in the data set.
"""

import math

import torch
import torch.nn.functional as F

SCALE_STD, STRETCH_STD = 0.2, 0.2  # of log2 of the factor
SHIFT_STD = 0.125  # of the translation, as a fraction of the image


class GeometricAugment:
    """Random flips and one random affine map for each image, with the labels that tell the network.

    Half of the images are mirrored left to right, whatever the probability. Each of these is chosen independently with
    `probability` and applied in this order; x points right, y down, and angles run from x towards y:

        y-flip       half of the chosen ones are mirrored top to bottom
        scale        enlarged by 2^(0.2 n) around the centre
        rotation     by an angle uniform in [-pi, pi]
        anisotropy   stretched by 2^(0.2 n) along a direction uniform in [-pi, pi], and by the inverse across it
        translation  by 0.125 n of the width and 0.125 n of the height

    with a standard normal n each. Scale, rotation and anisotropy act on pixels: a disc stays a disc, also where the
    image is not square.

    Labels, nine for each image: x-flip and y-flip, 0 or 1; n of the scale; cos(angle) - 1 and sin(angle) of the
    rotation; n cos(direction) and n sin(direction) of the anisotropy; n of both translations, x first. They are zero
    exactly where an image is returned bit for bit.

    Args:
        probability: of each choice, in [0, 1]; the paper trains with 0.12 to 0.15.

    Raises:
        ValueError: a probability outside [0, 1].

    >>> augment = GeometricAugment(probability=0.12)
    >>> images, labels = augment(torch.zeros(4, 3, 32, 48), torch.randn(4, augment.num_draws))
    >>> images.shape, labels.shape
    (torch.Size([4, 3, 32, 48]), torch.Size([4, 9]))
    """

    num_labels = 9
    num_draws = 12

    def __init__(self, probability: float):
        if not 0 <= probability <= 1:
            raise ValueError(f"The probability of an augmentation must lie in [0, 1], but got {probability!r}.")
        # A normal lies below its p-quantile with probability p, also where that is infinite, for p = 0 and 1.
        levels = torch.tensor([probability, probability / 2], dtype=torch.float64)
        self._quantile, self._half_quantile = torch.special.ndtri(levels).tolist()

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment each image by its own draws, and by nothing else: neighbours in the batch do not matter.

        Args:
            images: (batch, channels, height, width) float32 or float64 in [-1, 1], any size from 1x1. Not modified.
            draws: (batch, num_draws) standard normals on the images' device.

        Returns:
            images of the same shape and dtype, in [-1, 1], and labels (batch, 9).

        Raises:
            TypeError: images of another dtype.
            ValueError: images or draws of another shape.
        """
        self._check_inputs(images, draws)
        x_flip, y_flip, scale, angle, stretch, direction, shift_x, shift_y = self._factors(draws.to(images.dtype))
        labels = torch.stack(
            [
                x_flip, y_flip, scale, angle.cos() - 1, angle.sin(), stretch * direction.cos(),
                stretch * direction.sin(), shift_x, shift_y,
            ],
            dim=1,
        )  # fmt: skip
        images = torch.where(_per_image(x_flip) != 0, images.flip(3), images)
        images = torch.where(_per_image(y_flip) != 0, images.flip(2), images)
        moved = _affine(images, scale, angle, stretch, direction, shift_x, shift_y)
        return torch.where(_per_image((labels[:, 2:] != 0).any(1)), moved, images), labels

    def _factors(self, draws: torch.Tensor) -> list[torch.Tensor]:
        """From draws (batch, 12) x-flip, y-flip, scale, angle, stretch, direction and shifts, (batch,) each."""
        picks, values = draws.T.split(6)
        x_flip, y_flip, *picks = picks
        scale, angle, stretch, direction, shift_x, shift_y = values
        scaled, rotated, stretched, shifted = (pick < self._quantile for pick in picks)
        return [
            (x_flip < 0).to(draws.dtype),
            (y_flip < self._half_quantile).to(draws.dtype),
            torch.where(scaled, scale, 0),
            torch.where(rotated, _uniform_angle(angle), 0),
            torch.where(stretched, stretch, 0),
            _uniform_angle(direction),
            torch.where(shifted, shift_x, 0),
            torch.where(shifted, shift_y, 0),
        ]

    def _check_inputs(self, images: torch.Tensor, draws: torch.Tensor) -> None:
        if images.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"Images must be float32 or float64 in [-1, 1], but got {images.dtype}: convert them before, and "
                f"lower the precision after the augmentation."
            )
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"Images must have shape (batch, channels, height, width) without empty dimensions, but got "
                f"{tuple(images.shape)}."
            )
        if tuple(draws.shape) != (len(images), self.num_draws):
            raise ValueError(
                f"Draws must have shape (batch, num_draws) = {(len(images), self.num_draws)}, but got "
                f"{tuple(draws.shape)}."
            )


def _uniform_angle(normal: torch.Tensor) -> torch.Tensor:
    """Uniform in [-pi, pi], from standard normals."""
    return math.pi * (2 * torch.special.ndtr(normal) - 1)


def _per_image(values: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def _affine(images: torch.Tensor, scale, angle, stretch, direction, shift_x, shift_y) -> torch.Tensor:
    """Images (batch, channels, H, W) after scale, rotation, stretch and shift, the factors being (batch,) each.

    Bicubic, mirrored at the borders. Shrinking is not antialiased: at its usual factors, 0.75 and more, little of what
    a picture shows lies beyond the new Nyquist frequency. Where the curve overshoots it is cut to [-1, 1], as no image
    of the data set leaves that range and the network should not learn to.
    """
    height, width = images.shape[-2:]
    real = {"device": images.device, "dtype": images.dtype}
    # 1. An output pixel looks back for its source: pixels from the centre, before the shift.
    x = torch.arange(width, **real) + (0.5 - width / 2) - (SHIFT_STD * width * shift_x)[:, None]  # (batch, W)
    y = torch.arange(height, **real) + (0.5 - height / 2) - (SHIFT_STD * height * shift_y)[:, None]  # (batch, H)
    # 2. With z = x + iy, a stretch by s along direction d is (s + 1/s)/2 z + (s - 1/s)/2 e^(2id) conj(z), its inverse
    # the same with 1/s. Undoing rotation and scale is a factor 2^(-0.2 n) e^(-i angle) on both terms.
    shrink = torch.exp2(-SCALE_STD * scale)
    inverse, forward = torch.exp2(-STRETCH_STD * stretch), torch.exp2(STRETCH_STD * stretch)
    plain, mirrored = shrink * (inverse + forward) / 2, shrink * (inverse - forward) / 2
    plain_re, plain_im = plain * angle.cos(), -plain * angle.sin()
    phase = 2 * direction - angle
    mirrored_re, mirrored_im = mirrored * phase.cos(), mirrored * phase.sin()
    # 3. Sums, not matrix products, which might run in TF32. grid_sample counts from -1 to 1 between the outer borders.
    from_x = torch.stack([(plain_re + mirrored_re) / width, (plain_im + mirrored_im) / height], -1)  # (batch, 2)
    from_y = torch.stack([(mirrored_im - plain_im) / width, (plain_re - mirrored_re) / height], -1)
    grid = 2 * (from_x[:, None, None] * x[:, None, :, None] + from_y[:, None, None] * y[:, :, None, None])
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return moved.clamp(-1, 1)
