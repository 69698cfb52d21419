"""What the package as a whole promises: light imports, files that can travel alone, documents that are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dfu_diffusers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dfu_diffusers"
DOCUMENTS = [
    "README.md",
    "examples/README.md",
    "examples/space/README.md",
    "checkpoints/dfu-portraits/README.md",
    "checkpoints/portrait-reader/README.md",
    "CHANGELOG.md",
]


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere; a relative import counts as dfu_diffusers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("dfu_diffusers" if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", ["modeling_dfu.py", "scheduling_edm_heun.py", "pipeline_dfu.py"])
def test_files_that_travel_to_the_hub_stand_alone(name):
    assert imports(PACKAGE / name) <= {"torch", "diffusers"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", ["pipeline_dfu_super_resolution.py", "pipeline_dfu_inpaint.py"])
def test_files_that_travel_together_need_each_other_only(name):
    needs = {"torch", "diffusers", "numpy", "PIL", "dfu_diffusers"}  # numpy and PIL are diffusers' own requirements
    assert imports(PACKAGE / name) <= needs | sys.stdlib_module_names
    neighbours = re.findall(r"^from \.(\w*) import", (PACKAGE / name).read_text(), re.MULTILINE)
    assert neighbours and set(neighbours) <= {"pipeline_dfu", "pipeline_dfu_super_resolution"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_the_package_never_imports_its_examples_or_tests(path):
    assert not imports(path) & {"examples", "tests", "benchmarks"}
    needs = {"training.py": {"accelerate"}, "reports.py": {"matplotlib"}}.get(path.name, set())
    assert imports(path) & {"accelerate", "matplotlib"} == needs


def test_importing_the_package_brings_in_no_training_code():
    code = """
import sys, dfu_diffusers
heavy = {"datasets", "pandas", "matplotlib", *("dfu_diffusers." + name for name in ("data", "portraits", "training"))}
sys.exit(", ".join(heavy & set(sys.modules)) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_the_public_names():
    expected = ["DFUInpaintPipeline", "DFUModel", "DFUPipeline", "DFUSuperResolutionPipeline", "EDMHeunScheduler"]
    assert sorted(dfu_diffusers.__all__) == expected
    assert re.fullmatch(r"\d+\.\d+\.\d+", dfu_diffusers.__version__)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_in_documents_exist(document):
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all((folder / link).exists() for link in links), links
    paths = re.findall(r"\b(?:examples|benchmarks|checkpoints|dfu_diffusers|tests)/[\w./-]+\.\w+", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_python_in_the_readme_runs(tmp_path, monkeypatch):
    """The five-line use and what goes on from it, on the shipped checkpoint."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "portrait.png").stat().st_size > 1000
