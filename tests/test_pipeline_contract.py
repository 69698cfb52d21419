# Copyright 2026 The dfu_diffusers authors. Licensed under the Apache License, Version 2.0.
"""What every pipeline promises, with a refiner and without: types, seeds, batches, callbacks, offload, dtypes,
threads, saved folders, and errors."""

import contextlib
import json
import math
import threading

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler, ImagePipelineOutput
from diffusers.utils import dynamic_modules_utils
from sampling import assert_near, relative_error, silent, spy

from dfu_diffusers import (
    DFUInpaintPipeline,
    DFUModel,
    DFUPipeline,
    DFURefiner,
    DFUSuperResolutionPipeline,
    EDMHeunScheduler,
)

PIPELINES = [DFUPipeline, DFUSuperResolutionPipeline, DFUInpaintPipeline]
SIZE = (7, 10)  # of all results; a refiner makes it of 4x4 by way of 7x8, or of a given 4x6 in one octave
STEPS = 3  # of `unet`, and of the refiner in each octave

from_images = pytest.mark.parametrize("pipeline_class", PIPELINES[1:], ids=lambda cls: cls.__name__)


@pytest.fixture(params=PIPELINES, ids=lambda cls: cls.__name__)
def pipeline_class(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["alone", "refined"])
def refined(request):
    return request.param


@pytest.fixture
def make(make_model, make_refiner, pipeline_class, refined):
    """Factory of tiny silent pipelines; keyword arguments are those of `unet`, which super-resolution with a refiner
    does not need."""

    def make(scheduler=None, channels=3, **overrides):
        channels = dict(in_channels=channels, out_channels=channels)
        unet = make_model(**channels, sample_size=4 if refined else 16, **overrides)
        refiner = make_refiner(in_channels=channels["in_channels"]) if refined else None
        if refined and pipeline_class is DFUSuperResolutionPipeline:
            unet = None
        return silent(pipeline_class(unet, scheduler or EDMHeunScheduler(), refiner=refiner))

    return make


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def pipe(make, kept, pipeline_class, refined):
    """One for all tests that leave it as it is."""
    key = pipeline_class, refined
    return kept[key] if key in kept else kept.setdefault(key, make())


@pytest.fixture
def expected(pipe, kept):
    """What `sample(pipe)` gives."""
    return kept[id(pipe)] if id(pipe) in kept else kept.setdefault(id(pipe), sample(pipe))


def seeded(*seeds):
    """A list of generators."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def inputs(pipe, pictures) -> dict:
    """What each pipeline needs to make so many images of SIZE; number i always from the same picture."""
    height, width = SIZE
    if type(pipe).__name__ == "DFUPipeline":
        return dict(batch_size=len(pictures), height=height, width=width)
    enlarges = type(pipe).__name__ == "DFUSuperResolutionPipeline"
    sides = (4, 6) if enlarges else SIZE
    image = torch.cat([torch.rand(1, pipe._channels, *sides, generator=seeded(100 + i)[0]) for i in pictures])
    image = 0.4 + 0.2 * image  # tame enough to be the averages of a larger image
    if enlarges:
        return dict(image=image, height=height, width=width, strength=0.75)
    mask = torch.zeros(SIZE)
    mask[2:6, 3:9] = 1
    return dict(image=image, mask_image=mask, strength=0.75 if pipe.refiner is None else 1.0)


def sample(pipe, pictures=(0,), **kwargs):
    """The raw samples of a short run, picture i from seed i."""
    defaults = {"generator": seeded(*pictures), "num_inference_steps": STEPS, "octave_steps": STEPS}
    return pipe(**{**inputs(pipe, pictures), **defaults, "output_type": "latent", **kwargs}).images


def calls(pipe):
    """Network calls of `sample`: five for three Heun steps, or three for the last two, which begin at an image, and
    three in each of two octaves."""
    enlarges = type(pipe) is DFUSuperResolutionPipeline
    if pipe.refiner is None:
        return 5 if type(pipe) is DFUPipeline else 3
    return 2 * 3 if enlarges else 5 + 2 * 3


@contextlib.contextmanager
def spy_all(pipe, record):
    """Call `record(sample, timestep, ...)` before each evaluation of any network."""
    with contextlib.ExitStack() as stack:
        for model in (pipe.unet, pipe.refiner):
            if model is not None:
                stack.enter_context(spy(model, record))
        yield


# --- Results ---


def test_output_types_show_the_same_image(pipe):
    raw = sample(pipe, (0, 1))
    assert raw.shape == (2, 3, *SIZE) and raw.dtype == torch.float32 and not raw.requires_grad
    pt = sample(pipe, (0, 1), output_type="pt")
    assert pt.shape == (2, 3, *SIZE) and pt.min() >= 0 and pt.max() <= 1
    array = sample(pipe, (0, 1), output_type="np")
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    for image, values in zip(sample(pipe, (0, 1), output_type="pil"), array):
        assert (image.mode, image.size) == ("RGB", SIZE[::-1])
        np.testing.assert_array_equal(np.asarray(image), (values * 255).round().astype(np.uint8))
    if type(pipe) is DFUPipeline:  # the others move samples before they become pixels
        torch.testing.assert_close(pt, (raw / 2 + 0.5).clamp(0, 1))


def test_dict_and_tuple(pipe):
    arguments = dict(inputs(pipe, [0]), output_type="pt", num_inference_steps=3)
    output = pipe(generator=seeded(0), **arguments)
    in_tuple = pipe(generator=seeded(0), return_dict=False, **arguments)
    assert isinstance(output, ImagePipelineOutput) and type(in_tuple) is tuple and len(in_tuple) == 1
    assert torch.equal(output.images, in_tuple[0])


@pytest.mark.parametrize("channels, mode", [(1, "L"), (4, "RGBA")])
def test_other_channels(make, channels, mode):
    (image,) = sample(make(channels=channels), output_type="pil", num_inference_steps=2)
    assert (image.mode, image.size) == (mode, SIZE[::-1])


# --- Noise and batches ---


def test_seeds(make):
    pipe = make(EDMHeunScheduler(s_churn=20))
    first = sample(pipe, output_type="pt")
    assert torch.equal(first, sample(pipe, output_type="pt"))
    assert not torch.allclose(first, sample(pipe, output_type="pt", generator=seeded(1)))
    assert_near(sample(pipe, output_type="pt", generator=seeded(0)[0]), first)
    first, second = sample(pipe, (0, 1), generator=seeded(0)[0])
    assert not torch.allclose(first, second)


def test_a_generator_per_image_makes_images_independent(make):
    pipe = make(EDMHeunScheduler(s_churn=20))
    alone = torch.cat([sample(pipe, (i,)) for i in (3, 4, 5)])
    together, turned = sample(pipe, (3, 4, 5)), sample(pipe, (5, 3))
    assert relative_error(together, alone) < 1e-4 and relative_error(turned, alone[[2, 0]]) < 1e-4


def test_max_batch_size_bounds_the_network_and_keeps_the_images(make):
    pipe, pictures, batches = make(EDMHeunScheduler(s_churn=20)), (0, 1, 2), []
    whole = sample(pipe, pictures)
    with spy_all(pipe, lambda x, *_: batches.append(len(x))):
        parts = sample(pipe, pictures, max_batch_size=2)
    assert batches == [2, 1] * calls(pipe)
    assert relative_error(parts, whole) < 1e-4
    assert_near(sample(pipe, pictures, max_batch_size=99), whole)


def test_classes(make):
    pipe = make(num_class_embeds=5)
    if pipe.unet is None:
        with pytest.raises(ValueError, match="A refiner takes no classes, but got `class_labels` 3: leave them out"):
            sample(pipe, class_labels=3)
        return
    pair = sample(pipe, (0, 1), class_labels=[4, 2], max_batch_size=1)
    one = sample(pipe, (1,), class_labels=2)
    assert relative_error(pair[1:], one) < 1e-4 and relative_error(sample(pipe, (1,), class_labels=1), one) > 1e-3
    for labels in (None, 5, [0, 1]):
        with pytest.raises(ValueError, match=r"`class_labels` must be one integer in \[0, 5\)"):
            sample(pipe, class_labels=labels)


def test_latents_take_the_place_of_noise(pipe):
    noise = torch.randn(1, 3, *SIZE, generator=seeded(7)[0])
    kept = noise.clone()
    result = sample(pipe, latents=noise)
    assert torch.equal(noise, kept), "latents were changed in place"
    assert torch.equal(result, sample(pipe, latents=noise))
    if pipe.refiner is None:  # whose condition has noise from the generator
        assert torch.equal(result, sample(pipe, latents=noise, generator=seeded(5)))
    assert not torch.allclose(result, sample(pipe, latents=-noise))


# --- Callbacks and progress ---


def test_callback_sees_each_step(pipe, expected, monkeypatch):
    seen, bars, timesteps, sizes = [], [], [], []
    progress_bar = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda total: bars.append(progress_bar(total=total)) or bars[-1])
    with spy_all(pipe, lambda x, t, *_: timesteps.append(t) or sizes.append(x.shape)):
        result = sample(pipe, callback_on_step_end=lambda *args: seen.append(args) or args[-1])
    assert [step for _, step, _, _ in seen] == list(range(calls(pipe)))
    assert pipe.num_timesteps == bars[0].total == calls(pipe)
    assert torch.equal(torch.stack([t for _, _, t, _ in seen]), torch.stack(timesteps))
    assert all(owner is pipe and set(kwargs) == {"latents"} for owner, _, _, kwargs in seen)
    assert [kwargs["latents"].shape for *_, kwargs in seen] == sizes  # in an octave, its detail
    assert torch.equal(result, expected), "handing the latents back must change nothing"


def test_callback_replaces_latents(pipe, expected):
    changed = sample(pipe, callback_on_step_end=lambda p, i, t, kwargs: {"latents": kwargs["latents"] + (i == 0)})
    assert not torch.allclose(changed, expected)


def test_callback_may_ask_for_nothing(pipe):
    seen = []
    for nothing in ([], None):
        sample(
            pipe,
            callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(kwargs),
            callback_on_step_end_tensor_inputs=nothing,
        )
    assert seen == [{}] * 2 * calls(pipe)


def test_callback_that_returns_no_dict(pipe):
    with pytest.raises(TypeError, match="`callback_on_step_end` must return a dict or None, but returned 3"):
        sample(pipe, callback_on_step_end=lambda *args: 3)


def test_callback_that_asks_for_guidance_where_there_is_none(pipe):
    def guide(pipe, *args):
        pipe._guidance_scale = 2.0

    with pytest.raises(ValueError, match="`guidance_scale` 2.0 needs a class-conditional model, or a weaker one"):
        sample(pipe, callback_on_step_end=guide)


def test_interrupt_stops_there_and_not_the_next_run(pipe):
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i == 1

    count = []
    with spy_all(pipe, lambda *_: count.append(1)):
        stopped = sample(pipe, callback_on_step_end=stop)
        assert len(count) == 2 and pipe.interrupt and stopped.shape == (1, 3, *SIZE)
        sample(pipe)
    assert len(count) == 2 + calls(pipe) and not pipe.interrupt


# --- Samplers, dtypes and devices ---


@pytest.mark.parametrize("scheduler_class", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_stock_schedulers(make, scheduler_class):
    pipe = make(scheduler_class())
    result = sample(pipe)
    if pipe.refiner is None:
        expected = (calls(pipe) + 1) // 2
    else:
        expected = calls(pipe) - (2 if pipe.unet is not None else 0)
    assert pipe.num_timesteps == expected and result.isfinite().all()
    assert torch.equal(result, sample(pipe))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_keeps_float32_latents(make, dtype, tolerance):
    reference, pipe, seen, latents = sample(make()), make().to(dtype), [], []
    with spy_all(pipe, lambda x, *_: seen.append(x.dtype)):
        result = sample(pipe, callback_on_step_end=lambda p, i, t, kwargs: latents.append(kwargs["latents"].dtype))
    assert set(seen) == {dtype} and set(latents) == {torch.float32}
    assert result.dtype == torch.float32 and 0 < relative_error(result, reference) < tolerance
    sample(pipe, num_inference_steps=1, octave_steps=1, output_type="pil")


def test_model_offload(make, monkeypatch):
    expected, pipe, freed = sample(make()), make(), []
    pipe.enable_model_cpu_offload(device="cpu")
    free = pipe.maybe_free_model_hooks
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(free()))
    for _ in range(2):
        assert_near(sample(pipe), expected)
        assert all(hasattr(model, "_hf_hook") for model in (pipe.unet, pipe.refiner) if model is not None)
    assert len(freed) == 2


# --- Nothing leaks ---


def without_autocast(pipe, monkeypatch):
    """Keep autocast from the networks, whose precision it is meant to change: all else is left to it."""
    for model in (pipe.unet, pipe.refiner):
        if model is not None:
            monkeypatch.setattr(model, "forward", torch.autocast("cpu", enabled=False)(model.forward))


@contextlib.contextmanager
def global_state(name):
    """Something that is not as PyTorch sets it, as long as this lasts."""
    with contextlib.ExitStack() as stack:
        if name == "dtype":
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
        elif name == "device":
            stack.enter_context(torch.device("meta"))
        elif name == "deterministic":
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True)
        elif name == "threads":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(torch.get_num_threads() + 2)
        elif name == "seed":
            stack.enter_context(torch.random.fork_rng(devices=[]))
            torch.manual_seed(5)
        elif name == "no-gradients":
            stack.enter_context(torch.set_grad_enabled(False))
        elif name == "inference-mode":
            stack.enter_context(torch.inference_mode())
        else:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        yield


STATES = ["dtype device threads", "deterministic seed no-gradients", "inference-mode", "autocast"]


@pytest.mark.parametrize("names", STATES)
def test_global_state_changes_no_picture_and_is_left_as_it_was(pipe, monkeypatch, names):
    options = {"consistency": True} if isinstance(pipe, DFUSuperResolutionPipeline) else {}
    expected, arguments = sample(pipe, **options), {**inputs(pipe, [0]), **options, "generator": seeded(0)}
    if names == "autocast":
        without_autocast(pipe, monkeypatch)
    with contextlib.ExitStack() as stack:
        [stack.enter_context(global_state(name)) for name in names.split()]
        before = torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        result = pipe(**arguments, num_inference_steps=STEPS, octave_steps=STEPS, output_type="latent").images
        after = torch.get_rng_state(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert_near(result.clone(), expected)
    assert not result.requires_grad and torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_threads_that_share_a_network_each_get_their_own_picture(pipe, pipeline_class):
    """Two pipelines, each with its own scheduler; one tiles the plane, takes other steps, and fails in the end."""
    other = silent(pipeline_class(pipe.unet, EDMHeunScheduler(s_churn=5), refiner=pipe.refiner))
    options = {} if pipeline_class is DFUInpaintPipeline else {"tileable": "x"}
    runs = [(pipe, {}), (other, dict(options, num_inference_steps=2, octave_steps=2))]
    expected, results, barrier = [sample(each, **kwargs) for each, kwargs in runs], {}, threading.Barrier(2)

    def work(index):
        each, kwargs = runs[index]
        results[index] = [sample(each, **kwargs) for _ in range(3)]
        if index == 1:
            with contextlib.suppress(ZeroDivisionError):
                sample(each, callback_on_step_end=lambda *args: 1 / 0, **kwargs)
            barrier.wait(300)
        else:
            barrier.wait(300)
            results[index].append(sample(each, **kwargs))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results[index]) for index in (0, 1)] == [4, 3]
    for index, images in results.items():
        for image in images:
            assert_near(image, expected[index])


# --- Nothing silent ---


@pytest.mark.parametrize("network", ["unet", "refiner"])
def test_values_that_are_not_finite_are_told_after_the_stage_that_made_them(pipe, network):
    """With network, size and step; later stages are not begun."""
    model, own, seen = getattr(pipe, network), [], []
    if model is None:
        pytest.skip("this pipeline has none")

    second = 3 if network == "unet" else 2  # call of the second step: Heun has two calls to each
    begin = int(pipe.refiner is None and type(pipe) is not DFUPipeline)  # steps left out, with `strength`
    trunk = 5 - 2 * begin  # calls of `unet`

    def poison(module, args, output):
        own.append(1)
        return (output[0] * (math.nan if len(own) == second else 1),)

    enlarges = pipe.unet is None
    size = SIZE if pipe.refiner is None else (4, 4) if network == "unet" else (6, 10) if enlarges else (7, 8)
    message = f"`{network}` at {size[0]}x{size[1]} gave values that are not finite in step {begin + 2} of {STEPS}"
    with spy_all(pipe, lambda *_: seen.append(1)), model.register_forward_hook(poison):
        with pytest.raises(ValueError, match=message):
            sample(pipe)
    assert len(seen) == (trunk if network == "unet" else STEPS if enlarges else trunk + STEPS)


def test_weights_that_are_not_finite_are_told(make):
    pipe = make()
    with torch.no_grad():
        next((pipe.unet or pipe.refiner).parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="not finite in step [12] of 3: its weights are damaged, or float16 overflow"):
        sample(pipe)


def test_only_safetensors_are_saved(pipe, tmp_path):
    for save in (pipe.save_pretrained, (pipe.unet or pipe.refiner).save_pretrained):
        with pytest.raises(ValueError, match="saves safetensors only, but got safe_serialization=False"):
            save(tmp_path / "pickles", safe_serialization=False)
    with pytest.raises(ValueError, match="saves safetensors only"):
        pipe.push_to_hub("me/pickles", safe_serialization=False)
    assert not (tmp_path / "pickles").exists()


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_are_numbers(pipe, expected, pipeline_class, number):
    integer = torch.tensor if number is torch.tensor else np.int64
    kwargs = dict(num_inference_steps=integer(STEPS), octave_steps=integer(STEPS), max_batch_size=integer(2))
    kwargs["guidance_scale"] = number(1.0)
    if pipeline_class is not DFUPipeline:
        kwargs["strength"] = number(inputs(pipe, [0])["strength"])
    if pipeline_class is DFUSuperResolutionPipeline:
        kwargs["noise_level"] = number(0.0)
    assert torch.equal(sample(pipe, **kwargs), expected)


# --- Saving, loading and sharing ---


def test_save_and_load(pipe, expected, pipeline_class, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == pipeline_class.__name__
    assert not list(tmp_path.rglob("*.py"))
    for loader in (DiffusionPipeline, *PIPELINES):
        if pipe.unet is None and loader in (DFUPipeline, DFUInpaintPipeline):
            with pytest.raises(ValueError, match="unet"):
                loader.from_pretrained(tmp_path)
            continue
        loaded = silent(loader.from_pretrained(tmp_path))
        assert type(loaded) is (pipeline_class if loader is DiffusionPipeline else loader)
        for name, cls in (("unet", DFUModel), ("refiner", DFURefiner)):
            assert isinstance(getattr(loaded, name), cls if getattr(pipe, name) is not None else type(None))
        if type(loaded) is pipeline_class:
            assert torch.equal(sample(loaded), expected)


def test_components_are_shared_every_way(make, pipeline_class, make_model):
    pipe = make()
    if pipe.unet is None:
        pipe.unet = make_model(sample_size=4)
    expected = sample(pipe)
    for other in PIPELINES:
        there = other.from_pipe(pipe)
        back = silent(pipeline_class.from_pipe(there))
        assert type(there) is other
        for name in ("unet", "scheduler", "guide", "refiner"):
            assert getattr(there, name) is getattr(back, name) is getattr(pipe, name)
        assert torch.equal(sample(back), expected)


def test_shared_weights_keep_their_dtype(make, pipeline_class, recwarn):
    pipe = make().to(torch.bfloat16)
    twin = pipeline_class.from_pipe(pipe)
    assert twin.dtype == pipe.dtype == torch.bfloat16
    assert not [warning for warning in recwarn if "dtype" in str(warning.message)]
    assert pipeline_class.from_pipe(pipe, torch_dtype=torch.float32).dtype == torch.float32


def test_a_self_contained_folder_brings_all_it_needs(pipe, expected, pipeline_class, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "self-contained"
    pipe.save_pretrained(folder, self_contained=True)
    assert torch.equal(sample(silent(pipeline_class.from_pretrained(folder))), expected)  # our own classes
    loaded = silent(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
    parts = [loaded, *filter(None, (loaded.unet, loaded.refiner, loaded.scheduler))]
    assert all(type(part).__module__.startswith("diffusers_modules") for part in parts)
    assert type(loaded).__name__ == pipeline_class.__name__
    assert torch.equal(sample(loaded), expected)


# --- Bad input ---


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        (dict(num_inference_steps=0), ValueError, "`num_inference_steps` must be an integer of at least 1, but got 0"),
        (dict(num_inference_steps=2.0), TypeError, "`num_inference_steps` must be an integer .* got 2.0"),
        (dict(octave_steps=0), ValueError, "`octave_steps` must be an integer of at least 1, but got 0"),
        (dict(octave_steps=None), TypeError, "`octave_steps` must be an integer of at least 1, but got None"),
        (dict(max_batch_size=0), ValueError, "`max_batch_size` must be"),
        (dict(guidance_scale=math.nan), ValueError, "`guidance_scale` must be a positive number, but got nan"),
        (dict(guidance_scale=True), TypeError, "`guidance_scale` must be a positive number, but got True"),
        (dict(generator=seeded(0, 1)), ValueError, "one for each of the 1 images .*got a list of 2"),
        (dict(generator=[]), ValueError, "one for each of the 1 images .*got a list of 0"),
        (dict(generator=0), TypeError, "torch.Generator or a list of one per image, but got 0"),
        (dict(generator=[0]), TypeError, r"torch.Generator or a list of one per image, but got \[0\]"),
        (dict(generator=tuple(seeded(0))), TypeError, r"torch.Generator or a list of one per image, but got \(<"),
        (dict(output_type="image"), ValueError, r"one of \('pil', 'np', 'pt', 'latent'\), but got 'image'"),
        (dict(output_type=None), ValueError, "`output_type` must be one of .*but got None"),
        (dict(latents=torch.zeros(1, 3, 9, 9)), ValueError, r"\(1, 3, 7, 10\), but got \(1, 3, 9, 9\)"),
        (dict(class_labels=0), ValueError, "unconditional|takes no classes"),
        (dict(callback_on_step_end_tensor_inputs=["sigma"]), ValueError, r"\['latents'\], but got \['sigma'\]"),
    ],
)
def test_wrong_arguments(pipe, arguments, error, match):
    with pytest.raises(error, match=match):
        sample(pipe, **arguments)


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
    with pytest.raises(error, match=match):
        pipe(**{**inputs(pipe, [0]), "image": image})


@from_images
@pytest.mark.parametrize("refined", [False])
@pytest.mark.parametrize("strength, steps", [(1.0, 10), (0.3, 3), (0.01, 1)])
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
