# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""experiments/calibrate_extractor.py: its distance and its damages."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_diffusers.evaluation.metrics import FeatureStatistics, frechet_distance
from experiments import calibrate_extractor


def test_frechet_is_that_of_the_metrics():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 7, generator=generator) * scale + scale for scale in (1, 2))
    a, b = FeatureStatistics(), FeatureStatistics()
    a.update(x), b.update(y)
    assert calibrate_extractor.frechet(x, y) == pytest.approx(frechet_distance(a, b), rel=1e-9)  # both in float64
    few = torch.randn(3, 7, generator=generator)  # singular: the distance is the shift alone
    assert calibrate_extractor.frechet(few, few + 1) == pytest.approx(7, rel=1e-5)  # few + 1 is rounded to float32


def test_quadrants_are_moved_whole():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)
    shuffled = calibrate_extractor.shuffle_quadrants(pictures, np.random.default_rng(1))
    quarters = [{half.tobytes() for row in np.split(p, 2) for half in np.split(row, 2, axis=1)} for p in pictures]
    moved = [{half.tobytes() for row in np.split(p, 2) for half in np.split(row, 2, axis=1)} for p in shuffled]
    assert quarters == moved and (pictures != shuffled).any()


def test_the_table(tmp_path, capsys):
    """A small run on grey pictures, with the extractor that needs no package."""
    for i in range(8):
        split = ("train", "validation")[i % 2]
        for path, size in (f"emoji/{split}/faces/{i}.png", (256, 256)), (f"landscapes/{split}/{i}.jpg", (720, 360)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (20 * i, 90, 90)).save(tmp_path / path)
    calibrate_extractor.main(["--data_dir", str(tmp_path), "--count", "4", "--extractor", "portrait"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [3] * 10
    distances = {name.strip(): float(distance) for name, distance, _ in rows[1:]}
    for name in ("through 128 px", "through 32 px", "quadrants shuffled"):  # of flat pictures all are the same picture
        assert distances[name] == pytest.approx(distances["other emoji"], abs=0.1)
    assert abs(distances["noise of 10 levels"] - distances["other emoji"]) > 1
