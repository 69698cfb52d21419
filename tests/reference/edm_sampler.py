"""Slow, obvious twins of the EDM sampler, written from the equations of Karras et al. 2022 (arXiv 2206.00364).

Everything is float64. `denoise(x, sigma)` is the paper's D(x; sigma). With sigma(t) = t and s(t) = 1, t is the noise
level. The Gaussian functions give the exact denoiser and the exact solution of the probability flow for data N(mean,
variance), elementwise; in Fourier space the same formulas serve a Gaussian random field with a known spectrum.
"""

import math

import torch


def time_steps(count, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Equation 5: t_0 = sigma_max, ..., t_{N-1} = sigma_min, and t_N = 0."""
    steps = []
    for i in range(count):
        fraction = i / (count - 1) if count > 1 else 0.0
        start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
        steps.append((start + fraction * (end - start)) ** rho)
    return steps + [0.0]


def algorithm_1(denoise, x, t):
    """Algorithm 1 (deterministic Heun) from the sample `x` at level t[0] along the levels `t`: [x_0, ..., x_N]."""
    path = [x]
    for i in range(len(t) - 1):
        d = (x - denoise(x, t[i])) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_prime / 2)
        x = x_next
        path.append(x)
    return path


def churn_factors(t, s_churn, s_tmin=0.0, s_tmax=math.inf):
    """Algorithm 2's gamma_i of the levels t_0 .. t_{N-1}."""
    count = len(t) - 1
    return [min(s_churn / count, math.sqrt(2) - 1) if s_tmin <= t[i] <= s_tmax else 0.0 for i in range(count)]


def algorithm_2(denoise, x, t, s_churn, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0, unit_noise=None):
    """Algorithm 2 (stochastic) from `x` at level t[0]; returns [x_0, ..., x_N].

    `unit_noise(i)` draws step i's standard normal noise; it is called for the steps with gamma_i > 0 only.
    """
    gammas = churn_factors(t, s_churn, s_tmin, s_tmax)
    path = [x]
    for i in range(len(t) - 1):
        t_hat, x_hat = t[i], x
        if gammas[i] > 0:
            t_hat = t[i] + gammas[i] * t[i]
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * (s_noise * unit_noise(i))
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x_next = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x_next - denoise(x_next, t[i + 1])) / t[i + 1]
            x_next = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
        x = x_next
        path.append(x)
    return path


def algorithm_2_variance(variance, t, s_churn, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Exact variance of Algorithm 2's result for data N(0, variance), started from N(0, t_0^2).

    The denoiser is linear, so each Heun step multiplies the sample by a number: the step's result for the sample 1.
    """
    gammas = churn_factors(t, s_churn, s_tmin, s_tmax)
    result = t[0] ** 2
    for i in range(len(t) - 1):
        t_hat = t[i] * (1 + gammas[i])
        result += s_noise**2 * (t_hat**2 - t[i] ** 2)
        factor = algorithm_1(lambda x, sigma: gaussian_denoiser(x, sigma, variance), 1.0, [t_hat, t[i + 1]])[-1]
        result *= factor**2
    return result


def gaussian_denoiser(x, sigma, variance, mean=0.0):
    """E[y | y + sigma n = x] for y ~ N(mean, variance)."""
    return mean + variance / (variance + sigma**2) * (x - mean)


def gaussian_flow(x, sigma_from, sigma_to, variance, mean=0.0):
    """The probability flow (Equation 1) carries the marginal N(mean, variance + sigma^2) of one level to another's."""
    return mean + (x - mean) * ((variance + sigma_to**2) / (variance + sigma_from**2)) ** 0.5


def two_peaks_denoiser(x, sigma, variance=0.04):
    """E[y | x] for y ~ N(-1, variance) or N(1, variance) with equal odds: a nonlinear exact denoiser."""
    total = variance + sigma**2
    side = torch.tanh(x / total)  # odds of the peak at 1 minus odds of the peak at -1
    return side + variance / total * (x - side)


def power_spectrum(height, width):
    """A smooth spectrum (mean square of each mode of `fft2(norm="ortho")`) on any grid: (height, width) float64."""
    rows = torch.fft.fftfreq(height, d=1 / height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, d=1 / width, dtype=torch.float64)[None, :]
    return 4.0 / (1 + (rows**2 + columns**2) / 4) ** 1.5


def field_denoiser(x, sigma, spectrum):
    """The exact denoiser of a Gaussian random field: every Fourier mode on its own. x: (..., height, width) real."""
    modes = torch.fft.fft2(x, norm="ortho")
    return torch.fft.ifft2(gaussian_denoiser(modes, sigma, spectrum.to(x.dtype)), norm="ortho").real
