# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""Moving averages of weights: by half-life in images, and by power functions that can be chosen after training.

The half-life is EDM's (Karras et al., arXiv 2206.00364, appendix F.2). The power function and its reconstruction from
snapshots are EDM2's (Karras et al., arXiv 2312.02696, sections 3.1 and 3.2, appendix C): the weights of training step
tau count in the average at step t in proportion to tau^gamma,

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),  0 <= tau <= t,

a profile that stretches with the training. sigma_rel is its standard deviation as a fraction of t.
"""

import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

# The widest profile, gamma = 0, is the plain mean of all steps; the deviation of a uniform distribution on [0, 1].
LARGEST_SIGMA_REL = math.sqrt(1 / 12)
POOR_FIT = 0.1  # relative error of a reconstructed profile from which a warning says so


class _Average(EMAModel):
    """What the averages here share: `get_decay(n)`, the decay of step n = 1, 2, ..., is all that tells them apart.

    The first step copies the weights, so that the initial ones leave no trace. Averages of half-precision parameters
    are kept in float32: a decay of 0.9999 would be lost in less.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters)
        half = (torch.float16, torch.bfloat16)
        self.shadow_params = [shadow.float() if shadow.dtype in half else shadow for shadow in self.shadow_params]

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the parameters in, in one pass; EMAModel's own step takes three, and a copy of the model."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        parameters = [p.to(shadow.dtype) for p, shadow in zip(parameters, self.shadow_params)]
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.cur_decay_value)


class HalfLifeEMA(_Average):
    """Exponential moving average in which weights count half after so many more images.

    The decay of step n is 0.5^(batch_size / h) with h = min(halflife_images, rampup_ratio * images of earlier steps):
    early on, the average forgets faster, so that it is of use long before one half-life has passed.

    Args:
        parameters: of the model, in the order in which every step gives them.
        batch_size: images per step, over all processes together.
        halflife_images: half-life, in images.
        rampup_ratio: half-life as a fraction of the training so far; None for the full half-life from the start.

    Raises:
        ValueError: an argument that is not positive.

    >>> layer = nn.Linear(2, 2)
    >>> ema = HalfLifeEMA(layer.parameters(), batch_size=100, halflife_images=1000, rampup_ratio=None)
    >>> ema.step(layer.parameters())
    >>> round(ema.get_decay(2) ** 10, 6)
    0.5
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        batch_size: int,
        halflife_images: float,
        rampup_ratio: float | None = 0.05,
    ):
        for name, value in (("batch_size", batch_size), ("halflife_images", halflife_images)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, in images, but got {value!r}.")
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f"rampup_ratio must be positive, or None for no ramp-up, but got {rampup_ratio!r}.")
        super().__init__(parameters)
        self.batch_size, self.halflife_images, self.rampup_ratio = batch_size, halflife_images, rampup_ratio

    def get_decay(self, optimization_step: int) -> float:
        if optimization_step <= 1:
            return 0.0
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * (optimization_step - 1) * self.batch_size)
        return 0.5 ** (self.batch_size / halflife)


class PowerEMA(_Average):
    """Moving average with a power-function profile: the decay of step t is (1 - 1/t)^(gamma + 1) (EDM2, eq. 4).

    Two of them, sigma_rel 0.05 and 0.1, and snapshots now and then let `reconstruct` find other widths afterwards.

    Args:
        parameters: of the model, in the order in which every step gives them.
        sigma_rel: width of the profile as a fraction of the training, in (0, 0.2887].

    Raises:
        ValueError: a width out of its range.

    >>> round(PowerEMA(nn.Linear(2, 2).parameters(), sigma_rel=0.05).gamma, 2)
    16.97
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float):
        self.sigma_rel, self.gamma = sigma_rel, gamma_from_sigma_rel(sigma_rel)
        super().__init__(parameters)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / max(optimization_step, 1)) ** (self.gamma + 1)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the profile whose standard deviation is `sigma_rel` of its length.

    The profile is the beta distribution of gamma + 1 and 1, of variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)),
    which falls as gamma grows. So of the roots of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2, all real, it
    is the largest.

    Raises:
        ValueError: a width outside (0, 0.2887], the upper end being that of gamma = 0.

    >>> gamma = gamma_from_sigma_rel(0.1)
    >>> round(gamma, 2), round(math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))), 6)
    (6.94, 0.1)
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel must lie in (0, {LARGEST_SIGMA_REL:.4f}], where the upper end averages all steps alike, but "
            f"got {sigma_rel!r}. Usual values are 0.02 to 0.2."
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


# ---------------------------------------------------------------------------------------------------------------------
# Snapshots, and averages of any width from them


def save_snapshot(weights: dict[str, torch.Tensor], sigma_rel: float, step: int, folder: str | Path) -> Path:
    """Write the weights of a `PowerEMA` to folder/ema-<sigma_rel>-<step>.safetensors, for `reconstruct`.

    In float16, which rounds a weight by 2^-11 of itself at most, up or down at random: in the tests' random walk that
    comes to 0.1% of what averaging changes, about the error of a reconstruction itself. The file takes its name once
    it is complete.

    Args:
        weights: averages by the names of the model's parameters.
        sigma_rel, step: width of the average, and its `optimization_step`, at least 1.
        folder: made if it does not exist.

    Raises:
        ValueError: averages before the first step, or beyond float16's range.
    """
    if step < 1:
        raise ValueError("The average has seen no step yet: save a snapshot after ema.step().")
    half = {name: tensor.to(torch.float16).cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"The average of {name} reaches {weights[name].abs().max().item():.3g}, beyond the 65504 of float16: "
                f"a training this far out has diverged; go back to an earlier checkpoint."
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ema-{sigma_rel:g}-{step}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(half, partial, {"format": "pt", "sigma_rel": repr(float(sigma_rel)), "step": str(step)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def reconstruct(folder: str | Path, sigma_rel: float, step: int | None = None) -> dict[str, torch.Tensor]:
    """The average of width `sigma_rel` at `step`, from the snapshots in `folder` (EDM2, section 3.2).

    Holds one model in memory and reads one tensor at a time. Snapshots of two widths, every few percent of the
    training, give widths between and around theirs; a warning says where they do not suffice.

    Args:
        folder: of `save_snapshot`.
        sigma_rel: width wanted, in (0, 0.2887].
        step: of the training, the last snapshot's by default.

    Returns:
        State dict of float32 tensors on the CPU.

    Raises:
        ValueError: no snapshot, snapshots of different models, a file that is none of them, a step that they do
            not reach, a width out of range.
    """
    gamma = gamma_from_sigma_rel(sigma_rel)
    snapshots = _find_snapshots(Path(folder))
    last = snapshots[-1].step
    step = last if step is None else step
    if not 1 <= step <= last:
        raise ValueError(f"The snapshots in {folder} reach from step 1 to {last}, but step {step} was asked for.")
    steps, gammas = [s.step for s in snapshots], [gamma_from_sigma_rel(s.sigma_rel) for s in snapshots]
    weights, error = fit_profile(steps, gammas, step, gamma)
    if error > POOR_FIT:
        warnings.warn(
            f"The snapshots in {folder} give sigma_rel={sigma_rel} at step {step} poorly: the profile is off by "
            f"{error:.0%}. Choose a width nearer to theirs ({sorted({s.sigma_rel for s in snapshots})}), a step near "
            f"a snapshot, or save more of them.",
            stacklevel=2,
        )
    state = {}
    for snapshot, weight in zip(snapshots, weights.tolist()):
        with safe_open(snapshot.path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name).float()
                state[name] = state[name].add_(tensor, alpha=weight) if name in state else tensor.mul_(weight)
    return state


def fit_profile(steps, gammas, step: float, gamma: float) -> tuple[np.ndarray, float]:
    """Weights of snapshot profiles (steps[i], gammas[i]) whose sum is nearest to the profile (step, gamma).

    Least squares, A x = b with inner products A_ij = <p_i, p_j> and b_i = <p_i, p> (EDM2, appendix C), under the
    condition, ours, that x sums to 1: parameters that never move then stay themselves. Few snapshots would otherwise
    shrink or grow the whole model, by 1% in the case of four of each width 0.05 and 0.1 for a width of 0.07.

    Returns:
        weights (n,) in float64, and the relative error of the fitted profile in the L2 norm.
    """
    steps, gammas = np.asarray(steps, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    a = profile_product(steps[:, None], gammas[:, None], steps, gammas)
    b = profile_product(steps, gammas, step, gamma)
    norm = profile_product(step, gamma, step, gamma)
    # The condition by a Lagrange multiplier. Inner products are of the order of 1 / step: without units, ones fit in.
    ones = np.ones((len(b), 1))
    system = np.block([[a / norm, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(system, np.append(b / norm, 1), rcond=None)[0][:-1]
    squared_error = 1 - 2 * x @ b / norm + x @ a @ x / norm
    return x, math.sqrt(max(0.0, squared_error))


def profile_product(t, gamma, u, delta):
    """<p, q>, the integral of p(tau) q(tau) over 0 .. m = min(t, u), of the profiles (t, gamma) and (u, delta).

    (gamma + 1)(delta + 1) / (t^(gamma+1) u^(delta+1)) times the integral of tau^(gamma+delta), which is
    m^(gamma+delta+1) / (gamma+delta+1); powers of ratios at most 1 do not overflow. Arguments broadcast, as floats.

    >>> float(profile_product(4.0, 0.0, 8.0, 0.0))  # two means: 1/4 times 1/8, over 4 steps
    0.125
    """
    m = np.minimum(t, u)
    ratios = (m / t) ** gamma * (m / u) ** delta
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * ratios * m / (t * u)


class _Snapshot(NamedTuple):
    step: int
    sigma_rel: float
    path: Path
    shapes: dict[str, list[int]]


def _find_snapshots(folder: Path) -> list[_Snapshot]:
    """All snapshots in `folder`, by step; only the heads of their files are read."""
    snapshots = []
    for path in folder.glob("ema-*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read ({error}): remove it, the other snapshots may suffice."
            ) from error
        if not {"step", "sigma_rel"} <= metadata.keys():
            raise ValueError(f"{path} does not say its step and sigma_rel: remove it, it is no snapshot of ours.")
        snapshots.append(_Snapshot(int(metadata["step"]), float(metadata["sigma_rel"]), path, shapes))
    if not snapshots:
        raise ValueError(f"{folder} holds no snapshot ema-<sigma_rel>-<step>.safetensors: write some while training.")
    snapshots.sort(key=lambda snapshot: snapshot[:2])
    for snapshot in snapshots[1:]:
        if snapshot.shapes != snapshots[0].shapes:
            raise ValueError(
                f"{snapshot.path.name} and {snapshots[0].path.name} in {folder} are of different models: keep each "
                f"run's snapshots in a folder of its own."
            )
    return snapshots
