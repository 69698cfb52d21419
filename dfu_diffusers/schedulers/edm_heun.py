# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""The EDM sampler of Karras et al. 2022 (arXiv 2206.00364, "the paper" below) as a Diffusers scheduler.

Algorithm 1 (deterministic, second-order Heun) and Algorithm 2 (the same with "churn": fresh noise before each step),
the noise levels of Equation 5, and the preconditioning of Table 1 (EDM column), which training shares.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

from ..checks import real_number

logger = logging.get_logger(__name__)

FLOAT32 = torch.finfo(torch.float32)
LOWEST, HIGHEST = 1e-18, 1e18  # noise levels, whose squares float32 must hold


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """
    Output of [`EDMHeunScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of the sample's shape and dtype):
            The sample at which the network is called next, or the result after the last call.
        pred_original_sample (`torch.Tensor` of the sample's shape and dtype):
            The denoised image D(x; sigma) that this network call predicts; a preview of the result.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    """
    Heun sampler in the EDM formulation (the paper's Algorithms 1 and 2): `N` noise levels cost `2N - 1` network calls.

    Differences from the stock [`EDMEulerScheduler`], whose argument names and defaults it shares:

    - It is second order: each step from one noise level to the next calls the network twice, except the last (to 0).
    - Churn follows Algorithm 2: noise is added *before* the network is called, and the network gets the raised level
      `sigma_hat`, so the schedule contains both levels. Without churn the sampler is deterministic (Algorithm 1).
    - `init_noise_sigma` is the first noise level of the network, `sigma_max` (stock: `sqrt(sigma_max**2 + 1)`).
    - `set_timesteps(sigmas=...)` takes noise levels (stock: positions between 0 and 1).

    Args:
        sigma_min (`float`, defaults to 0.002): Lowest noise level (images are in [-1, 1]), at least 1e-18.
        sigma_max (`float`, defaults to 80.0): Highest noise level, above `sigma_min`, at most 1e18.
        sigma_data (`float`, defaults to 0.5): Standard deviation of the training images, in [1e-18, 1e18].
        sigma_schedule (`"karras"` or `"exponential"`, defaults to `"karras"`):
            Noise levels of Equation 5, or in geometric progression.
        num_train_timesteps (`int`, defaults to 1000): Number of levels before `set_timesteps` is called; not used in
            sampling.
        prediction_type (`"epsilon"` or `"v_prediction"`, defaults to `"epsilon"`):
            `"epsilon"` is the paper's network F of Equation 7, `"v_prediction"` the one of opposite sign (as stock).
        rho (`float`, defaults to 7.0): Exponent of Equation 5, in [0.1, 1000]; higher favours low noise levels.
        final_sigmas_type (`"zero"` or `"sigma_min"`, defaults to `"zero"`):
            Where the last step goes. With `"sigma_min"` the result keeps noise of the lowest level.
        s_churn (`float`, defaults to 0.0): Algorithm 2's S_churn, at least 0. Level `sigma` becomes
            `sigma (1 + gamma)` with `gamma = min(s_churn / N, sqrt(2) - 1)`; 0 gives Algorithm 1.
        s_tmin (`float`, defaults to 0.0): Lowest level that is churned, at least 0.
        s_tmax (`float` or `None`, defaults to `None`): Highest level that is churned; `None` means no upper limit
            (infinity is stored as `None`, since JSON has no infinity).
        s_noise (`float`, defaults to 1.0): Standard deviation of the churn noise, positive (paper: 1.003 or 1.007).

    Raises:
        `ValueError`: if an argument is outside its range.

    Example (the "network" here knows the answer: every image is 0.25 everywhere):

    >>> scheduler = EDMHeunScheduler()
    >>> scheduler.set_timesteps(18)
    >>> len(scheduler.timesteps)
    35
    >>> sample = torch.randn(1, 3, 8, 8) * scheduler.init_noise_sigma
    >>> for t in scheduler.timesteps:
    ...     sigma = torch.exp(4 * t)
    ...     network_input = scheduler.scale_model_input(sample, t)
    ...     c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / (sigma**2 + 0.25) ** 0.5
    ...     network_output = (0.25 - c_skip * sample) / c_out
    ...     sample = scheduler.step(network_output, t, sample).prev_sample
    >>> bool((sample - 0.25).abs().max() < 1e-3)
    True
    """

    _compatibles = ["EDMHeunScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
    ) -> None:
        sigma_min = _check_number("sigma_min", sigma_min, LOWEST, HIGHEST, "the paper uses 0.002")
        above = math.nextafter(sigma_min, math.inf)
        if s_tmax is not None and real_number(s_tmax) != math.inf:
            s_tmax = _check_number("s_tmax", s_tmax, 0.0, FLOAT32.max, "None means no upper limit")
        # The arguments were registered before this line runs: the config gets Python's numbers, and no infinity.
        self.register_to_config(
            sigma_min=sigma_min,
            sigma_max=_check_number("sigma_max", sigma_max, above, HIGHEST, "the paper uses 80, above `sigma_min`"),
            sigma_data=_check_number("sigma_data", sigma_data, LOWEST, HIGHEST, "0.5 suits images in [-1, 1]"),
            num_train_timesteps=_check_count("num_train_timesteps", num_train_timesteps),
            rho=_check_number("rho", rho, 0.1, 1000.0, "the paper uses 7"),
            s_churn=_check_number("s_churn", s_churn, 0.0, FLOAT32.max, "0 switches churn off"),
            s_tmin=_check_number("s_tmin", s_tmin, 0.0, FLOAT32.max, "0 means no lower limit"),
            s_tmax=None if s_tmax is None or s_tmax == math.inf else s_tmax,
            s_noise=_check_number("s_noise", s_noise, FLOAT32.tiny, FLOAT32.max, "for no churn noise set `s_churn=0`"),
        )
        if self.config.s_tmax is not None and self.config.s_tmax < self.config.s_tmin:
            raise ValueError(f"`s_tmax` must not be below `s_tmin`, {s_tmin!r}, but is {s_tmax!r}.")
        _check_choice("sigma_schedule", sigma_schedule, ("karras", "exponential"))
        _check_choice("prediction_type", prediction_type, ("epsilon", "v_prediction"))
        _check_choice("final_sigmas_type", final_sigmas_type, ("zero", "sigma_min"))

        self.is_scale_input_called = False
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps = None  # until the user calls set_timesteps

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- Preconditioning (Table 1, EDM column). Training uses these functions, too. ---

    def precondition_inputs(self, sample: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """c_in x: the network's input, of unit variance. A `sigma` tensor broadcasts, e.g. (batch, 1, 1, 1)."""
        return sample * (1 / (sigma**2 + self.config.sigma_data**2) ** 0.5)

    def precondition_noise(self, sigma: float | torch.Tensor) -> torch.Tensor:
        """c_noise = ln(sigma)/4: the network's timestep, in the shape of `sigma` (a float gives a float32 scalar)."""
        if not isinstance(sigma, torch.Tensor):
            return torch.tensor(math.log(sigma) / 4, dtype=torch.float32)
        return torch.log(sigma) / 4

    def precondition_outputs(
        self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float | torch.Tensor
    ) -> torch.Tensor:
        """
        The denoised image D = c_skip x + c_out F (Equation 7).

        Args:
            sample (`torch.Tensor`): Noisy images x, before `precondition_inputs`.
            model_output (`torch.Tensor` of the same shape): The network's raw output F (or -F, "v_prediction").
            sigma (`float` or `torch.Tensor`): Noise level; a tensor broadcasts, e.g. (batch, 1, 1, 1).
        """
        c_skip = self.config.sigma_data**2 / (sigma**2 + self.config.sigma_data**2)
        return c_skip * sample + self._c_out(sigma) * model_output

    def _c_out(self, sigma: float | torch.Tensor) -> float | torch.Tensor:
        c_out = sigma * self.config.sigma_data / (sigma**2 + self.config.sigma_data**2) ** 0.5
        return -c_out if self.config.prediction_type == "v_prediction" else c_out

    def _slope(self, sample: torch.Tensor, model_output: torch.Tensor, sigma: float) -> torch.Tensor:
        """dx/dsigma = (x - D) / sigma of the probability flow (Algorithm 1, lines 4 and 7), D = c_skip x + c_out F
        substituted: at low noise x and D are nearly equal, and their difference would lose most digits."""
        return sigma / (sigma**2 + self.config.sigma_data**2) * sample - self._c_out(sigma) / sigma * model_output

    def loss_weight(self, sigma: float | torch.Tensor) -> float | torch.Tensor:
        """lambda = 1 / c_out^2: the weight of |D - image|^2 that gives all noise levels the same loss at the start."""
        return (sigma**2 + self.config.sigma_data**2) / (sigma * self.config.sigma_data) ** 2

    # --- The schedule ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: torch.Tensor | list[float] | None = None,
    ) -> None:
        """
        Sets the noise levels and ends any run in progress; call it before each run.

        Afterwards `sigmas` (2N, float32, on the CPU so that no step waits for the device) contains the level of every
        network call and the final one, `[s^0, s1, s^1, s2, s^2, ..., s^(N-1), final]` where s^ is s raised by churn,
        and `timesteps` (2N - 1, float32, on `device`) is ln(sigma)/4 of every network call.

        Args:
            num_inference_steps (`int`, *optional*):
                Number N of noise levels, at least 1. The paper uses 18 for CIFAR-10.
            device (`str` or `torch.device`, *optional*): Where to put `timesteps`; the CPU if left out.
            sigmas (`list[float]` or 1-D `torch.Tensor`, *optional*):
                Your own N noise levels (before churn), positive and strictly decreasing; a 0 may end them.

        Raises:
            `ValueError`: if neither or contradicting arguments are given, or `sigmas` are not as described.
        """
        final = 0.0 if self.config.final_sigmas_type == "zero" else None
        if sigmas is not None:
            levels = _check_sigmas(sigmas)
            if levels[-1] == 0:  # an explicit 0 at the end overrides `final_sigmas_type`
                levels, final = levels[:-1], 0.0
            if num_inference_steps is not None and real_number(num_inference_steps) != len(levels):
                raise ValueError(
                    f"`num_inference_steps={num_inference_steps}` contradicts `sigmas`, which holds {len(levels)}"
                    " noise levels besides a final 0. Pass one of the two."
                )
        elif num_inference_steps is None:
            raise ValueError("`set_timesteps` needs `num_inference_steps` or `sigmas`; both are None. Try 18 steps.")
        else:
            levels = self._noise_levels(_check_count("num_inference_steps", num_inference_steps))

        # Algorithm 2, lines 4-6. The limits are compared in float32, so that s_tmax = sigma_max includes sigma_max.
        gamma = min(self.config.s_churn / len(levels), math.sqrt(2) - 1)
        s_tmax = math.inf if self.config.s_tmax is None else self.config.s_tmax
        low, high = torch.tensor([self.config.s_tmin, s_tmax], dtype=torch.float32, device="cpu")
        churned = (levels.float() >= low) & (levels.float() <= high)
        raised = torch.where(churned, levels * (1 + gamma), levels)

        final = levels[-1:] if final is None else levels.new_zeros(1)
        pairs = torch.stack([levels, raised], dim=1).flatten()  # s0, s^0, s1, s^1, ...
        self.sigmas = torch.cat([pairs[1:], final]).to(torch.float32)
        self.timesteps = self.precondition_noise(self.sigmas[:-1].double()).to(torch.float32).to(device)
        self.num_inference_steps = len(levels)
        self._first_level = levels[0].float().item()  # s0, which only the initial noise needs

        self._step_index = None
        self._begin_index = None
        self._heun_sample = None  # the sample and the slope at the start of a step, between its two network calls
        self._heun_derivative = None

    def _noise_levels(self, count: int) -> torch.Tensor:
        """`count` levels from sigma_max to sigma_min, float64: Equation 5, or a geometric progression."""
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        ramp = torch.linspace(0, 1, count, dtype=torch.float64, device="cpu")  # whatever the default device is
        if self.config.sigma_schedule == "exponential":
            return high * (low / high) ** ramp
        # This form ends exactly at `low`; with `high + ramp * (low - high)` small rho would round it to zero.
        return ((1 - ramp) * high ** (1 / rho) + ramp * low ** (1 / rho)) ** rho

    def _noise_std(self, index: int) -> float:
        """Standard deviation of the noise in the sample of network call `index` (its sigma, if s_noise is 1)."""
        sigma = self.sigmas[index].item()
        if index % self.order:  # a corrector call, at an unchurned level
            return sigma
        level = self.sigmas[index - 1].item() if index > 0 else self._first_level
        return math.sqrt(level**2 + self.config.s_noise**2 * (sigma**2 - level**2))

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial noise: sigma_max, raised by the churn of the first step if it has any."""
        return self._noise_std(0)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next network call starts a step (predictor) rather than completing one (corrector)."""
        return self._heun_derivative is None

    @property
    def step_index(self) -> int | None:
        """Index of the current network call; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first network call, if `set_begin_index` gave one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Sets where in `timesteps` the run begins: `2 * i` begins at noise level i, as in `timesteps[2 * i:]`.
        Optional: it saves the first step a search, which is the only time that a run waits for the device.

        Raises:
            `ValueError`: if `begin_index` is negative or odd, the second call of a step.
        """
        _check_begin(begin_index, self.order)
        self._begin_index = begin_index

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        Index of `timestep` in `timesteps`. If two are equal (a corrector and the next predictor), it is the second,
        so that a run from there begins with a predictor.

        Raises:
            `ValueError`: if `timestep` is not one of `timesteps`.
        """
        if schedule_timesteps is None:
            schedule_timesteps = self.timesteps
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.to(schedule_timesteps.device)
        found = (schedule_timesteps == timestep).nonzero().flatten().tolist()
        if not found:
            raise ValueError(
                f"timestep {timestep} is not in this schedule of {len(schedule_timesteps)} timesteps. Take it from"
                " `scheduler.timesteps` after `set_timesteps`."
            )
        return next((index for index in found if index % self.order == 0), found[0])

    def _init_step_index(self, timestep: float | torch.Tensor) -> None:
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        _check_begin(index, self.order)
        self._step_index = index

    def _current_index(self, timestep: float | torch.Tensor) -> int:
        if self._step_index is None:
            self._init_step_index(timestep)
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"All {len(self.timesteps)} network calls of this schedule are done. Call `set_timesteps` again."
            )
        return self._step_index

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Images with the noise they have at `timesteps`, e.g. to start in the middle of the schedule.

        Args:
            original_samples (`torch.Tensor` of shape (batch, ...)): Clean images.
            noise (`torch.Tensor` of the same shape): Unit noise.
            timesteps (`torch.Tensor` of shape (batch,)): Members of `self.timesteps`. As in the stock schedulers, they
                are ignored once `set_begin_index` was called: then the current step counts, or else `begin_index`.

        Returns:
            `torch.Tensor`: of the shape and dtype of `original_samples`.
        """
        timesteps = timesteps.reshape(-1)
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            indices = [self._begin_index if self._step_index is None else self._step_index] * len(timesteps)

        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        std = torch.tensor([self._noise_std(i) for i in indices], dtype=dtype, device=original_samples.device)
        std = std.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (original_samples.to(dtype) + std * noise).to(original_samples.dtype)

    # --- Sampling ---

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The network's input c_in x at the current noise level, in the dtype of `sample`."""
        sigma = self.sigmas[self._current_index(timestep)].item()
        self.is_scale_input_called = True
        return self.precondition_inputs(sample, sigma)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        noise_sampler: Callable[[torch.Size], torch.Tensor] | None = None,
    ) -> EDMHeunSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        One network call of Algorithm 1 or 2 (two calls make a step, the last step has one). Computes in float32, or in
        float64 if `sample` has it; keep `sample` in float32 when the network runs in half precision.

        Args:
            model_output (`torch.Tensor` of the sample's shape): The network's raw output.
            timestep (`float` or `torch.Tensor`): The current one of `timesteps`.
            sample (`torch.Tensor` of shape (batch, channels, height, width)): The sample the network was called at.
            generator (`torch.Generator` or a list of one per image, *optional*): Source of the churn noise, which is
                always drawn in float32. Unused without churn.
            return_dict (`bool`, defaults to `True`): Whether to return an output object or a tuple.
            noise_sampler (`Callable`, *optional*): Draws the churn noise instead of `generator`. It takes the sample's
                shape and returns unit noise, as `dfu_diffusers.pipelines.noise.nested_noise` does.

        Returns:
            [`EDMHeunSchedulerOutput`] or the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            `ValueError`: if `timestep` is an integer, or the schedule has ended.
        """
        is_tensor = isinstance(timestep, torch.Tensor)
        if isinstance(timestep, Integral) or (is_tensor and not timestep.is_floating_point()):
            raise ValueError(
                f"timestep {timestep} is an integer, but timesteps are ln(sigma)/4. Pass the members of"
                " `scheduler.timesteps`, not their indices."
            )
        if not self.is_scale_input_called:
            logger.warning("`scale_model_input` was not called before `step`: the network's input must be scaled.")
            self.is_scale_input_called = True  # warn only once

        index = self._current_index(timestep)
        sigma, sigma_next = self.sigmas[index].item(), self.sigmas[index + 1].item()
        dtype = torch.promote_types(sample.dtype, torch.float32)

        x, model_output = sample.to(dtype), model_output.to(dtype)
        denoised = self.precondition_outputs(x, model_output, sigma)
        derivative = self._slope(x, model_output, sigma)

        if self.state_in_first_order:
            # Predictor: an Euler step, final if it is the last (lines 5 and 6).
            prev_sample = x + (sigma_next - sigma) * derivative
            if index + 1 < len(self.timesteps):
                self._heun_sample, self._heun_derivative = x, derivative
        else:
            # Corrector: repeat the step with the mean of both slopes (line 8).
            step_size = sigma - self.sigmas[index - 1].item()
            prev_sample = self._heun_sample + step_size * 0.5 * (self._heun_derivative + derivative)
            self._heun_sample = self._heun_derivative = None
            # Churn of the next step (Algorithm 2, lines 4-6), before the network is called at sigma_next.
            if sigma_next > sigma:
                if noise_sampler is None:
                    noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
                else:
                    noise = noise_sampler(x.shape).to(x.device)
                prev_sample = prev_sample + self.config.s_noise * math.sqrt(sigma_next**2 - sigma**2) * noise
        self._step_index += 1

        prev_sample, denoised = prev_sample.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, denoised
        return EDMHeunSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)


def _check_number(name: str, value: float, low: float, high: float, remedy: str) -> float:
    """The Python number of a real number in [low, high]."""
    number = real_number(value)
    if number is None:
        raise ValueError(f"`{name}` must be a number, but is {value!r}; {remedy}.")
    if not low <= number <= high:  # also rejects NaN
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}], but is {value!r}; {remedy}.")
    return number


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")


def _check_count(name: str, value: int) -> int:
    count = real_number(value)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")
    return count


def _check_begin(index: int, order: int) -> None:
    if index < 0 or index % order:
        raise ValueError(
            f"A run cannot begin at network call {index}: odd calls complete a step begun by the call before. Begin at"
            f" a multiple of `scheduler.order` ({order}), e.g. `scheduler.timesteps[{order} * i:]`."
        )


def _check_sigmas(sigmas: torch.Tensor | list[float]) -> torch.Tensor:
    """The user's noise levels as a float64 tensor on the CPU."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim != 1:
        raise ValueError(f"`sigmas` must be a list or 1-D tensor of levels, but has shape {tuple(levels.shape)}.")
    rounded = levels.to(torch.float32)
    positive = rounded[:-1] if len(levels) and levels[-1] == 0 else rounded
    valid = len(positive) > 0 and bool(positive.isfinite().all() and (positive > 0).all())
    if not valid or not bool((rounded.diff() < 0).all()):
        raise ValueError(
            "`sigmas` must be finite positive noise levels, strictly decreasing in float32, with an optional 0 at the"
            f" end, but is {levels.tolist()}. Sort them from high to low and drop repeated values."
        )
    return levels
