"""What the tests of pipelines share: short runs, seeds, and a denoiser that knows the answer."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    """One generator for one seed, by default 0, else a list of them."""
    seeds = seeds or (0,)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def sample(pipe, steps=3, **kwargs) -> torch.Tensor:
    """The raw sample of a short run from seed 0, or from `generator` or `latents`."""
    kwargs = {"generator": seeded(0), "num_inference_steps": steps, "output_type": "latent", **kwargs}
    return pipe(**kwargs).images


def pipe_calls(steps):
    return 2 * steps - 1


def relative_error(result, expected):
    return ((result.double() - expected).norm() / expected.norm()).item()


def assert_near(result, expected):
    """Equal but for rounding, as far as a network of random weights and a few steps of a sampler enlarge it.

    CPUs, batch sizes, memory layouts, devices and ways of computing round differently, in float32 by 6e-8 at a time.
    """
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def spy(module, record):
    """Call `record(sample, timestep, class_labels)` before each evaluation of the network."""
    return module.register_forward_pre_hook(lambda _, args: record(*args))


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """Knows the best denoiser of images whose pixels are independent N(mean, std^2), and preconditions it as EDM."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=2, out_channels=2, mean=0.3, std=0.2):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def denoise(self, x, sigma):
        mean, variance = self.config.mean, self.config.std**2
        return mean + variance / (variance + sigma**2) * (x - mean)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        sigma_data, sigma = 0.5, torch.exp(4 * timestep)
        total = sigma**2 + sigma_data**2
        x = sample * total.sqrt()
        output = (self.denoise(x, sigma) - sigma_data**2 / total * x) / (sigma * sigma_data / total.sqrt()) * self.one
        return UNet2DOutput(sample=output) if return_dict else (output,)
