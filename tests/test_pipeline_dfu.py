"""DFUPipeline: sizes, noise, callbacks, samplers, saved folders and bad input, with tiny models and no network."""

import inspect
import json
import math
import re

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
    EulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.callbacks import PipelineCallback
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import GaussianDenoiser, assert_near, relative_error, sample, seeded, silent, spy

from dfu_diffusers import DFUModel, DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.pipelines.noise import nested_noise

SCHEDULERS = [EDMHeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


@pytest.mark.parametrize("s_churn", [0.0, 20.0])
@pytest.mark.parametrize("strategy", ["direct", "cascade"])
def test_sampling_waits_for_values_only_at_its_end(make_pipe, monkeypatch, strategy, s_churn):
    """A meta tensor has no values, so that asking for one fails where a GPU would make the CPU wait."""
    monkeypatch.setattr(DFUPipeline, "_check_finite", lambda *args: None)
    pipe = make_pipe(scheduler=EDMHeunScheduler(s_churn=s_churn))
    pipe.unet.to("meta")
    images = pipe(height=12, width=12, num_inference_steps=3, output_type="latent", strategy=strategy).images
    assert images.is_meta and images.shape == (1, 3, 12, 12)


# --- Sizes ---


@pytest.fixture(scope="module")
def small_pipe(make_pipe):
    return make_pipe()


@settings(max_examples=25, deadline=None)
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


def test_integers_of_numpy_and_torch_are_integers(pipe):
    result = sample(pipe, np.int64(2), batch_size=torch.tensor(2), height=np.int64(4), width=np.uint8(5))
    assert result.shape == (2, 3, 4, 5)


# --- Output types ---


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_modes_at_a_side_of_one_pixel(make_pipe, channels, mode, size):
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


# --- Noise and batches ---


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


def test_models_go_into_evaluation_mode_when_a_pipeline_gets_them(make_model):
    unet, guide = make_model(dropout=0.5).train(), make_model().train()
    pipe = silent(DFUPipeline(unet, EDMHeunScheduler()))
    assert torch.equal(sample(pipe), sample(pipe))  # dropout would tell them apart
    pipe.guide = guide
    assert not unet.training and not guide.training
    unet.train()
    sample(pipe, 1)
    assert unet.training  # calls change nothing


# --- Callbacks, counts and progress ---


def test_progress_bar_is_filled(make_model, capsys):
    pipe = DFUPipeline(make_model(), EDMHeunScheduler())
    sample(pipe, 3, batch_size=2, max_batch_size=1, height=2, width=2)
    assert "5/5" in capsys.readouterr().err


def test_official_callback_classes(pipe):
    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": 0 * callback_kwargs["latents"]}

    zero = Zero(cutoff_step_ratio=1.0)
    result = sample(pipe, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=[])
    assert result.abs().sum() == 0, "the class itself says which tensors it needs"


def test_call_signature_follows_diffusers():
    parameters = inspect.signature(DFUPipeline.__call__).parameters
    expected = [
        "batch_size", "height", "width", "num_inference_steps", "octave_steps", "class_labels", "guidance_scale",
        "generator", "latents", "output_type", "return_dict", "callback_on_step_end",
        "callback_on_step_end_tensor_inputs", "max_batch_size", "strategy", "tileable", "retired",
    ]  # fmt: skip
    assert list(parameters)[1:] == expected
    assert all(parameters[name].default is not inspect.Parameter.empty for name in expected[:-1])
    assert parameters["num_inference_steps"].default == 18 and parameters["output_type"].default == "pil"
    assert parameters["callback_on_step_end_tensor_inputs"].default == ["latents"]


@pytest.mark.parametrize(
    "name, instead",
    [
        ("nested_noise", "noise is always nested now; pass other noise as `latents`"),
        ("noise_shift", "load the pipeline with a `refiner`"),
        ("fixed_levels", "load the pipeline with a `refiner`"),
        ("spectral_gain", "load the pipeline with a `refiner`"),
        ("cascade_sigma", "it is 0.25 now"),
        ("cascade_hold", "it is 0.25 now"),
        ("tile_size", "see `enable_tiling`"),
        ("tile_overlap", "see `enable_tiling`"),
    ],
)
def test_retired_arguments_name_what_to_use(pipe, name, instead):
    with pytest.raises(TypeError, match=f"`{name}` was retired: .*{re.escape(instead)}.*CHANGELOG.md"):
        pipe(**{name: 1})


def test_unknown_arguments(pipe):
    with pytest.raises(TypeError, match="The pipeline has no argument `steps`"):
        pipe(steps=4)


# --- Class labels ---


def test_class_labels_in_every_form(make_pipe):
    pipe = make_pipe(num_class_embeds=3)
    expected, three = sample(pipe, batch_size=3, class_labels=2), torch.tensor([2, 2, 2])
    for labels in ([2, 2, 2], (2, 2, 2), three, three.byte(), torch.tensor(2), np.int64(2)):
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
        (torch.tensor(True), TypeError),
        (math.nan, TypeError),
    ],
)
def test_wrong_counts(small_pipe, name, value, error):
    message = f"`{name}` must be an integer of at least 1, but got {value!r}: pass one, or leave it out"
    with pytest.raises(error, match=re.escape(message)):
        small_pipe(**{"num_inference_steps": 1, name: value})


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
    ],
)
def test_wrong_latents(pipe, arguments, error, match):
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
    pipe = silent(DFUPipeline(GaussianDenoiser(), scheduler_class()))
    batch = 2000 // math.prod(size) + 1
    kwargs = dict(batch_size=batch, height=size[0], width=size[1])
    noise = nested_noise((batch, 2, *size), seeded(0))
    result = sample(pipe, steps, **kwargs)
    torch.testing.assert_close(result, 0.3 + 0.2 * noise, atol=0.02, rtol=0)
    assert abs(result.mean() - 0.3) < 0.02 and abs(result.std() - 0.2) < 0.01


def test_exact_denoiser_with_churn_keeps_the_distribution():
    pipe = silent(DFUPipeline(GaussianDenoiser(), EDMHeunScheduler(s_churn=40)))
    result = sample(pipe, 100, batch_size=8, height=23, width=40)
    assert abs(result.mean() - 0.3) < 0.01 and abs(result.std() - 0.2) < 0.01


def test_a_stock_unet(make_pipe):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipe = silent(DFUPipeline(unet, EDMHeunScheduler()))
    timesteps = []
    with spy(unet, lambda x, t, *_: timesteps.append(t)):
        result = sample(pipe, height=8, width=12)
    assert result.shape == (1, 3, 8, 12) and result.isfinite().all()
    assert torch.equal(torch.stack(timesteps), pipe.scheduler.timesteps), "timesteps must arrive unrounded"


def test_a_model_without_sample_size_needs_both_sides():
    unet = UNet2DModel(
        block_out_channels=(32,), layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipe = silent(DFUPipeline(unet, EDMHeunScheduler()))
    assert sample(pipe, 1, height=2, width=3).shape == (1, 3, 2, 3)
    with pytest.raises(TypeError, match="`width` must be an integer of at least 1, but got None"):
        sample(pipe, 1, height=2)


# --- Dtypes and devices ---


def test_half_precision_latents_are_welcome(pipe):
    noise = torch.randn(1, 3, 16, 16, generator=seeded(0)).half()
    assert_near(sample(pipe, latents=noise), sample(pipe, latents=noise.float()))


def test_float8_storage(pipe):
    expected = sample(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert relative_error(sample(pipe), expected) < 0.5
    weights = dict(pipe.unet.named_parameters())
    assert weights["down_blocks.0.conv1.spectral.weight"].dtype == torch.float8_e4m3fn  # as torch's own layers
    assert weights["conv_out.spectral.weight"].dtype == torch.float32  # which decides on the result


def test_components_and_offload_attributes(pipe):
    assert set(pipe.components) == {"unet", "scheduler", "guide", "refiner"}
    assert list(inspect.signature(DFUPipeline.__init__).parameters)[1:] == ["unet", "scheduler", "guide", "refiner"]
    assert pipe.model_cpu_offload_seq == "unet->guide->refiner" and pipe._optional_components == ["guide", "refiner"]
    assert pipe._callback_tensor_inputs == ["latents"]


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
    """The folder of a saved pipeline, and its sample when loaded."""
    folder = tmp_path_factory.mktemp("saved")
    make_pipe(sample_size=(6, 9)).save_pretrained(folder)
    return folder, sample(silent(DFUPipeline.from_pretrained(folder)))


def test_saved_folder(saved):
    folder = saved[0]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


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
    again = silent(DiffusionPipeline.from_pretrained(tmp_path))
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
    pipe = silent(DFUPipeline.from_pretrained(tmp_path, variant="fp16"))
    assert torch.equal(sample(pipe), saved[1])
    with pytest.raises(ValueError, match="variant=fp16"):
        DFUPipeline.from_pretrained(saved[0], variant="fp16")


def test_components_come_from_a_stock_pipeline(pipe):
    expected = sample(pipe)
    stock = silent(DFUPipeline.from_pipe(DDPMPipeline(pipe.unet, DDPMScheduler()), scheduler=pipe.scheduler))
    assert stock.unet is pipe.unet and torch.equal(sample(stock), expected)


def test_tileable(make_pipe):
    """Shifted noise gives the shifted image, by what the levels divide the sides by."""
    pipe = make_pipe()
    pipe.register_modules(guide=make_pipe(block_out_channels=(8, 8, 8)).unet)
    arguments = dict(height=16, width=32, num_inference_steps=2, output_type="latent")
    latents = torch.randn(1, 3, 16, 32, generator=seeded(0))

    def error(axes, shift, **options):
        noises = latents, latents.roll(shift, (2, 3))
        image, moved = (pipe(latents=x, tileable=axes, **options, **arguments).images for x in noises)
        return ((moved - image.roll(shift, (2, 3))).norm() / image.norm()).item()

    assert error("xy", (8, 16), guidance_scale=2.0) < 1e-4  # the guide, too
    assert error("x", (0, 16)) < 1e-4 < 1e-2 < error(None, (0, 16))
    with pytest.raises(ValueError, match="must be 'x', 'y', 'xy' or None, but got 'z'"):
        pipe(tileable="z")
    blocks = dict(down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], block_out_channels=[4])
    pipe = DFUPipeline(UNet2DModel(16, **blocks, norm_num_groups=2), EDMHeunScheduler())
    with pytest.raises(ValueError, match="`tileable='x'` needs models that take it, but got a UNet2DModel"):
        pipe(tileable="x")


def test_a_compiled_model_is_a_model(make_pipe):
    """torch.compile's wrapper has no truth value. What it wraps runs uncompiled here, which is quicker."""
    pipe = make_pipe()
    expected = sample(pipe)
    with torch.compiler.set_stance("force_eager"):
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        assert_near(sample(pipe), expected)
        pipe.guide = torch.compile(make_pipe(block_out_channels=(8, 8, 8)).unet, backend="eager")
        assert sample(pipe, guidance_scale=2.0).isfinite().all()


class CosineLevels(EDMEulerScheduler):
    """Tells noise levels as diffusers' CosineDPMSolverMultistepScheduler does."""

    def precondition_noise(self, sigma):
        return torch.atan(sigma) * 2 / math.pi


@pytest.mark.parametrize(
    "scheduler, match",
    [
        (DDIMScheduler(), "must precondition the network as EDM does, but DDIMScheduler does not: use `EDMHeunSch"),
        (EulerDiscreteScheduler.from_config(EDMHeunScheduler().config), "but EulerDiscreteScheduler does not"),
        (CosineLevels(), "but CosineLevels does not"),
        (EDMEulerScheduler(prediction_type="sample"), "`prediction_type` .*, but EDMEulerScheduler has 'sample'"),
        (EDMEulerScheduler(sigma_data=0.0), "`sigma_data` must be a positive number, but EDMEulerScheduler has 0.0"),
    ],
)
def test_schedulers_that_cannot_sample(make_pipe, scheduler, match):
    with pytest.raises(ValueError, match=match):
        make_pipe(scheduler)(num_inference_steps=1)


def test_a_component_in_place_of_none_is_saved(pipe, make_model, make_refiner, tmp_path):
    pipe.guide, pipe.refiner = make_model(), make_refiner()
    pipe.save_pretrained(tmp_path)
    loaded = DFUPipeline.from_pretrained(tmp_path)
    assert type(loaded.guide) is DFUModel and type(loaded.refiner) is DFURefiner
    pipe.guide = None
    pipe.save_pretrained(tmp_path / "without")
    assert DFUPipeline.from_pretrained(tmp_path / "without").guide is None


def test_folders_from_before_there_was_a_guide(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index.pop("guide") == [None, None]
    (saved[0] / "model_index.json").write_text(json.dumps(index))
    assert DiffusionPipeline.from_pretrained(saved[0]).guide is None
