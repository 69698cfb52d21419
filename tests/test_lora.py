"""LoRA files of strangers: their metadata hold numbers and names, and no pattern of theirs is ever matched."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

SLOW = "(a+)+$|((\\w+)*)*!"  # a regular expression that takes exponential time on long names


FILE = "pytorch_lora_weights.safetensors"


def adapt(model, folder, **options):
    """Weights, metadata and output of the model with a LoRA."""
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, **options}
    model.add_adapter(peft.LoraConfig(**{"target_modules": ["qkv", "proj", "spatial"], **options}))
    model.save_lora_adapter(folder)
    metadata = model.peft_config["default"].to_dict().items()
    metadata = {key: list(each) if isinstance(each, set) else each for key, each in metadata}
    return load_file(folder / FILE), metadata, model(noise(), 0.1).sample


@pytest.fixture(scope="module")
def adapted(make_model, tmp_path_factory):
    return adapt(make_model(), tmp_path_factory.mktemp("lora"))


@pytest.fixture
def saved(make_model, adapted, tmp_path):
    """Factory of LoRAs saved with other metadata: (folder, the adapted model's output)."""

    def save(config=None, **changes):
        weights, metadata, output = adapt(make_model(), tmp_path, **config) if config else adapted
        text = json.dumps({**metadata, **changes} if "all" not in changes else changes["all"], default=str)
        save_file(weights, tmp_path / FILE, metadata={"format": "pt", "lora_adapter_metadata": text})
        return tmp_path, output

    return save


def noise():
    return torch.randn(1, 3, 8, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "layers_pattern"])
def test_patterns_for_layers_are_not_matched_for_the_weights_name_them(make_model, saved, name):
    folder, expected = saved(**{name: SLOW, "layers_to_transform": [10**9]})
    model, start = make_model(), time.monotonic()
    model.load_lora_adapter(folder)
    assert time.monotonic() - start < 20
    torch.testing.assert_close(model(noise(), 0.1).sample, expected)  # the same sums over the same layers


@pytest.mark.parametrize("names", [{"qkv": 3, "conv1.spatial": 1}, {"^down_blocks.0.conv1.spatial$": 3}])
def test_names_with_ranks_and_scales_of_their_own(make_model, saved, names):
    options = {"rank_pattern": names, "alpha_pattern": {name: 9.0 for name in names}}
    for target in (["qkv", "proj", "spatial"], r".*\.(qkv|proj|spatial)"):  # by name, by a pattern of one's own
        folder, expected = saved({**options, "target_modules": target})
        model = make_model()
        model.load_lora_adapter(folder, adapter_name="default")
        torch.testing.assert_close(model(noise(), 0.1).sample, expected)
        model.save_lora_adapter(folder)  # and once more, from what was loaded
        again = make_model()
        again.load_lora_adapter(folder)
        torch.testing.assert_close(again(noise(), 0.1).sample, expected)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"rank_pattern": {SLOW: 2}}, ValueError, "rank_pattern .* must be a dict of at most 1000 names of layers"),
        ({"alpha_pattern": {"qkv" * 100: 2}}, ValueError, "alpha_pattern .* names of layers"),
        ({"alpha_pattern": ["qkv"]}, ValueError, "alpha_pattern .* must be a dict"),
        ({"target_parameters": "spectral.weight"}, ValueError, "target_parameters .* must be a list"),
        ({"target_parameters": ["a"] * 2000}, ValueError, "at most 1000"),
        ({"r": 10**12}, ValueError, "r of the LoRA's metadata must be a whole number from 1 to 4096, but is 1000"),
        ({"r": 0}, ValueError, "must be a whole number from 1"),
        ({"r": True}, ValueError, "must be a whole number from 1"),
        ({"rank_pattern": {"qkv": 2.0}}, ValueError, "must be a whole number from 1"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha .* must be a number of at most 1e"),
        ({"lora_alpha": math.inf}, ValueError, "lora_alpha .* must be a number of at most 1e"),
        ({"lora_alpha": 10**400}, ValueError, "lora_alpha .* must be a number of at most 1e"),
        ({"lora_alpha": "4"}, ValueError, "lora_alpha .* must be a number"),
        ({"alpha_pattern": {"qkv": math.nan}}, ValueError, "lora_alpha .* must be a number"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout .* number in"),
        ({"use_rslora": "yes"}, ValueError, "use_rslora .* must be true or false"),
        ({"all": []}, TypeError, "must be a mapping"),
        ({"r": 3}, ValueError, "another configuration"),
    ],
)
def test_metadata_that_are_refused(model, saved, changes, error, message):
    folder, _ = saved(**changes)
    with pytest.raises(error, match=message) as caught:
        model.load_lora_adapter(folder)
    assert len(str(caught.value)) < 400 and not hasattr(model, "peft_config")


def test_weights_whose_names_are_patterns_are_refused(make_model):
    weights = {f"{SLOW}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    with pytest.raises(ValueError, match="another configuration"):
        make_model().load_lora_adapter(weights)
