"""The benchmark compares what it claims to compare, and runs on the tiny preset."""

import argparse
import contextlib
import copy
import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import draw
from PIL import Image

import measure
import pictures
from benchmarks import bench_layer, bench_model, bench_pipeline, bench_train, large_images
from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.evaluation.extractors import load_extractor
from dfu_diffusers.evaluation.tables import report
from dfu_diffusers.models.modes import average_pixels, octave_std
from dfu_diffusers.models.spectral import SpectralConv2d
from examples import evaluate_dfu, train_dfu
from experiments import (
    ablations,
    compare_precisions,
    distill_guidance,
    experiment,
    heldout_loss,
    inpaint,
    octaves,
    super_resolution,
)
from textbook import RfftSpectralConv2d

# --- Speed and memory ---


def small_unet(**config):
    layers = dict(block_out_channels=(4, 8), layers_per_block=1, fourier_modes=(2, None), attention_levels=())
    return DFUModel(**layers, **config)


def save_octaves(folder):
    """A pipeline that draws on a grid of 8 x 8 px, and refines it."""
    torch.manual_seed(0)
    unet = small_unet(sample_size=8)
    refiner = DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=16)
    DFUPipeline(unet, EDMHeunScheduler(), refiner=refiner).save_pretrained(folder)


@pytest.fixture
def known_peak(monkeypatch):
    """Operations a second that this machine is said to reach: to measure them takes seconds for each type."""
    for benchmark in (bench_layer, bench_model):
        monkeypatch.setattr(benchmark, "gemm_peak", lambda *_: 1e15)


def test_contenders_take_turns():
    order = []
    times = measure.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=2)
    assert order == ["a", "b"] * 3 and len(times["a"]) == len(times["b"]) == 2  # the first ones warm up
    assert measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    assert measure.gemm_peak("cpu", torch.float32) > 1e8


def test_operations_and_memory_of_known_calls():
    x, y, out = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    assert measure.operations(lambda: torch.bmm(x, y)) == measure.operations(lambda: out.baddbmm_(x, y)) == 2 * 360
    convolution = torch.nn.Conv2d(2, 3, 3, padding=1)
    image = torch.randn(1, 2, 8, 8)
    assert measure.operations(lambda: convolution(image)) == 2 * 9 * 2 * 3 * 64

    def two_at_once():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    assert measure.peak_bytes(two_at_once) == 2 * 4000
    assert measure.peak_bytes(lambda: x.view(-1).view(3, 4, 5)) == 0  # no memory of their own


def test_tables_are_taken_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    rows = [{"size": 32, "dtype": "float32", "ratio": 1.23456}, {"size": 64, "dtype": "bfloat16", "ratio": 1234.5}]
    args = argparse.Namespace(device="cpu", output=tmp_path / "benchmarks" / "results" / "layer")
    report(rows, "A title.", "python x.py", args)
    assert "A title. By `python x.py`; device" in args.output.with_suffix(".md").read_text()
    page = "Before.\n\n<!-- layer.csv: size; ratio=times -->\n\n| old |\n|---|\n| 1 |\n\nAfter.\n"
    updated = measure.with_tables(page)
    assert "-->\n\n| size | times |\n|---|---|\n| 32 | 1.23 |\n| 64 | 1,234 |\n\nAfter.\n" in updated
    assert measure.with_tables(updated) == updated
    only = measure.with_tables("<!-- layer.csv: dtype==bfloat16; size -->\n")
    assert only == "<!-- layer.csv: dtype==bfloat16; size -->\n| size |\n|---|\n| 64 |\n"


@pytest.mark.parametrize("page", ["docs/performance.md"])
def test_tables_of_the_pages_are_those_measured(page):
    text = (measure.ROOT / page).read_text()
    assert ".csv: " in text and measure.with_tables(text) == text, f"run `python benchmarks/measure.py {page}`"


def copy_weights(ours, theirs):
    """From a SpectralConv2d(2, 3, (4, 3)) to a textbook layer."""
    real, imaginary = ours.weight.detach().view(8, 3, 2, 6).chunk(2, dim=-1)  # rows -4 .. 3
    weight = torch.complex(real, imaginary).permute(2, 3, 0, 1)  # (in, out, rows, columns)
    theirs.weight.data = torch.view_as_real(torch.stack([weight[:, :, 4:], weight[:, :, :4]]))


def test_the_rfft2_layer_is_the_same_function():
    ours, theirs = SpectralConv2d(2, 3, (4, 3)), RfftSpectralConv2d(2, 3, (4, 3))
    copy_weights(ours, theirs)
    x = torch.randn(2, 2, 12, 18)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_the_benchmark_of_layers(tmp_path, monkeypatch, capsys, known_peak):
    """With a layer from a folder, as the authors' would be."""
    (tmp_path / "their_networks.py").write_text(
        "from textbook import RfftSpectralConv2d\n\n\n"
        "class Layer(RfftSpectralConv2d):\n"
        "    def __init__(self, in_channels, out_channels, rows, columns):\n"
        "        super().__init__(in_channels, out_channels, (rows, columns))\n"
    )
    options = ["--cases", "forward:8:1", "forward:5:2", "training:8:1", "--channels", "4", "--modes", "3", "2"]
    monkeypatch.syspath_prepend(tmp_path)
    options += ["--official_layer", "their_networks:Layer", "--turns", "1"]
    rows = bench_layer.main([*options, "--output", str(tmp_path / "layer")])
    kinds = [(row["case"], row["dtype"]) for row in rows]
    assert kinds == [(kind, dtype) for kind in ("forward", "forward", "training") for dtype in ("float32", "bfloat16")]
    assert rows[0]["official / ours"] > 0 and rows[0]["rfft2, ms"] > 0 and rows[2]["rfft2, ms"] is None
    assert all(0 < row["share of GEMM peak"] < 1 and row["peak, MiB"] > 0 for row in rows)
    assert "| training | bfloat16 | 8 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="kind must be forward or training"):
        bench_layer.main(["--cases", "backward:8:1"])


def test_the_benchmark_of_models(tmp_path, capsys, known_peak):
    options = ["--config", "tiny", "--cases", "forward:8:1", "training:16:2", "--turns", "1", "--profile"]
    rows = bench_model.main([*options, "--output", str(tmp_path / "model")])
    cases = [(row["case"], row["dtype"], row["size"]) for row in rows]
    dtypes = ("float32", "bfloat16")
    assert cases == [("forward", dtype, 8) for dtype in dtypes] + [("training", dtype, 16) for dtype in dtypes]
    assert all(row[f"dual / {name}"] > 0 for row in rows for name in ("spatial", "compact", "UNet2DModel"))
    assert rows[0]["float32 / this"] == 1 and rows[0]["ns per pixel"] > 0
    out = capsys.readouterr().out
    assert "mkldnn" in out or "conv" in out  # the profile
    assert len(list(csv.DictReader(open(tmp_path / "model.csv")))) == 4
    (row,) = bench_model.main(["--config", "tiny", "--cases", "forward:8:1", "--alone", "--dtypes", "float32"])
    assert not any("spatial" in name for name in row)


def test_a_model_with_textbook_layers_is_measured_in_all_precisions(known_peak):
    dtypes = ["float32", "tf32", "bfloat16"]
    options = ["--config", "tiny", "--cases", "forward:9:1", "training:16:2", "--alone", "--rfft2", "--turns", "1"]
    rows = bench_model.main([*options, "--dtypes", *dtypes])
    assert [row["dtype"] for row in rows] == dtypes * 2 and all(row["dual / rfft2"] > 0 for row in rows)
    with pytest.raises(SystemExit):
        bench_model.main(["--config", "ffhq-96-compact", "--rfft2"])

    model = small_unet()
    layers = [layer for layer in model.modules() if isinstance(layer, SpectralConv2d)]
    bench_model.with_textbook_layers(model)
    swapped = [layer for layer in model.modules() if isinstance(layer, bench_model.TextbookLayer)]
    assert len(swapped) == len(layers) > 0
    assert not any(isinstance(layer, SpectralConv2d) for layer in model.modules())

    ours, theirs = SpectralConv2d(2, 3, (4, 3)), bench_model.TextbookLayer(2, 3, (4, 3))
    copy_weights(ours, theirs)
    x = torch.randn(2, 2, 12, 18)
    expected = ours(x)
    assert torch.allclose(theirs(x, residual=torch.ones_like(expected)), expected + 1, atol=1e-4)
    assert theirs(x.bfloat16(), (7, 5)).shape == (2, 3, 7, 5)
    assert torch.allclose(theirs(x, (12, 27)).mean((2, 3)), expected.mean((2, 3)), atol=1e-4)  # mode (0, 0)


def test_the_benchmark_of_pipelines(tmp_path, capsys):
    save_octaves(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--sizes", "8", "16", "--reference_size", "8", "--turns", "1"]
    rows = bench_pipeline.main([*options, "--num_inference_steps", "2", "--output", str(tmp_path / "pipeline")])
    variants = ["float32", "bfloat16", "float32+direct"]
    assert [(row["size"], row["variant"]) for row in rows] == [(size, name) for size in (8, 16) for name in variants]
    assert rows[0]["beside 8 px"] == 1 and rows[1]["PSNR to float32, dB"] > 30 > rows[-1]["PSNR to float32, dB"]
    assert Image.open(tmp_path / "pipeline.png").size == (2 * 130, 16 + 3 * 146)
    with pytest.raises(SystemExit):
        bench_pipeline.main([*options, "--variants", "bfloat16+fast"])
    assert "--variants bfloat16+fast: one of float32" in capsys.readouterr().err


def test_pipelines_are_compiled_as_their_variant_says(tmp_path, monkeypatch):
    save_octaves(tmp_path / "model")
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    for network in (DFUModel, DFURefiner):
        monkeypatch.setattr(network, "compile_repeated_blocks", lambda model: modes.append("blocks"))
    options = ["--model", str(tmp_path / "model"), "--sizes", "8", "--turns", "1", "--num_inference_steps", "2"]
    variants = ["float32", "bfloat16+compiled", "float32+direct+graphs"]
    rows = bench_pipeline.main([*options, "--variants", *variants])
    assert modes == ["blocks"] * 2 + ["reduce-overhead"] * 2 and [row["variant"] for row in rows] == variants


def run_here(words, **_):
    """A script whose process begins with main(), as subprocess.run would run it, but in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        large_images.main(words[2:])
    return argparse.Namespace(returncode=0, stdout=out.getvalue())


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_large_image_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch, capsys, alone):
    DFUPipeline(small_unet(), EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--sizes", "120", "--num_inference_steps", "2"]
    if not alone:
        monkeypatch.setattr(large_images, "subprocess", argparse.Namespace(run=run_here, PIPE=None))
    ballast = np.ones(2**27) if alone else None  # a GiB here, which is none of the child's
    (row,) = large_images.main([*options, "--output", str(tmp_path / "large")])
    del ballast
    assert row["size"] == 120 and 100 < row["peak, MiB"] and row["s"] > 0
    assert row["peak, MiB"] < 1000 or not alone
    assert Image.open(tmp_path / "large_120.png").size == (120, 120) and "| 120 |" in capsys.readouterr().out


@pytest.mark.slow
def test_freed_memory_is_measured(tmp_path):
    options = ["--freed_memory", "tiny:8:2", "--turns", "1", "--output", str(tmp_path / "kept.csv")]
    (row,) = bench_train.main(options)
    assert row["preset"] == "tiny" and row["give back / keep"] == row["give back, s"] / row["keep, s"] > 0
    assert (tmp_path / "kept.md").is_file()


def test_precisions_are_compared(tmp_path, monkeypatch, capsys):
    def run(words, check):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_dfu.main(words[2:])

    monkeypatch.setattr(compare_precisions, "subprocess", argparse.Namespace(run=run))
    monkeypatch.setattr(compare_precisions, "setting", lambda device: {"device": device})
    options = ["--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--resolutions", "8", "--batch_size", "2"]
    options += ["--num_validation_images", "2"]
    rows = compare_precisions.main(["--steps", "20", "--output_dir", str(tmp_path / "out"), *options])
    assert [row["steps"] for row in rows][-1] == "19 to 20" and len(rows) == 10
    assert all(abs(row["difference"]) < 0.1 * row["float32"] for row in rows)
    assert any(row["float32"] != row["bfloat16"] for row in rows)
    assert (tmp_path / "out" / "losses.png").is_file() and "times as long in float32" in capsys.readouterr().out


def test_a_refiner_learns_its_guided_output(make_refiner, tmp_path, monkeypatch):
    """The guide is the refiner with 1 less in its last bias, so guidance with w = 1.5 adds 0.5 to the output."""
    refiner = make_refiner(in_channels=3)
    refiner.save_pretrained(tmp_path / "refiner")
    guide = copy.deepcopy(refiner)
    with torch.no_grad():
        guide.conv_out.bias.sub_(1.0)
    guide.save_pretrained(tmp_path / "guide")
    distillation = distill_guidance.Distillation(refiner, refiner, guide, 1.5)
    distillation(draw(2, 3, 8, 6), torch.zeros(2), draw(2, 3, 8, 6), torch.full((2,), 0.1))
    torch.testing.assert_close(distillation.error, torch.full((2,), 0.25), rtol=1e-4, atol=0)

    monkeypatch.setattr(distill_guidance, "BATCHES", [((20, 20), 2, 1), ((24, 16), 2, 1)])
    options = ["--model", tmp_path / "refiner", "--guide", tmp_path / "guide", "--output_dir", tmp_path / "student"]
    distill_guidance.main([*map(str, options), "--guidance_scale", "1.5", "--steps", "20", "--learning_rate", "1e-3"])
    before, after = (DFURefiner.from_pretrained(tmp_path / name) for name in ("refiner", "student"))
    assert (after.conv_out.bias > before.conv_out.bias).all()


def test_the_heldout_loss_of_an_untrained_model_is_about_one(tmp_path, capsys):
    pipe = DFUPipeline(small_unet(), EDMHeunScheduler())
    pipe.save_pretrained(tmp_path)
    heldout_loss.main(["--model", str(tmp_path), "--sizes", "8", "12x10", "--count", "32"])
    assert "| 12x10 | 0." in capsys.readouterr().out
    loss, error = heldout_loss.heldout_loss(pipe, (8, 8), 256)
    assert abs(loss - 0.85) < 0.15 and 0 < error < 0.1  # portraits vary less than sigma_data, so a bit below one
    assert heldout_loss.heldout_loss(pipe, (8, 8), 256) == (loss, error)


def test_the_training_benchmark_runs_the_script_s_own_step(tmp_path, capsys):
    options = ["--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--batch_size", "2", "--steps", "4"]
    (row,) = bench_train.main(["--sizes", "8", *options, "--output", str(tmp_path / "train.csv")])
    assert row["script_over_bare"] > 0 and row["loader"] > 0
    assert "| 8 |" in capsys.readouterr().out and (tmp_path / "train.csv").read_text().count("\n") == 2


def test_enlarged_portraits_are_measured(tmp_path, capsys):
    save_octaves(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--side", "16", "--scales", "2", "--count", "3", "--samples", "2"]
    rows = super_resolution.main([*options, "--output", str(tmp_path / "table")])
    names = [
        "bicubic",
        "Lanczos",
        "bicubic, projected",
        "sample",
        "sample, consistency=False",
        "one call",
        "mean of 2",
    ]
    assert [row["method"] for row in rows] == names and {row["size"] for row in rows} == {32}
    assert [row["consistency, 1/255"] <= 1 for row in rows] == [False, False, True, True, False, True, True]
    assert all(row["PSNR, dB"] > 12 and 0.3 < row["SSIM"] < 1 and row["Frechet"] is None for row in rows)
    assert len(list(csv.DictReader(open(tmp_path / "table.csv")))) == 7 and (tmp_path / "table.png").is_file()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    truth = pictures.portraits(3, 32)
    figures = super_resolution.measure(truth, truth, super_resolution.averaged(truth, 16), load_extractor("portrait"))
    assert figures["SSIM"] > 0.999 and figures["consistency, 1/255"] < 0.51 and figures["feature distance"] == 0


def test_squares_are_the_middles_of_pictures(tmp_path):
    for number, size in enumerate([(40, 20), (24, 30)]):
        Image.new("RGB", size, (100 * number, 0, 0)).save(tmp_path / f"{number}.png")
    assert super_resolution.squares(tmp_path, 9, None).shape == (2, 20, 20, 3)
    assert (super_resolution.squares(tmp_path, 9, 10)[..., 0] == np.array([0, 100])[:, None, None]).all()
    assert len(super_resolution.squares(tmp_path, 1, 10)) == 1


class Means:
    """Stands in for the portrait reader, whose features need more images."""

    name, dim = "means", 3

    def __call__(self, images):
        return images.mean((2, 3))


def test_octaves_are_measured_at_many_sizes(tmp_path, monkeypatch, capsys, few_steps):
    few_steps(8)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(octaves, "load_extractor", lambda *_: Means())
    save_octaves(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--sizes", "16", "13", "12x24", "--count", "5", "--seeds", "0", "7"]
    options += ["--baseline", str(tmp_path / "model"), "--baseline_strategies", "direct", "--baseline_limit", "16"]
    options += ["--output_dir", str(tmp_path / "out")]
    rows = octaves.main(options)
    names = {size: [row["pictures"] for row in rows if row["size"] == size] for size in ("16x16", "13x13", "12x24")}
    assert names["16x16"] == ["octaves", "direct", "real"] * 2
    assert names["13x13"] == ["octaves", "enlarged", "direct", "real"] * 2
    assert names["12x24"] == ["octaves", "enlarged", "real"] * 2
    assert all(row["above real"] == 0 for row in rows if row["pictures"] == "real")
    assert all(row["coherence"] == row["FD"] for row in rows if row["size"] != "12x24")
    assert all((row["16 to 24 px"] is None) == (row["size"] != "12x24") for row in rows)
    same = [row["PSNR to small, dB"] for row in rows if row["size"] == "12x24" and row["pictures"] == "octaves"]
    assert min(same) > 25  # one seed is one picture, but for the aliasing of modes in averages
    table = (tmp_path / "out" / "octaves.md").read_text()
    assert table in capsys.readouterr().out and "one_seed" not in table
    assert len(list(csv.DictReader(open(tmp_path / "out" / "octaves.csv")))) == len(rows)
    assert Image.open(tmp_path / "out" / "octaves.png").size == (2 * 258 + 514, 16 + 2 * 4 * (256 + 16 + 2))
    monkeypatch.setattr(octaves.ModelSource, "draw", None)  # which would fail: all is kept
    assert octaves.main(options) == rows


@pytest.mark.parametrize("part, variants", [("refiner", ["half", "damped"]), ("trunk", ["dual-16"])])
def test_variants_are_trained_and_compared(tmp_path, monkeypatch, few_steps, part, variants):
    few_steps(2)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(ablations, "load_extractor", lambda *_: Means())
    monkeypatch.setattr(ablations, "BATCH", 2)
    monkeypatch.setattr(ablations, "HELD_OUT_IMAGES", 4)
    monkeypatch.setattr(ablations, "TRUNK", {**ablations.TRUNK, "block_out_channels": [8, 8, 8], "norm_num_groups": 4})
    unet, refiner = small_unet(sample_size=16), DFURefiner(hidden_channels=8, num_layers=1)
    DFUPipeline(unet, EDMHeunScheduler(), refiner=refiner).save_pretrained(tmp_path / "model")
    folders = ["--trunk", tmp_path / "model", "--refiner", tmp_path / "model", "--output_dir", tmp_path / "out"]
    options = [part, *variants, *map(str, folders), "--sides", "32", "--steps", "1", "--count", "5"]
    rows = ablations.main(options)
    assert [row["variant"] for row in rows] == [*variants, "real"]
    assert all(row["FD"] >= 0 and "power, 16 to 32 px" in row for row in rows)
    if part == "refiner":
        assert [row["loss"] is None for row in rows] == [False, True, True]
    table = (tmp_path / "out" / f"ablations_{part}.md").read_text()
    assert all(f"| {name} |" in table for name in variants)
    for kind in (ablations.ModelSource, ablations.Portraits):
        monkeypatch.setattr(kind, "draw", None)  # which would fail: all is kept
    monkeypatch.setattr(ablations, "fit", None)
    assert ablations.main(options) == rows


def test_what_the_ablations_need_is_told_before_training(tmp_path, monkeypatch, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(ablations, "fit", None)  # training would fail
    DFUPipeline(small_unet(sample_size=16), EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    wrong = {
        ("trunk", "--refiner", str(tmp_path / "model")): "has no refiner: name another pipeline",
        ("refiner", "--trunk", str(tmp_path / "nothing")): "nothing cannot be loaded as a pipeline",
        ("refiner", "large"): "no such variant: large; there are base, law",
        ("refiner", "--largest", "64"): "small is for --largest 32",
    }
    for options, message in wrong.items():
        with pytest.raises(SystemExit):
            ablations.main([*options, "--output_dir", str(tmp_path / "out")])
        assert message in capsys.readouterr().err


def test_changes_of_training_and_drawing_are_in_force_and_undone(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ablations, "fit", lambda network, *_: told.append(ablations.losses.TOLD_NOISE) or network)
    usual = ablations.losses.TOLD_NOISE
    refiner = ablations.train_refiner(ablations.REFINERS["clean"], 32, 1, "clean")
    assert told == [(0.01, 0.01)] and ablations.losses.TOLD_NOISE == usual
    parts = small_unet(sample_size=16).eval(), EDMHeunScheduler()
    options = dict(height=20, width=20, num_inference_steps=1, octave_steps=1, output_type="latent")
    pictures = []
    for kind in (DFUPipeline, ablations.RawPipeline):
        pipe = kind(*parts, refiner=refiner)
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(generator=torch.Generator().manual_seed(0), **options).images)
    torch.testing.assert_close(average_pixels(pictures[1]), pictures[0], rtol=1e-4, atol=1e-4)


def test_what_the_variants_of_the_refiner_change():
    images = ablations.portraits(range(40), (32, 32))
    soft = ablations.soften(images, range(40))
    unchanged = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(images, soft)])
    assert 8 < unchanged.sum() < 32
    sharpness = (soft[~unchanged].diff(dim=3).square().mean() / images[~unchanged].diff(dim=3).square().mean()).item()
    assert 0.2 < sharpness < 0.9
    faint = ablations.recolour(images, range(40))
    shares = faint.std((2, 3)) / images.std((2, 3))
    torch.testing.assert_close(shares, shares[:, :1].expand(-1, 3), rtol=1e-3, atol=0)
    assert 0.1 <= shares.min() and shares.max() <= 1 and faint.abs().max() <= 1
    config = ablations.REFINERS["law"].build(ablations.SIDES[32]).config
    half = ablations.REFINERS["half"].build(ablations.SIDES[32]).config
    assert config.detail_exponent == pytest.approx(2 * half.detail_exponent) and half.detail_exponent < 0
    assert octave_std(config, (32, 32)) == pytest.approx(ablations.DETAIL_STD)


def test_octaves_need_a_refiner(tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    DFUPipeline(small_unet(), EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        octaves.main(["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    assert "has no refiner: name a pipeline that has one" in capsys.readouterr().err


def test_jumps_at_the_edge_of_a_mask(tmp_path, capsys):
    images, holes = np.zeros((1, 4, 6, 3), np.uint8), np.zeros((1, 4, 6), bool)
    images[..., 3:, :], holes[..., 3:] = 30, True
    assert inpaint.edge_jump(images, holes) == 30 and inpaint.edge_jump(0 * images, holes) == 0
    DFUPipeline(small_unet(), EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--size", "16", "--count", "3", "--churn", "0", "5"]
    jumps = inpaint.main([*options, "--num_inference_steps", "2", "--output", str(tmp_path / "sheet")])
    ways = [f"{how}, s_churn {churn}" for how in ("replaced", "seamless") for churn in (0, 5)]
    assert list(jumps) == ["truth", *ways] and (tmp_path / "sheet.png").is_file()
    assert "| seamless, s_churn 5 |" in capsys.readouterr().out


# --- The experiment ---


@pytest.fixture
def tiny_budget(monkeypatch):
    tiny = {"block_out_channels": [4, 8], "fourier_modes": [[2, 3], [1, 2]], "attention_levels": []}
    for name in ("CONFIG", "TRUNK"):
        monkeypatch.setattr(experiment, name, {**getattr(experiment, name), **tiny})
    monkeypatch.setattr(experiment, "REFINER", {**experiment.REFINER, "hidden_channels": 4, "num_layers": 1})
    monkeypatch.setitem(experiment.BUDGETS, "cpu", experiment.Budget((8, 12), 2, 2, 1, 5, (2, 2)))
    return experiment.BUDGETS["cpu"]


def test_networks_of_the_experiment():
    budget = experiment.BUDGETS["cpu"]
    kinds = ("dual", f"dual-{budget.largest}", "spatial", "spectral", "compact", "wide", "tall", "mirror")
    with torch.device("meta"):
        networks = [DFUModel(**experiment.model_config(kind, budget)) for kind in kinds]
    dual, single, *halves, wide, tall, mirror = (network.num_parameters() for network in networks)
    assert dual == single > max(halves) and max(abs(each / dual - 1) for each in (wide, tall)) < 0.1
    assert mirror > 2 * dual
    rows, columns = experiment.model_config("tall", budget)["fourier_modes"][0]
    assert rows > 2 * (columns - 1)  # cycles down and across
    assert {run for runs in experiment.RUNS.values() for run in runs} <= set(experiment.runs(budget))


def test_the_experiment_from_training_to_report(tiny_budget, tmp_path, monkeypatch, capsys, few_steps):
    """With a stranger's extractor, and each script in this process."""
    few_steps()

    def execute(words):
        AcceleratorState._reset_state(reset_partial_state=True)  # as if it had just started
        (script,) = (word for word in words if word.endswith("_dfu.py"))
        arguments = words[words.index(script) + 1 :]
        if "train" in Path(script).name:
            train_dfu.main([*arguments, "--num_validation_images", "2"])
        else:
            evaluate_dfu.main(arguments)

    class Mean:
        name, dim = "mean", 3

        def __call__(self, images):
            return images.mean((2, 3))

    monkeypatch.setattr(experiment, "execute", execute)
    monkeypatch.setattr(evaluate_dfu, "plot_curves", lambda *_: None)  # seconds; its own tests draw them
    monkeypatch.setattr(evaluate_dfu.extractors, "load_extractor", lambda *_: Mean())
    monkeypatch.chdir(tmp_path)
    options = ["--output_dir", "out", "--results_dir", "results"]
    for stage, message in (("evaluate", "None of dual-0"), ("report", "no results")):
        with pytest.raises(SystemExit, match=message):
            experiment.main([stage, *options])
    names = ["dual-0", "spatial-0", "upsampled-0", "dual-8-0", "octaves-0"]
    experiment.main(["train", *names, *options])
    capsys.readouterr()
    experiment.main(["train", *names, *options])
    assert capsys.readouterr().out.count("is finished") == 5
    for stage in ("evaluate", "report"):
        experiment.main([stage, *options])
    text = Path("results/experiment.md").read_text()
    assert "| 20 px, 1.66x | 24 px, 2x | 12x24 px, 1:2 | 36 px, 3x | 48 px, 4x | 96 px, 8x |" in text
    assert "octaves beat sampling directly" in text and "power, log10" in text
    assert "DFU beats the UNet" in text and "octaves beat the cascade" in text
    assert "FNO" not in text  # which was not trained
    rows = list(csv.DictReader(open("results/experiment.csv")))
    drawn = {(row["run"], row["size"]) for row in rows if row["method"] == "model"}
    assert len(drawn) == 5 * 4 + 3 * 3 + 2 and ("dual-8-0", "24") in drawn and ("spatial-0", "48") in drawn
    assert Image.open("results/experiment_samples.png").size[0] == 6 * 130
    experiment.main(["picture", "out/dual-0", "out/spatial-0", *options])
    assert Image.open("out/samples.png").size == (6 * 130, 16 + 2 * 4 * 146)
    with pytest.raises(SystemExit):
        experiment.main(["picture", "out/dual-0"])


def test_verdicts_of_the_experiment():
    assert experiment.verdict([(1, [1.0, 2.0], [3.0]), (2, [1.0], [1.5])]) == "yes"
    assert (
        experiment.verdict([(1, [1.0, 4.0], [3.0])]) == experiment.verdict([(1, [1], [2]), (2, [2], [1])]) == "mixed"
    )
    assert experiment.verdict([(1, [5.0, 4.0], [3.0])]) == "no"
