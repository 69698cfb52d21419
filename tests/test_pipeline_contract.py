"""What every pipeline promises: types, seeds, batches, callbacks, offload, dtypes, saved folders, and errors."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    ImagePipelineOutput,
)
from diffusers.utils import dynamic_modules_utils
from sampling import assert_near, silent

from dfu_diffusers import DFUInpaintPipeline, DFUModel, DFUPipeline, DFUSuperResolutionPipeline, EDMHeunScheduler

PIPELINES = [DFUPipeline, DFUSuperResolutionPipeline, DFUInpaintPipeline]
FROM_IMAGES = PIPELINES[1:]
SIZE = (7, 10)  # of all results

from_images = pytest.mark.parametrize("pipeline_class", FROM_IMAGES, ids=lambda cls: cls.__name__)


@pytest.fixture(params=PIPELINES, ids=lambda cls: cls.__name__)
def pipeline_class(request):
    return request.param


@pytest.fixture
def make(make_model, pipeline_class):
    """Factory of tiny silent pipelines; keyword arguments are the model's."""

    def make(scheduler=None, **overrides):
        return silent(pipeline_class(make_model(**overrides), scheduler or EDMHeunScheduler()))

    return make


@pytest.fixture
def pipe(make):
    return make()


def seeded(*seeds):
    """A list of generators."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def inputs(pipeline_class, pictures) -> dict:
    """What each pipeline needs to make so many images of SIZE; number i always from the same picture."""
    height, width = SIZE
    if pipeline_class is DFUPipeline:
        return dict(batch_size=len(pictures), height=height, width=width)
    sides = (4, 6) if pipeline_class is DFUSuperResolutionPipeline else SIZE
    image = torch.cat([torch.rand(1, 3, *sides, generator=seeded(100 + i)[0]) for i in pictures])
    image = 0.4 + 0.2 * image  # tame enough to be the averages of a larger image
    if pipeline_class is DFUSuperResolutionPipeline:
        return dict(image=image, height=height, width=width, strength=0.75)
    mask = torch.zeros(SIZE)
    mask[2:6, 3:9] = 1
    return dict(image=image, mask_image=mask, strength=0.75)


def sample(pipe, pictures=(0,), **kwargs):
    """The raw samples of a short run, picture i from seed i."""
    defaults = {"generator": seeded(*pictures), "num_inference_steps": 4, "output_type": "latent"}
    return pipe(**{**inputs(type(pipe), pictures), **defaults, **kwargs}).images


def calls(pipe):
    """Network calls of `sample`: all of 4 Heun steps, or the last 3, which begin at an image."""
    return 7 if type(pipe) is DFUPipeline else 5


def spy(module, record):
    """Call `record(sample, timestep, class_labels)` before each evaluation of the network."""
    return module.register_forward_pre_hook(lambda _, args: record(*args))


def relative_error(x, reference) -> float:
    return ((x - reference).norm() / reference.norm()).item()


# --- Results ---


def test_output_types_show_the_same_image(pipe):
    raw = sample(pipe, (0, 1))
    assert raw.shape == (2, 3, *SIZE) and raw.dtype == torch.float32
    pt = sample(pipe, (0, 1), output_type="pt")
    assert pt.shape == (2, 3, *SIZE) and pt.min() >= 0 and pt.max() <= 1
    array = sample(pipe, (0, 1), output_type="np")
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    for image, values in zip(sample(pipe, (0, 1), output_type="pil"), array):
        assert (image.mode, image.size) == ("RGB", SIZE[::-1])
        np.testing.assert_array_equal(np.asarray(image), (values * 255).round().astype(np.uint8))


def test_dict_and_tuple(pipe):
    output = pipe(**inputs(type(pipe), [0]), generator=seeded(0), output_type="pt", num_inference_steps=3)
    (images,) = pipe(
        **inputs(type(pipe), [0]), generator=seeded(0), output_type="pt", num_inference_steps=3, return_dict=False
    )
    assert isinstance(output, ImagePipelineOutput) and torch.equal(output.images, images)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_other_channels(pipeline_class, make, channels, mode):
    pipe, arguments = make(in_channels=channels, out_channels=channels), inputs(pipeline_class, [0])
    if "image" in arguments:
        arguments["image"] = arguments["image"][:, :1].expand(-1, channels, -1, -1)
    (image,) = pipe(**arguments, num_inference_steps=2).images
    assert (image.mode, image.size) == (mode, SIZE[::-1])


# --- Noise and batches ---


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
def test_seeds(make, s_churn):
    pipe = make(EDMHeunScheduler(s_churn=s_churn))
    first = sample(pipe, output_type="pt")
    assert torch.equal(first, sample(pipe, output_type="pt"))
    assert not torch.allclose(first, sample(pipe, output_type="pt", generator=seeded(1)))
    assert_near(sample(pipe, output_type="pt", generator=seeded(0)[0]), first)


@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_a_generator_per_image_makes_images_independent(make, output_type):
    pipe = make(EDMHeunScheduler(s_churn=20))
    alone = torch.cat([sample(pipe, (i,), output_type=output_type) for i in (3, 4, 5)])
    together = sample(pipe, (3, 4, 5), output_type=output_type)
    turned = sample(pipe, (5, 3), output_type=output_type)
    assert relative_error(together, alone) < 1e-4 and relative_error(turned, alone[[2, 0]]) < 1e-4


def test_max_batch_size_bounds_the_network_and_keeps_the_images(make):
    pipe = make(num_class_embeds=5)
    pictures, labels, batches = (0, 1, 2), [4, 0, 2], []
    whole = sample(pipe, pictures, class_labels=labels)
    with spy(pipe.unet, lambda x, *_: batches.append(len(x))):
        parts = sample(pipe, pictures, class_labels=labels, max_batch_size=2)
    assert batches == [2, 1] * calls(pipe)
    assert relative_error(parts, whole) < 1e-4
    one = sample(pipe, (2,), class_labels=2)
    assert relative_error(parts[2:], one) < 1e-4 and relative_error(sample(pipe, (2,), class_labels=1), one) > 1e-3


def test_latents_take_the_place_of_noise(pipe):
    noise = torch.randn(1, 3, *SIZE, generator=seeded(7)[0])
    kept = noise.clone()
    result = sample(pipe, latents=noise)
    assert torch.equal(noise, kept), "latents were changed in place"
    assert torch.equal(result, sample(pipe, latents=noise, generator=seeded(5)))
    assert not torch.allclose(result, sample(pipe, latents=-noise))


def test_no_gradients(pipe):
    assert not sample(pipe).requires_grad


# --- Callbacks and progress ---


def test_callback_sees_each_step(pipe, monkeypatch):
    seen, bars, timesteps = [], [], []
    progress_bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: bars.append(progress_bar(total=total)) or bars[-1])
    with spy(pipe.unet, lambda x, t, *_: timesteps.append(t)):
        result = sample(pipe, callback_on_step_end=lambda *args: seen.append(args))
    assert [step for _, step, _, _ in seen] == list(range(calls(pipe)))
    assert pipe.num_timesteps == bars[0].total == calls(pipe)
    assert torch.equal(torch.stack([t for _, _, t, _ in seen]), torch.stack(timesteps))
    assert all(owner is pipe and set(kwargs) == {"latents"} for owner, _, _, kwargs in seen)
    last = seen[-1][-1]["latents"]
    assert last.shape == result.shape and relative_error(last, result) < 1e-5


def test_callback_replaces_latents(pipe):
    changed = sample(pipe, callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"] + (i == 0)})
    assert not torch.allclose(changed, sample(pipe))


def test_interrupt_stops_there_and_not_the_next_run(pipe):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True

    count = []
    with spy(pipe.unet, lambda *_: count.append(1)):
        sample(pipe, num_inference_steps=10, callback_on_step_end=stop)
        assert len(count) == 1 and pipe.interrupt
        sample(pipe)
    assert len(count) == 1 + calls(pipe) and not pipe.interrupt


# --- Samplers, dtypes and devices ---


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_stock_schedulers(make, scheduler_class):
    pipe = make(scheduler_class())
    result = sample(pipe)
    assert pipe.num_timesteps == (calls(pipe) + 1) // 2 and result.isfinite().all()
    assert torch.equal(result, sample(pipe))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_latents(make, dtype):
    reference, pipe, seen = sample(make()), make().to(dtype), []
    with spy(pipe.unet, lambda x, *_: seen.append(x.dtype)):
        result = sample(pipe, callback_on_step_end=lambda p, i, t, kwargs: seen.append(kwargs["latents"].dtype))
    assert set(seen) == {dtype, torch.float32}
    assert result.dtype == torch.float32 and 0 < relative_error(result, reference) < 0.1


def test_model_offload(make, monkeypatch):
    expected, pipe, freed = sample(make()), make(), []
    pipe.enable_model_cpu_offload(device="cpu")
    free = pipe.maybe_free_model_hooks
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(free()))
    for _ in range(2):
        assert_near(sample(pipe), expected)
        assert hasattr(pipe.unet, "_hf_hook")
    assert len(freed) == 2


# --- Saving, loading and sharing ---


def test_save_and_load(pipe, pipeline_class, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == pipeline_class.__name__
    assert not list(tmp_path.rglob("*.py"))
    for loader in (DiffusionPipeline, *PIPELINES):
        loaded = silent(loader.from_pretrained(tmp_path))
        assert type(loaded) is (pipeline_class if loader is DiffusionPipeline else loader)
        assert type(loaded.unet) is DFUModel
        if type(loaded) is pipeline_class:
            assert torch.equal(sample(loaded), sample(pipe))


def test_components_are_shared_every_way(pipe, pipeline_class):
    for other in PIPELINES:
        there = other.from_pipe(pipe)
        back = silent(pipeline_class.from_pipe(there))
        assert type(there) is other and there.unet is back.unet is pipe.unet
        assert there.scheduler is pipe.scheduler
        assert torch.equal(sample(back), sample(pipe))


def test_shared_weights_keep_their_dtype(make, pipeline_class, recwarn):
    pipe = make().to(torch.bfloat16)
    assert DFUPipeline.from_pipe(pipe).dtype == pipeline_class.from_pipe(pipe).dtype == torch.bfloat16
    assert pipe.unet.conv_in.spatial.weight.dtype == torch.bfloat16
    assert not [warning for warning in recwarn if "dtype" in str(warning.message)]
    assert DFUPipeline.from_pipe(pipe, torch_dtype=torch.float32).dtype == torch.float32


def test_a_self_contained_folder_brings_all_it_needs(pipe, pipeline_class, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "self-contained"
    pipe.save_pretrained(folder, self_contained=True)
    assert torch.equal(sample(silent(pipeline_class.from_pretrained(folder))), sample(pipe))  # our own classes
    loaded = silent(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
    assert type(loaded).__module__.startswith("diffusers_modules") and type(loaded).__name__ == pipeline_class.__name__
    arguments = inputs(pipeline_class, [0])
    images = loaded(**arguments, generator=seeded(0), num_inference_steps=4, output_type="latent").images
    assert torch.equal(images, sample(pipe))


# --- Bad input ---


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(num_inference_steps=0), ValueError, "`num_inference_steps` must be an integer of at least 1, but got 0"),
        (dict(num_inference_steps=2.0), TypeError, "`num_inference_steps` must be an integer .* got 2.0"),
        (dict(max_batch_size=0), ValueError, "`max_batch_size` must be"),
        (dict(generator=seeded(0, 1)), ValueError, "one for each of the 1 images .*got a list of 2"),
        (dict(generator=0), TypeError, "torch.Generator or a list of one per image, but got 0"),
        (dict(output_type="image"), ValueError, "`output_type` must be one of .*but got 'image'"),
        (dict(latents=torch.zeros(1, 3, 9, 9)), ValueError, r"\(1, 3, 7, 10\), but got \(1, 3, 9, 9\)"),
        (dict(class_labels=0), ValueError, "unconditional"),
        (dict(callback_on_step_end_tensor_inputs=["sigma"]), ValueError, r"\['latents'\], but got \['sigma'\]"),
    ],
)
def test_wrong_arguments(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        sample(pipe, **arguments)


def test_wrong_class_labels(make):
    pipe = make(num_class_embeds=3)
    for labels in (None, 3, [0, 1]):
        with pytest.raises(ValueError, match=r"`class_labels` must be one integer in \[0, 3\)"):
            sample(pipe, class_labels=labels)


@from_images
@pytest.mark.parametrize(
    "strength, error",
    [(0, ValueError), (-0.5, ValueError), (1.01, ValueError), (float("nan"), ValueError), ("1", TypeError)]
    + [(True, TypeError), (None, TypeError)],
)
def test_wrong_strength(pipe, strength, error):
    with pytest.raises(error, match=r"`strength` must .*\(0, 1\], but got"):
        sample(pipe, strength=strength)


@from_images
@pytest.mark.parametrize(
    "image, error, match",
    [
        ([], ValueError, "at least one image, and all of one size, but got none"),
        ([torch.zeros(3, 7, 10), torch.zeros(3, 8, 10)], ValueError, "of one size, but got 7x10, 8x10: call"),
        (torch.zeros(1, 3, 0, 4), ValueError, r"at least one pixel, but has shape \(1, 3, 0, 4\)"),
        (torch.zeros(1, 4, 7, 10), ValueError, r"`image` must have 3 channels .*\(1, 4, 7, 10\)"),
        (np.zeros((7, 10)), ValueError, "`image` must have 3 channels"),
        (torch.full((3, 7, 10), 1.5), ValueError, r"floats in \[0, 1\], but they reach from 1.5 to 1.5"),
        (torch.full((3, 7, 10), -1.0), ValueError, r"floats in \[0, 1\], but they reach from -1 to -1"),
        (torch.full((3, 7, 10), torch.nan), ValueError, "not all numbers"),
        (torch.zeros(3, 7, 10, dtype=torch.int64), TypeError, "holds torch.int64"),
        ("portrait.png", TypeError, "PIL image, an array, a tensor or a list of these, but got str"),
        (None, TypeError, "but got NoneType"),
    ],
)
def test_wrong_images(pipe, image, error, match):
    arguments = {**inputs(type(pipe), [0]), "image": image}
    with pytest.raises(error, match=match):
        pipe(**arguments)


@from_images
def test_a_scheduler_without_a_denoised_image(make):
    with pytest.raises(ValueError, match="but DDIMScheduler does not: use `EDMHeunScheduler`, `EDMEulerScheduler`"):
        sample(make(DDIMScheduler()))


@from_images
@pytest.mark.parametrize("strength, steps", [(1.0, 10), (0.5, 5), (0.3, 3), (0.01, 1)])
@pytest.mark.parametrize("scheduler_class", [EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_strength_takes_the_last_steps_of_the_schedule(make, scheduler_class, strength, steps):
    pipe, timesteps = make(scheduler_class()), []
    with spy(pipe.unet, lambda x, t, *_: timesteps.append(t)):
        sample(pipe, num_inference_steps=10, strength=strength)
    expected = scheduler_class()
    expected.set_timesteps(10)
    order = expected.order
    assert len(timesteps) == order * (steps - 1) + 1
    assert torch.equal(torch.stack(timesteps), expected.timesteps[-len(timesteps) :])
