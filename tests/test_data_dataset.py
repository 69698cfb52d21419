"""ImageDataset: random access to images at any size."""

import numpy as np
import pytest
import torch
from image_files import COLOURS, FAULTS, SIZES, break_body, datasets, flat_image, numbers_of, photos, save, table_of
from torch.utils.data import DataLoader

from benchmarks import bench_data
from dfu_diffusers.data.dataset import ImageDataset
from dfu_diffusers.data.streams import ImageStream, ignore_signals

pytest_plugins = "image_files"


@pytest.fixture
def mixed(tmp_path, open_folder):
    """A wide colour, a tall grey and a transparent picture."""
    save(tmp_path / "photos" / "wide.png")
    save(tmp_path / "photos" / "nested" / "grey.png", COLOURS[:, :40, 0])
    save(tmp_path / "photos" / "nested" / "alpha.webp", np.dstack([COLOURS, COLOURS[..., :1]]), lossless=True)
    return open_folder()


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (7, 31), (70, 20)])
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_images_come_at_any_size(mixed, size, mode, channels):
    dataset = ImageDataset(mixed, mode=mode)
    assert len(dataset) == 3
    for index in range(3):
        image = dataset[index, size]["image"]
        assert image.shape == (channels, *size) and image.dtype == torch.float32
        assert -1 <= image.min() and image.max() <= 1
    batch = dataset.__getitems__([(0, size), (1, (9, 9)), (2, size, 50)])
    assert torch.equal(batch[0]["image"], dataset[0, size]["image"]) and batch[1]["image"].shape[1:] == (9, 9)
    assert torch.equal(dataset[-1, size]["image"], batch[2]["image"])
    with pytest.raises(IndexError):
        dataset[3, size]


def test_the_crop_keeps_the_aspect_ratio(mixed):
    """A square view of a picture that is 1.5 times as wide as high shows its middle two thirds."""
    wide = next(i for i, row in enumerate(mixed) if row["image"]["path"].endswith("wide.png"))
    view = ImageDataset(mixed)[wide, (60, 60)]["image"]
    assert torch.equal(view, torch.from_numpy(COLOURS[:, 15:75].astype(np.float32)).permute(2, 0, 1) / 127.5 - 1)


def test_flips_and_crops_are_functions_of_seed_and_number(mixed):
    wide = next(i for i, row in enumerate(mixed) if row["image"]["path"].endswith("wide.png"))
    draws = [(wide, (60, 60), number) for number in range(60)]
    straight = ImageDataset(mixed)[draws[0]]["image"]
    flips = [item["image"] for item in ImageDataset(mixed, random_flip=True).__getitems__(draws)]
    mirrored = sum(torch.equal(image, straight.flip(-1)) for image in flips)
    assert 15 < mirrored < 45 and mirrored + sum(torch.equal(image, straight) for image in flips) == 60

    options = dict(random_crop=True, random_flip=True, seed=5)
    first = [item["image"] for item in ImageDataset(mixed, **options).__getitems__(draws)]
    torch.manual_seed(1)
    again = [ImageDataset(mixed, **options)[draw]["image"] for draw in reversed(draws)]
    other = [item["image"] for item in ImageDataset(mixed, **{**options, "seed": 6}).__getitems__(draws)]
    assert all(map(torch.equal, first, reversed(again))) and not all(map(torch.equal, first, other))
    assert len({image.numpy().tobytes() for image in first}) > 50
    whole = ImageDataset(mixed, random_crop=True)[wide, (60, 90), 3]["image"]  # nothing to choose
    assert torch.equal(whole, ImageDataset(mixed)[wide, (60, 90)]["image"])


def test_unreadable_headers_are_left_out_by_name(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 3)
    for name, content in FAULTS.items():
        (tmp_path / "photos" / name).write_bytes(content)
    dataset = ImageDataset(open_folder())
    assert len(dataset) == 3 and "5 of 8 images are left out" in caplog.text
    assert all(name in caplog.text for name in FAULTS)
    assert numbers_of(torch.stack([dataset[i, (4, 4)]["image"] for i in range(3)])) == [0, 1, 2]


def test_only_five_names_are_told(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 1)
    for number in range(8):
        (tmp_path / "photos" / f"bad{number}.png").write_bytes(b"")
    ImageDataset(open_folder())
    assert "bad4.png" in caplog.text and "bad5.png" not in caplog.text and "and 3 more" in caplog.text


def test_a_broken_body_is_told_once_and_replaced_by_the_next(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 4)
    break_body(tmp_path / "photos" / "03.png")
    dataset = ImageDataset(open_folder(), label_column="label")
    assert len(dataset) == 4 and not caplog.text
    for _ in range(2):
        items = dataset.__getitems__([(i, (8, 8), i) for i in range(4)])
        assert numbers_of(torch.stack([item["image"] for item in items])) == [0, 1, 2, 0]
    assert caplog.text.count("03.png") == 1


def test_nothing_usable(tmp_path, open_folder):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match="None of the 1 images can be used: 1 unreadable"):
        ImageDataset(open_folder())
    photos(tmp_path / "photos", 1)
    break_body(tmp_path / "photos" / "00.png")
    with pytest.raises(ValueError, match="None of the 1 images can be decoded"):
        ImageDataset(open_folder())[0, (4, 4)]


def test_small_images_fail_are_skipped_or_enlarged(tmp_path, open_folder, caplog):
    photos(tmp_path / "photos", 2)  # 20 x 24
    save(tmp_path / "photos" / "wide.png", flat_image(7, (18, 100)))
    table = open_folder()
    with pytest.raises(ValueError, match=r"1 of the images .*19x19 pixels: .*wide.png \(18x100\).*skip.*upscale"):
        ImageDataset(table, min_size=(19, 19))
    assert len(ImageDataset(table, min_size=(18, 24))) == 3
    assert len(ImageDataset(table, min_size=(19, 19), small_images="upscale")) == 3
    assert len(ImageDataset(table, min_size=(19, 19), small_images="skip")) == 2
    assert "1 of 3 images are smaller than 19x19" in caplog.text
    with pytest.raises(ValueError, match="0 unreadable, 3 too small"):
        ImageDataset(table, min_size=(64, 64), small_images="skip")


@pytest.mark.parametrize(
    "kind, values, names, numbers",
    [
        ("class", [1, 0, 1], ["cat", "dog"], [1, 0, 1]),
        ("int", [2, 0, 2], ["0", "1", "2"], [2, 0, 2]),
        ("str", ["b", "a", "b"], ["a", "b"], [1, 0, 1]),
    ],
)
def test_labels(kind, values, names, numbers):
    table = table_of(3, kind=values)
    if kind == "class":
        table = table.cast_column("kind", datasets.ClassLabel(names=names))
    dataset = ImageDataset(table, label_column="kind")
    assert dataset.class_names == names and dataset.num_classes == len(names)
    loader = DataLoader(dataset, batch_sampler=[[(i, (4, 4)) for i in range(3)]])
    assert next(iter(loader))["label"].tolist() == numbers
    assert ImageDataset(table).class_names is None and "label" not in ImageDataset(table)[0, (4, 4)]


@pytest.mark.parametrize("values, wrong", [([0.5, 1.0], "0.5"), ([0, -1], "-1")])
def test_bad_labels(values, wrong):
    with pytest.raises(ValueError, match=f"column 'kind' holds {wrong}"):
        ImageDataset(table_of(2, kind=values), label_column="kind")


def test_bad_options(mixed):
    for options, message in [
        (dict(image_column="picture"), r"no column 'picture', only \['image', 'label'\]"),
        (dict(label_column="kind"), "no column 'kind'"),
        (dict(mode="CMYK"), "mode='CMYK'"),
        (dict(small_images="grow"), "small_images='grow'.*fail.*skip.*upscale"),
    ]:
        for make in (ImageDataset, lambda table, **options: ImageStream(table.to_iterable_dataset(), [], **options)):
            with pytest.raises(ValueError, match=message):
                make(mixed, **options)


def test_held_out_images_are_others_and_not_randomised(tmp_path, open_folder):
    photos(tmp_path / "photos", 10)
    dataset = ImageDataset(open_folder(), random_flip=True, random_crop=True)
    train, held_out = dataset.split(3, seed=1)
    shown = [numbers_of(torch.stack([d[i, (4, 4)]["image"] for i in range(len(d))])) for d in (train, held_out)]
    assert len(held_out) == 3 and sorted(sum(shown, [])) == list(range(10))
    assert held_out.rows.tolist() == dataset.split(3, seed=1)[1].rows.tolist() != dataset.split(3)[1].rows.tolist()
    assert train.framing == dataset.framing and not (held_out.framing.random_crop or held_out.framing.random_flip)
    for count in (0, 10, -1):
        with pytest.raises(ValueError, match=f"{count} of 10 images"):
            dataset.split(count)


def test_indices_choose_rows():
    dataset = ImageDataset(table_of(5), indices=[4, 2])
    assert numbers_of(torch.stack([dataset[i, (4, 4)]["image"] for i in range(2)])) == [4, 2]


def test_the_fingerprint_knows_files_but_not_where_they_lie(tmp_path, open_folder):
    for folder in ("here", "there"):
        photos(tmp_path / folder / "photos", 3)
        save(tmp_path / folder / "photos" / "sub" / "x.png")
    fingerprints = {ImageDataset(open_folder(f"{folder}/photos")).fingerprint for folder in ("here", "there")}
    (tmp_path / "there/photos/sub/x.png").rename(tmp_path / "there/photos/sub/y.png")
    fingerprints.add(ImageDataset(open_folder("there/photos")).fingerprint)
    save(tmp_path / "here/photos/sub/x.png", COLOURS[:30])
    fingerprints.add(ImageDataset(open_folder("here/photos")).fingerprint)
    assert len(fingerprints) == 3
    assert ImageDataset(table_of(3)).fingerprint == ImageDataset(table_of(3)).fingerprint
    assert ImageDataset(table_of(3)).fingerprint != ImageDataset(table_of(4)).fingerprint


def test_workers_change_nothing(tmp_path, open_folder):
    photos(tmp_path / "photos", 8)
    break_body(tmp_path / "photos" / "05.png")
    dataset = ImageDataset(open_folder(), random_crop=True, random_flip=True)
    batches = [[(n % 8, SIZES[n % 2], n) for n in range(start, start + 6, 2)] for start in range(8)]
    plain = [batch["image"] for batch in DataLoader(dataset, batch_sampler=batches)]
    worked = DataLoader(dataset, batch_sampler=batches, num_workers=2, worker_init_fn=ignore_signals)
    assert all(map(torch.equal, plain, (batch["image"] for batch in worked)))


def test_the_benchmark_runs(tmp_path, capsys):
    options = ["--images", "4", "--source_size", "32", "--sizes", "8", "--seconds", "0"]
    (row,) = bench_data.main([*options, "--output", str(tmp_path / "data.csv")])
    assert row["size"] == 8 and row["cached"] > 0 and "| 8 |" in capsys.readouterr().out
    assert (tmp_path / "data.csv").read_text().count("\n") == 2
