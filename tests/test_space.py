"""examples/space: the functions behind the page, the page over HTTP, and (slow) in a real browser."""

import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import torch
import yaml
from conftest import redraw
from diffusers import EDMDPMSolverMultistepScheduler
from PIL import Image

from dfu_diffusers import DFUPipeline, DFURefiner, DFUSuperResolutionPipeline, EDMHeunScheduler

gr = pytest.importorskip("gradio")
from examples.space import app  # noqa: E402

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
LAYOUT = {"strategy": "direct", "tileable": "none"}
GENERATE = {"height": 7, "width": 5, "count": 2, **LAYOUT}
COMPARE = {"sizes": "5, 8x6", **LAYOUT}
ENLARGE = {"picture": None, "scale": 2.7, "strength": 1, "noise_level": 0, "consistency": True}
INPUTS = {"generate": GENERATE, "compare": COMPARE, "enlarge": ENLARGE}
SETTINGS = {"seed": 3, "steps": 2, "sampler": "EDM Heun", "churn": 0, "label": None}


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """Factory of folders with a tiny saved pipeline."""

    def save(**overrides):
        folder = tmp_path_factory.mktemp("model")
        DFUPipeline(make_model(sample_size=12, **overrides), EDMHeunScheduler()).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def folder(saved):
    return saved()


@pytest.fixture(scope="module")
def studio(folder):
    return app.Studio(folder, app.Limits(max_side=64, max_pixels=1000, max_images=4, max_steps=9))


def draw(function, request=None, progress=lambda done, desc: None, **inputs):
    """(caption, file name, pixels) of each picture."""
    given = {**INPUTS[function.__name__], **SETTINGS, **inputs}
    (gallery,) = ([(caption, Path(path).name, np.asarray(Image.open(path))) for path, caption in pictures]
                  for pictures in function(**given, request=request, progress=progress))  # fmt: skip
    return gallery


# --- Pictures ---


def test_generate_draws_each_seed_at_exactly_the_size_asked_for(studio):
    pictures = draw(studio.generate)
    assert [(caption, name) for caption, name, _ in pictures] == [
        ("7x5, seed 3", "seed3_7x5.png"),
        ("7x5, seed 4", "seed4_7x5.png"),
    ]
    assert [image.shape for _, _, image in pictures] == [(7, 5, 3)] * 2
    assert abs(pictures[0][2].astype(int) - pictures[1][2]).max() > 20


def test_a_picture_is_the_pipelines_from_nested_noise(studio, folder):
    pipe = DFUPipeline.from_pretrained(folder)
    expected = pipe(height=7, width=5, num_inference_steps=2, generator=[torch.Generator().manual_seed(4)]).images[0]
    for picture in (draw(studio.generate, seed=4, count=1)[0], draw(studio.compare, seed=4, sizes="7x5")[0]):
        np.testing.assert_array_equal(picture[2], np.asarray(expected))
    assert abs(draw(studio.generate)[1][2].astype(int) - np.asarray(expected)).max() <= 1, "whatever its neighbours"


def test_compare_draws_one_seed_at_each_size_once(studio):
    pictures = draw(studio.compare, sizes=" 5,8 x 6 5\n1X1 ,")
    assert [name for _, name, _ in pictures] == ["seed3_5x5.png", "seed3_8x6.png", "seed3_1x1.png"]
    assert [image.shape[:2] for _, _, image in pictures] == [(5, 5), (8, 6), (1, 1)]


def test_samplers_and_churn(studio):
    assert list(app.SAMPLERS.values())[2] is EDMDPMSolverMultistepScheduler
    images = [draw(studio.generate, sampler=name, steps=6, count=1)[0][2].astype(int) for name in app.SAMPLERS]
    churned = [draw(studio.generate, churn=2.5, steps=6, count=1)[0][2] for _ in range(2)]
    np.testing.assert_array_equal(*churned)
    images.append(churned[0].astype(int))
    assert not any(np.array_equal(a, b) for a, b in zip(images, images[1:] + images[:1]))


def test_classes_and_grey_pictures(saved):
    studio = app.Studio(saved(num_class_embeds=3, in_channels=1, out_channels=1))
    first, second = (draw(studio.generate, steps=6, label=label)[0][2] for label in (0, 2))
    assert first.shape == (7, 5) and not np.array_equal(first, second)
    with pytest.raises(gr.Error, match="The class cannot be 3: choose a whole number from 0 to 2"):
        draw(studio.generate, label=3)
    with pytest.raises(gr.Error, match="The class is missing"):
        draw(studio.generate)


def test_models_that_make_no_pictures_are_refused(saved):
    with pytest.raises(ValueError, match="pictures of 1 or 3 channels, but .* has 4"):
        app.Studio(saved(in_channels=4, out_channels=4))


# --- Beyond the model's own size, 12 pixels ---


@pytest.mark.parametrize("sampler", app.SAMPLERS)
def test_a_strategy_is_the_pipelines(studio, folder, sampler, strategy="cascade"):
    if sampler == "EDM Heun":
        pipe = DFUPipeline.from_pretrained(folder)
        generator = [torch.Generator().manual_seed(3)]
        expected = pipe(1, 20, 31, 4, strategy=strategy, generator=generator).images[0]
        asked = {"sizes": "20x31", "strategy": strategy, "steps": 4}
        np.testing.assert_array_equal(draw(studio.compare, **asked)[0][2], np.asarray(expected))
    inputs = {"height": 20, "width": 31, "count": 1, "steps": 4, "sampler": sampler}
    (direct,), (picture,) = (draw(studio.generate, **inputs, strategy=each) for each in ("direct", strategy))
    assert picture[2].shape == (20, 31, 3) and not np.array_equal(picture[2], direct[2])


def test_progress_tells_the_size_that_a_cascade_has_reached(studio):
    seen = []
    draw(studio.compare, sizes="6, 20", strategy="cascade", progress=lambda done, desc: seen.append((done, desc)))
    shares, texts = zip(*seen)
    assert list(shares) == sorted(set(shares)) and shares[-1] == 1
    assert list(dict.fromkeys(texts)) == ["Drawing 6x6", "Drawing 20x20, now at 12x12", "Drawing 20x20"]
    assert texts.count("Drawing 6x6") == texts.count("Drawing 20x20, now at 12x12") == 3  # 2 steps of Heun
    assert shares[2] == 0.5


# --- With a refiner ---


@pytest.fixture(scope="module")
def octaves(make_model, tmp_path_factory):
    """A folder of a pipeline whose own size, that of its refiner, is 24 pixels, and the pipeline."""
    refiner = redraw(DFURefiner(hidden_channels=8, num_layers=1, sample_size=24, coarse_size=8)).eval()
    pipe = DFUPipeline(make_model(sample_size=8), EDMHeunScheduler(), refiner=refiner)
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("octaves"))
    return folder, pipe


def test_with_a_refiner_the_page_draws_octaves(octaves):
    folder, pipe = octaves
    studio, seen = app.Studio(folder), []
    assert studio.own_size == (24, 24)
    pictures = draw(studio.compare, sizes="20x31", strategy="octaves", progress=lambda done, desc: seen.append(desc))
    expected = pipe(1, 20, 31, 2, generator=[torch.Generator().manual_seed(3)]).images[0]
    np.testing.assert_array_equal(pictures[0][2], np.asarray(expected))
    assert list(dict.fromkeys(seen)) == [
        "Drawing 20x31, now at 8x8", "Drawing 20x31, now at 16x16", "Drawing 20x31"
    ]  # fmt: skip
    with pytest.raises(gr.Error, match="There is no strategy cascade: choose one of octaves."):
        draw(studio.compare, strategy="cascade")
    components = [block["props"] for block in app.build(studio).config["components"]]
    visible = {props["label"]: props.get("visible", True) for props in components if props.get("label")}
    assert visible["Noise"] and not visible["Strength"] and not visible["Strategy"]


def test_with_a_refiner_the_page_adds_detail_to_an_upload(octaves, upload):
    folder, pipe = octaves
    image = Image.fromarray(noise(9, 10))
    pipe = DFUSuperResolutionPipeline.from_pipe(pipe)
    options = {"noise_level": 0.1, "consistency": False}
    expected = pipe(image, scale=1.5, generator=[torch.Generator().manual_seed(3)], **options).images[0]
    ((_, _, picture),) = draw(app.Studio(folder).enlarge, picture=upload(image), scale=1.5, **options)
    np.testing.assert_array_equal(picture, np.asarray(expected))
    with pytest.raises(gr.Error, match="The noise cannot be 3: choose a number from 0 to 0.5"):
        draw(app.Studio(folder).enlarge, picture=upload(image), noise_level=3)


# --- Tiles ---


@pytest.mark.parametrize("tileable", ["x", "y", "xy"])
def test_tileable_pictures(studio, folder, tileable):
    pipe, generator = DFUPipeline.from_pretrained(folder), [torch.Generator().manual_seed(3)]
    expected = pipe(1, 8, 6, 2, tileable=tileable, generator=generator).images[0]
    before = draw(studio.compare, sizes="8x6")[0][2]
    picture = draw(studio.compare, sizes="8x6", tileable=tileable)[0][2]
    np.testing.assert_array_equal(picture, np.asarray(expected))
    assert not np.array_equal(picture, before)
    np.testing.assert_array_equal(draw(studio.compare, sizes="8x6")[0][2], before)  # the network is as it was


def test_what_a_model_cannot_do_is_refused(saved):
    studio = app.Studio(saved(spectral_boundary="mirror"))
    with pytest.raises(gr.Error, match="tileable='x'. joins edges that this model's spectral_boundary"):
        draw(studio.generate, tileable="x")
    assert not studio.running and not studio.network.locked()


def test_a_run_waits_for_the_last_step_of_a_stopped_one(studio):
    """Otherwise both would switch the edges of the network that they share."""
    go, inside = threading.Event(), threading.Event()

    def progress(done, desc):
        inside.set()
        go.wait(20)

    ours, pictures = SimpleNamespace(session_hash="ours"), []
    stopped = threading.Thread(
        target=lambda: pytest.raises(
            gr.Error, draw, studio.compare, request=ours, tileable="xy", progress=progress, steps=9
        )
    )
    following = threading.Thread(target=lambda: pictures.extend(draw(studio.compare)))
    stopped.start()
    assert inside.wait(20)
    studio.stop(ours)
    following.start()
    following.join(0.3)
    assert following.is_alive() and not pictures
    go.set()
    following.join(20)
    stopped.join(20)
    for picture, expected in zip(pictures, draw(studio.compare), strict=True):
        np.testing.assert_array_equal(picture[2], expected[2])


# --- Enlarging ---


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Factory of uploads: a picture or bytes, as gradio hands them over."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))

    def save(content, name="picture.png", **options):
        content.save(tmp_path / name, **options) if isinstance(content, Image.Image) else (
            tmp_path / name).write_bytes(content)  # fmt: skip
        return {"path": str(tmp_path / name), "orig_name": name}

    return save


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(64, 192, (height, width, channels), np.uint8)


@pytest.mark.parametrize("consistency", [True, False])
def test_enlarging_is_the_pipelines(studio, folder, upload, consistency):
    image = Image.fromarray(noise(7, 5))
    pipe = DFUSuperResolutionPipeline.from_pretrained(folder)
    generator = [torch.Generator().manual_seed(3)]
    options = {"strength": 0.4, "consistency": consistency}
    expected = pipe(image, scale=2.7, num_inference_steps=5, generator=generator, **options).images[0]
    ((caption, name, picture),) = draw(studio.enlarge, picture=upload(image), steps=5, **options)
    assert (caption, name, picture.shape) == ("19x14, seed 3", "seed3_19x14.png", (19, 14, 3))
    np.testing.assert_array_equal(picture, np.asarray(expected))


def test_uploads_of_any_kind_become_the_models(saved, studio, upload):
    grey = app.Studio(saved(in_channels=1, out_channels=1))
    colours, marks = Image.fromarray(noise(4, 6)), Image.Exif()
    marks[274] = 6  # the camera was held on its side
    for image, name, options in [
        (colours, "a.jpg", {}),
        (colours.convert("RGBA"), "a.webp", {}),
        (colours.convert("P"), "a.gif", {}),
        (colours.convert("1"), "a.bmp", {}),
        (Image.new("I;16", (6, 4), 30000), "a.png", {}),
        (colours.rotate(90, expand=True), "turned.jpg", {"exif": marks.tobytes()}),
        (colours, "no picture by its name.txt", {"format": "PNG"}),
    ]:
        picture = upload(image, name, **options)
        assert draw(studio.enlarge, picture=picture, scale=2)[0][2].shape == (8, 12, 3), name
        assert draw(grey.enlarge, picture=picture, scale=2)[0][2].shape == (8, 12), name


def test_an_upload_means_what_it_means_in_training(upload):
    for image, colour in [
        (Image.new("I;16", (2, 2), 257 * 100), (100, 100, 100)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (255, 255, 255)),
    ]:
        assert app.read_upload(upload(image), 64, "RGB").getpixel((0, 0)) == colour


def test_uploads_that_cannot_be_enlarged(studio, upload, tmp_path, monkeypatch):
    whole = Path(upload(Image.fromarray(noise(32, 32)))["path"]).read_bytes()
    fine = upload(Image.fromarray(noise(10, 20)))
    outside = tmp_path.parent / "elsewhere.png"
    shutil.copy(fine["path"], outside)
    unreadable = "This file cannot be read: upload a picture of type PNG, JPEG, WEBP, GIF, BMP."
    for inputs, message in [
        ({"picture": None}, "The picture is missing: upload one."),
        ({"picture": {"path": None}}, "The picture is missing"),
        ({"picture": {"path": str(outside)}}, "This picture was not uploaded"),
        ({"picture": {"path": f"{tmp_path}/../elsewhere.png"}}, "This picture was not uploaded"),
        ({"picture": {"path": str(tmp_path)}}, unreadable),
        ({"picture": {"path": str(tmp_path / "gone.png")}}, unreadable),
        ({"picture": upload(b"", "empty.png")}, unreadable),
        ({"picture": upload(b"<svg/>", "drawing.svg")}, unreadable),
        ({"picture": upload(whole[: len(whole) // 2], "cut.png")}, unreadable),
        ({"picture": upload(Image.new("RGB", (4, 4)), "program.eps")}, unreadable),
        (
            {"picture": upload(Image.new("RGB", (20, 65)), "long.png")},
            "The picture has 65x20 pixels, but a side has at most 64: upload",
        ),
        ({"scale": 3.3}, "The picture would become 33x66, but a side has at most 64 pixels: choose a smaller factor"),
        ({"scale": 2.5}, "1,250 pixels are more than the 1,000 of one request"),
        ({"scale": 0.5}, "The factor cannot be 0.5: choose a number from 1 to 64."),
        ({"scale": None}, "The factor is missing"),
        ({"scale": math.inf}, "The factor cannot be inf"),
        ({"strength": 0}, "The strength cannot be 0: choose a number from 0.05 to 1."),
        ({"strength": math.nan}, "The strength cannot be nan"),
        ({"sampler": ["DDPM"]}, "There is no sampler ['DDPM']"),
    ]:
        with pytest.raises(gr.Error, match=re.escape(message)):
            draw(studio.enlarge, **{"picture": fine, "scale": 2, **inputs})
    fine = upload(Image.new("1", (5000, 5000)), "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(gr.Error, match="The picture is far too large: a side has at most 64 pixels."):
        draw(studio.enlarge, picture=fine)
    assert not studio.running


# --- Limits ---


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"height": 0}, "The height cannot be 0: choose a whole number from 1 to 64."),
        ({"height": None}, "The height is missing: choose a whole number from 1 to 64."),
        ({"width": -3}, "The width cannot be -3: choose a whole number from 1 to 64."),
        ({"width": 65}, "The width cannot be 65: choose"),
        ({"width": 4.5}, "The width cannot be 4.5: choose"),
        ({"width": "wide"}, "The width cannot be wide: choose"),
        ({"width": math.nan}, "The width cannot be nan: choose"),
        ({"width": math.inf}, "The width cannot be inf: choose"),
        ({"width": True}, "The width cannot be True: choose"),
        ({"width": [5]}, "The width cannot be [5]: choose"),
        ({"count": 5}, "The number of pictures cannot be 5: choose a whole number from 1 to 4."),
        ({"seed": -1}, "The seed cannot be -1: choose a whole number from 0 to 4,294,967,295."),
        ({"seed": ""}, "The seed is missing: choose"),
        ({"steps": 10}, "The number of steps cannot be 10: choose a whole number from 1 to 9."),
        ({"churn": 21}, "The churn cannot be 21: choose a number from 0 to 20."),
        (
            {"sampler": "<b>DDPM"},
            "There is no sampler &lt;b&gt;DDPM: choose one of EDM Heun, EDM Euler, DPM-Solver++.",
        ),
        ({"strategy": "<b>"}, "There is no strategy &lt;b&gt;: choose one of direct, cascade."),
        ({"tileable": "z"}, "There is no tiling z: choose one of none, x, y, xy."),
        ({"height": 32, "width": 16}, "1,024 pixels are more than the 1,000 of one request: choose fewer or smaller"),
        ({"sizes": ""}, "The list has 0 sizes: write 1 to 4 of them, such as 32, 48, 96x64."),
        ({"sizes": None}, "The list has 0 sizes"),
        ({"sizes": "1 2 3 4 5"}, "The list has 5 sizes"),
        ({"sizes": "5, large"}, "large is no size: write HEIGHT or HEIGHTxWIDTH, such as 64 or 96x64."),
        ({"sizes": "0"}, "0 is no size"),
        ({"sizes": "-5"}, "-5 is no size"),
        ({"sizes": "5x"}, "5x is no size"),
        ({"sizes": "5x65"}, "A side of 5x65 cannot be 65: choose a whole number from 1 to 64."),
        ({"sizes": "9" * 80}, "99999 cannot be 99999"),
        ({"sizes": " " * 30_000}, "The list has 30,000 characters: write 1 to 4 sizes, such as 32, 48, 96x64."),
        ({"sizes": "<img/src=x>"}, "&lt;img/src=x&gt; is no size"),
        ({"sizes": "30, 20"}, "1,300 pixels are more than the 1,000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_remedy(studio, inputs, message):
    with pytest.raises(gr.Error, match=re.escape(message)):
        draw(studio.compare if "sizes" in inputs else studio.generate, **inputs)
    assert not studio.running


def test_limits_come_from_the_environment(monkeypatch):
    assert app.from_environment("DFU_MAX_SIDE", 256) == 256
    monkeypatch.setenv("DFU_MAX_SIDE", "96")
    assert app.from_environment("DFU_MAX_SIDE", 256) == 96
    for wrong in ("0", "-1", "many", ""):
        monkeypatch.setenv("DFU_MAX_SIDE", wrong)
        with pytest.raises(SystemExit, match=f"DFU_MAX_SIDE must be a whole number from 1 up, not {wrong!r}"):
            app.from_environment("DFU_MAX_SIDE", 256)


def test_stop_ends_the_run_of_its_session_alone(studio):
    ours, theirs = SimpleNamespace(session_hash="ours"), SimpleNamespace(session_hash="theirs")
    seen = []

    def progress(done, desc, stopped=None):
        seen.append((round(done, 3), desc))
        if len(seen) == 2:
            studio.stop(stopped)

    assert len(draw(studio.compare, request=ours, progress=lambda *a, **k: progress(*a, **k, stopped=theirs))) == 2
    assert seen == [(0.167, "Drawing 5x5"), (0.333, "Drawing 5x5"), (0.5, "Drawing 5x5")] + [
        (0.667, "Drawing 8x6"), (0.833, "Drawing 8x6"), (1, "Drawing 8x6"),
    ]  # fmt: skip
    seen.clear()
    with pytest.raises(gr.Error, match="Stopped: press the button again"):
        draw(studio.compare, request=ours, progress=lambda *a, **k: progress(*a, **k, stopped=ours))
    assert len(seen) == 2 and not studio.running


# --- Texts ---


def test_the_card_tells_what_to_expect(tmp_path):
    title, about = app.read_card(ROOT / "checkpoints" / "dfu-portraits")
    assert title == "dfu-portraits" and "one person at every size" in about and "Cartoon portraits only" in about
    assert "![" not in about and "Recipe" not in about and "Citation" not in about
    assert app.read_card(tmp_path) == (tmp_path.name, "\n\n")
    (tmp_path / "README.md").write_text("no heading\n")
    assert app.read_card(tmp_path)[0] == tmp_path.name
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no text")
    assert app.read_card(tmp_path) == (tmp_path.name, "\n\n")
    (tmp_path / "README.md").write_text("# name\n" + "![" * 50_000)  # a model's card may be anybody's
    start = time.monotonic()
    assert app.read_card(tmp_path)[0] == "name" and time.monotonic() - start < 5


def test_the_header_of_the_space():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert header["sdk_version"].split(".")[0] == gr.__version__.split(".")[0]
    assert len(header["short_description"]) <= 60  # the Hub's limit
    assert re.findall(r"`DFU_(\w+)` \| (\d+)", text) == [
        (name.upper(), str(value)) for name, value in vars(app.Limits()).items()
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "no/such/folder"], "there is no folder no/such/folder: --model or DFU_MODEL names"),
        (["--model", "tests"], "model_index.json"),
        (["--port", "x"], "invalid int value"),
    ],
)
def test_wrong_options(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        app.main(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# --- The page ---


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Factory of running pages: the address of a studio's."""
    pages, patch = [], pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))

    def start(studio):
        pages.append(app.build(studio))
        return pages[-1].launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)[1]

    yield start
    for page in pages:
        page.close(verbose=False)
    patch.undo()


@pytest.fixture(scope="module")
def served(folder, serve):
    studio = app.Studio(folder, app.Limits(max_side=256, max_queue=1))
    return SimpleNamespace(studio=studio, url=serve(studio))


@pytest.fixture
def client(served, tmp_path):
    client = pytest.importorskip("gradio_client").Client(served.url, download_files=tmp_path, verbose=False)
    yield client
    client.close()


@pytest.mark.parametrize("overrides, visible", [({}, False), ({"num_class_embeds": 3}, True)])
def test_controls_fit_the_model(saved, overrides, visible):
    limits = app.Limits(max_side=10, max_pixels=150, max_images=3)
    components = [block["props"] for block in app.build(app.Studio(saved(**overrides), limits)).config["components"]]
    controls = {props["label"]: props for props in components if props.get("label")}
    height, images = controls["Height in pixels"], controls["Pictures, each of the next seed"]
    assert (height["minimum"], height["maximum"], height["value"], height["step"]) == (1, 10, 10, 1)
    assert images["value"] == 1 and images["maximum"] == 3
    assert controls["Sizes in pixels"]["value"] == "5, 7, 10"
    assert controls["Class"]["visible"] == visible
    assert controls["Sampler"]["value"] == "EDM Heun" and controls["Steps"]["value"] == 18


def test_over_http(client, tmp_path):
    gradio_client = pytest.importorskip("gradio_client")
    pictures = client.predict(*GENERATE.values(), *SETTINGS.values(), api_name="/generate")
    assert [picture["caption"] for picture in pictures] == ["7x5, seed 3", "7x5, seed 4"]
    assert [Path(picture["image"]).name for picture in pictures] == ["seed3_7x5.png", "seed4_7x5.png"]
    assert [Image.open(picture["image"]).size for picture in pictures] == [(5, 7)] * 2
    pictures = client.predict(*COMPARE.values(), *SETTINGS.values(), api_name="/compare")
    assert [Image.open(picture["image"]).size for picture in pictures] == [(5, 5), (6, 8)]
    Image.fromarray(noise(7, 5)).save(tmp_path / "mine.png")
    inputs = {**ENLARGE, "picture": gradio_client.handle_file(tmp_path / "mine.png")}
    pictures = client.predict(*inputs.values(), *SETTINGS.values(), api_name="/enlarge")
    assert [Image.open(picture["image"]).size for picture in pictures] == [(14, 19)]


def test_refusals_over_http(client):
    """The sliders' own bounds do not come first: their message would name no remedy."""
    errors = pytest.importorskip("gradio_client.exceptions")
    with pytest.raises(errors.AppError, match="The height cannot be 999: choose a whole number from 1 to 256"):
        client.predict(*{**GENERATE, "height": 999}.values(), *SETTINGS.values(), api_name="/generate")
    with pytest.raises(errors.AppError, match="wide is no size"):
        client.predict(*{**COMPARE, "sizes": "wide"}.values(), *SETTINGS.values(), api_name="/compare")
    with pytest.raises(errors.AppError, match="The picture is missing: upload one."):
        client.predict(*ENLARGE.values(), *SETTINGS.values(), api_name="/enlarge")


def test_no_other_files_than_uploads_are_read_over_http(served, tmp_path):
    """gradio sees to it only where the request owns that it names a file, by its `meta`."""
    Image.fromarray(noise(7, 5)).save(tmp_path / "private.png")
    data = [{"path": str(tmp_path / "private.png")}, 2, 1, 0, True, *SETTINGS.values()]
    call = f"{served.url}gradio_api/call/enlarge"
    event = requests.post(call, json={"data": data}, timeout=20).json()["event_id"]
    answer = requests.get(f"{call}/{event}", timeout=20).text
    assert "event: complete" not in answer and "This picture was not uploaded" in answer


def test_one_request_runs_at_a_time_and_few_wait(client, served, monkeypatch):
    running, most, go = [0], [0], threading.Event()

    def draw_slowly(*args):
        running[0] += 1
        most[0] = max(most[0], running[0])
        go.wait(20)
        running[0] -= 1
        yield []

    monkeypatch.setattr(served.studio, "draw", draw_slowly)
    jobs = [client.submit(*GENERATE.values(), *SETTINGS.values(), api_name="/generate")]
    wait_until(lambda: running[0])
    jobs.append(client.submit(*COMPARE.values(), *SETTINGS.values(), api_name="/compare"))
    wait_until(lambda: jobs[1].status().code.name == "IN_QUEUE")
    with pytest.raises(Exception, match="Queue is full"):
        client.predict(*COMPARE.values(), *SETTINGS.values(), api_name="/compare")
    go.set()
    assert [job.result(timeout=20) for job in jobs] == [[], []] and most == [1]


def wait_until(condition, seconds=60):
    """The value of `condition()` once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


# --- A browser ---

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1200"
)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Visitor:
    """What someone does with the page."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        wait_until(lambda: self.find("#height input[type=number]"))

    def find(self, selector):
        return [each for each in self.browser.find_elements("css selector", selector) if each.is_displayed()]

    def click(self, selector, text=""):
        wait_until(lambda: [each for each in self.find(selector) if text in each.text])[-1].click()

    def type(self, selector, text):
        field = wait_until(lambda: self.find(selector))[0]
        field.send_keys("\ue009a")  # control and a
        field.send_keys("\ue003" + text + "\ue004")  # backspace before it, and a tab that leaves the field after it

    def upload(self, path, image):
        image.save(path)
        self.browser.find_element("css selector", "#upload input[type=file]").send_keys(str(path))
        script = "return document.querySelector('#upload img')?.naturalWidth"
        wait_until(lambda: self.browser.execute_script(script) == image.width)

    def read(self, selector, *names):
        """Properties of each visible element, all read at one moment: the page may replace an element at any time."""
        script = """return [...document.querySelectorAll(arguments[0])].filter(each => each.checkVisibility())
            .map(each => arguments[1].map(name => each[name]))"""
        return self.browser.execute_script(script, selector, names)

    def pictures(self, *names):
        """(height, width) of each picture shown, once these files are."""

        def shown():
            images = self.read("#pictures .grid-container img", "src", "naturalHeight", "naturalWidth")
            drawn = [src.rsplit("/", 1)[1] for src, *_ in images] == list(names) and all(width for *_, width in images)
            return drawn and [(height, width) for _, height, width in images]

        return wait_until(shown, 240)

    def error(self):
        """The message on the page, which is then closed."""
        ((message,),) = wait_until(lambda: self.read(".toast-body", "innerText"))
        self.browser.execute_script("document.querySelector('.toast-close').click()")
        wait_until(lambda: not self.read(".toast-body"))
        return message


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "shipped"])
def test_in_a_browser(browser, model, folder, serve, tmp_path):
    studio = app.Studio(folder if model == "tiny" else ROOT / "checkpoints" / "dfu-portraits")
    visitor = Visitor(browser, serve(studio))
    visitor.type("#height input[type=number]", "48")
    visitor.type("#width input[type=number]", "40")
    visitor.type("#count input[type=number]", "3")
    visitor.click("#generate")
    names = [f"seed{seed}_48x40.png" for seed in range(3)]
    assert visitor.pictures(*names) == [(48, 40)] * 3
    style = "return getComputedStyle(document.querySelector('#pictures .grid-container img')).imageRendering"
    assert browser.execute_script(style) == "pixelated"
    browser.save_screenshot(str(tmp_path / "generate.png"))

    visitor.type("#seed input", "-5")
    visitor.click("#generate")
    assert "The seed cannot be -5: choose a whole number from 0" in visitor.error()
    visitor.click("#seed button")
    wait_until(lambda: int(visitor.read("#seed input", "value")[0][0]) >= 0)
    visitor.type("#seed input", "7")

    visitor.click("button[role=tab]", "One seed")
    for sizes, message in (
        ("32, wide", "wide is no size"),
        ("999", "A side of 999 cannot be 999"),
        ("", "has 0 sizes"),
    ):
        visitor.type("#sizes input, #sizes textarea", sizes)
        visitor.click("#compare")
        assert message in visitor.error()
    visitor.type("#sizes input, #sizes textarea", "32, 48, 64, 96x64")
    visitor.click("#compare")
    names = [f"seed7_{size}.png" for size in ("32x32", "48x48", "64x64", "96x64")]
    assert visitor.pictures(*names) == [(32, 32), (48, 48), (64, 64), (96, 64)]
    browser.save_screenshot(str(tmp_path / "compare.png"))

    visitor.click("button[role=tab]", "Enlarge")
    visitor.click("#enlarge")
    assert "The picture is missing" in visitor.error()
    visitor.upload(tmp_path / "large.png", Image.new("RGB", (300, 20)))
    visitor.click("#enlarge")
    assert "The picture has 20x300 pixels, but a side has at most 256" in visitor.error()
    visitor.click("#upload button[aria-label='Remove Image']")
    visitor.upload(
        tmp_path / "small.png", Image.open(ROOT / "checkpoints" / "dfu-portraits" / "demo.png").resize((40, 24))
    )
    visitor.type("#scale input", "2.7")
    visitor.click("#enlarge")
    assert visitor.pictures("seed7_65x108.png") == [(65, 108)]
    browser.save_screenshot(str(tmp_path / "enlarge.png"))
    log = [entry for entry in browser.get_log("browser") if "Method not implemented" not in entry["message"]]
    assert not log  # but for what gradio says at the end of each upload


@pytest.mark.slow
@pytest.mark.parametrize("leave", [False, True])
def test_a_run_ends_when_its_visitor_stops_it_or_leaves(browser, folder, serve, leave, monkeypatch):
    studio = app.Studio(folder)
    evaluate = DFUPipeline._evaluate
    calls = []

    def slowly(*args):
        calls.append(time.sleep(0.2))
        return evaluate(*args)

    monkeypatch.setattr(DFUPipeline, "_evaluate", slowly)
    visitor = Visitor(browser, serve(studio))
    visitor.click("#generate")
    wait_until(lambda: calls)
    browser.get("about:blank") if leave else visitor.click("#stop")
    wait_until(lambda: not studio.running)
    time.sleep(0.5)
    done = len(calls)
    time.sleep(1)
    assert len(calls) == done < 35
    if not leave:  # and the next one runs
        visitor.click("#generate")
        visitor.pictures(*(f"seed{seed}_12x12.png" for seed in range(4)))


@pytest.mark.slow
def test_the_files_of_a_space_start_alone(folder, tmp_path):
    shutil.copy(SPACE / "app.py", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DFU_MODEL": str(folder), "DFU_MAX_SIDE": "99"}
    process = subprocess.Popen([sys.executable, "app.py", "--port", str(port)], cwd=tmp_path, env=environment)
    try:
        wait_until(lambda: process.poll() is None and not socket.socket().connect_ex(("127.0.0.1", port)))
        client = pytest.importorskip("gradio_client").Client(f"http://127.0.0.1:{port}", verbose=False)
        errors = pytest.importorskip("gradio_client.exceptions")
        with pytest.raises(errors.AppError, match="from 1 to 99"):
            client.predict(*{**GENERATE, "height": 100}.values(), *SETTINGS.values(), api_name="/generate")
    finally:
        process.terminate()
        process.wait(20)
