# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Procedural portraits: endless, licence-free cartoon faces that exist at every resolution.

A portrait is a function on the unit square, x to the right and y down, described by the numbers named in
`PARAMETERS`. Rendering at height x width averages that function over the cells of the grid, sample j of N at
(j + 1/2)/N, so that pictures of one portrait at different sizes agree: large shapes stay where they are, and the fine
shirt stripes fade to their mean where pixels are too coarse to show them. A non-square picture is the same function
on the same unit square, that is, a stretched one.

Parameters come from (seed, index) alone: portrait 7 of seed 0 is the same, up to rounding, in every batch, order and
worker.

>>> faces = render_portraits(portrait_parameters([0, 1, 2]), 32, 48)
>>> faces.shape, bool(faces.abs().max() <= 1)
(torch.Size([3, 3, 32, 48]), True)
"""

import math
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset


class Parameter(NamedTuple):
    """One number of a portrait, drawn uniformly from [low, high). Lengths are fractions of the picture's side."""

    name: str
    low: float
    high: float
    meaning: str


# Each value is hashed from its position here: appending a parameter leaves the others as they were.
PARAMETERS = (
    Parameter("head_x", 0.46, 0.54, "centre of the head"),
    Parameter("head_y", 0.40, 0.45, "centre of the head"),
    Parameter("head_width", 0.19, 0.235, "half-width of the head"),
    Parameter("head_height", 0.235, 0.275, "half-height of the head"),
    Parameter("turn", -0.03, 0.03, "sideways shift of the features on the head"),
    Parameter("skin_tone", 0.0, 1.0, "light to dark"),
    Parameter("ear_size", 0.03, 0.05, "half-width of an ear"),
    Parameter("hair_colour", 0.0, 1.0, "along the ramp HAIR"),
    Parameter("hair_volume", 0.01, 0.09, "thickness of the hair around the head"),
    Parameter("hair_length", 0.06, 0.5, "reach of the hair below the head's centre"),
    Parameter("hairline", 0.42, 0.85, "height of the forehead's top, in half-heights of the head"),
    Parameter("parting", -0.11, 0.11, "sideways place of the forehead's top"),
    Parameter("bun", -0.12, 0.11, "radius of a bun on the head, none when negative"),
    Parameter("eye_width", 0.048, 0.06, "half-width of an eye"),
    Parameter("eye_open", 0.034, 0.058, "half-height of an eye"),
    Parameter("eye_spacing", 0.086, 0.102, "half the distance between the eyes"),
    Parameter("eye_colour", 0.0, 1.0, "along the ramp IRIS"),
    Parameter("gaze", -0.018, 0.018, "sideways shift of the pupils"),
    Parameter("brow_gap", 0.022, 0.045, "distance from eye to brow"),
    Parameter("brow_slope", -0.3, 0.3, "angry, inner ends low, to worried, inner ends high"),
    Parameter("nose_width", 0.022, 0.042, "half-width of the nose"),
    Parameter("mouth_width", 0.06, 0.105, "half-width of the mouth"),
    Parameter("mouth_open", 0.0, 0.05, "how far the lower lip drops"),
    Parameter("smile", -0.02, 0.042, "how far the corners lie above the middle"),
    Parameter("shoulders", 0.34, 0.46, "half-width of the shoulders at the picture's foot"),
    Parameter("shirt_hue", 0.0, 1.0, "around the colour circle"),
    Parameter("stripe_contrast", 0.4, 1.0, "0 plain, 1 full"),
    Parameter("stripe_frequency", 8.0, 24.0, "cycles per picture"),
    Parameter("stripe_angle", -1.0, 1.0, "radians from vertical stripes"),
    Parameter("stripe_phase", 0.0, 1.0, "cycles"),
    Parameter("background_hue", 0.0, 1.0, "around the colour circle"),
    Parameter("background_light", 0.0, 1.0, "dark to light"),
)

SKIN = "ffe3cf f8cfb0 eab48c cf9163 a86b42 7c4a2d 573220"
HAIR = "17141a 3a2419 6b3f22 8f4a22 c2622d e0a84e f2d68a b9b6b5 e4668f 7c4fb5 2f8fb0 3f9d6b"
IRIS = "4a2f1e 7a5230 5d8040 3f8f8c 3f78b8"
INK, WHITE, MOUTH, BLUSH = "241a20", "f7f6f2", "7d2233", "e8606a"

_MIN_GRID = 64  # coarser pictures are averaged from a finer one, where eyes and lips span several cells
_CHUNK_CELLS = 2**18  # cells rendered at a time: enough to amortise the calls, few enough for the caches and memory


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea and Flood 2014): uint64 -> well mixed uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def portrait_parameters(indices, seed: int = 0) -> torch.Tensor:
    """The parameters of portraits number `indices` of the series `seed`; see `PARAMETERS` for names and ranges.

    Shape: n integers (sequence, array or tensor) -> (n, len(PARAMETERS)), float32.

    >>> torch.equal(portrait_parameters([5, 9])[1], portrait_parameters([9])[0])
    True
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    key = _splitmix64(np.array([operator.index(seed) % 2**64], dtype=np.uint64) + step)
    indices = np.asarray(indices).reshape(-1)
    if indices.size and indices.dtype.kind not in "iu":
        raise TypeError(f"Portraits are numbered by integers, but got indices of type {indices.dtype}.")
    image = _splitmix64(key + step * indices.astype(np.uint64))
    field = step * np.arange(1, len(PARAMETERS) + 1, dtype=np.uint64)
    unit = (_splitmix64(image[:, None] + field) >> np.uint64(11)) * 2.0**-53  # 53 bits: exact in float64
    low, high = np.array([(p.low, p.high) for p in PARAMETERS]).T
    return torch.from_numpy((low + (high - low) * unit).astype(np.float32))


def _cos(turns: torch.Tensor) -> torch.Tensor:
    return torch.cos(2 * math.pi * turns)


def _colours(colours: str, device: torch.device) -> torch.Tensor:
    """Hexadecimal sRGB colours, separated by blanks -> (n, 3) in [-1, 1]."""
    return torch.tensor([list(bytes.fromhex(c)) for c in colours.split()], device=device) / 127.5 - 1


def _ramp(colours: str, position: torch.Tensor) -> torch.Tensor:
    """Piecewise linear colour ramp through hexadecimal sRGB: position (n, 1, 1, 1) in [0, 1] -> (n, 3, 1, 1)."""
    table = _colours(colours, position.device)
    place = (position.clamp(0, 1) * (len(table) - 1)).view(-1, 1)
    below = place.long().clamp(max=len(table) - 2).view(-1)
    return torch.lerp(table[below], table[below + 1], place - below[:, None])[..., None, None]


def _hue(hue: torch.Tensor, light: torch.Tensor | float, strength: float) -> torch.Tensor:
    """Colour circle: hue (n, 1, 1, 1) in turns -> (n, 3, 1, 1) around the grey `light`, both on the scale [-1, 1]."""
    thirds = torch.arange(3, device=hue.device).view(1, 3, 1, 1) / 3
    return light + strength * _cos(hue - thirds)


class _Canvas:
    """Pictures (n, 3, height, width) that ovals are painted on, each within the window of cells it can touch."""

    def __init__(self, n: int, height: int, width: int, device: torch.device):
        self.cell = 1 / height, 1 / width
        self.y = ((torch.arange(height, device=device) + 0.5) / height).view(1, 1, -1, 1)
        self.x = ((torch.arange(width, device=device) + 0.5) / width).view(1, 1, 1, -1)
        self.pixels = torch.empty(n, 3, height, width, device=device)

    def window(self, x, y, sides, heights, bend=None) -> tuple[slice, slice]:
        """Rows and columns that hold the oval of every picture, with two cells to spare."""
        (left, right), (up, down), slices = sides, heights, []
        rise = left * (abs(bend[0]) + abs(bend[1]) * left) if bend else 0
        for count, low, high in (
            (self.y.numel(), y - up - rise, y + down + rise),
            (self.x.numel(), x - left, x + right),
        ):
            first, last = int(low.min() * count) - 2, int(high.max() * count) + 3
            slices.append(slice(min(max(first, 0), count - 1), min(max(last, 1), count)))
        return tuple(slices)

    def oval(self, window, x, y, sides, heights, bend=None) -> torch.Tensor:
        """Coverage in [0, 1] by an oval of four quarter ellipses: half-widths (left, right), half-heights (up, down).

        Brows and lips are bent along y = slope u + curve u^2, u from the centre, given bend = (slope, curve). A
        cell's coverage comes from f = r - 1 at its centre, r the radius in units of the oval, taken as linear: the
        edge is f/(|f_x| h_x + |f_y| h_y) cells away.
        """
        (left, right), (up, down) = sides, heights
        u, v = self.x[..., window[1]] - x, self.y[:, :, window[0]] - y
        if bend:
            t = torch.clamp(u, -left, right)  # beyond its ends the curve runs on level
            v = v - t * (bend[0] + bend[1] * t)
        across = u / torch.where(u < 0, left, right).square()
        along = v / torch.where(v < 0, up, down).square()
        square = (u * across + 1e-12) + v * along  # r^2, and no 0/0 in the middle
        rows, columns = self.cell[0] * along.abs() + 1e-20, self.cell[1] * across  # r |f_y| h_y and r f_x h_x
        if bend:
            columns = columns - along * ((bend[0] + 2 * bend[1] * t) * (t == u) * self.cell[1])
        return square.sqrt().sub_(square).div_(rows + columns.abs_()).add_(0.5).clamp_(0, 1)

    def paint(self, window, coverage: torch.Tensor, colour: torch.Tensor, under: torch.Tensor | None = None) -> None:
        """Lays a colour over what is there, or in place of a colour `under` that covers at least as much of each cell.

        The latter is exact for nested ovals: where their edges share a cell, nothing else shows through between them.
        """
        pixels = self.pixels[..., window[0], window[1]]
        pixels.add_((colour - (pixels if under is None else under)) * coverage)

    def add(self, colour, *oval) -> tuple:
        """Paints one oval and returns its window and coverage."""
        window = self.window(*oval)
        coverage = self.oval(window, *oval)
        self.paint(window, coverage, colour)
        return window, coverage

    def stripes(self, window, frequency, angle, phase) -> torch.Tensor:
        """Stripe pattern in [0, 1]: a square wave's first two harmonics, exactly averaged over each cell."""
        turns = angle / (2 * math.pi)
        f_x, f_y = frequency * _cos(turns), frequency * _cos(turns - 0.25)
        first, third = (torch.sinc(k * f_x * self.cell[1]) * torch.sinc(k * f_y * self.cell[0]) for k in (1, 3))
        x, y = f_x * self.x[..., window[1]] + phase, f_y * self.y[:, :, window[0]]
        wave = _cos(x) * _cos(y) - _cos(x - 0.25) * _cos(y - 0.25)  # cos(x + y)
        # first cos(t) - third cos(3t)/3 with cos(3t) = 4 cos(t)^3 - 3 cos(t); its largest value is 2 sqrt(2)/3.
        return wave * (first + third - (4 / 3) * third * wave.square()) * (3 / (4 * math.sqrt(2))) + 0.5


def _paint(canvas: _Canvas, p: dict[str, torch.Tensor]) -> None:
    """Paints the portraits from back to front; every p[name] is (n, 1, 1, 1)."""

    def both(r):
        return r, r

    def plain(colour):
        return _colours(colour, x.device).view(1, 3, 1, 1)

    x, y, a, b = p["head_x"], p["head_y"], p["head_width"], p["head_height"]
    skin, hair = _ramp(SKIN, p["skin_tone"]), _ramp(HAIR, p["hair_colour"])
    skin_shade, hair_shade = 0.8 * skin - 0.2, 0.75 * hair - 0.25  # towards black
    far = 9.0  # a half-height that leaves the picture

    # 1. Background: a vertical gradient between neighbouring hues.
    light = 0.75 * p["background_light"] - 0.2
    above, below = _hue(p["background_hue"], light, 0.3), _hue(p["background_hue"] + 0.12, light - 0.3, 0.3)
    canvas.pixels.copy_(torch.lerp(above, below, canvas.y))

    # 2. Back of the hair, with its bun.
    volume, bun = p["hair_volume"], p["bun"].clamp(min=1e-3)
    mane = x, y, both(a + volume), (b + volume, p["hair_length"])
    lining = x, y, both(a + volume - 0.01), (b + volume - 0.01, p["hair_length"] - 0.01)  # no edge blends twice
    canvas.add(hair, x, y - b - volume - 0.4 * bun, both(bun), both(bun))
    canvas.add(hair_shade, *lining)

    # 3. Shirt, and the neck down to its round neckline, with the shadow of the head.
    shirt = x, torch.full_like(y, 1.08), both(p["shoulders"]), (0.33, far)
    window = canvas.window(*shirt)
    dark, pale = _hue(p["shirt_hue"], -0.25, 0.5), _hue(p["shirt_hue"], 0.55, 0.3)
    weave = canvas.stripes(window, p["stripe_frequency"], p["stripe_angle"], p["stripe_phase"])
    cloth = torch.lerp(dark, pale, weave.mul_(p["stripe_contrast"]))
    canvas.paint(window, canvas.oval(window, *shirt), cloth)
    window, neck = canvas.add(skin, x, torch.full_like(y, 0.77), both(0.42 * a), (0.4, 0.07))
    canvas.paint(window, neck * canvas.oval(window, x, y + 0.035, both(a), both(b)), skin_shade)

    # 4. Ears and head.
    for side in (-1, 1):
        canvas.add(skin_shade, x + side * a, y + 0.03, both(p["ear_size"]), both(1.3 * p["ear_size"]))
    canvas.add(skin, x, y, both(a), both(b))

    # 5. Features.
    face, eye_a, eye_b = x + p["turn"], p["eye_width"], p["eye_open"]
    ink, white, iris = plain(INK), plain(WHITE), _ramp(IRIS, p["eye_colour"])
    cheek = 0.6 * skin + 0.4 * plain(BLUSH)
    for side in (-1, 1):
        eye_x, eye_y = face + side * p["eye_spacing"], y + 0.03
        canvas.add(cheek, eye_x + side * 0.025, y + 0.5 * b, both(0.045), both(0.032))
        window, cover = canvas.add(ink, eye_x, eye_y - 0.004, both(eye_a + 0.008), both(eye_b + 0.008))
        pupil_x, (iris_r, pupil_r, glint_r) = eye_x + p["gaze"], (both(r) for r in (0.038, 0.024, 0.009))
        for colour, under, *oval in (
            (white, ink, eye_x, eye_y, both(eye_a), both(eye_b)),
            (iris, white, pupil_x, eye_y, iris_r, iris_r),
            (ink, iris, pupil_x, eye_y, pupil_r, pupil_r),
            (white, ink, pupil_x - 0.008, eye_y - 0.01, glint_r, glint_r),
        ):
            cover = torch.minimum(cover, canvas.oval(window, *oval))
            canvas.paint(window, cover, colour, under)
        canvas.add(
            hair_shade,
            eye_x,
            eye_y - eye_b - p["brow_gap"],
            both(1.1 * eye_a),
            both(0.015),
            (side * p["brow_slope"], 2.0),
        )
    canvas.add(skin_shade, face, y + 0.36 * b, both(p["nose_width"]), (0.02, 0.014))
    smile, width = p["smile"], p["mouth_width"]
    lips = face, y + 0.6 * b + smile, both(width), (0.012, 0.014 + p["mouth_open"])
    canvas.add(plain(MOUTH), *lips, (0.0, -smile / width.square()))

    # 6. Front of the hair: the mane without the forehead and all below, whose top may lie to one side.
    opening_a, part = 0.88 * a, p["parting"]
    window = canvas.window(*mane)
    opening = canvas.oval(
        window, x + part, y + 0.1 * b, (opening_a + part, opening_a - part), (b * (p["hairline"] + 0.1), far)
    )
    canvas.paint(window, canvas.oval(window, *mane).mul_(1 - opening), hair)


def _as_size(size) -> tuple[int, int]:
    """Checks a picture size, one side or (height, width), and returns (height, width)."""
    sides = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size={size!r} has {len(sides)} numbers. Give one side or (height, width).")
    return tuple(_as_count("size", side) for side in sides)


def _as_count(name: str, value) -> int:
    try:
        count = operator.index(None if isinstance(value, bool) else value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}. Give a whole number of at least 1.") from None
    if count < 1:
        raise ValueError(f"{name}={value!r} is empty. Give a whole number of at least 1.")
    return count


@torch.no_grad()
def render_portraits(parameters: torch.Tensor, height: int, width: int | None = None) -> torch.Tensor:
    """Renders portraits as functions on the unit square, on the device of their parameters.

    Args:
        parameters: From `portrait_parameters`, possibly edited.
        height: Rows, at least 1.
        width: Columns, at least 1. None = as many as rows. Other widths stretch the picture.

    Shape: (n, len(PARAMETERS)) -> (n, 3, height, width), float32 sRGB in [-1, 1].

    >>> render_portraits(portrait_parameters(range(4)), 7, 5).shape
    torch.Size([4, 3, 7, 5])
    """
    height, width = _as_size((height, height if width is None else width))
    if parameters.ndim != 2 or parameters.shape[1] != len(PARAMETERS):
        raise ValueError(
            f"parameters of shape {tuple(parameters.shape)} do not describe portraits. Give (n, "
            f"{len(PARAMETERS)}) numbers, for example `portrait_parameters(range(n))`."
        )
    fine_y, fine_x = (-(-_MIN_GRID // side) if side < _MIN_GRID else 1 for side in (height, width))
    images = torch.empty(len(parameters), 3, height, width, device=parameters.device)
    chunk = max(1, _CHUNK_CELLS // (height * fine_y * width * fine_x))
    for rows, image in zip(parameters.float().split(chunk), images.split(chunk)):
        canvas = _Canvas(len(rows), height * fine_y, width * fine_x, rows.device)
        _paint(canvas, {p.name: column.view(-1, 1, 1, 1) for p, column in zip(PARAMETERS, rows.T)})
        image.copy_(canvas.pixels.view(-1, 3, height, fine_y, width, fine_x).mean((3, 5)))
    return images


class PortraitDataset(Dataset):
    """Portraits 0 .. length - 1 of one series, rendered when asked for: {"image": (3, H, W), "parameters": (P,)}.

    Args:
        length: Number of portraits.
        size: Side in pixels or (height, width), for items that name no size of their own.
        seed: The series. Different seeds give different people: one for training, another for evaluation.

    An index may bring its size, `dataset[i, (height, width)]`: mixed-resolution samplers yield such pairs.

    >>> dataset = PortraitDataset(100, size=32)
    >>> dataset[-1]["image"].shape, dataset[3, (20, 30)]["image"].shape
    (torch.Size([3, 32, 32]), torch.Size([3, 20, 30]))
    """

    def __init__(self, length: int = 50_000, size: int | tuple[int, int] = 64, seed: int = 0):
        self.length, self.size, self.seed = _as_count("length", length), _as_size(size), operator.index(seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices) -> list[dict[str, torch.Tensor]]:
        """Items for a list of indices, rendered together per size; `DataLoader` calls this for each batch."""
        places, groups = [], {}
        for item, index in enumerate(indices):
            index, size = (index[0], _as_size(index[1])) if isinstance(index, tuple) else (index, self.size)
            index = operator.index(index)
            if not -self.length <= index < self.length:
                raise IndexError(f"index {index} is out of range for {self.length} portraits.")
            places.append(index % self.length)
            groups.setdefault(size, []).append(item)
        parameters = portrait_parameters(places, self.seed)
        items = [{"parameters": row} for row in parameters]
        for size, members in groups.items():
            for item, image in zip(members, render_portraits(parameters[members], *size)):
                items[item]["image"] = image
        return items


def portraits_to_datasets(length: int, size: int | tuple[int, int] = 64, seed: int = 0):
    """The portraits of `PortraitDataset` as a `datasets.Dataset`: a PNG column "image" and a column per parameter.

    >>> portraits_to_datasets(2, size=16)[0]["image"].size
    (16, 16)
    """
    try:
        from datasets import Dataset as Table
        from datasets import Features, Image, Value
    except ImportError as error:
        raise ImportError('`portraits_to_datasets` needs datasets: pip install "dfu_diffusers[train]"') from error
    length, size, picture, encoded = _as_count("length", length), _as_size(size), Image(), []
    parameters = portrait_parameters(range(length), seed)
    for rows in parameters.split(256):  # PNGs are kept, not pixels
        pixels = render_portraits(rows, *size).add_(1).mul_(127.5).round_().byte().permute(0, 2, 3, 1).numpy()
        encoded += [picture.encode_example(image) for image in pixels]
    columns = {p.name: column.numpy() for p, column in zip(PARAMETERS, parameters.T)}
    features = Features({"image": picture, **{p.name: Value("float32") for p in PARAMETERS}})
    return Table.from_dict({"image": encoded, **columns}, features=features)
