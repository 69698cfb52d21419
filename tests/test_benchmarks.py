"""The benchmark compares what it claims to compare, and runs on the tiny preset."""

import csv

import torch

from benchmarks import bench_dual_conv
from dfu_diffusers.modeling_dfu import SpectralConv2d


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
