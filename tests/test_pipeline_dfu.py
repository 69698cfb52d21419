"""DFUPipeline: sizes, noise, callbacks, samplers, saved folders and bad input, with tiny models and no network."""

import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.callbacks import PipelineCallback
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import GaussianDenoiser, assert_near, pipe_calls, relative_error, sample, seeded, spy

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.pipeline_dfu import nested_noise

SCHEDULERS = [EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
@pytest.mark.parametrize("options", [{}, {"strategy": "guided"}, {"strategy": "cascade"}, {"noise_shift": 1.0}])
def test_sampling_never_waits_for_a_value(make_pipe, options, s_churn):
    """A meta tensor has no values, so that asking for one fails where a GPU would make the CPU wait."""
    pipe = make_pipe(scheduler=EDMHeunScheduler(s_churn=s_churn))
    pipe.unet.to("meta")
    images = pipe(height=12, width=12, num_inference_steps=3, output_type="latent", **options).images
    assert images.is_meta and images.shape == (1, 3, 12, 12)


# --- Sizes ---


@pytest.fixture(scope="module")
def small_pipe(make_pipe):
    return make_pipe()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_every_small_size(small_pipe, height, width):
    (image,) = small_pipe(height=height, width=width, num_inference_steps=2, generator=seeded(0)).images
    assert image.size == (width, height) and image.mode == "RGB"


@pytest.mark.parametrize("height, width, steps", [(97, 131, 2), (512, 512, 1), (512, 768, 1)])
def test_large_and_odd_sizes(make_pipe, height, width, steps):
    pipe = make_pipe(block_out_channels=(8,) * 6, fourier_modes=((4, 3), 2, 2, 2, 1, None), attention_levels=())
    result = sample(pipe, steps, height=height, width=width)
    assert result.shape == (1, 3, height, width) and result.isfinite().all() and result.std() > 0


@pytest.mark.parametrize("sample_size, height, width", [(6, 6, 6), ((6, 9), 6, 9), ([6, 9], 6, 9)])
def test_missing_sides_come_from_sample_size(make_pipe, sample_size, height, width):
    pipe = make_pipe(sample_size=sample_size)
    assert sample(pipe, 1).shape[2:] == (height, width)
    assert sample(pipe, 1, height=4).shape[2:] == (4, width)
    assert sample(pipe, 1, width=4).shape[2:] == (height, 4)
    assert sample(pipe, 1, height=5, width=4).shape[2:] == (5, 4)


def test_numpy_integers_are_integers(pipe):
    result = sample(pipe, np.int64(2), batch_size=np.int32(2), height=np.int64(4), width=np.uint8(5))
    assert result.shape == (2, 3, 4, 5)


# --- Output types ---


def test_output_types_show_the_same_image(pipe):
    raw = sample(pipe, batch_size=2, height=5, width=7)
    assert raw.dtype == torch.float32 and raw.abs().max() > 1, "this test needs values to clamp"
    expected = (raw / 2 + 0.5).clamp(0, 1)

    pt = sample(pipe, batch_size=2, height=5, width=7, output_type="pt")
    torch.testing.assert_close(pt, expected)
    array = sample(pipe, batch_size=2, height=5, width=7, output_type="np")
    assert isinstance(array, np.ndarray) and array.shape == (2, 5, 7, 3)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    images = sample(pipe, batch_size=2, height=5, width=7, output_type="pil")
    for image, values in zip(images, array):
        np.testing.assert_array_equal(np.asarray(image), (values * 255).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(5, 7), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_modes_also_at_a_side_of_one_pixel(make_pipe, channels, mode, size):
    pipe = make_pipe(in_channels=channels, out_channels=channels)
    kwargs = dict(height=size[0], width=size[1])
    (image,) = sample(pipe, output_type="pil", **kwargs)
    assert (image.mode, image.size) == (mode, size[::-1])
    array = sample(pipe, output_type="np", **kwargs)[0]
    np.testing.assert_array_equal(np.asarray(image).reshape(array.shape), (array * 255).round().astype(np.uint8))


def test_many_channels(make_pipe):
    pipe = make_pipe(in_channels=5, out_channels=5)
    assert sample(pipe, output_type="np", height=4, width=6).shape == (1, 4, 6, 5)
    assert sample(pipe, output_type="pt", height=4, width=6).shape == (1, 5, 4, 6)
    with pytest.raises(ValueError, match="'pil'.* 1, 3 or 4 channels.* makes 5: use 'np' or 'pt'"):
        pipe(num_inference_steps=1)


def test_dict_and_tuple(pipe):
    kwargs = dict(num_inference_steps=2, output_type="pt")
    output = pipe(generator=seeded(0), **kwargs)
    in_tuple = pipe(generator=seeded(0), return_dict=False, **kwargs)
    assert isinstance(output, ImagePipelineOutput) and type(in_tuple) is tuple and len(in_tuple) == 1
    assert torch.equal(output.images, in_tuple[0])


# --- Noise and batches ---


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
def test_same_generator_same_image(make_pipe, s_churn):
    pipe = make_pipe(EDMHeunScheduler(s_churn=s_churn))
    first = sample(pipe, batch_size=2)
    assert torch.equal(first, sample(pipe, batch_size=2))
    assert not torch.allclose(first, sample(pipe, batch_size=2, generator=seeded(1)))
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
def test_a_generator_per_image_makes_images_independent(make_pipe, s_churn):
    pipe = make_pipe(EDMHeunScheduler(s_churn=s_churn))
    alone = torch.cat([sample(pipe, generator=seeded(seed)) for seed in (3, 4, 5)])
    together = sample(pipe, batch_size=3, generator=seeded(3, 4, 5))
    turned = sample(pipe, batch_size=2, generator=seeded(5, 3))
    assert relative_error(together, alone) < 1e-4 and relative_error(turned, alone[[2, 0]]) < 1e-4
    assert_near(sample(pipe, generator=[seeded(3)]), alone[:1])


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_latents_are_unit_noise_scaled_once(make_pipe, scheduler_class):
    pipe = make_pipe(scheduler_class())
    noise = nested_noise((2, 3, 6, 8), seeded(7))
    kept = noise.clone()
    inputs = []
    with spy(pipe.unet, lambda x, *_: inputs.append(x)):
        from_latents = sample(pipe, batch_size=2, height=6, width=8, latents=noise)
    assert torch.equal(noise, kept), "latents were changed in place"
    assert_near(from_latents, sample(pipe, batch_size=2, height=6, width=8, generator=seeded(7)))
    sigma, sigma_data = 80.0, 0.5
    expected = noise * pipe.scheduler.init_noise_sigma / math.sqrt(sigma**2 + sigma_data**2)
    torch.testing.assert_close(inputs[0], expected)


def test_initial_noise_with_churn_has_the_raised_level(make_pipe):
    pipe = make_pipe(EDMHeunScheduler(s_churn=100))
    noise = torch.ones(1, 3, 4, 4)
    inputs = []
    with spy(pipe.unet, lambda x, *_: inputs.append(x)):
        sample(pipe, height=4, width=4, latents=noise)
    sigma = 80 * math.sqrt(2)
    torch.testing.assert_close(inputs[0], noise * sigma / math.sqrt(sigma**2 + 0.25))


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
def test_max_batch_size_bounds_the_network_and_keeps_the_images(make_pipe, s_churn):
    pipe = make_pipe(EDMHeunScheduler(s_churn=s_churn), num_class_embeds=5)
    kwargs = dict(batch_size=5, class_labels=[4, 3, 2, 1, 0])
    whole = sample(pipe, **kwargs)
    batches = []
    with spy(pipe.unet, lambda x, *_: batches.append(len(x))):
        parts = sample(pipe, max_batch_size=2, **kwargs)
    assert batches == [2, 2, 1] * 5  # three Heun steps are five calls
    assert relative_error(parts, whole) < 1e-4
    assert_near(sample(pipe, max_batch_size=99, **kwargs), whole)


def test_no_gradients_and_modes_are_left_alone(pipe):
    assert not sample(pipe, 1).requires_grad
    pipe.unet.train()
    sample(pipe, 1)
    assert pipe.unet.training


# --- Callbacks, counts and progress ---


def test_eighteen_steps_by_default_are_thirty_five_calls(pipe, monkeypatch):
    totals, calls = [], []
    progress_bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(progress_bar(total=total)) or totals[-1])
    with spy(pipe.unet, lambda *_: calls.append(1)):
        pipe(height=2, width=2, generator=seeded(0), output_type="latent")
    assert pipe.num_timesteps == len(calls) == totals[0].total == 35


def test_progress_bar_is_filled(make_model, capsys):
    pipe = DFUPipeline(make_model(), EDMHeunScheduler())
    sample(pipe, 3, batch_size=2, max_batch_size=1, height=2, width=2)
    assert "5/5" in capsys.readouterr().err


def test_callback_sees_each_step(pipe):
    seen = []

    def callback(*args):
        seen.append(args)
        return args[-1]

    result = sample(pipe, callback_on_step_end=callback)
    assert torch.equal(result, sample(pipe)), "handing the latents back must change nothing"
    assert [step for _, step, _, _ in seen] == list(range(5)) and pipe.num_timesteps == 5
    assert torch.equal(torch.stack([t for _, _, t, _ in seen]), pipe.scheduler.timesteps)
    assert all(owner is pipe and set(kwargs) == {"latents"} for owner, _, _, kwargs in seen)
    assert torch.equal(seen[-1][-1]["latents"], result)


def test_callback_replaces_latents(pipe):
    def zero_at(step):
        return lambda pipe, i, t, kwargs: {"latents": torch.zeros_like(kwargs["latents"])} if i == step else None

    assert sample(pipe, callback_on_step_end=zero_at(pipe_calls(3) - 1)).abs().sum() == 0
    changed = sample(pipe, callback_on_step_end=zero_at(1))
    assert changed.abs().sum() > 0 and not torch.allclose(changed, sample(pipe))


def test_callback_may_ask_for_nothing_and_return_nothing(pipe):
    seen = []
    result = sample(
        pipe,
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}] * 5 and torch.equal(result, sample(pipe))


def test_official_callback_classes(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": 0 * callback_kwargs["latents"]}

    zero = Zero(cutoff_step_ratio=1.0)
    result = sample(pipe, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=[])
    assert result.abs().sum() == 0, "the class itself says which tensors it needs"


def test_interrupt_stops_there_and_not_the_next_run(pipe):
    seen = []

    def stop(pipe, i, t, kwargs):
        seen.append(kwargs["latents"])
        pipe._interrupt = i == 1

    calls = []
    with spy(pipe.unet, lambda *_: calls.append(1)):
        result = sample(pipe, callback_on_step_end=stop)
    assert len(calls) == 2 and torch.equal(result, seen[-1])
    with spy(pipe.unet, lambda *_: calls.append(1)):
        sample(pipe)
    assert len(calls) == 2 + 5


def test_call_signature_follows_diffusers():
    parameters = inspect.signature(DFUPipeline.__call__).parameters
    expected = [
        "batch_size", "height", "width", "num_inference_steps", "class_labels", "generator", "latents", "output_type",
        "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    ]  # fmt: skip
    assert list(parameters)[1 : 1 + len(expected)] == expected
    assert all(p.default is not inspect.Parameter.empty for name, p in parameters.items() if name != "self")
    assert parameters["num_inference_steps"].default == 18 and parameters["output_type"].default == "pil"
    assert parameters["callback_on_step_end_tensor_inputs"].default == ["latents"]


# --- Class labels ---


@pytest.mark.parametrize(
    "labels",
    [[2, 2, 2], (2, 2, 2), torch.tensor([2, 2, 2]), torch.tensor(2), np.int64(2), torch.tensor([2] * 3).byte()],
)
def test_class_labels_in_every_form(make_pipe, labels):
    pipe = make_pipe(num_class_embeds=3)
    expected = sample(pipe, batch_size=3, class_labels=2)
    assert_near(sample(pipe, batch_size=3, class_labels=labels), expected)
    assert not torch.allclose(sample(pipe, batch_size=3, class_labels=[2, 2, 0])[2], expected[2])


@pytest.mark.parametrize(
    "labels, error, match",
    [
        (None, ValueError, r"class-conditional: `class_labels` must be one integer in \[0, 3\)"),
        (3, ValueError, r"one integer in \[0, 3\), or one for each of the 2 images, but got 3"),
        (-1, ValueError, r"in \[0, 3\).*but got -1"),
        ([0, 3], ValueError, r"in \[0, 3\).*but got \[0, 3\]"),
        ([0], ValueError, r"each of the 2 images, but got \[0\]"),
        ([0, 1, 2], ValueError, r"each of the 2 images, but got \[0, 1, 2\]"),
        (torch.zeros(2, 1, dtype=torch.long), ValueError, "each of the 2 images, but got tensor"),
        (1.0, TypeError, "one integer .*but got 1.0"),
        (torch.tensor([0.0, 1.0]), TypeError, "one integer .*but got tensor"),
        ([True, False], TypeError, r"one integer .*but got \[True, False\]"),
        (True, TypeError, "one integer .*but got True"),
        ("cat", TypeError, "one integer .*but got 'cat'"),
        (["cat", "dog"], TypeError, r"one integer .*but got \['cat', 'dog'\]"),
        ([[0, 1], [2]], TypeError, r"one integer .*but got \[\[0, 1\], \[2\]\]"),
        ([], TypeError, r"one integer .*but got \[\]"),
    ],
)
def test_wrong_class_labels(make_pipe, labels, error, match):
    with pytest.raises(error, match=match):
        sample(make_pipe(num_class_embeds=3), batch_size=2, class_labels=labels)


def test_class_labels_for_an_unconditional_model(pipe):
    with pytest.raises(ValueError, match="unconditional, but got `class_labels` 0: leave them out"):
        sample(pipe, class_labels=0)


# --- Bad input ---


@pytest.mark.parametrize("name", ["batch_size", "height", "width", "num_inference_steps", "max_batch_size"])
@pytest.mark.parametrize(
    "value, error",
    [
        (0, ValueError),
        (-3, ValueError),
        (np.int64(0), ValueError),
        (8.0, TypeError),
        (True, TypeError),
        ("8", TypeError),
        ([8], TypeError),
        (np.float32(8), TypeError),
        (np.bool_(True), TypeError),
        (torch.tensor(8.0), TypeError),
    ],
)
def test_wrong_counts(small_pipe, name, value, error):
    message = f"`{name}` must be an integer of at least 1, but got {value!r}: pass one, or leave it out"
    with pytest.raises(error, match=re.escape(message)):
        small_pipe(**{"num_inference_steps": 1, name: value})


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
@pytest.mark.parametrize("steps, error", [(0, ValueError), (1.5, TypeError)])
def test_wrong_steps_are_refused_before_any_scheduler_sees_them(make_pipe, scheduler_class, steps, error):
    with pytest.raises(error, match="`num_inference_steps` must be an integer of at least 1, but got"):
        sample(make_pipe(scheduler_class()), steps)


NOISE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(latents=NOISE, height=8), ValueError, r"shape .* = \(1, 3, 8, 16\), but got \(1, 3, 16, 16\): pass the"),
        (dict(latents=NOISE, batch_size=2), ValueError, r"\(2, 3, 16, 16\), but got \(1, 3, 16, 16\): pass the"),
        (dict(latents=NOISE[:, :1]), ValueError, r"\(1, 3, 16, 16\), but got \(1, 1, 16, 16\)"),
        (dict(latents=NOISE[0]), ValueError, r"\(1, 3, 16, 16\), but got \(3, 16, 16\)"),
        (dict(latents=NOISE.numpy()), TypeError, "`latents` must be a floating point tensor .*got ndarray"),
        (dict(latents=NOISE.long()), TypeError, "`latents` must be a floating point tensor .*got torch.int64"),
        (dict(output_type="image"), ValueError, r"one of \('pil', 'np', 'pt', 'latent'\), but got 'image'"),
        (dict(output_type=None), ValueError, "but got None"),
        (dict(generator=seeded(0, 1)), ValueError, "one for each of the 1 images .*got a list of 2"),
        (dict(generator=[seeded(0)], batch_size=3), ValueError, "one for each of the 3 images .*got a list of 1"),
        (dict(generator=[]), ValueError, "got a list of 0"),
        (dict(generator=0), TypeError, "torch.Generator or a list of one per image, but got 0"),
        (dict(generator=[0]), TypeError, r"torch.Generator or a list of one per image, but got \[0\]"),
        (dict(generator=(seeded(0),)), TypeError, r"torch.Generator or a list of one per image, but got \(<"),
        (dict(callback_on_step_end_tensor_inputs=["sigma"]), ValueError, r"\['latents'\], but got \['sigma'\]"),
    ],
)
def test_wrong_arguments(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        pipe(num_inference_steps=1, **arguments)


def test_a_model_of_unequal_channels(make_pipe):
    with pytest.raises(ValueError, match="`in_channels` 3 and `out_channels` 6"):
        make_pipe(out_channels=6)(num_inference_steps=1)


# --- Samplers ---


def test_stock_schedulers_come_and_go_by_from_config(pipe):
    expected = sample(pipe)
    for scheduler_class in SCHEDULERS[1:]:
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
        result = sample(pipe)
        assert pipe.num_timesteps == 3 and result.isfinite().all()
        assert torch.equal(result, sample(pipe)) and not torch.allclose(result, expected)
    pipe.scheduler = EDMHeunScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(sample(pipe), expected)


def test_from_config_keeps_what_the_user_set(make_pipe):
    pipe = make_pipe(EDMHeunScheduler(sigma_max=20.0, rho=5.0))
    pipe.scheduler = EDMEulerScheduler.from_config(pipe.scheduler.config)
    assert (pipe.scheduler.config.sigma_max, pipe.scheduler.config.rho) == (20.0, 5.0)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (40, 23)])
@pytest.mark.parametrize("scheduler_class, steps", [(SCHEDULERS[0], 60), (SCHEDULERS[1], 400), (SCHEDULERS[2], 40)])
def test_exact_denoiser_gives_gaussian_images(scheduler_class, steps, size):
    """The probability flow carries noise z to mean + std z (but for 1/80 of the mean): the whole chain is checked."""
    pipe = DFUPipeline(GaussianDenoiser(), scheduler_class())
    pipe.set_progress_bar_config(disable=True)
    batch = 2000 // math.prod(size) + 1
    kwargs = dict(batch_size=batch, height=size[0], width=size[1])
    noise = nested_noise((batch, 2, *size), seeded(0))
    result = sample(pipe, steps, **kwargs)
    torch.testing.assert_close(result, 0.3 + 0.2 * noise, atol=0.02, rtol=0)
    assert abs(result.mean() - 0.3) < 0.02 and abs(result.std() - 0.2) < 0.01


def test_exact_denoiser_with_churn_keeps_the_distribution():
    pipe = DFUPipeline(GaussianDenoiser(), EDMHeunScheduler(s_churn=40))
    pipe.set_progress_bar_config(disable=True)
    result = sample(pipe, 100, batch_size=8, height=23, width=40)
    assert abs(result.mean() - 0.3) < 0.01 and abs(result.std() - 0.2) < 0.01


def test_a_stock_unet(make_pipe):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipe = DFUPipeline(unet, EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    timesteps = []
    with spy(unet, lambda x, t, *_: timesteps.append(t)):
        result = sample(pipe, height=8, width=12)
    assert result.shape == (1, 3, 8, 12) and result.isfinite().all()
    assert torch.equal(torch.stack(timesteps), pipe.scheduler.timesteps), "timesteps must arrive unrounded"


def test_a_model_without_sample_size_needs_both_sides():
    unet = UNet2DModel(
        block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipe = DFUPipeline(unet, EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, 1, height=2, width=3).shape == (1, 3, 2, 3)
    with pytest.raises(TypeError, match="`width` must be an integer of at least 1, but got None"):
        sample(pipe, 1, height=2)


# --- Dtypes and devices ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_on_the_cpu(make_pipe, dtype, tolerance):
    reference = sample(make_pipe(), height=12, width=9)
    pipe = make_pipe().to(dtype)
    inputs, latents = [], []
    with spy(pipe.unet, lambda x, *_: inputs.append(x.dtype)):
        result = sample(
            pipe, height=12, width=9, callback_on_step_end=lambda p, i, t, kwargs: latents.append(kwargs["latents"])
        )
    assert set(inputs) == {dtype} and {x.dtype for x in latents} == {torch.float32}
    assert 0 < relative_error(result, reference) < tolerance
    for output_type in ("pil", "np", "pt"):
        sample(pipe, 1, output_type=output_type)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_half_precision_network_keeps_float32_latents(make_pipe, scheduler_class):
    result = sample(make_pipe(scheduler_class()).to(torch.bfloat16))
    assert result.dtype == torch.float32 and result.isfinite().all()


def test_half_precision_latents_are_welcome(pipe):
    noise = torch.randn(1, 3, 16, 16, generator=seeded(0)).half()
    assert_near(sample(pipe, latents=noise), sample(pipe, latents=noise.float()))


def test_float8_storage(pipe):
    expected = sample(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert relative_error(sample(pipe), expected) < 0.5


def test_components_and_offload_attributes(pipe):
    assert set(pipe.components) == {"unet", "scheduler", "guide"}
    assert list(inspect.signature(DFUPipeline.__init__).parameters) == ["self", "unet", "scheduler", "guide"]
    assert (
        pipe.model_cpu_offload_seq == "unet->guide"
        and pipe._optional_components == ["guide"]
        and pipe._callback_tensor_inputs == ["latents"]
    )


def test_model_offload_with_the_cpu_as_accelerator(make_pipe):
    expected = sample(make_pipe())
    pipe = make_pipe()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert_near(sample(pipe), expected)
        assert hasattr(pipe.unet, "_hf_hook")


def test_hooks_are_freed_after_a_run(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    sample(pipe, 2)
    assert freed == [1]


@pytest.mark.parametrize(
    "level", [dict(offload_type="leaf_level"), dict(offload_type="block_level", num_blocks_per_group=1)]
)
def test_group_offload(make_pipe, level):
    expected = sample(make_pipe())
    pipe = make_pipe()
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **level)
    assert_near(sample(pipe), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_an_accelerator(make_pipe, way):
    expected = sample(make_pipe(num_class_embeds=2), class_labels=1)
    pipe = make_pipe(num_class_embeds=2)
    getattr(pipe, way)("cuda") if way == "to" else getattr(pipe, way)(device="cuda")
    result = sample(pipe, class_labels=1)
    assert result.device.type == "cuda" and relative_error(result.cpu(), expected) < 1e-2
    if way != "to":
        assert pipe.unet.device.type == ("meta" if "sequential" in way else "cpu")


# --- Saving and loading ---


@pytest.fixture(scope="module")
def saved(make_pipe, tmp_path_factory):
    """The folder of a saved pipeline, its sample when loaded, and the pipeline that was saved."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = make_pipe(sample_size=(6, 9))
    pipe.save_pretrained(folder)
    loaded = DFUPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return folder, sample(loaded), pipe


@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, DFUPipeline])
def test_save_and_load_bit_for_bit(saved, pipeline_class):
    folder, loaded_sample, original = saved
    pipe = pipeline_class.from_pretrained(folder)
    assert type(pipe) is DFUPipeline and type(pipe.unet) is DFUModel and type(pipe.scheduler) is EDMHeunScheduler
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sample(pipe), loaded_sample)
    weights, expected = pipe.unet.state_dict(), original.unet.state_dict()
    assert list(weights) == list(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(sample(pipe), sample(original))


def test_saved_folder(saved):
    folder = saved[0]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DFUPipeline"
    assert index["unet"] == ["dfu_diffusers", "DFUModel"]
    assert index["scheduler"] == ["dfu_diffusers", "EDMHeunScheduler"]


def test_a_fresh_process_needs_only_the_import(saved, tmp_path):
    folder, expected, _ = saved
    code = f"""
import torch, dfu_diffusers
from diffusers import AutoModel, DiffusionPipeline
unet = AutoModel.from_pretrained({str(folder)!r}, subfolder="unet")
pipe = DiffusionPipeline.from_pretrained({str(folder)!r})
assert type(unet) is dfu_diffusers.DFUModel and type(pipe) is dfu_diffusers.DFUPipeline
assert type(dfu_diffusers.DFUPipeline.from_pretrained({str(folder)!r})) is dfu_diffusers.DFUPipeline
pipe = dfu_diffusers.DFUPipeline(unet, pipe.scheduler)
generator = torch.Generator().manual_seed(0)
torch.save(pipe(num_inference_steps=3, generator=generator, output_type="latent").images, {str(tmp_path / "x.pt")!r})
"""
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Expected types" not in run.stderr
    assert_near(torch.load(tmp_path / "x.pt"), expected)  # the other process chooses its threads


@pytest.mark.parametrize("scheduler_class", SCHEDULERS[1:])
def test_swap_the_scheduler_while_loading_and_save_again(saved, tmp_path, scheduler_class):
    pipe = DFUPipeline.from_pretrained(saved[0], scheduler=scheduler_class())
    assert type(pipe.scheduler) is scheduler_class
    pipe.set_progress_bar_config(disable=True)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        scheduler_class.__name__,
    ]
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), expected)


def test_load_in_half_precision(saved):
    pipe = DFUPipeline.from_pretrained(saved[0], torch_dtype=torch.float16)
    assert pipe.unet.dtype == torch.float16
    mixed = DFUPipeline.from_pretrained(saved[0], torch_dtype={"unet": torch.bfloat16, "default": torch.float16})
    assert mixed.unet.dtype == torch.bfloat16
    pipe.set_progress_bar_config(disable=True)
    assert relative_error(sample(pipe), saved[1]) < 0.02


def test_variants(saved, tmp_path):
    DFUPipeline.from_pretrained(saved[0]).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe = DFUPipeline.from_pretrained(tmp_path, variant="fp16")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sample(pipe), saved[1])
    with pytest.raises(ValueError, match="variant=fp16"):
        DFUPipeline.from_pretrained(saved[0], variant="fp16")


def test_pipelines_share_components(pipe):
    expected = sample(pipe)
    twin = DFUPipeline(**pipe.components)
    other = DFUPipeline.from_pipe(pipe)
    stock = DFUPipeline.from_pipe(DDPMPipeline(pipe.unet, DDPMScheduler()), scheduler=pipe.scheduler)
    for each in (twin, other, stock):
        each.set_progress_bar_config(disable=True)
        assert each.unet is pipe.unet and torch.equal(sample(each), expected)


def test_tileable_cascade(make_pipe, monkeypatch):
    """The enlarged image has no edges along these axes either: with no noise to speak of, all is bicubic."""
    pipe, kwargs = make_pipe(sample_size=8), dict(height=16, width=16, strategy="cascade", cascade_sigma=1e-3)
    latents = nested_noise((1, 3, 16, 16), seeded(1))
    for axes, shifts in (("x", (0, 16 // 2)), ("xy", (8, 8))):
        image, moved = (
            sample(pipe, 4, latents=noise, tileable=axes, cascade_hold=1.0, **kwargs)
            for noise in (latents, latents.roll(shifts, (2, 3)))
        )
        assert relative_error(moved, image.roll(shifts, (2, 3))) < 1e-2


@pytest.mark.parametrize("strategy", ["direct", "guided"])
def test_tileable(make_pipe, strategy):
    """Shifted noise gives the shifted image, by what the levels of large and small size divide the sides by."""
    pipe = make_pipe()
    pipe.register_modules(guide=make_pipe(block_out_channels=(8, 8, 8)).unet)
    arguments = dict(height=16, width=32, num_inference_steps=2, output_type="latent", strategy=strategy)
    latents = torch.randn(1, 3, 16, 32, generator=seeded(0))

    def error(pipe, axes, shift, **options):
        noises = latents, latents.roll(shift, (2, 3))
        image, moved = (pipe(latents=x, tileable=axes, **options, **arguments).images for x in noises)
        return ((moved - image.roll(shift, (2, 3))).norm() / image.norm()).item()

    assert error(pipe, "xy", (8, 16), guidance_scale=2.0) < 1e-4  # the guide, too
    assert error(pipe, "x", (0, 16)) < 1e-4 < 1e-2 < error(pipe, None, (0, 16))
    assert pipe.unet.conv_in.periodic == pipe.guide.conv_in.periodic == (False, False)
    with pytest.raises(ValueError, match="must be 'x', 'y', 'xy' or None, but got 'z'"):
        pipe(tileable="z")
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[4])
    pipe = DFUPipeline(UNet2DModel(16, **blocks, norm_num_groups=2), EDMHeunScheduler())
    with pytest.raises(ValueError, match="needs a DFUModel, but got a UNet2DModel"):
        pipe(tileable="x")


@pytest.mark.parametrize("strategy", ["direct", "guided", "cascade"])
def test_fixed_levels(make_pipe, strategy):
    """The models' context, of the size in the picture's shape that fits into `sample_size`; none within it."""
    pipe = make_pipe(sample_size=8)
    options = dict(num_inference_steps=3, strategy=strategy, cascade_sigma=20.0)
    plain, fixed = (sample(pipe, height=12, width=24, fixed_levels=on, **options) for on in (False, True))
    with pipe.unet.use_fixed_levels((4, 8)):
        assert_near(sample(pipe, height=12, width=24, **options), fixed)
    assert relative_error(fixed, plain) > 1e-3
    within = (sample(pipe, height=8, width=5, fixed_levels=on, **options) for on in (False, True))
    assert_near(*within)
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[4])
    pipe = DFUPipeline(UNet2DModel(16, **blocks, norm_num_groups=2), EDMHeunScheduler())
    with pytest.raises(ValueError, match="`fixed_levels` needs a DFUModel, but got a UNet2DModel"):
        pipe(fixed_levels=True)


def test_spectral_gain(make_pipe):
    """Beyond `sample_size` a gain of (side / sample_size)^g in every model, nowhere within it."""
    pipe = make_pipe(sample_size=8)
    pipe.register_modules(guide=make_pipe(block_out_channels=(8, 8, 8)).unet)
    options = dict(num_inference_steps=2, guidance_scale=2.0)
    image = sample(pipe, height=8, width=18, spectral_gain=0.5, **options)
    with pipe.unet.use_spectral_gain(1.5**0.5), pipe.guide.use_spectral_gain(1.5**0.5):
        assert_near(sample(pipe, height=8, width=18, **options), image)
    within = (sample(pipe, height=8, width=5, spectral_gain=g, **options) for g in (0.0, 0.5))
    assert_near(*within)
    assert pipe.unet.conv_in.spectral.gain == 1
    with pytest.raises(ValueError, match="`spectral_gain` is for strategy='direct', but got 'guided'"):
        pipe(spectral_gain=0.5, strategy="guided")
    for wrong, error in ((math.inf, ValueError), (math.nan, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="`spectral_gain` must"):
            pipe(spectral_gain=wrong)


def test_a_compiled_model_is_a_model(make_pipe):
    """torch.compile's wrapper has no truth value."""
    pipe = make_pipe()
    expected = sample(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert_near(sample(pipe), expected)
    pipe.guide = torch.compile(make_pipe(block_out_channels=(8, 8, 8)).unet, backend="eager")
    assert sample(pipe, guidance_scale=2.0).isfinite().all()


def test_a_scheduler_of_another_family_runs(make_pipe):
    assert sample(make_pipe(DDIMScheduler())).isfinite().all()


def test_folders_from_before_there_was_a_guide(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index.pop("guide") == [None, None]
    (saved[0] / "model_index.json").write_text(json.dumps(index))
    assert DiffusionPipeline.from_pretrained(saved[0]).guide is None
