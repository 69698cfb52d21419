"""What `import dfu_diffusers` teaches diffusers: to save our classes by the package's name, and to find them again."""

import ast
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, UNet2DModel
from diffusers.pipelines import pipeline_loading_utils
from forks import forked

import dfu_diffusers
from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler

pytestmark = pytest.mark.usefixtures("one_thread")

pytest_plugins = "hub_stand_in"

PACKAGE = Path(dfu_diffusers.__file__).parent
LOADERS = pytest.mark.parametrize("loader", [DFUPipeline, DiffusionPipeline])


@pytest.fixture
def pipe(make_model, make_refiner):
    return DFUPipeline(make_model(), EDMHeunScheduler(sigma_max=70.0), refiner=make_refiner())


@pytest.fixture(params=["folder", "hub"])
def place(request, hub, pipe, tmp_path) -> str:
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if request.param == "folder":
        return str(folder)
    hub.add_repo("me/tiny", **files)
    return "me/tiny"


def test_saved_files_name_the_public_package(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index, *configs = (
        json.loads((tmp_path / name).read_text())
        for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    )
    assert index["_class_name"] == "DFUPipeline"
    assert index["unet"] == ["dfu_diffusers", "DFUModel"]
    assert index["scheduler"] == ["dfu_diffusers", "EDMHeunScheduler"]
    assert index["refiner"] == ["dfu_diffusers", "DFURefiner"]
    assert [config["_class_name"] for config in configs] == ["DFUModel", "EDMHeunScheduler"]


@LOADERS
def test_pipelines_load(place, pipe, loader):
    loaded = loader.from_pretrained(place)
    classes = [type(each) for each in (loaded, loaded.unet, loaded.scheduler, loaded.refiner)]
    assert classes == [DFUPipeline, DFUModel, EDMHeunScheduler, DFURefiner]
    assert loaded.scheduler.config.sigma_max == 70.0
    for name in ("unet", "refiner"):
        own, its = (getattr(each, name).parameters() for each in (pipe, loaded))
        assert all(torch.equal(a, b) for a, b in zip(own, its, strict=True))


@pytest.mark.parametrize("loader", [DFUModel, AutoModel])
def test_models_load(place, pipe, loader):
    loaded = loader.from_pretrained(place, subfolder="unet")
    assert type(loaded) is DFUModel
    assert all(torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), loaded.parameters()))


@LOADERS
def test_components_are_swapped_while_loading(place, loader, make_model):
    unet, scheduler = make_model(), EDMEulerScheduler()
    loaded = loader.from_pretrained(place, scheduler=scheduler)
    assert loaded.scheduler is scheduler and type(loaded.unet) is DFUModel
    loaded = loader.from_pretrained(place, unet=unet)
    assert loaded.unet is unet and type(loaded.scheduler) is EDMHeunScheduler
    stock = UNet2DModel(sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",),
                        up_block_types=("UpBlock2D",), norm_num_groups=4)  # fmt: skip
    assert loader.from_pretrained(place, unet=stock, scheduler=scheduler).unet is stock


@LOADERS
def test_wrong_components_are_refused(place, loader):
    with pytest.raises(ValueError, match="should be"):
        loader.from_pretrained(place, unet=EDMEulerScheduler())


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_schedulers_are_compatible(place, scheduler_class):
    scheduler = EDMHeunScheduler.from_pretrained(place, subfolder="scheduler")
    assert {scheduler_class, EDMHeunScheduler} <= set(scheduler.compatibles)
    assert scheduler_class.from_config(scheduler.config).config.sigma_max == 70.0
    assert scheduler_class.from_pretrained(place, subfolder="scheduler").config.sigma_max == 70.0
    assert EDMHeunScheduler.from_config(scheduler_class(sigma_max=60.0).config).config.sigma_max == 60.0


def test_checkpoints_survive_that_every_module_is_renamed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.save_pretrained(tmp_path / "alone", self_contained=True)
    package = tmp_path / "later/dfu_diffusers"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for wing in ("models", "pipelines", "schedulers"):
        (package / wing).rename(package / f"new_{wing}")
    for path in package.rglob("*.py"):
        path.write_text(
            re.sub(r"(?<=^from )(\.+)(?=models|pipelines|schedulers)", r"\1new_", path.read_text(), flags=re.M)
        )

    def load():
        for name in [name for name in sys.modules if name.split(".")[0] == "dfu_diffusers"]:
            del sys.modules[name]
        sys.path.insert(0, str(package.parent))
        later = importlib.import_module("dfu_diffusers")
        assert later.DFUModel.__module__ == "dfu_diffusers.new_models.dfu"
        for loader, place in ((DiffusionPipeline, "pipe"), (later.DFUPipeline, "alone")):
            loaded = loader.from_pretrained(tmp_path / place)
            classes = [type(each) for each in (loaded, loaded.unet, loaded.scheduler)]
            assert classes == [later.DFUPipeline, later.DFUModel, later.EDMHeunScheduler]

    with forked(load) as process:
        process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("gone", ["LOADABLE_CLASSES", "_dict_from_json_file"])
def test_a_diffusers_without_the_places_is_named(monkeypatch, gone):
    monkeypatch.setattr(diffusers, "__version__", "9.9")
    if gone == "LOADABLE_CLASSES":
        monkeypatch.delattr(pipeline_loading_utils, gone)
    else:
        monkeypatch.setattr(dfu_diffusers, "DFUPipeline", object)
    with pytest.raises(ImportError, match="diffusers 9.9 has moved .*see setup.py"):
        dfu_diffusers._register_with_diffusers()


def test_one_place_reaches_into_the_loading_of_diffusers():
    """No other file imports from its loading code, sets its attributes, or knows its table of classes."""
    for path in PACKAGE.rglob("*.py"):
        reaches = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and "pipeline_loading_utils" in (node.module or ""):
                reaches.add(node.module)
            elif isinstance(node, ast.Name) and node.id == "setattr":
                reaches.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr in ("_dict_from_json_file", "LOADABLE_CLASSES"):
                reaches.add(node.attr)
        assert bool(reaches) == (path == PACKAGE / "__init__.py"), f"{path.name}: {reaches}"
