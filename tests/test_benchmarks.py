"""The benchmark compares what it claims to compare, and runs on the tiny preset."""

import csv

import torch

from benchmarks import bench_dual_conv, bench_train, heldout_loss
from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.modeling_dfu import SpectralConv2d
from examples import train_dfu


def test_the_rfft2_layer_is_the_same_function():
    ours, theirs = SpectralConv2d(2, 3, (4, 3)), bench_dual_conv.RfftSpectralConv2d(2, 3, (4, 3))
    real, imaginary = ours.weight.detach().view(8, 3, 2, 6).chunk(2, dim=-1)  # rows -4 .. 3
    weight = torch.complex(real, imaginary).permute(2, 3, 0, 1)  # (in, out, rows, columns)
    theirs.weight.data = torch.stack([weight[:, :, 4:], weight[:, :, :4]])
    x = torch.randn(2, 2, 12, 18)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_the_benchmark_runs(tmp_path, capsys):
    options = ["--config", "tiny", "--sizes", "16", "24", "--batch_size", "1", "--repeats", "1"]
    rows = bench_dual_conv.main([*options, "--output", str(tmp_path / "table.csv")])
    assert [row["size"] for row in rows] == [16, 24] and all(row["dual_over_spatial"] > 0 for row in rows)
    assert "| 24 | 1 |" in capsys.readouterr().out
    assert [row["config"] for row in csv.DictReader(open(tmp_path / "table.csv"))] == ["tiny", "tiny"]


def test_the_heldout_loss_of_an_untrained_model_is_about_one(tmp_path, capsys):
    unet = DFUModel(block_out_channels=(4, 8), layers_per_block=1, fourier_modes=(2, None), attention_levels=())
    pipe = DFUPipeline(unet, EDMHeunScheduler())
    pipe.save_pretrained(tmp_path)
    heldout_loss.main(["--model", str(tmp_path), "--sizes", "8", "12x10", "--count", "32"])
    assert "| 12x10 | 0." in capsys.readouterr().out
    loss, error = heldout_loss.heldout_loss(pipe, (8, 8), 256)
    assert abs(loss - 0.85) < 0.15 and 0 < error < 0.1  # portraits vary less than sigma_data, so a bit below one
    assert heldout_loss.heldout_loss(pipe, (8, 8), 256) == (loss, error)


def test_the_training_benchmark_runs_the_script_s_own_step(tmp_path, capsys):
    options = ["--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--batch_size", "2", "--steps", "4"]
    (row,) = bench_train.main(["--sizes", "8", *options, "--output", str(tmp_path / "train.csv")])
    assert 0.05 < row["script_over_bare"] < 1.5 and row["loader"] > 0
    assert "| 8 |" in capsys.readouterr().out and (tmp_path / "train.csv").read_text().count("\n") == 2
