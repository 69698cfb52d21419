"""Mixed-resolution batches and images of a folder."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_diffusers.data import ImageDataset, MixedResolutionBatchSampler, parse_resolution

SIZES = [(16, 16), (24, 24), (32, 48)]


def test_every_batch_has_one_resolution_and_every_epoch_each_image_once():
    batches = list(MixedResolutionBatchSampler(10, 4, SIZES, num_steps=50, seed=3))
    assert all(len({size for _, size in batch}) == 1 for batch in batches)
    indices = [index for batch in batches for index, _ in batch]
    epochs = [indices[i : i + 10] for i in range(0, len(indices), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_resolutions_follow_their_weights():
    sampler = MixedResolutionBatchSampler(10, 1, SIZES, weights=[1, 3, 0], num_steps=4000)
    drawn = [sampler.resolution(step) for step in range(4000)]
    assert drawn.count(SIZES[2]) == 0
    assert abs(drawn.count(SIZES[1]) / 4000 - 0.75) < 0.03  # more than four standard deviations


def test_a_resumed_sampler_continues_where_it_was():
    whole = list(MixedResolutionBatchSampler(7, 3, SIZES, num_steps=20))
    assert list(MixedResolutionBatchSampler(7, 3, SIZES, num_steps=20, first_step=12)) == whole[12:]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_each_batch(processes):
    whole = list(MixedResolutionBatchSampler(20, 6, SIZES, num_steps=9))
    shares = [
        list(MixedResolutionBatchSampler(20, 6, SIZES, num_steps=9, rank=rank, num_processes=processes))
        for rank in range(processes)
    ]
    assert [sum(parts, []) for parts in zip(*shares)] == whole


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=0), "no image"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(num_processes=3), "batch_size=4 cannot be shared equally by 3"),
        (dict(weights=[1, 2]), "3 resolutions"),
        (dict(weights=[0, 0, 0]), "not all 0"),
        (dict(weights=[1, -1, 1]), "at least 0"),
    ],
)
def test_bad_sampler_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedResolutionBatchSampler(**{"length": 10, "batch_size": 4, "resolutions": SIZES, **arguments})


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "12x", "x12", "1.5", "3x4x5", "big"])
def test_bad_resolutions(text):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_resolution(text)


@pytest.fixture
def photo_table(tmp_path):
    """A nested folder of a wide colour, a tall grey and a transparent picture."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "photos" / "nested").mkdir(parents=True)
    ramp = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "photos" / "wide.png")
    Image.fromarray(ramp[:, :40, 0]).save(tmp_path / "photos" / "nested" / "grey.png")
    Image.fromarray(np.dstack([ramp, ramp[..., :1]])).save(tmp_path / "photos" / "nested" / "alpha.webp")
    return datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "photos"), split="train", cache_dir=str(tmp_path / "cache")
    )


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (7, 31), (70, 20)])
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_images_of_a_folder_come_at_any_size(photo_table, size, mode, channels):
    dataset = ImageDataset(photo_table, mode=mode)
    assert len(dataset) == 3
    for index in range(3):
        image = dataset[index, size]["image"]
        assert image.shape == (channels, *size) and image.dtype == torch.float32
        assert -1 <= image.min() and image.max() <= 1


def test_the_crop_keeps_the_aspect_ratio(photo_table):
    """A square view of a horizontal ramp that is 1.5 times as wide as high shows its middle two thirds."""
    pictures = [photo_table[i]["image"] for i in range(3)]
    wide = next(i for i, picture in enumerate(pictures) if picture.size == (90, 60) and picture.mode == "RGB")
    view = ImageDataset(photo_table)[wide, (60, 60)]["image"]
    whole = torch.from_numpy(np.array(photo_table[wide]["image"], dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(view, whole[:, :, 15:75], atol=1e-6)


def test_flip_mirrors_about_half_of_the_images(photo_table):
    torch.manual_seed(0)
    straight, flipped = ImageDataset(photo_table), ImageDataset(photo_table, flip=True)
    reference = straight[0, (8, 8)]["image"]
    drawn = [flipped[0, (8, 8)]["image"] for _ in range(40)]
    mirrored = sum(torch.equal(image, reference.flip(-1)) for image in drawn)
    assert 8 < mirrored < 32 and mirrored + sum(torch.equal(image, reference) for image in drawn) == 40


def test_a_missing_column_is_named(photo_table):
    with pytest.raises(ValueError, match="no column 'picture'"):
        ImageDataset(photo_table, image_column="picture")
