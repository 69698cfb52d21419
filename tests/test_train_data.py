"""The training script on pictures of its user: folders, zips, streams, classes, and what is broken in them."""

import csv
import json
import shutil

import pytest
import torch
from training_runs import assert_same, train

from dfu_diffusers import DFUPipeline

pytest_plugins = "training_runs"


def test_a_cache_a_zip_and_workers_give_the_same_run(tmp_path, photos):
    options = ["--random_flip", "--num_validation_images", "1", "--train_data_dir"]
    plain = train(tmp_path / "plain", *options, photos)
    cached = train(tmp_path / "cached", *options, photos, "--cache_dir", tmp_path / "cache", "--num_workers", "1")
    assert_same(cached, plain)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3  # two sizes, and the sizes of the originals
    archive = shutil.make_archive(tmp_path / "photos", "zip", photos)
    assert train(tmp_path / "zip", *options, archive).keys() == plain.keys()


def test_a_stream(tmp_path, photos):
    options = ["--train_data_dir", photos, "--streaming", "--class_conditional", "--num_validation_images", "3"]
    first = train(tmp_path / "first", *options)
    assert_same(train(tmp_path / "again", *options, "--num_workers", "2"), first)
    assert DFUPipeline.from_pretrained(tmp_path / "first").unet.config.num_class_embeds == 2
    assert json.loads((tmp_path / "first" / "run.json").read_text())["data"]["class_names"] == ["cat", "dog"]
    assert "Classes: 0 cat, 1 dog" in (tmp_path / "first" / "README.md").read_text()
    assert len(list(csv.DictReader(open(tmp_path / "first" / "validation.csv")))) == 2


def test_classes_of_folders(tmp_path, photos):
    train(tmp_path / "run", "--train_data_dir", photos, "--class_conditional")
    pipe = DFUPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 2
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    cat, dog = (pipe(num_inference_steps=2, class_labels=i, latents=latents, output_type="pt").images for i in (0, 1))
    assert not torch.equal(cat, dog)
    with pytest.raises(SystemExit, match="num_class_embeds=2, but with --class_conditional False"):
        config = tmp_path / "run" / "unet" / "config.json"
        train(tmp_path / "plain", "--train_data_dir", photos, "--model_config", config)


def test_dropped_labels_have_a_class_of_their_own(tmp_path, photos):
    options = ["--train_data_dir", photos, "--class_conditional", "--label_dropout", "0.5"]
    train(tmp_path / "run", *options)
    pipe = DFUPipeline.from_pretrained(tmp_path / "run")
    assert pipe.unet.config.num_class_embeds == 3, "the cat, the dog, and no class"
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, class_labels=0, output_type="pt")
    plain, guided = (
        pipe(generator=torch.Generator().manual_seed(0), guidance_scale=scale, **options).images for scale in (1, 3)
    )
    assert guided.isfinite().all() and not torch.equal(plain, guided)


def test_a_stream_with_nothing_left_and_one_that_breaks(tmp_path, photos):
    stream = ["--train_data_dir", photos, "--streaming"]
    with pytest.raises(SystemExit, match="holds no image to train on: lower --num_validation_images"):
        train(tmp_path / "run", *stream, "--num_validation_images", 12)
    with pytest.raises(SystemExit, match="small"):
        train(tmp_path / "run", *stream, "--resolutions", 17, "--num_validation_images", 0)


def test_broken_images_are_named_and_left_out(tmp_path, photos, caplog):
    (photos / "cat" / "empty.png").write_bytes(b"")
    (photos / "cat" / "text.jpg").write_text("not a picture")
    whole = (photos / "dog" / "1.png").read_bytes()
    (photos / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not even named like one")
    train(tmp_path / "run", "--train_data_dir", photos, "--max_train_steps", "6")
    named = caplog.text
    assert "empty.png" in named and "text.jpg" in named and "cut.png" in named and "notes.txt" not in named
    assert "notes" not in json.loads((tmp_path / "run" / "run.json").read_text())["data"]["description"]


def test_small_images_and_empty_folders(tmp_path, photos):
    for size in ("17", "10x28"):  # each side counts: all are 16 high and 20 to 31 wide
        with pytest.raises(SystemExit, match="small"):
            train(tmp_path / "run", "--train_data_dir", photos, "--resolutions", "16", size)
    train(tmp_path / "run", "--train_data_dir", photos, "--resolutions", "17", "--small_images", "upscale")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty"):
        train(tmp_path / "none", "--train_data_dir", tmp_path / "empty")
    assert not (tmp_path / "none").exists()


def test_the_data_sets_of_the_examples_can_be_made_and_trained_on(tmp_path):
    pytest.importorskip("sklearn"), pytest.importorskip("skimage")
    from examples import make_data

    make_data.main(["--output_dir", str(tmp_path), "--portraits", "30"])
    assert len(list((tmp_path / "photos").iterdir())) == 8
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == list("0123456789")
    train(tmp_path / "run", "--dataset_name", tmp_path / "portraits", "--streaming", "--max_train_steps", 2)
