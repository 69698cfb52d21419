"""The evaluation script, end to end with a tiny model and features from a fixed random projection."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
from accelerate import debug_launcher
from accelerate.state import AcceleratorState

from dfu_diffusers import DFUPipeline, DFURefiner, EDMHeunScheduler, hub
from dfu_diffusers.evaluation import extractors
from dfu_diffusers.evaluation.collections import Collection
from dfu_diffusers.evaluation.report import METRICS
from dfu_diffusers.evaluation.sources import (
    EvaluationError,
    ModelSource,
    Portraits,
    fourier_resize,
    lanczos_resize,
    to_bytes,
)
from examples import evaluate_dfu

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ["--sizes", "16", "24", "20x31"]
TINY = ["--num_images", "12", "--num_inference_steps", "2", "--batch_size", "5"]
QUICK = ["fd", "kid", "coherence", "patch", "precision", "agreement"]
CARD = f"---\nlicense: apache-2.0\n{yaml.safe_dump(hub.METADATA)}---\n\n# tiny\n\nText that stays.\n"


class Projection:
    """Random projections of images averaged down to 8x8 px."""

    name, dim = "projection", 10

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        weights = torch.randn(192, self.dim, generator=torch.Generator().manual_seed(0)) / 14
        return torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ weights


@pytest.fixture(autouse=True)
def projection(monkeypatch):
    monkeypatch.setattr(extractors, "load_extractor", lambda name, device: Projection(), raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DFUPipeline(make_model(), EDMHeunScheduler()).save_pretrained(folder)
    (folder / hub.CARD).write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def octaves(tmp_path_factory, make_model):
    """A pipeline with a refiner, which was trained to twice the grid of its `unet`."""
    folder = tmp_path_factory.mktemp("models") / "octaves"
    refiner = DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=16)
    DFUPipeline(make_model(sample_size=8), EDMHeunScheduler(), refiner=refiner).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory, model):
    """A run of one process that nothing disturbed: its folder."""
    output = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "load_extractor", lambda name, device: Projection(), raising=False)
        evaluate(model, output, "--metrics", *QUICK)
    return output


def evaluate(model, output, *options):
    """The script in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = ["--model", model, *SIZES, *TINY, "--output_dir", output, *options]
    return evaluate_dfu.main(list(map(str, argv)))


def refused(capsys, *arguments) -> str:
    """The one line with which the script ends."""
    with pytest.raises(SystemExit) as caught:
        evaluate(*arguments)
    text = capsys.readouterr().err.strip().splitlines()[-1] if caught.value.code == 2 else str(caught.value)
    assert text.startswith("evaluate_dfu.py: ") or ": error: " in text
    assert "\n" not in text
    return text


def figures(output) -> dict:
    rows = json.loads((output / "results.json").read_text())["rows"]
    return {(row["name"], row["size"]): row["figures"] for row in rows}


def assert_same(output, other, tolerance=0.0):
    ours, theirs = figures(output), figures(other)
    assert ours.keys() == theirs.keys()
    for row in ours:
        assert ours[row] == pytest.approx(theirs[row], rel=tolerance, abs=tolerance), row


@pytest.fixture
def photos(tmp_path):
    """25 pictures of mixed sizes, at least 32 px."""
    (tmp_path / "photos").mkdir()
    noise = np.random.default_rng(0)
    for i in range(25):
        pixels = noise.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32 + i, 33), Image.Resampling.BICUBIC).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


# --- What a run leaves ---


def test_a_run_leaves_table_curves_sheet_and_a_valid_card(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--sizes", "16", "20x31", "--update_model_card", "--strategy", "cascade"]
    evaluate(model, tmp_path, *options)
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["training_size"] == "16x16" and facts["processes"] == 1 and "--strategy cascade" in facts["command"]
    names = [(row["size"], row["name"]) for row in facts["rows"]]
    beyond = ["tiny", "tiny, lanczos", "tiny, fourier", "real"]
    assert names == [("16x16", "tiny"), ("16x16", "real")] + [("20x31", name) for name in beyond]
    every = {column for metric in METRICS.values() for column in metric.columns}
    for row in facts["rows"]:
        left_out = {"coherence": row["factor"] == 1, "agreement": row["factor"] == 1 or row["name"] == "real"}
        assert row["figures"].keys() == every - {name for name, out in left_out.items() if out}
        assert all(map(math.isfinite, row["figures"].values())) and row["count"] == 12

    table = (tmp_path / "results.md").read_text()
    assert table.count("\n| ") == 7 and "| 20x31 | 1.56x | tiny, lanczos |" in table
    assert Image.open(tmp_path / "curves.png").size[0] > 800
    assert Image.open(tmp_path / "samples.png").size[1] == 6 * 146

    text = (model / hub.CARD).read_text()
    hub.check_card(text)
    results = ModelCard(text).data.eval_results
    assert "Text that stays." in text and len({result.metric_name for result in results}) == len(results) == 22
    protocol = "(projection, 12 images, 2 steps, strategy cascade)"
    value = next(each.metric_value for each in results if each.metric_name == f"FD at 20x31 px {protocol}")
    assert value == figures(tmp_path)["tiny", "20x31"]["fd"]
    evaluate(model, tmp_path, *options, "--metrics", "fd")  # nothing is drawn, none lost
    assert len(ModelCard((model / hub.CARD).read_text()).data.eval_results) == 22


def test_several_models_are_compared(tmp_path, model, make_model):
    DFUPipeline(make_model(conv_type="spatial"), EDMHeunScheduler()).save_pretrained(tmp_path / "unet")
    options = ["--sizes", "24", "--metrics", "spectrum", "--output_dir", str(tmp_path / "out"), *TINY]
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate_dfu.main(["--model", str(model), str(tmp_path / "unet"), *options])
    found = figures(tmp_path / "out")
    assert len(found) == 7 and found["tiny", "24x24"] != found["unet", "24x24"]
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["extractor"]  # no metric needs one

    AcceleratorState._reset_state(reset_partial_state=True)
    other = tmp_path / "else" / "tiny"
    DFUPipeline(make_model(sample_size=20), EDMHeunScheduler()).save_pretrained(other)
    assert evaluate_dfu.labels([str(model), str(other)]) == [str(model).strip("/"), str(other).strip("/")]
    with pytest.raises(SystemExit, match="different sample sizes .*16x16.*20x20.*--train_size"):
        evaluate_dfu.main(["--model", str(model), str(other), *options])


# --- What does not matter ---


def test_two_processes_give_the_same_numbers(tmp_path, plain, model):
    argv = ["--model", model, *SIZES, *TINY, "--output_dir", tmp_path, "--metrics", *QUICK]
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(evaluate_dfu.main, (list(map(str, argv)),), num_processes=2)  # forks, so that it needs no imports
    assert json.loads((tmp_path / "results.json").read_text())["processes"] == 2
    assert_same(tmp_path, plain, 1e-3)  # equal seeds; another process may round the last bit otherwise


def test_the_batch_size_does_not_matter(tmp_path, plain, model):
    evaluate(model, tmp_path, "--metrics", *QUICK, "--batch_size", "12")
    assert_same(tmp_path, plain, 1e-3)  # rounding may turn a pixel by one of 255


def test_an_interrupted_run_goes_on(tmp_path, plain, model, monkeypatch):
    draw, drawn = Collection._draw, []

    def stumble(collection, batch):
        if len(drawn) == 4:
            (collection.folder / f"{batch[0]:010d}.partial").write_bytes(b"half a file")
            raise KeyboardInterrupt
        drawn.append((collection.size, *batch))
        draw(collection, batch)

    monkeypatch.setattr(Collection, "_draw", stumble)
    options = ["--metrics", *QUICK, "--cache_dir", plain / "references"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tmp_path, *options)
    done = [((16, 16), *batch) for batch in (range(5), range(5, 10), range(10, 12))] + [((24, 24), *range(5))]
    assert drawn == done
    assert not (tmp_path / "results.json").exists()

    before, drawn[:] = list(drawn), []
    monkeypatch.setattr(Collection, "_draw", lambda *args: drawn.append((args[0].size, *args[1])) or draw(*args))
    evaluate(model, tmp_path, *options)
    assert drawn[0] == (before[3][0], *range(5, 10)) and drawn.count(before[0]) == 0
    assert_same(tmp_path, plain)


def test_a_strategy_changes_what_lies_beyond_the_training_size(tmp_path, model):
    options = ["--metrics", "spectrum", "--sizes", "16", "24", "--num_images", "4"]
    evaluate(model, tmp_path / "direct", *options)
    evaluate(model, tmp_path / "cascade", *options, "--strategy", "cascade")
    direct, cascade = (figures(tmp_path / name) for name in ("direct", "cascade"))
    assert direct["tiny", "16x16"] == cascade["tiny", "16x16"] and direct["tiny", "24x24"] != cascade["tiny", "24x24"]
    assert "strategy cascade" in (tmp_path / "cascade" / "results.md").read_text()


def test_guidance_changes_what_is_drawn(tmp_path, make_model):
    DFUPipeline(make_model(num_class_embeds=3), EDMHeunScheduler()).save_pretrained(tmp_path / "tiny")
    options = ["--metrics", "spectrum", "--sizes", "16", "--num_images", "4", "--class_labels", "0"]
    for scale in ("1", "3"):
        evaluate(tmp_path / "tiny", tmp_path / scale, *options, "--guidance_scale", scale)
    plain, guided = (figures(tmp_path / scale)["tiny", "16x16"] for scale in ("1", "3"))
    assert plain != guided and "guidance_scale 3.0" in (tmp_path / "3" / "results.md").read_text()


def test_octaves_are_measured_from_the_refiner_s_size_on(tmp_path, octaves):
    options = ["--metrics", "agreement", "--sizes", "16", "24", "--num_images", "4", "--octave_steps", "2"]
    evaluate(octaves, tmp_path / "octaves", *options)
    evaluate(octaves, tmp_path / "direct", *options[:-2], "--strategy", "direct")
    facts = json.loads((tmp_path / "octaves" / "results.json").read_text())
    assert facts["training_size"] == "16x16" and "octave_steps 2" in (tmp_path / "octaves" / "results.md").read_text()
    drawn, direct = (figures(tmp_path / way)["octaves", "24x24"]["agreement"] for way in ("octaves", "direct"))
    assert drawn > direct + 3  # one seed is one picture
    assert {row["images"].get("octave_steps") for row in facts["rows"] if row["method"] == "model"} == {2}


# --- What is kept is what was asked for ---


@pytest.mark.parametrize(
    "options, field",
    [
        (["--num_inference_steps", "3"], "num_inference_steps 2 (asked for: 3)"),
        (["--seed", "1"], r"images [0, 11] (asked for: [1, 12])"),
        (["--strategy", "cascade"], "strategy 'default' (asked for: 'cascade')"),
        (["--train_size", "20"], "patch 8 (asked for: 10)"),
        (["--dtype", "bfloat16"], "asked for: '"),
    ],
)
def test_other_samples_and_references_are_refused(capsys, plain, model, options, field):
    text = refused(capsys, model, plain, "--metrics", *QUICK, *options)
    assert field in text and "another --output_dir or --cache_dir" in text


def test_references_are_cached(tmp_path, capsys, plain, model, photos, monkeypatch):
    monkeypatch.setattr(Portraits, "draw", None)  # which would fail
    evaluate(model, tmp_path / "again", "--metrics", *QUICK, "--cache_dir", plain / "references")
    assert_same(tmp_path / "again", plain)
    text = refused(capsys, model, tmp_path / "other", "--cache_dir", plain / "references", "--reference_dir", photos)
    assert "data 'portraits-20002' (asked for: '" in text and "filter 'rendered' (asked for: 'lanczos')" in text
    monkeypatch.setattr(Projection, "name", "another")
    text = refused(capsys, model, tmp_path / "other", "--cache_dir", plain / "references")
    assert "extractor 'projection' (asked for: 'another')" in text


def test_pictures_serve_as_references(tmp_path, model, photos):
    rows = evaluate(model, tmp_path / "out", "--reference_dir", photos, "--metrics", "fd")
    floor, references = (rows[-1].compared.samples, rows[-1].compared.references)
    assert floor.pixels([12]).shape == (1, 20, 31, 3)
    both = [each.tobytes() for c in (floor, references) for each in c.pixels(c.indices)]
    assert len(set(both)) == 24  # no picture is in both sets
    assert rows[-1].figures["fd"] < rows[-2].figures["fd"]


# --- Baselines ---


@pytest.mark.parametrize(
    "old, new", [((16, 16), (24, 24)), ((16, 15), (20, 31)), ((9, 12), (9, 40)), ((12, 12), (8, 13))]
)
def test_baselines_have_the_size_asked_for(old, new):
    images = torch.rand(2, 3, *old) * 2 - 1
    assert fourier_resize(images, new).shape == (2, 3, *new)
    assert torch.allclose(fourier_resize(images, old), images, atol=1e-4)
    for channels in (1, 3):
        pixels = to_bytes(images[:, :channels])
        assert lanczos_resize(pixels, new).shape == (2, *new, channels)
        assert np.array_equal(lanczos_resize(pixels, old), pixels)


def test_fourier_padding_is_exact_on_band_limited_images():
    def sample(height, width):
        y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
        waves = [(0, 0, 0.3), (3, -2, 1.0), (5, 4, 0.4), (-1, 5, 0.7)]
        return sum(torch.cos(2 * torch.pi * (k * y[:, None] + l * x) + phase) for k, l, phase in waves)[None, None]

    for size in ((24, 24), (13, 40), (12, 12), (11, 11)):
        assert torch.allclose(fourier_resize(sample(12, 11), size), sample(*size), atol=1e-12)


def test_fourier_padding_passes_through_alternating_pixels():
    alternating = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    fine = fourier_resize(alternating, (24, 24))  # three times as many: every third centre is an old one
    assert torch.allclose(fine[..., 1::3, 1::3], alternating, atol=1e-5)


# --- Bad input ---


def test_an_empty_folder_is_refused(tmp_path, capsys, model):
    (tmp_path / "empty").mkdir()
    text = refused(capsys, tmp_path / "empty", tmp_path / "out")
    assert "no file named config.json" in text and "name the folder of a saved pipeline" in text
    text = refused(capsys, model, tmp_path / "out", "--reference_dir", tmp_path / "empty")
    assert str(tmp_path / "empty") in text and "give a folder or zip with images in it" in text
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_images_are_refused(tmp_path, capsys, model, photos):
    text = refused(capsys, model, tmp_path / "out", "--num_images", "10")
    assert "10 images are too few for the covariance of the 10 features of projection: take more than 10" in text
    assert "leave fd out" in text
    assert "at least 4" in refused(capsys, model, tmp_path / "out", "--num_images", "3")
    text = refused(capsys, model, tmp_path / "out", "--num_images", "13", "--reference_dir", photos)
    assert "25 usable images" in text and "lower --num_images to 12" in text
    assert not (tmp_path / "out").exists()


def test_small_references_are_refused_or_left_out(tmp_path, capsys, model, photos):
    text = refused(capsys, model, tmp_path / "out", "--reference_dir", photos, "--sizes", "32x40")
    assert "enlarged to 32x40" in text and "small_images" in text
    options = ["--sizes", "32x40", "--metrics", "seam", "--num_images", "8", "--small_images", "skip"]
    evaluate(model, tmp_path / "out", "--reference_dir", photos, *options)
    assert figures(tmp_path / "out").keys() >= {("real", "32x40"), ("tiny, lanczos", "32x40")}


def test_other_bad_options_are_named(tmp_path, capsys, model, monkeypatch):
    assert "invalid choice: 'ssim'" in refused(capsys, model, tmp_path, "--metrics", "ssim")
    assert "not '0'" in refused(capsys, model, tmp_path, "--sizes", "0")
    assert "invalid choice: 'guided'" in refused(capsys, model, tmp_path, "--strategy", "guided")
    assert "strategy='octaves' needs a refiner" in refused(
        capsys, model, tmp_path, "--strategy", "octaves", "--metrics", "spectrum", "--num_images", "4", "--sizes", "16"
    )
    assert "7x16 is too small" in refused(capsys, model, tmp_path, "--sizes", "7x16")
    text = refused(capsys, model, tmp_path, "--reference_dir", "a", "--dataset_name", "b")
    assert "give one of them" in text
    assert "2 times" in refused(capsys, model, tmp_path, "--model", model, model)
    assert "a local folder with a card" in refused(capsys, "me/model", tmp_path, "--update_model_card")

    def fetch(name, device):
        raise OSError(f"The weights of {name} cannot be fetched:\nconnect to the Internet once.")

    monkeypatch.setattr(extractors, "load_extractor", fetch)
    text = refused(capsys, model, tmp_path, "--extractor", "inception")
    assert text == "evaluate_dfu.py: The weights of inception cannot be fetched: connect to the Internet once."


def test_images_of_another_guide_or_refiner_are_other_images(make_model):
    unet, guides = make_model(), [None, make_model(), make_model(block_out_channels=(8, 8, 8))]
    pipes = [DFUPipeline(unet, EDMHeunScheduler(), guide) for guide in guides]
    pipes += [DFUPipeline(unet, EDMHeunScheduler(), refiner=DFURefiner(hidden_channels=n)) for n in (4, 8)]
    assert len({ModelSource(pipe).key((9, 8))["weights"] for pipe in pipes}) == 5


def test_damaged_files_and_infinite_pixels_are_named(tmp_path, model, make_model):
    collection = Collection(tmp_path, Portraits(), (16, 16), range(4), None)
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(EvaluationError, match="key.json cannot be read .* remove"):
        collection.check()
    (tmp_path / "0000000000.npz").write_bytes(b"PK not quite")
    with pytest.raises(EvaluationError, match="0000000000.npz is damaged .* remove it"):
        collection.missing()
    np.savez(tmp_path / "0000000000.npz", indices=np.arange(4))
    whole, random = (tmp_path / "0000000000.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        (tmp_path / "0000000000.npz").write_bytes(flipped)
        with contextlib.suppress(EvaluationError):  # which it is, or else the bit meant nothing
            assert collection.missing() == []
    pipe = DFUPipeline(make_model(), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        next(pipe.unet.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="values that are not finite"):
        ModelSource(pipe, num_inference_steps=1).draw([0], (9, 8))


def test_classes_in_turn(make_model):
    """All of them, or those that are asked for; another choice is another collection."""
    seen = []
    unet = make_model(in_channels=3, num_class_embeds=3)
    unet.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    pipe = DFUPipeline(unet, EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    for classes, expected in ((None, [1, 2, 0]), ([2, 0], [2, 0, 2])):
        ModelSource(pipe, classes, num_inference_steps=1).draw([4, 5, 6], (8, 8))
        assert seen.pop() == expected
    every, all_named, some = (ModelSource(pipe, classes).key((8, 8)) for classes in (None, [0, 1, 2], [2, 0]))
    assert every == all_named != some


def test_classes_that_there_are_not_and_processes_that_nobody_knows(make_model, tmp_path, monkeypatch):
    """Both are refused before anything is drawn."""
    DFUPipeline(make_model(in_channels=3, num_class_embeds=3), EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--sizes", "16", "--metrics", "spectrum", "--num_images", "20"]
    options = [*map(str, options), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--class_labels 3: .*model has 3 classes, numbered from 0"):
        evaluate_dfu.main([*options, "--class_labels", "0", "3"])
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does, of which Accelerate takes no notice on CPUs
    monkeypatch.setattr(evaluate_dfu, "Accelerator", lambda **_: SimpleNamespace(num_processes=1, device="cpu"))
    with pytest.raises(SystemExit, match="2 processes were launched, but Accelerate knows of 1: .*ACCELERATE_USE_CPU"):
        evaluate_dfu.main(options)
    assert not (tmp_path / "out").exists()
