# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Parameters of a DFUModel by level and kind, to freeze some for fine-tuning and to see where they are.

Kinds:
    spatial    3x3 convolutions of dual convolutions
    spectral   Fourier layers of dual convolutions
    norm       GroupNorms, those of attention included
    attention  queries, keys, values and output projection
    skip       1x1 convolutions of residual branches
    embedding  noise level, class and augmentation labels, and each block's projection of them

Levels are those of `DFUBlock.level`, 0 being the full image: the middle blocks belong to the last level, and a block
that joins two levels to the lower one, whose modes it has. Stem and output belong to level 0; the embedding that all
blocks share belongs to none.
"""

import re

from torch import nn

from ..models.dfu import DFUModel
from ..models.layers import DFUAttention, DFUBlock, DualConv2d
from ..models.spectral import SpectralConv2d

KINDS = ("spatial", "spectral", "norm", "attention", "skip", "embedding")


def parameter_groups(model: DFUModel) -> dict[str, tuple[int | None, str]]:
    """(level, kind) of each parameter, by name, in the model's order.

    Raises:
        TypeError: another model, or one wrapped (for training on several devices, say).
        ValueError: a parameter that belongs nowhere: a new layer needs a line in this file.

    >>> groups = parameter_groups(DFUModel(block_out_channels=(8,), fourier_modes=(2,), attention_levels=()))
    >>> groups["conv_in.spectral.weight"], groups["embedding_in.bias"]
    ((0, 'spectral'), (None, 'embedding'))
    """
    if not isinstance(model, DFUModel):
        raise TypeError(
            f"Parameters have groups in a DFUModel, but got {type(model).__name__}: unwrap the model first."
        )
    return {name: _group(model, name) for name, _ in model.named_parameters()}


def freeze(model: DFUModel, selectors: list[str]) -> list[str]:
    """Stop the training of the parameters that any selector names, before the optimizer is made.

    Sets `requires_grad` to False; give the optimizer those that still have it, and frozen ones cost it no memory.

    Args:
        model: a DFUModel, not wrapped. Parameters frozen earlier stay so.
        selectors: "spatial" (a kind), "level:1", or "level:1.spectral" for both at once.

    Returns:
        names of the parameters selected, in the model's order.

    Raises:
        TypeError: selectors that are not a list of strings, or another model.
        ValueError: an unknown kind or level, a selector that matches nothing, or nothing left to train.

    >>> model = DFUModel(block_out_channels=(8, 8), fourier_modes=(2, None), attention_levels=(), layers_per_block=1)
    >>> freeze(model, ["level:0.spectral", "norm"])[:2]
    ['conv_in.spectral.weight', 'down_blocks.0.norm1.weight']
    """
    if isinstance(selectors, str) or not all(isinstance(selector, str) for selector in selectors):
        raise TypeError(f"Selectors must be a list of strings such as ['level:0', 'spectral'], but got {selectors!r}.")
    groups = parameter_groups(model)
    chosen = set().union(*(_select(groups, selector) for selector in selectors))
    parameters = dict(model.named_parameters())
    if not any(p.requires_grad and name not in chosen for name, p in parameters.items()):
        raise ValueError(f"Freezing {', '.join(selectors)} leaves nothing to train: leave out at least one of them.")
    for name in chosen:
        parameters[name].requires_grad_(False)
    return [name for name in groups if name in chosen]


def summary(model) -> str:
    """A table of parameters, in millions, by level and kind; "*" marks cells that are frozen as a whole. Of another
    model than a DFUModel one line.

    >>> config = dict(block_out_channels=(64, 64), layers_per_block=1, fourier_modes=(4, None), attention_levels=())
    >>> print(summary(DFUModel(**config)))
    level     spatial    spectral        norm   attention        skip   embedding       total
    0           0.299       2.652       0.001                   0.017       0.049       3.018
    1           0.591                   0.002       0.017       0.025       0.115       0.750
    shared                                                                  0.082       0.082
    total       0.890       2.652       0.003       0.017       0.041       0.247       3.850
    """
    if not isinstance(model, DFUModel):
        return f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters"
    groups, parameters = parameter_groups(model), dict(model.named_parameters())
    levels = [*_levels(groups), None]

    def cell(rows, columns) -> str:
        members = [parameters[name] for name, (level, kind) in groups.items() if level in rows and kind in columns]
        if not members:
            return " " * 12
        mark = " " if any(p.requires_grad for p in members) else "*"
        return f"{sum(p.numel() for p in members) / 1e6:11.3f}{mark}"

    columns = [*((kind,) for kind in KINDS), KINDS]
    lines = [f"{'level':6}" + "".join(f"{name:>11} " for name in (*KINDS, "total"))]
    for name, rows in [*(("shared" if level is None else level, [level]) for level in levels), ("total", levels)]:
        lines.append(f"{name:<6}" + "".join(cell(rows, kinds) for kinds in columns))
    total, training = (
        sum(p.numel() for p in parameters.values() if p.requires_grad or every) for every in (True, False)
    )
    if training < total:
        lines.append(f"{training / 1e6:.3f} M of {total / 1e6:.3f} M parameters train (* frozen)")
    return "\n".join(line.rstrip() for line in lines)


def _group(model: DFUModel, name: str) -> tuple[int | None, str]:
    """(level, kind) of a parameter, from the modules that hold it."""
    *path, _ = name.split(".")
    modules = [model]
    for part in path:
        modules.append(getattr(modules[-1], part))
    kind = _kind(modules, path)
    level = next((module.level for module in modules if isinstance(module, DFUBlock)), None)
    if kind is None:
        raise ValueError(f"Parameter {name} belongs to no kind: {__name__} must learn where the new layer belongs.")
    if level is None and kind != "embedding":  # stem and output
        level = 0
    return level, kind


def _kind(modules: list[nn.Module], path: list[str]) -> str | None:
    """Kind of a parameter that the last of `modules` holds, each of them being inside the one before."""
    layer, parent, attribute = modules[-1], ([None] + modules)[-2], ([""] + path)[-1]
    if isinstance(layer, SpectralConv2d):
        return "spectral"
    if isinstance(layer, nn.GroupNorm):
        return "norm"
    if isinstance(parent, DualConv2d) and attribute == "spatial":
        return "spatial"
    if isinstance(parent, DFUAttention) and attribute in ("qkv", "proj"):
        return "attention"
    if isinstance(parent, DFUBlock) and attribute in ("skip", "embedding"):
        return attribute
    if isinstance(parent, DFUModel) and "embedding" in attribute:
        return "embedding"
    return None


def _levels(groups: dict[str, tuple[int | None, str]]) -> list[int]:
    return sorted({level for level, _ in groups.values() if level is not None})


def _select(groups: dict[str, tuple[int | None, str]], selector: str) -> set[str]:
    """Names that match one selector."""
    match = re.fullmatch(r"level:(\d+)(?:\.(\w+))?|(\w+)", selector)
    level, kind = (None, None) if match is None else (match[1], match[2] or match[3])
    if match is None or (kind is not None and kind not in KINDS):
        raise ValueError(
            f"{selector!r} selects no parameters: use a kind ({', '.join(KINDS)}), level:N, or both as in "
            f"level:1.spectral."
        )
    levels = _levels(groups)
    if level is not None and int(level) not in levels:
        raise ValueError(f"{selector!r}: this model has the levels {', '.join(map(str, levels))}; choose one of them.")
    names = {name for name, group in groups.items() if level in (None, str(group[0])) and kind in (None, group[1])}
    if not names:
        present = sorted({own_kind for own_level, own_kind in groups.values() if level in (None, str(own_level))})
        raise ValueError(f"{selector!r} matches no parameter of this model; there it has {', '.join(present)}.")
    return names
