"""Documents and the notebook are true: their Python runs, on tiny data, and their command lines exist."""

import argparse
import ast
import contextlib
import importlib
import inspect
import json
import pkgutil
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import dynamic_modules_utils
from PIL import Image

import dfu_diffusers
from dfu_diffusers import (
    DFUInpaintPipeline,
    DFUModel,
    DFUPipeline,
    DFURefiner,
    DFUSuperResolutionPipeline,
    EDMHeunScheduler,
)
from dfu_diffusers.training.options import Options

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

from examples import train_dfu  # noqa: E402

pytest_plugins = "hub_stand_in"

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = [
    ROOT / name
    for name in (
        "README.md",
        "examples/README.md",
        "examples/space/README.md",
        "checkpoints/dfu-portraits/README.md",
        "checkpoints/dfu-upscaler/README.md",
        "dfu_diffusers/assets/portrait-reader/README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "model_card.md",
    )
]
NOTEBOOK = ROOT / "examples" / "train_and_generate.ipynb"
NOT_RUN = 0  # blocks under <!-- not run: reason -->, on all pages together
OPTIONAL = {"peft", "torchmetrics"}  # a page ends at the first block that imports one that is not installed
TINY = [
    "--model_config", str(train_dfu.CONFIGS / "tiny.json"), "--batch_size", "4", "--max_train_steps", "2",
    "--report_to", "none", "--num_validation_images", "4", "--lr_warmup_images", "4",
]  # fmt: skip
# Figures of the pages that a reader's machine can afford, and a test cannot.
SMALLER = {
    "fine_tune.md": [("num_steps=200", "num_steps=2")],
    "performance.md": [
        ("[(32, 4), (64, 4), (128, 1)]", "[(8, 1)]"),
        ("[(32, 8), (64, 8)]", "[(8, 1)]"),
        ("step(full, 64, 32,", "step(full, 8, 1,"),
        ("turns=7", "turns=1"),
        ("turns=5", "turns=1"),
        ("size, dtype = 256,", "size, dtype = 8,"),
    ],
}


def blocks(page: Path) -> list[tuple[str, str, str | None]]:
    """(language, text, reason not to run it or None) of each fenced block."""
    found = re.findall(r"(?:<!-- not run: (.+?) -->\n+)?^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(language, text, reason or None) for reason, language, text in found]


def train(*options: str) -> None:
    """The training script in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dfu.main(list(options))


# --- What a reader has at hand ---


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures, in a folder for each of two classes."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((80, 70), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """What the training script leaves of a run on them."""
    folder = tmp_path_factory.mktemp("trained")
    train("--train_data_dir", str(photos), "--output_dir", str(folder), *TINY, "--resolutions", "8", "12")
    return folder


@pytest.fixture
def place(photos, trained, tmp_path, monkeypatch):
    """A working folder as the pages take it for granted."""
    for name in ("checkpoints", "examples", "benchmarks", "docs", "model_card.md", "setup.py", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("photos", "other_photos"):
        (tmp_path / name).symlink_to(photos)
    shutil.copytree(trained, tmp_path / "outputs" / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


# --- Pages ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page(page, place, hub, few_steps, monkeypatch):
    """All blocks in order, in one namespace, as a reader would run them."""
    monkeypatch.setattr(DFUModel, "compile_repeated_blocks", lambda model: None)  # a minute; its own tests run it
    if page.name != "concepts.md":  # which counts the steps
        few_steps()
    namespace, shrunk = {}, SMALLER.get(page.name, [])
    for language, text, reason in blocks(page):
        if language != "python" or reason:
            continue
        for name in OPTIONAL & imported(text):
            pytest.importorskip(name)
        for long, short in shrunk:
            text = text.replace(long, short)
        exec(compile(text, page.name, "exec"), namespace)
    assert all(long in page.read_text() for long, _ in shrunk)


def imported(text: str) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [[node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names] for node in nodes]
    return {name.split(".")[0] for group in names for name in group}


def test_languages_and_exceptions():
    all_blocks = [block for page in PAGES for block in blocks(page)]
    assert {language for language, _, _ in all_blocks} == {"python", "bash"}
    assert len([reason for _, _, reason in all_blocks if reason]) == NOT_RUN
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(all_blocks)  # none escaped the pattern


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text)
    assert [link for link, _ in links if link and not (page.parent / link).exists()] == []
    headings = {
        re.sub(r"[^\w\- ]", "", title).replace(" ", "-").lower() for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    assert [anchor for link, anchor in links if anchor and not link and anchor[1:] not in headings] == []
    folders = "examples|benchmarks|experiments|checkpoints|dfu_diffusers|tests"
    folders += "|docs" * (page in PAGES)  # the changelog names one that is gone
    paths = re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]+\.\w+", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert page in OTHERS or max(map(len, text.splitlines())) <= 130


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert names == set(re.findall(r"\]\((\w+\.md)\)", index))


def test_the_reference_names_what_there_is():
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference" / "index.md").read_text(), re.M)
    found = [pkgutil.resolve_name(name) for name in names]
    assert all(getattr(dfu_diffusers, name) in found for name in dfu_diffusers.__all__)


def test_the_card_at_the_top_is_that_of_the_shipped_model():
    card = (ROOT / "checkpoints/dfu-portraits/README.md").read_text()
    there = re.sub(r"\]\((?!https?:|#|\.\./)", "](checkpoints/dfu-portraits/", card).replace("](../../", "](")
    assert (ROOT / "model_card.md").read_text() == there


# --- Command lines ---


class Parsed(Exception):
    """A parser has accepted a command line: far enough."""


@pytest.fixture
def parse(monkeypatch):
    """Function that hands a script's main its options, and stops once they are accepted."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        parse_args(parser, *args, **kwargs)
        raise Parsed

    def parse(main, options: list[str]) -> None:
        with monkeypatch.context() as patch, contextlib.suppress(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            main(options)
            pytest.fail("it parsed no options")

    return parse


def commands(page: Path) -> list[list[str]]:
    lines = [
        line
        for language, text, _ in blocks(page)
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_command_lines(page, place, parse):
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\w+", words[0]):  # the environment
            words = words[1:]
        if words[:2] in (["hf", "auth"], ["git", "clone"]):
            continue
        if words[:2] == ["pip", "install"]:
            extras = set(re.findall(r'"(\w+)"\]? ?[:=]', (ROOT / "setup.py").read_text()))
            assert all(name in extras for word in words for name in re.findall(r"\[(\w+)\]", word)), words
        elif words[:3] == ["python", "-m", "dfu_diffusers.hub"]:
            parse(importlib.import_module("dfu_diffusers.hub.__main__").main, words[3:])
        else:
            check_script(words, parse)


def check_script(words: list[str], parse) -> None:
    """`accelerate launch`, `torchrun` or `python`, options of these, a script, and its options."""
    start = next(place for place, word in enumerate(words) if word.endswith(".py"))
    launcher, script, options = words[:start], words[start], words[start + 1 :]
    assert (ROOT / script).is_file(), words
    assert launcher[0] in ("accelerate", "torchrun", "python"), words
    assert all((ROOT / word).is_file() for word in launcher if word.endswith(".yaml")), words
    if script == "examples/train_dfu.py":
        check_training(options)
    elif script == "examples/space/app.py":  # gradio takes seconds to import
        source = (ROOT / script).read_text()
        assert all(f'"{word}"' in source for word in options if word.startswith("--")), words
    else:
        parse(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main, options)


def check_training(options: list[str]) -> None:
    """The script's own checks; and where there is something to train on, all that --dry_run looks at, with the tiny
    model at one size unless a file says otherwise."""
    args = train_dfu.parse_args(options, train_dfu.CONFIGS)
    there = all(
        value is None or Path(value).exists() for value in (args.train_data_dir, args.dataset_name, args.init_from)
    )
    if there:
        if not args.resume_from_checkpoint:  # the fixture's run lies where that of the reader will
            options = [*options, "--output_dir", "outputs/new"]
        quick = [] if {"--config", "--init_from"} & set(options) else [*TINY[:2], "--resolutions", "16"]
        train(*options, *quick, "--dry_run", "--report_to", "none", "--num_workers", "0")


# --- The notebook ---


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text())


def test_format_of_the_notebook(notebook):
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    assert notebook["cells"][0]["source"][0].startswith("# ") and "--train_data_dir" in text


def test_nbformat_accepts_the_notebook(notebook):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(notebook))


def test_the_notebook_asks_for_the_repository(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = next(cell for cell in notebook["cells"] if "SOURCE = " in "".join(cell["source"]))
    with pytest.raises(SystemExit, match="SOURCE is empty: put the address"):
        exec("".join(cell["source"]), {})


@pytest.mark.parametrize("own_photos", [False, True], ids=["portraits", "photos"])
def test_the_notebook_runs(notebook, place, photos, few_steps, monkeypatch, own_photos):
    """Cells in order, with tiny settings. Lines for the shell are left out, but for the training, which runs here."""
    few_steps()
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {"display": lambda image: image.load()}
    tiny = dict(
        STEPS=2, BATCH_SIZE=4, SIZES="8 12", MODEL=str(train_dfu.CONFIGS / "tiny.json"), SHOWN=[(8, 8), (9, 14)]
    )
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        python = re.sub(r"^[!%](?:.*\\\n)*.*$", "", source, flags=re.M)
        exec(compile(python, NOTEBOOK.name, "exec"), namespace)
        if "STEPS = " in source:
            assert tiny.keys() <= namespace.keys()
            namespace.update(tiny | ({"PHOTOS": str(photos)} if own_photos else {}))
        for command in re.findall(r"^!accelerate launch examples/train_dfu.py ((?:.*\\\n)*.*)$", source, re.M):
            options = re.sub(r"\{(\w+)\}", lambda name: str(namespace[name[1]]), command.replace("\\\n", " "))
            train(*shlex.split(options), "--num_validation_images", "4", "--report_to", "none")
    sheet = namespace["sheet"]
    assert sheet.size[0] > 16 and np.asarray(sheet).std() > 1
    assert Path("outputs/notebook.zip").stat().st_size > 1000


# --- Options ---


def test_every_option_has_its_line_where_it_pays():
    """docs/options.md, which says so, against the signatures."""
    calls = (DFUPipeline, DFUSuperResolutionPipeline, DFUInpaintPipeline)
    functions = [cls.__call__ for cls in calls] + [cls.__init__ for cls in (DFUModel, DFURefiner, EDMHeunScheduler)]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    names |= {f"--{name}" for name in vars(Options())}
    told = set(re.findall(r"`([\w-]+)", (ROOT / "docs" / "options.md").read_text()))
    assert names - {"self", "retired"} <= told
    assert {name for name in told if name.startswith("--")} <= names
