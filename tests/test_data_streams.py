"""ImageStream: images in order, shuffled, resumed and shared among processes."""

import os
import pickle
import signal

import pytest
import torch
from image_files import batches_of, break_body, datasets, flat_image, images_of, numbers_of, photos, save, table_of
from torch.utils.data import DataLoader

from dfu_diffusers.data import streams
from dfu_diffusers.data.streams import ImageStream, ignore_signals

pytest_plugins = "image_files"


@pytest.fixture(params=["folder", "bytes"])
def stream_table(request, tmp_path, open_folder):
    """Eleven usable flat images and a file that is none, streamed from a folder or from a table in several shards."""
    photos(tmp_path / "photos", 11)
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    if request.param == "folder":
        return open_folder(streaming=True)
    images = [{"path": p.name, "bytes": p.read_bytes()} for p in sorted((tmp_path / "photos").iterdir())]
    table = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    return table.to_iterable_dataset(num_shards=3)


def test_a_stream_shows_each_image_once_an_epoch(stream_table, caplog):
    stream = ImageStream(stream_table, batches_of(range(33), size=(4, 4)), shuffle_buffer=5)
    shown = numbers_of(torch.cat(images_of(stream)))
    epochs = [shown[:11], shown[11:22], shown[22:]]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert caplog.text.count("zero.png") == 1


def test_without_a_buffer_a_stream_keeps_its_order(stream_table):
    stream = ImageStream(stream_table, batches_of(range(22), size=(4, 4)), shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(stream))) == [*range(11), *range(11)]


def test_resume_processes_and_workers_see_the_same_stream(stream_table):
    options = dict(random_crop=True, random_flip=True, seed=4, shuffle_buffer=4)
    batches = batches_of(range(40))
    whole = images_of(ImageStream(stream_table, batches, **options))
    assert [image.shape[-2:] for image in whole] == [batch[0][1] for batch in batches]
    for start in (3, 7, 19):
        resumed = images_of(ImageStream(stream_table, batches[start:], **options))
        assert all(map(torch.equal, whole[start:], resumed)) and len(resumed) == 20 - start
    for rank in range(2):
        share = [[batch[rank]] for batch in batches]
        part = images_of(ImageStream(stream_table, share, **options))
        assert all(torch.equal(images[rank], own[0]) for images, own in zip(whole, part))
    worked = images_of(ImageStream(stream_table, batches, **options), num_workers=3)
    assert len(worked) == len(whole) and all(map(torch.equal, whole, worked))


def test_a_stream_can_be_sent_to_a_spawned_worker(stream_table):
    stream = ImageStream(stream_table, batches_of(range(4)))
    assert all(map(torch.equal, images_of(stream), images_of(pickle.loads(pickle.dumps(stream)))))


def test_skipped_records_are_not_decoded(stream_table, monkeypatch):
    decoded = []
    read = streams.read_image
    monkeypatch.setattr(streams, "read_image", lambda *arguments: decoded.append(1) or read(*arguments))
    images_of(ImageStream(stream_table, batches_of(range(100, 104))))
    assert len(decoded) == 4


@pytest.mark.parametrize("broken, replacement", [(0, 1), (1, 0), (9, 8)])
def test_a_broken_body_is_replaced_by_its_neighbour(tmp_path, open_folder, broken, replacement, caplog):
    photos(tmp_path / "photos", 11)
    break_body(tmp_path / "photos" / f"{broken:02}.png")
    table = open_folder(streaming=True)
    batches = batches_of(range(22), size=(4, 4))
    shown = numbers_of(torch.cat(images_of(ImageStream(table, batches, shuffle_buffer=1))))
    expected = [replacement if number == broken else number for number in range(11)]
    if broken == 0:  # nothing is before it: one of the epoch's first eight
        assert shown[1:11] == expected[1:] and shown[0] in range(1, 8) and shown[11:] == shown[:11]
    else:
        assert shown == expected * 2
    assert caplog.text.count(f"{broken:02}.png") == 1
    resumed = ImageStream(table, batches[broken // 2 :], shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(resumed))) == shown[broken // 2 * 2 :]


def test_streams_without_usable_images(tmp_path, open_folder):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "zero.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image that can be used"):
        images_of(ImageStream(open_folder(streaming=True), batches_of(range(1))))
    empty = table_of(1).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="no image that can be used"):
        images_of(ImageStream(empty, batches_of(range(1))))
    break_body(tmp_path / "photos" / "zero.png")
    with pytest.raises(ValueError, match="No image near number 0"):
        images_of(ImageStream(open_folder(streaming=True), batches_of(range(1))))
    with pytest.raises(ValueError, match="1 follows 3"):
        images_of(ImageStream(table_of(5).to_iterable_dataset(), [[(0, (4, 4), 3), (0, (4, 4), 1)]]))


def test_small_images_of_a_stream(tmp_path, open_folder):
    photos(tmp_path / "photos", 3)
    save(tmp_path / "photos" / "small.png", flat_image(9, (10, 10)))
    table, options = open_folder(streaming=True), dict(min_size=(16, 16), shuffle_buffer=1)
    batches = batches_of(range(4), size=(16, 16))
    with pytest.raises(ValueError, match=r"small.png \(10x10\)"):
        images_of(ImageStream(table, batches, **options))
    for small_images, shown in {"skip": [0, 1, 2, 0], "upscale": [0, 1, 2, 9]}.items():
        stream = ImageStream(table, batches, small_images=small_images, **options)
        assert numbers_of(torch.cat(images_of(stream))) == shown


def test_labels_of_a_stream(tmp_path, open_folder):
    for number in range(4):
        save(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", flat_image(number))
    stream = ImageStream(open_folder(streaming=True), batches_of(range(4)), label_column="label")
    assert stream.class_names == ["a", "b"]
    for batch in DataLoader(stream, batch_size=None):
        assert batch["label"].tolist() == [number % 2 for number in numbers_of(batch["image"])]
    table = table_of(2, kind=["x", "y"], number=[5, 6]).to_iterable_dataset()
    assert ImageStream(table, [], label_column="number").class_names is None
    with pytest.raises(ValueError, match="'kind' is .*string"):
        ImageStream(table, [], label_column="kind")
    unlabelled = table_of(2, number=[-1, -1]).to_iterable_dataset()
    with pytest.raises(ValueError, match="'number' holds -1"):
        images_of(ImageStream(unlabelled, batches_of(range(1)), label_column="number"))


def test_a_stream_whose_columns_are_not_known_yet():
    table = table_of(3).cast_column("image", datasets.Image(decode=False)).to_iterable_dataset().map(lambda row: row)
    assert table.column_names is None
    stream = ImageStream(table, batches_of(range(3), size=(4, 4)), shuffle_buffer=1)
    assert numbers_of(torch.cat(images_of(stream))) == [0, 1, 2]


def test_workers_leave_signals_to_the_main_process():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        ignore_signals(0)
        for number in numbers:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
