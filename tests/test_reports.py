"""Tables, curves and sheets, and the count of activations."""

import csv

import numpy as np
import pytest
import torch
from conftest import draw, redraw
from PIL import Image
from sampling import silent

from dfu_diffusers import DFUPipeline, DFURefiner, DFUSuperResolutionPipeline, EDMHeunScheduler
from dfu_diffusers.files import write_atomically
from dfu_diffusers.training import reports
from dfu_diffusers.training.reports import Table, activation_bytes, enlargement_sheet, plot_losses, sample_sheet

FIELDS = ["step", "resolution", "loss"]


def rows(path):
    return list(csv.DictReader(open(path)))


def test_a_table_continues_after_a_checkpoint_and_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "loss.csv"
    table = Table(path, FIELDS)
    for step in range(1, 6):
        table.append(step, "8x8", 1 / step)
    with open(path, "a") as file:
        file.write("6,8")  # killed while writing
    again = Table(path, FIELDS, start_step=3)
    again.append(4, "8x12", 0.5)
    assert [row["step"] for row in rows(path)] == ["1", "2", "3", "4"]
    assert rows(path)[3] == {"step": "4", "resolution": "8x12", "loss": "0.5"}
    Table(path, FIELDS)
    assert rows(path) == []


@pytest.mark.parametrize(
    "damage", ["1,8x8", "one,8x8,0.5", "1,8x8,half", "1,8x8,0.5,more", "-1,8x8,0.5", "\0\0\0", "1,8x8,\xff"]
)
def test_damaged_rows_are_left_out(tmp_path, damage, caplog, monkeypatch):
    monkeypatch.setattr(reports.logger, "disabled", False)  # whatever logging another test has set up
    caplog.set_level("WARNING", logger=reports.logger.name)
    path = tmp_path / "loss.csv"
    path.write_bytes(f"step,resolution,loss\n{damage}\n2,8x8,0.5\n3,8x8,0.25\n".encode("latin-1"))
    table = Table(path, FIELDS, start_step=9)
    assert [row["step"] for row in table.rows] == [row["step"] for row in rows(path)] == ["2", "3"]
    assert "1 damaged rows" in caplog.text


def test_a_table_of_other_columns_begins_anew(tmp_path):
    (tmp_path / "loss.csv").write_text("step,other\n1,2\n2,3\n")
    assert Table(tmp_path / "loss.csv", FIELDS, start_step=9).rows == []


def test_the_plot_shows_every_resolution(tmp_path):
    training, validation = Table(tmp_path / "a.csv", FIELDS), Table(tmp_path / "b.csv", FIELDS)
    plot_losses(tmp_path / "empty.png", training, validation)
    for step in range(1, 200):
        training.append(step, ("8x8", "16x16")[step % 2], 1 / step)
    validation.append(199, "8x8", 0.1)
    plot_losses(tmp_path / "loss.png", training, validation)
    pictures = [np.array(Image.open(tmp_path / name).convert("RGB")) for name in ("empty.png", "loss.png")]
    assert pictures[1].shape[0] > 300
    blue, orange = ([31, 119, 180], [255, 127, 14])  # matplotlib's first two colours
    for colour in (blue, orange):
        assert (pictures[1] == colour).all(-1).sum() > 50 and not (pictures[0] == colour).all(-1).any()


def test_a_sheet_holds_the_samples_of_its_seeds(make_model):
    pipe = DFUPipeline(make_model(num_class_embeds=2), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    sheet = sample_sheet(pipe, [(8, 8), (4, 8)], seed=5, count=3, cell=16)
    assert sheet.size == (56 + 3 * (32 + 2), 2 * (16 + 2))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    options = dict(num_inference_steps=reports.STEPS, class_labels=[0, 1, 0], generator=generators)
    second = pipe(batch_size=3, height=4, width=8, **options).images[1]
    shown = sheet.crop((56 + 34, 18, 56 + 34 + 32, 34))
    assert np.array_equal(np.array(shown), np.array(second.resize((32, 16), Image.Resampling.NEAREST)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_what_a_refiner_makes_of_images(channels):
    refiner = redraw(DFURefiner(in_channels=channels, hidden_channels=8, num_layers=1)).eval()
    pipe = silent(DFUSuperResolutionPipeline(None, EDMHeunScheduler(), refiner=refiner))
    images = 0.3 * draw(2, channels, 4, 6)
    sheet = enlargement_sheet(pipe, images, seed=3, cell=32)
    assert sheet.size == (56 + 2 * (48 + 2), 4 * (32 + 2))
    given = np.array(sheet.crop((56, 0, 56 + 48, 32)))[::8, ::8].transpose(2, 0, 1)  # each pixel is a square of 8
    expected = ((images[0] + 1) * 127.5).round().clamp(0, 255).expand(3, -1, -1).numpy()
    assert np.array_equal(given, expected.astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_activations_are_counted_without_making_them(make_model, channels):
    """Twice the images keep twice the bytes, and gradient checkpointing keeps a fraction. (Against the resident memory
    of the portraits preset at 8 x 64 x 64 px: 265 MiB counted, 275 MiB found.)"""
    model = make_model(in_channels=channels, out_channels=channels)
    one, two = (activation_bytes(model, batch, (16, 12)) for batch in (1, 2))
    assert one > 16 * 12 * 8 * 4 and 1.9 < two / one <= 2
    assert next(model.parameters()).device.type == "cpu"
    model.enable_gradient_checkpointing()
    assert activation_bytes(model, 2, (16, 12)) < 0.5 * two


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    write_atomically(tmp_path / "run.json", "old")
    write_atomically(tmp_path / "run.json", "new")
    assert (tmp_path / "run.json").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
