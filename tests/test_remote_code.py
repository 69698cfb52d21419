"""Loading what others published: with this package or without it, and never their code or pickles unasked."""

import ast
import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file, save_file

import dfu_diffusers
from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.hub import check_push, push_folder
from dfu_diffusers.pipelines.remote_code import REMOTE_CODE_MODULES, bundle

pytest_plugins = "hub_stand_in"

CODE = {"pipeline_dfu.py", "unet/modeling_dfu.py", "scheduler/scheduling_edm_heun.py"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(height=13, width=18, num_inference_steps=2, output_type="np", generator=generator).images


@pytest.fixture(scope="session")
def pipe(make_pipe):
    return make_pipe()


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def assert_same_image(image, expected):
    """In [0, 1]; another process, with other threads, rounds differently."""
    np.testing.assert_allclose(image, expected, rtol=0, atol=1e-4)


def run(code: str, environment: dict) -> str:
    """stderr of a fresh process."""
    command = [sys.executable, "-c", "import sys\nimport numpy, torch\n" + inspect.getsource(draw) + code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Push, load in a fresh process, same image ---


def test_a_fresh_process_without_the_package_and_a_round_trip(hub, folder, pipe, tmp_path):
    push_folder(folder, check_push("me/alone"), self_contained=True)
    code = f"""
sys.modules["dfu_diffusers"] = None
from diffusers import AutoModel, DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("me/alone", trust_remote_code=True)
pipe.save_pretrained({str(tmp_path / "saved")!r})
images = [draw(pipe)]
for place in ("me/alone", {str(tmp_path / "saved")!r}):
    pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
    pipe.unet = AutoModel.from_pretrained(place, subfolder="unet", trust_remote_code=True)
    images.append(draw(pipe))
numpy.save({str(tmp_path / "images.npy")!r}, images)

del sys.modules["dfu_diffusers"]
import dfu_diffusers
wings = {{f"dfu_diffusers.{{wing}}" for wing in ("data", "training", "evaluation", "hub")}}
assert not sys.modules.keys() & {{"datasets", "matplotlib", *wings}}, "the import brings in no training code"
"""
    warnings = run(code, hub.environment(tmp_path / "home"))
    assert "not found in your environment" not in warnings and "not expected" not in warnings
    images = np.load(tmp_path / "images.npy")
    assert len(images) == 3
    for image in images:
        assert_same_image(image, draw(pipe))

    # What it saved is whole: the package loads it, too, and it can be pushed.
    saved = tmp_path / "saved"
    assert files_of(saved).keys() == files_of(folder).keys() | CODE
    assert np.array_equal(draw(DFUPipeline.from_pretrained(saved)), draw(pipe))
    push_folder(saved, "me/alone")
    pushed = hub.repos["me/alone"].files
    assert pushed.keys() >= CODE and not any(str(tmp_path).encode() in content for content in pushed.values())


def test_a_pipeline_of_diffusers_with_our_model(hub, make_model, tmp_path, monkeypatch):
    """Only the model's module travels; the pipeline's name stays the one that diffusers knows."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    stock = diffusers.DDPMPipeline(make_model(), diffusers.DDPMScheduler())
    stock.save_pretrained(tmp_path / "stock")
    push_folder(tmp_path / "stock", check_push("me/stock"), self_contained=True)
    files = hub.repos["me/stock"].files
    assert {name for name in files if name.endswith(".py")} == {"unet/modeling_dfu.py"}
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "DDPMPipeline" and index["unet"] == ["modeling_dfu", "DFUModel"]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained("me/stock")

    loaded = DiffusionPipeline.from_pretrained("me/stock", trust_remote_code=True)
    assert type(loaded) is diffusers.DDPMPipeline and type(loaded.unet).__module__.startswith("diffusers_modules.")
    images = []
    for pipe in (stock, loaded):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(generator=generator, num_inference_steps=2, output_type="np").images)
    assert np.array_equal(*images)


# --- What is saved ---


def test_saving_with_the_code(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "alone", self_contained=True)
    plain, alone = files_of(folder), files_of(tmp_path / "alone")
    assert alone.keys() == plain.keys() | CODE
    assert {name for name in plain if plain[name] != alone[name]} == {"model_index.json"}
    index = json.loads(alone["model_index.json"])
    assert index["_class_name"] == ["pipeline_dfu", "DFUPipeline"]
    assert index["unet"] == ["modeling_dfu", "DFUModel"]
    assert index["scheduler"] == ["scheduling_edm_heun", "EDMHeunScheduler"]
    assert index["auto_map"] == {"AutoModel": "modeling_dfu.DFUModel"}
    assert all(alone[name].decode() == code_of(Path(name).stem) for name in CODE)

    pipe.save_pretrained(tmp_path / "later")  # the option holds for one call
    assert files_of(tmp_path / "later") == plain


def test_parts_of_diffusers_need_no_code(pipe, tmp_path):
    stock = DFUPipeline(pipe.unet, diffusers.EDMEulerScheduler())
    stock.save_pretrained(tmp_path, self_contained=True)
    assert files_of(tmp_path).keys() & CODE == {"pipeline_dfu.py", "unet/modeling_dfu.py"}
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    assert type(DFUPipeline.from_pretrained(tmp_path).scheduler) is diffusers.EDMEulerScheduler


def code_of(stem: str) -> str:
    return bundle(getattr(dfu_diffusers, REMOTE_CODE_MODULES[stem]).__module__)


@pytest.mark.parametrize("stem", REMOTE_CODE_MODULES)
def test_diffusers_sees_no_dependency_in_files_that_travel(stem):
    """It reads imports from the text, docstrings included, and wants each of them installed or in the repository."""
    found = re.findall(r"^\s*(?:from|import)\s+(\.*\w*)", code_of(stem), flags=re.MULTILINE)
    needs = {"numpy", "PIL"} if stem in ("pipeline_dfu_inpaint", "pipeline_dfu_super_resolution") else set()
    assert set(found) <= {"torch", "diffusers"} | needs | sys.stdlib_module_names  # diffusers needs the others, too


@pytest.mark.parametrize("stem", REMOTE_CODE_MODULES)
def test_names_in_a_file_that_travels_mean_one_thing(stem):
    """Its modules share one namespace: no two of them may define a name, or import other things under it."""
    meanings = {}
    for node in ast.parse(code_of(stem)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names:
                meaning = (getattr(node, "module", None), name.name)
                assert meanings.setdefault(name.asname or name.name, meaning) == meaning
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert meanings.setdefault(node.name, node) is node, node.name
        elif isinstance(node, ast.Assign):
            for name in ast.walk(node.targets[0]):
                if isinstance(name, ast.Name):
                    assert meanings.setdefault(name.id, node) is node, name.id


# --- Nothing runs unasked ---

LOADERS = {
    "DFUPipeline": lambda place, **kwargs: DFUPipeline.from_pretrained(place, **kwargs),
    "DiffusionPipeline": lambda place, **kwargs: DiffusionPipeline.from_pretrained(place, **kwargs),
    "DFUModel": lambda place, **kwargs: DFUModel.from_pretrained(place, subfolder="unet", **kwargs),
    "AutoModel": lambda place, **kwargs: AutoModel.from_pretrained(place, subfolder="unet", **kwargs),
}
GUARDED = pytest.mark.skipif(
    diffusers.__version__ in ("0.40.0", "0.41.0", "0.42.0"),
    reason="until 0.42.1 diffusers imports whatever installed module a folder names",
)


class Trap:
    """Code, or a pickle, that would leave a mark."""

    def __init__(self, mark: Path):
        self.mark = mark
        self.code = f"open({str(mark)!r}, 'w')\n".encode()

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def trap(tmp_path):
    trap = Trap(tmp_path / "mark")
    yield trap
    assert not trap.mark.exists()


@pytest.fixture(params=["folder", "hub"])
def publish(request, hub, tmp_path, monkeypatch):
    """Function that puts a folder where it will be loaded from: leaves it, or lets the Hub hold all of its files."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def publish(folder: Path) -> str:
        if request.param == "folder":
            return str(folder)
        hub.add_repo("me/evil", **files_of(folder))
        return "me/evil"

    return publish


def change(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_trap_works(tmp_path):
    """Lest the tests below pass for the wrong reason."""
    trap = Trap(tmp_path / "mark")
    pickle.loads(pickle.dumps(trap)).close()
    assert trap.mark.exists()
    trap.mark.unlink()
    exec(trap.code)
    assert trap.mark.exists()


def test_a_trusted_module_does_run(pipe, tmp_path, publish):
    trap = Trap(tmp_path / "mark")
    pipe.save_pretrained(tmp_path / "alone", self_contained=True)
    with open(tmp_path / "alone/pipeline_dfu.py", "ab") as file:
        file.write(trap.code)
    DiffusionPipeline.from_pretrained(publish(tmp_path / "alone"), trust_remote_code=True)
    assert trap.mark.exists()


@pytest.mark.parametrize("loader", ["DiffusionPipeline", "AutoModel"])
def test_self_contained_repositories_ask_for_trust(pipe, tmp_path, publish, trap, loader):
    """And say how to give it. Our own classes need none, for they do not run that code."""
    pipe.save_pretrained(tmp_path / "alone", self_contained=True)
    for name in CODE:
        (tmp_path / "alone" / name).write_bytes(trap.code)
    place = publish(tmp_path / "alone")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        LOADERS[loader](place)
    loaded = DFUPipeline.from_pretrained(place)
    assert (type(loaded), type(loaded.unet)) == (DFUPipeline, DFUModel)
    assert type(DFUPipeline.from_pretrained(place, trust_remote_code=True)) is DFUPipeline
    assert type(DFUModel.from_pretrained(place, subfolder="unet")) is DFUModel


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.pkl"])
def test_pickled_weights(folder, publish, trap, name, loader, monkeypatch):
    (folder / WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps({"conv_in.weight": trap}))
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("a pickle was opened"))
    with pytest.raises((OSError, ValueError, RuntimeError)):
        LOADERS[loader](publish(folder))


def test_pickles_cannot_be_asked_for(folder):
    with pytest.raises(ValueError, match="safetensors only"):
        DFUModel.from_pretrained(folder, subfolder="unet", use_safetensors=False)
    with pytest.raises(ValueError, match="safetensors only"):
        DFUPipeline.from_pretrained(folder, use_safetensors=False)


def test_pickled_weights_of_diffusers_own_models(tmp_path, publish, trap, monkeypatch):
    """Which diffusers would open: the pipeline asks for safetensors of every component."""
    stock = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, attention_head_dim=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DFUPipeline(stock, EDMHeunScheduler()).save_pretrained(tmp_path / "stock")
    (tmp_path / "stock/unet/diffusion_pytorch_model.safetensors").unlink()
    stock.save_pretrained(tmp_path / "stock/unet", safe_serialization=False)
    opened = []
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: opened.append(arguments) or stock.state_dict())
    place = publish(tmp_path / "stock")
    DiffusionPipeline.from_pretrained(place)
    assert opened  # lest the test pass for the wrong reason
    opened.clear()
    with pytest.raises(OSError, match="safetensors"):
        DFUPipeline.from_pretrained(place)
    assert not opened
    stock.save_pretrained(tmp_path / "stock/unet")
    assert type(DFUPipeline.from_pretrained(tmp_path / "stock").unet) is diffusers.UNet2DModel and not opened


@pytest.mark.parametrize("loader", LOADERS)
def test_pickles_and_modules_that_nothing_names(folder, publish, trap, loader):
    names = ["pytorch_model.bin", "unet/diffusion_pytorch_model.bin", "unet/x.pkl", "scheduler/scheduler.pkl"]
    for name in names:
        (folder / name).write_bytes(pickle.dumps(trap))
    for name in ("pipeline.py", "__init__.py", "unet/__init__.py", "unet/modeling_dfu.py", "scheduler/x.py"):
        (folder / name).write_bytes(trap.code)
    LOADERS[loader](publish(folder))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_module_in_the_package_s_name(folder, publish, trap, loader):
    for name in ("dfu_diffusers.py", "unet/dfu_diffusers.py", "scheduler/dfu_diffusers.py"):
        (folder / name).write_bytes(trap.code)
    if "Model" in loader:
        LOADERS[loader](publish(folder))
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            LOADERS[loader](publish(folder))


@pytest.mark.parametrize("loader", ["DFUPipeline", "DiffusionPipeline"])
@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["evil", "DFUPipeline"]},
        {"unet": ["evil", "DFUModel"]},
        {"scheduler": ["evil", "EDMHeunScheduler"]},
        {"unet": ["modeling_dfu", "Evil"]},
        {"unet": ["../evil", "DFUModel"]},
        {"unet": ["{outside}", "DFUModel"]},
        {"_class_name": ["../evil", "DFUPipeline"]},
        {"_class_name": ["{outside}", "DFUPipeline"]},
    ],
    ids=str,
)
def test_modules_that_the_index_names(folder, publish, trap, changes, loader):
    outside = folder.parent / "evil.py"
    for path in (outside, folder / "evil.py", folder / "unet/evil.py", folder / "scheduler/evil.py"):
        path.write_bytes(trap.code)
    (folder / "unet/modeling_dfu.py").write_bytes(trap.code)
    changes = json.loads(json.dumps(changes).replace("{outside}", str(outside.with_suffix(""))))
    change(folder, "model_index.json", **changes)
    with pytest.raises((OSError, ValueError, TypeError, AttributeError)):
        LOADERS[loader](publish(folder))


@GUARDED
@pytest.mark.parametrize("loader", ["DFUPipeline", "DiffusionPipeline"])
def test_an_importable_module_that_the_index_names(folder, publish, trap, loader, monkeypatch):
    (folder.parent / "installed").mkdir()
    (folder.parent / "installed/evil_twin.py").write_bytes(trap.code)
    monkeypatch.syspath_prepend(folder.parent / "installed")
    change(folder, "model_index.json", unet=["evil_twin", "DFUModel"])
    with pytest.raises(ValueError, match="evil_twin"):
        LOADERS[loader](publish(folder))


@pytest.mark.parametrize("where", ["model_index.json", "unet/config.json"])
def test_an_auto_map(folder, publish, trap, where):
    (folder / "unet/evil.py").write_bytes(trap.code)
    change(folder, where, auto_map={"AutoModel": "evil.DFUModel"})
    place = publish(folder)
    assert type(DFUModel.from_pretrained(place, subfolder="unet")) is DFUModel
    if where == "model_index.json":
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModel.from_pretrained(place, subfolder="unet")
    else:  # diffusers asks the index first, where there is one
        assert type(AutoModel.from_pretrained(place, subfolder="unet")) is DFUModel


@pytest.mark.parametrize("name", ["../outside", "{absolute}"])
def test_components_outside_of_the_folder(pipe, folder, publish, trap, name):
    outside = folder.parent / "outside"
    shutil.copytree(folder / "unet", outside)
    (outside / "modeling_dfu.py").write_bytes(trap.code)
    change(folder, "model_index.json", **{name.format(absolute=outside): ["modeling_dfu", "DFUModel"]})
    try:
        loaded = DiffusionPipeline.from_pretrained(publish(folder))
    except (OSError, ValueError):
        return
    assert loaded.components.keys() == pipe.components.keys()


def test_paths_that_leave_the_cache(hub, folder, tmp_path):
    """No git repository holds them, but who answers need not be one."""
    evil = {
        f"unet/{6 * '../'}escaped.json": b"{}",
        "../../../escaped.json": b"{}",
        "unet/../../../../../x.json": b"{}",
    }
    hub.add_repo("me/evil", **files_of(folder), **evil)
    before = set(tmp_path.parent.glob("**/*.json"))
    try:
        DFUPipeline.from_pretrained("me/evil", cache_dir=tmp_path / "a/b/c/cache")
    except (OSError, ValueError):
        pass
    written = set(tmp_path.parent.glob("**/*.json")) - before
    assert all((tmp_path / "a/b/c/cache") in path.parents for path in written)


def test_shards_that_are_pickles_elsewhere(folder, publish, trap):
    (folder / WEIGHTS).unlink()
    (folder.parent / "evil.bin").write_bytes(pickle.dumps(trap))
    weight_map = {"conv_in.weight": "../../evil.bin"}
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map})
    )
    with pytest.raises((OSError, ValueError, RuntimeError)):
        DFUPipeline.from_pretrained(publish(folder))


@pytest.mark.parametrize("loader", LOADERS)
def test_weights_of_other_shapes(folder, publish, loader):
    weights = load_file(folder / WEIGHTS)
    name = next(iter(weights))
    save_file({**weights, name: weights[name][:1].repeat(3, *[1] * (weights[name].ndim - 1))}, folder / WEIGHTS)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        LOADERS[loader](publish(folder))


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, "half"])
def test_broken_weights(folder, publish, content):
    content = (folder / WEIGHTS).read_bytes()[:1000] if content == "half" else content
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises((OSError, ValueError, RuntimeError)):
        DFUPipeline.from_pretrained(publish(folder))
