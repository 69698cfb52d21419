"""Procedural portraits: the same people in every batch, and the same pictures at every resolution."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfu_diffusers.data.portraits import (
    PARAMETERS,
    PortraitDataset,
    _Canvas,
    portrait_parameters,
    portraits_to_datasets,
    render_portraits,
)

LOW, HIGH = (torch.tensor([getattr(p, end) for p in PARAMETERS]) for end in ("low", "high"))


def test_parameters_depend_on_seed_and_index_only():
    everyone = portrait_parameters(range(100), seed=3)
    assert everyone.shape == (100, len(PARAMETERS)) and everyone.dtype == torch.float32
    assert torch.equal(portrait_parameters([41, 7, 41], seed=3), everyone[[41, 7, 41]])
    assert torch.equal(portrait_parameters(torch.arange(5), seed=3), portrait_parameters(np.arange(5), seed=3))
    assert not torch.isclose(everyone, portrait_parameters(range(100), seed=4)).all(1).any()
    assert portrait_parameters([]).shape == (0, len(PARAMETERS))


def test_parameters_are_pinned():
    """Published data sets are named by (seed, index): these numbers may change in no version and on no platform."""
    head = portrait_parameters([0, 1, 12345])[:, :3]
    expected = [
        [0.487044185, 0.413456500, 0.202220500],
        [0.471096754, 0.448555112, 0.202502474],
        [0.460966021, 0.405814707, 0.196247831],
    ]
    torch.testing.assert_close(head, torch.tensor(expected), rtol=0, atol=1e-7)
    background = portrait_parameters([0], seed=7)[0, -2:]
    torch.testing.assert_close(background, torch.tensor([0.037815150, 0.444377244]), rtol=0, atol=1e-7)


def test_parameters_fill_their_ranges_independently():
    unit = (portrait_parameters(range(4000)) - LOW) / (HIGH - LOW)
    assert unit.min() > -1e-5 and unit.max() < 1 + 1e-5
    assert (unit.mean(0) - 0.5).abs().max() < 0.025, "5 standard errors: 0.023"
    assert (unit.std(0) - 12**-0.5).abs().max() < 0.015
    assert torch.corrcoef(unit.T).fill_diagonal_(0).abs().max() < 0.08, "5 standard errors: 0.079"
    assert len({p.name for p in PARAMETERS}) == len(PARAMETERS)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 13), (16, 16), (33, 31), (64, 64), (1, 65), (127, 20), (96, 99)])
def test_any_size_gives_finite_pictures_in_range(size):
    images = render_portraits(portrait_parameters(range(6)), *size)
    assert images.shape == (6, 3, *size) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1


def test_extreme_parameters_stay_in_range():
    corners = torch.where(torch.rand(64, len(PARAMETERS), generator=torch.Generator().manual_seed(0)) < 0.5, LOW, HIGH)
    for images in (render_portraits(corners, 40), render_portraits(torch.stack([LOW, HIGH]), 130)):
        assert images.isfinite().all() and images.abs().max() <= 1


@pytest.mark.parametrize("size", [16, 33, 64, 100])
def test_a_picture_does_not_depend_on_its_batch(size):
    parameters = portrait_parameters(range(40))
    together = render_portraits(parameters, size)
    assert together.flatten(1).unique(dim=0).shape[0] == 40, "forty different people"
    for i in (0, 14, 39):
        assert_same_picture(render_portraits(parameters[i : i + 1], size)[0], together[i])
    assert_same_picture(render_portraits(parameters[3:17], size), together[3:17])


def assert_same_picture(result, expected):
    """To a hundredth of a level of 8 bits: the phase of the finest stripes, 150 radians, is rounded by 2e-5."""
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (32, 32), (64, 64), (17, 40), (50, 81)])
def test_pictures_agree_with_area_averages_of_larger_ones(size):
    parameters = portrait_parameters(range(16))
    coarse = render_portraits(parameters, *size)
    fine = F.avg_pool2d(render_portraits(parameters, 8 * size[0], 8 * size[1]), 8)
    error = (coarse - fine).abs()
    assert error.mean() < 0.007, f"mean {error.mean():.4f}, largest {error.max():.3f}; measured 0.001 to 0.005, 0.5"
    assert error.max() < 0.6, f"largest {error.max():.3f}: only cells where three or more edges meet may differ much"
    assert (coarse - fine).mean((2, 3)).abs().max() < 0.006, "each picture's mean colour is the same at both sizes"


def test_mean_colour_is_the_same_at_every_size():
    parameters = portrait_parameters(range(16))
    reference = render_portraits(parameters, 256).mean((2, 3))
    for size in ((1, 1), (3, 5), (16, 16), (64, 64), (31, 90)):
        difference = (render_portraits(parameters, *size).mean((2, 3)) - reference).abs().max()
        assert difference < 0.006, f"{size}: mean colour differs by {difference:.4f}"


@pytest.mark.parametrize("angle", [0.0, 0.6, -1.0])
@pytest.mark.parametrize("frequency", [8.0, 23.7, 64.0])
def test_stripes_are_exact_cell_averages(frequency, angle):
    def stripes(height, width):
        values = (torch.full((1, 1, 1, 1), value) for value in (frequency, angle, 0.3))
        return _Canvas(1, height, width, torch.device("cpu")).stripes((slice(None), slice(None)), *values)

    coarse, fine = stripes(12, 20), stripes(12 * 16, 20 * 16)
    torch.testing.assert_close(coarse, F.avg_pool2d(fine, 16), rtol=0, atol=1e-4)
    assert fine.min() >= -1e-5 and fine.max() <= 1 + 1e-5


def test_stripes_finer_than_the_pixels_leave_their_mean():
    parameters = portrait_parameters([0]).repeat(2, 1)
    names = [p.name for p in PARAMETERS]
    parameters[:, names.index("stripe_frequency")] = torch.tensor([64.0, 128.0])  # whole cycles per cell of 16
    parameters[:, names.index("stripe_angle")] = 0
    images = render_portraits(parameters, 16)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-3)


def test_dataset_items_and_batches():
    dataset = PortraitDataset(20, size=(24, 32), seed=5)
    assert len(dataset) == 20
    item = dataset[3]
    assert item["image"].shape == (3, 24, 32) and item["parameters"].shape == (len(PARAMETERS),)
    assert torch.equal(item["parameters"], portrait_parameters([3], seed=5)[0])
    assert torch.equal(dataset[-1]["image"], dataset[19]["image"])
    for single, batched in zip([dataset[2], dataset[19], dataset[2]], dataset.__getitems__([2, -1, 2])):
        assert torch.equal(single["parameters"], batched["parameters"])
        assert_same_picture(single["image"], batched["image"])
    assert len(list(dataset)) == 20, "iteration ends, as it does for sequences"
    assert dataset.__getitems__([]) == []


def test_dataset_items_at_other_sizes():
    dataset = PortraitDataset(20, size=16)
    mixed = dataset.__getitems__([(4, (20, 30)), 5, (torch.tensor(6), 24), (4, 20)])
    assert [tuple(item["image"].shape[1:]) for item in mixed] == [(20, 30), (16, 16), (24, 24), (20, 20)]
    assert torch.equal(mixed[0]["image"], dataset[4, (20, 30)]["image"])
    batches = [[(0, (16, 16)), (1, (16, 16))], [(2, (24, 20)), (3, (24, 20))]]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches)
    assert [tuple(batch["image"].shape) for batch in loader] == [(2, 3, 16, 16), (2, 3, 24, 20)]


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: PortraitDataset(10, size=0), ValueError, "size=0 .* at least 1"),
        (lambda: PortraitDataset(10, size=(8, -3)), ValueError, "size=-3"),
        (lambda: PortraitDataset(10, size=16.5), TypeError, "size=16.5 is a float"),
        (lambda: PortraitDataset(10, size=True), TypeError, "size=True is a bool"),
        (lambda: portrait_parameters([0.7]), TypeError, "numbered by integers"),
        (lambda: PortraitDataset(10, size=(8, 8, 3)), ValueError, "has 3 numbers"),
        (lambda: PortraitDataset(10, size="64"), TypeError, "size='64' is a str"),
        (lambda: PortraitDataset(0), ValueError, "length=0"),
        (lambda: PortraitDataset(None), TypeError, "length=None"),
        (lambda: PortraitDataset(10)[10], IndexError, "index 10 is out of range for 10"),
        (lambda: PortraitDataset(10)[-11], IndexError, "index -11"),
        (lambda: PortraitDataset(10)[2, 0], ValueError, "size=0"),
        (lambda: render_portraits(portrait_parameters([0]), 0), ValueError, "size=0"),
        (lambda: render_portraits(portrait_parameters([0])[0], 16), ValueError, "do not describe portraits"),
        (lambda: portraits_to_datasets(0), ValueError, "length=0"),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_portraits_to_datasets_round_trip():
    pytest.importorskip("datasets")
    table = portraits_to_datasets(5, size=(12, 20), seed=2)
    source = PortraitDataset(5, size=(12, 20), seed=2)
    assert table.column_names == ["image", *(p.name for p in PARAMETERS)] and len(table) == 5
    for row, item in zip(table, source):
        assert row["image"].mode == "RGB" and row["image"].size == (20, 12)
        pixels = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(pixels, item["image"], rtol=0, atol=0.5 / 127.5 + 1e-5)
        parameters = torch.tensor([row[p.name] for p in PARAMETERS])
        torch.testing.assert_close(parameters, item["parameters"])


def test_missing_datasets_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "dfu_diffusers\[train\]"'):
        portraits_to_datasets(2)
