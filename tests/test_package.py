"""What the package as a whole promises: light imports, files that can travel alone, documents that are true."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dfu_diffusers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dfu_diffusers"


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere; a relative import counts as dfu_diffusers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("dfu_diffusers" if node.level else node.module.split(".")[0])
    return found


# What each wing may import of the package, besides itself; the main module may import what everybody needs.
ARROWS = {
    "checks": set(),
    "models": {"checks"},
    "schedulers": {"checks"},
    "pipelines": {"models", "schedulers", "checks", "decode"},
    "data": {"files", "decode"},
    "decode": set(),
    "files": set(),
    "command_line": {"schedulers", "data"},
    "training": {"models", "schedulers", "pipelines", "data", "files", "command_line", "__init__"},
    "evaluation": {"models", "schedulers", "pipelines", "data", "files", "command_line"},
    "hub": {"models", "schedulers", "pipelines", "data", "files", "__init__"},
    "__init__": {"models", "schedulers", "pipelines"},
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == len(inside):  # from the package's own top
            wings = [node.module.split(".")[0]] if node.module else ["__init__" for _ in node.names]
            assert set(wings) <= ARROWS[inside[0]] | {inside[0]}, ast.unparse(node)
    assert not imports(path) & {"examples", "tests", "benchmarks", "experiments"}


def test_metrics_know_no_network():
    modules = re.findall(r"^from (\.\S+) import", (PACKAGE / "evaluation" / "metrics.py").read_text(), re.M)
    assert modules == ["..models.modes", "..models.resampling"]


def test_the_public_names():
    pipelines = ["DFUInpaintPipeline", "DFUPipeline", "DFUSuperResolutionPipeline"]
    assert sorted(dfu_diffusers.__all__) == sorted([*pipelines, "DFUModel", "DFURefiner", "EDMHeunScheduler"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", dfu_diffusers.__version__)


AWAY = """
import sys
from pathlib import Path

import torch
import dfu_diffusers
from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler, hub
from dfu_diffusers.evaluation.extractors import load_extractor

assert Path(sys.argv[1]) in Path(dfu_diffusers.__file__).parents, dfu_diffusers.__file__
layers = dict(block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(2, None), attention_levels=())
refiner = DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=16)
pipe = DFUPipeline(DFUModel(sample_size=8, **layers), EDMHeunScheduler(), refiner=refiner)
(image,) = pipe(height=20, width=13, num_inference_steps=2, octave_steps=2).images
assert image.size == (13, 20)
assert load_extractor("portrait")(torch.zeros(1, 3, 32, 32)).shape == (1, 96)
pipe.save_pretrained("model", self_contained=True)
hub.check_card(hub.model_card(hub.TEMPLATE, "model", "me/model", license="apache-2.0"))
"""


@pytest.mark.slow
def test_an_installed_wheel_is_whole(tmp_path):
    """Built from a copy, as building leaves files; installed and run away from the repository."""
    source, site, away = tmp_path / "source", tmp_path / "site", tmp_path / "away"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / "dfu_diffusers", ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    away.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("dfu_diffusers-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)

    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words in (["-c", AWAY, str(site)], ["-m", "dfu_diffusers.hub", "--help"]):
        done = subprocess.run([sys.executable, *words], env=environment, cwd=away, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "Publish a saved pipeline." in done.stdout


def test_python_in_the_readme_runs(tmp_path, monkeypatch, few_steps):
    """The five-line use and what goes on from it, on the shipped checkpoint."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    few_steps()
    names = {}
    for block in blocks:
        exec(compile(block.replace("256", "48"), "README.md", "exec"), names)  # smaller, and therefore sooner
    assert (tmp_path / "portrait.png").stat().st_size > 1000
