"""Which parameters belong together, and that freezing holds exactly what it says."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from dfu_diffusers import DFUModel
from dfu_diffusers.models.layers import DFUAttention
from dfu_diffusers.models.spectral import SpectralConv2d
from dfu_diffusers.training.freezing import KINDS, freeze, parameter_groups, summary

CONFIG = json.loads((Path(__file__).parents[1] / "examples" / "configs" / "ffhq-96.json").read_text())
AUTHORS_FREEZE = ["level:0", "level:1.norm", "level:1.spectral", "level:2.norm", "level:2.spectral"]


def make_ffhq() -> DFUModel:
    with torch.device("meta"):
        return DFUModel.from_config(CONFIG)


def count(model, names=None) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if names is None or name in names)


@pytest.mark.parametrize("conv_type", ["dual", "spatial", "spectral"])
def test_every_parameter_has_one_group(make_model, conv_type):
    model = make_model(conv_type=conv_type, fourier_modes=((4, 3), 2, 1), num_class_embeds=5, num_augment_labels=9)
    groups = parameter_groups(model)
    assert list(groups) == [name for name, _ in model.named_parameters()]
    kinds = {kind for _, kind in groups.values()}
    absent = {"dual": set(), "spatial": {"spectral"}, "spectral": {"spatial"}}[conv_type]
    assert kinds == set(KINDS) - absent
    assert {level for level, _ in groups.values()} == {None, 0, 1, 2}


def test_kinds_agree_with_the_layers(make_model):
    """Counted by type of layer, with no look at names."""
    model = make_model(num_class_embeds=5, num_augment_labels=9)
    groups, sizes = parameter_groups(model), Counter()
    for name, parameter in model.named_parameters():
        sizes[groups[name][1]] += parameter.numel()

    def total(*types, where=lambda layer: True):
        layers = [layer for layer in model.modules() if isinstance(layer, types) and where(layer)]
        return sum(p.numel() for layer in layers for p in layer.parameters())

    assert sizes["spectral"] == total(SpectralConv2d)
    assert sizes["norm"] == total(nn.GroupNorm)
    assert sizes["spatial"] == total(nn.Conv2d, where=lambda conv: conv.kernel_size == (3, 3))
    assert sizes["skip"] == total(nn.Conv2d, where=lambda conv: conv.kernel_size == (1, 1))
    norms_of_attention = sum(count(layer.norm) for layer in model.modules() if isinstance(layer, DFUAttention))
    assert sizes["attention"] == total(DFUAttention) - norms_of_attention
    assert sizes["attention"] + sizes["embedding"] == total(nn.Linear, nn.Embedding)


def test_levels_are_those_of_the_blocks(make_model):
    model = make_model()
    groups = parameter_groups(model)
    for blocks in ("down_blocks", "mid_blocks", "up_blocks"):
        for index, block in enumerate(getattr(model, blocks)):
            names = [name for name in groups if name.startswith(f"{blocks}.{index}.")]
            assert names and {groups[name][0] for name in names} == {block.level}
    assert groups["conv_in.spatial.weight"] == groups["conv_out.spatial.weight"] == (0, "spatial")
    assert groups["norm_out.weight"] == (0, "norm") and groups["embedding_in.weight"] == (None, "embedding")
    assert {block.level for block in model.mid_blocks} == {2}
    assert [block.level for block in model.up_blocks if block.resample] == [2, 1]  # the level they come from


def test_a_new_layer_cannot_be_forgotten(make_model):
    for place in ("", "up_blocks.0", "conv_in"):
        model = make_model()
        model.get_submodule(place).register_module("extra", nn.Linear(2, 2))
        with pytest.raises(ValueError, match="extra.weight belongs to no kind"):
            parameter_groups(model)
    model.register_parameter("bare", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="bare belongs to no kind"):
        parameter_groups(model)
    with pytest.raises(TypeError, match="DataParallel: unwrap"):
        parameter_groups(nn.DataParallel(make_model()))


@pytest.mark.parametrize(
    "selectors",
    [["spatial"], ["spectral", "norm"], ["level:1"], ["level:2.spatial", "attention"], ["level:0", "level:1.norm"]],
)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_moves_all_but_the_frozen(make_model, generator, selectors, optimizer_class):
    model = make_model(num_augment_labels=9)
    frozen = freeze(model, selectors)
    assert frozen == [name for name, p in model.named_parameters() if not p.requires_grad]
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images, labels = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 9, generator=generator)
    model(images, torch.tensor([-0.5, 0.3]), augment_labels=labels).sample.square().mean().backward()
    optimizer.step()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == frozen
    assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
    if optimizer_class is torch.optim.Adam:
        kept = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert kept == count(model) - count(model, frozen)


def test_selectors_are_a_union_and_add_up(make_model):
    model = make_model()
    groups = parameter_groups(model)
    assert freeze(model, ["level:1.norm"]) == [name for name, group in groups.items() if group == (1, "norm")]
    both = freeze(model, ["level:1.norm", "skip", "level:1"])
    assert both == [name for name, (level, kind) in groups.items() if level == 1 or kind == "skip"]
    freeze(model, ["attention"])  # what was frozen stays so
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in both)
    assert freeze(model, []) == []


def test_freezing_as_the_authors_code_and_as_the_papers_text():
    model = make_ffhq()
    frozen = freeze(model, AUTHORS_FREEZE)
    assert (len(frozen), count(model, frozen)) == (268, 573_126_275)
    assert summary(model).endswith("57.450 M of 630.576 M parameters train (* frozen)")
    model = make_ffhq()
    frozen = freeze(model, ["spatial"])
    assert (len(frozen), count(model, frozen)) == (90 * 2, 52_226_435)
    assert all(".spatial." in name for name in frozen)


def test_summary_adds_up():
    model = make_ffhq()
    lines = [line.split() for line in summary(model).splitlines()]
    assert lines[0] == ["level", *KINDS, "total"] and [line[0] for line in lines[1:]] == list("0123") + [
        "shared",
        "total",
    ]
    assert lines[-1] == "total 52.226 568.771 0.052 1.579 2.497 5.452 630.576".split()
    assert sum(float(line[-1]) for line in lines[1:-1]) == pytest.approx(630.576, abs=0.005)
    freeze(model, ["level:0", "spectral"])
    rows = summary(model).splitlines()
    assert rows[1].count("*") == 6 and rows[2].count("*") == 1 and rows[-2].count("*") == 1


@pytest.mark.parametrize(
    "selectors, message",
    [
        (["spatail"], "'spatail' selects no parameters: use a kind .spatial, spectral, norm"),
        (["level:1.dense"], "level:1.dense.* selects no"),
        (["level:one"], "level:N"),
        (["norm", ""], "'' selects no"),
        (["level:3"], "levels 0, 1, 2; choose"),
        (["level:2.spectral"], "matches no parameter of this model; there it has attention, embedding, norm"),
        (["level:0", "level:1", "level:2", "embedding"], "leaves nothing to train"),
    ],
)
def test_errors_leave_the_model_as_it_was(make_model, selectors, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        freeze(model, selectors)
    assert all(p.requires_grad for p in model.parameters())


def test_selectors_that_match_nothing_or_are_no_list(make_model):
    with pytest.raises(ValueError, match="'spectral' matches no parameter of this model"):
        freeze(make_model(conv_type="spatial"), ["spectral"])
    with pytest.raises(TypeError, match="list of strings"):
        freeze(make_model(), "spatial")
