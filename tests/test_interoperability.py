"""DFUModel among other tools: PEFT, single files, torch.export, ONNX, compilers, offloading, diffusers' training."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import redraw
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sampling import assert_near, silent
from torch import nn

from dfu_diffusers import DFUModel, DFUPipeline, EDMHeunScheduler
from dfu_diffusers.data.portraits import portrait_parameters, render_portraits
from dfu_diffusers.models import resampling, spectral
from dfu_diffusers.models.layers import DualConv2d

ATTENTION, CONV_1X1, CONV_3X3 = ["qkv", "proj"], ["skip"], ["spatial"]
SPECTRAL = ["spectral.weight"]
CPU = torch.device("cpu")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_model(make_model):
    """Two levels, of which only the upper one is dual: quick to trace."""
    return make_model(block_out_channels=(4, 8), fourier_modes=((4, 3), None), attention_levels=())


@pytest.fixture
def pipe(make_pipe):
    return make_pipe()


def generate(pipe, **arguments):
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 13, "width": 10, "num_inference_steps": 2, "output_type": "pt", **arguments}
    return pipe(generator=generator, **arguments).images


# --- LoRA ---


@pytest.fixture
def lora():
    """Factory of LoRA configurations; by default their layers start with random values rather than without effect."""
    peft = pytest.importorskip("peft")

    def make(modules=(), parameters=(), init=False, **options):
        return peft.LoraConfig(
            r=2, lora_alpha=4, target_modules=list(modules), target_parameters=list(parameters) or None,
            init_lora_weights=init, **options,
        )  # fmt: skip

    return make


EVERYTHING = (ATTENTION + CONV_1X1 + CONV_3X3, SPECTRAL)


@pytest.mark.parametrize(
    "modules, parameters, expected",
    [
        (ATTENTION, [], {"attention.qkv", "attention.proj"}),
        (CONV_1X1, [], {"skip"}),
        (CONV_3X3, [], {"conv1.spatial", "conv2.spatial", "conv_in.spatial", "conv_out.spatial"}),
        ([], SPECTRAL, {"conv1.spectral", "conv2.spectral", "conv_in.spectral", "conv_out.spectral"}),
    ],
    ids=["attention", "1x1", "3x3", "spectral"],
)
def test_lora_reaches_each_kind_of_layer(make_model, lora, modules, parameters, expected):
    model, x = make_model(), draw(2, 3, 13, 10)
    before = model(x, 0.1).sample
    model.add_adapter(lora(modules, parameters))
    assert (model(x, 0.1).sample - before).abs().max() > 1e-2
    adapted = [name.split(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name]
    assert {".".join(name.split(".")[-2:]) if "skip" not in name else "skip" for name in adapted} == expected
    model(x, 0.1).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


def test_lora_round_trip(make_model, lora, tmp_path):
    model, x = make_model(), draw(2, 3, 13, 10)
    before = model(x, 0.1).sample
    model.add_adapter(lora(*EVERYTHING, init=True), "style")
    assert_near(model(x, 0.1).sample, before)  # B starts at zero
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # while B is zero, A has no gradient
        F.mse_loss(model.train()(x, 0.1).sample, torch.ones_like(x)).backward()
        optimizer.step()
    trained = model.eval()(x, 0.1).sample
    assert (trained - before).abs().max() > 1e-2

    model.disable_adapters()
    assert_near(model(x, 0.1).sample, before)
    model.enable_adapters()
    assert torch.equal(model(x, 0.1).sample, trained)

    model.save_lora_adapter(tmp_path, "style")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = make_model()
    fresh.load_lora_adapter(tmp_path, adapter_name="style")
    assert torch.equal(fresh(x, 0.1).sample, trained)
    fresh.delete_adapters("style")
    assert_near(fresh(x, 0.1).sample, before)


@pytest.mark.parametrize("modules, parameters", [EVERYTHING, (ATTENTION, [])], ids=["everything", "attention"])
def test_fuse_and_unload_lora(make_model, lora, tmp_path, modules, parameters):
    model, x = make_model(), draw(2, 3, 13, 10)
    before = model(x, 0.1).sample
    model.add_adapter(lora(modules, parameters))
    adapted = model(x, 0.1).sample
    model.save_lora_adapter(tmp_path)
    model.fuse_lora()
    assert_near(model(x, 0.1).sample, adapted)
    model.unfuse_lora()
    assert_near(model(x, 0.1).sample, adapted)
    model.disable_adapters()
    assert_near(model(x, 0.1).sample, before)

    model = make_model()
    model.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(model(x, 0.1).sample, adapted)
    model.unload_lora()
    assert_near(model(x, 0.1).sample, before)
    assert set(model.state_dict()) == set(make_model().state_dict())


def test_two_loras_at_once(make_model, lora, tmp_path):
    model, x = make_model(), draw(2, 3, 13, 10)
    before = model(x, 0.1).sample
    outputs = {}
    for name in ("style2", "style"):  # a name that is part of another one
        other = make_model()
        other.add_adapter(lora(*EVERYTHING), name)
        outputs[name] = other(x, 0.1).sample
        other.save_lora_adapter(tmp_path / name, name)
        model.load_lora_adapter(tmp_path / name, adapter_name=name)
    for name in ("style2", "style"):
        model.set_adapters(name)
        assert_near(model(x, 0.1).sample, outputs[name])
    model.set_adapters(["style2", "style"], [0.0, 0.0])
    assert_near(model(x, 0.1).sample, before)
    model.set_adapters(["style2", "style"], [1.0, 0.5])
    assert min((model(x, 0.1).sample - output).abs().max() for output in outputs.values()) > 1e-2


def test_lora_in_a_pipeline(pipe, lora, tmp_path):
    """`pipe.load_lora_weights` is for the pipelines that diffusers knows; ours has one network to ask."""
    before = generate(pipe)
    pipe.unet.add_adapter(lora(*EVERYTHING), "style")
    styled = generate(pipe)
    assert (styled - before).abs().max() > 1e-2
    pipe.unet.save_lora_adapter(tmp_path, "style")
    pipe.unet.unload_lora()
    assert_near(generate(pipe), before)
    pipe.unet.load_lora_adapter(tmp_path)
    assert torch.equal(generate(pipe), styled)
    assert not hasattr(pipe, "load_lora_weights")


def test_limits_of_lora_are_told(make_model, lora):
    with pytest.raises(ValueError, match="SpectralConv2d.* is not supported"):
        make_model().add_adapter(lora(["spectral"]))
    for option in (dict(lora_dropout=0.1), dict(use_dora=True)):
        with pytest.raises(ValueError, match="does not work with"):
            make_model().add_adapter(lora([], SPECTRAL, **option))


@pytest.mark.parametrize("modules, parameters", [EVERYTHING, (ATTENTION, [])], ids=["everything", "attention"])
@pytest.mark.parametrize("bare", [False, True], ids=["second", "first"])
def test_a_refused_lora_leaves_the_model_as_it_was(make_model, lora, tmp_path, modules, parameters, bare):
    model, other, x = make_model(), make_model(block_out_channels=(8, 12, 12)), draw(1, 3, 8, 8)
    model.add_adapter(lora(modules, parameters))
    model.save_lora_adapter(tmp_path)
    if not bare:
        other.add_adapter(lora(modules, parameters), "first")
        other.set_adapters("first", 0.7)
    before = other(x, 0.1).sample
    trained = {name for name, p in other.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="another configuration"):
        other.load_lora_adapter(tmp_path, adapter_name="second")
    assert torch.equal(other(x, 0.1).sample, before)
    assert {name for name, p in other.named_parameters() if p.requires_grad} == trained
    assert list(getattr(other, "peft_config", {})) == ([] if bare else ["first"])


def test_lora_names_and_arguments_that_do_not_fit(make_model, lora, tmp_path):
    model = make_model()
    model.add_adapter(lora(*EVERYTHING), "style")
    model.save_lora_adapter(tmp_path, "style")
    with pytest.raises(ValueError, match="an adapter 'style' already"):
        model.load_lora_adapter(tmp_path, adapter_name="style")
    for wrong, kind, message in (
        ({"prefix": "unet"}, ValueError, "without a prefix, but got prefix='unet'"),
        ({"use_safetensors": False}, ValueError, "from safetensors"),
        ({"hotswap": True}, TypeError, "takes no hotswap"),
        ({"adaptername": "x", "weights_name": "y"}, TypeError, "takes no adaptername, weights_name"),
    ):
        with pytest.raises(kind, match=message):
            make_model().load_lora_adapter(tmp_path, **wrong)


@pytest.mark.parametrize("option", ["dora", "bias", "rslora"])
def test_kinds_of_lora_on_layers_that_peft_knows(make_model, lora, tmp_path, option):
    options = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}, "rslora": {"use_rslora": True}}[option]
    model, fresh, x = make_model(), make_model(), draw(1, 3, 8, 9)
    model.add_adapter(lora(ATTENTION + CONV_3X3, **options))
    model.save_lora_adapter(tmp_path)
    fresh.load_lora_adapter(tmp_path)
    assert torch.equal(fresh(x, 0.1).sample, model(x, 0.1).sample)


def test_a_lora_without_metadata(make_model, lora, tmp_path):
    """As older releases of diffusers wrote them: ranks are read off the shapes, and alpha is the rank."""
    model, x = make_model(), draw(1, 3, 8, 9)
    model.add_adapter(lora(ATTENTION + CONV_3X3))
    model.peft_config["default"].lora_alpha = 2
    model.set_adapters("default", 0.5)
    model.save_lora_adapter(tmp_path)
    fresh = make_model()
    fresh.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert torch.equal(fresh(x, 0.1).sample, model(x, 0.1).sample)


def test_metadata_cannot_ask_for_more_than_lora_layers(make_model, lora, tmp_path):
    model, fresh, x = make_model(), make_model(), draw(1, 3, 8, 9)
    model.add_adapter(lora(ATTENTION))
    model.save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])

    def save(**changes):
        text = {"format": "pt", "lora_adapter_metadata": json.dumps({**metadata, **changes})}
        save_file(load_file(path), path, metadata=text)

    for odd in (
        {"megatron_config": {"x": 1}}, {"loftq_config": {"loftq_bits": 4}}, {"layer_replication": [[0, 1]]},
        {"bias": "all"}, {"peft_type": "LOKR"}, {"modules_to_save": ["conv_in"]}, {"an_option_of_tomorrow": 1},
    ):  # fmt: skip
        save(**odd)
        with pytest.raises(TypeError, match=f"ask for {next(iter(odd))}, but only r, lora_alpha"):
            fresh.load_lora_adapter(path)

    # What only describes the file is not heeded: "pissa" would rewrite the model's own weights.
    remarks = {"init_lora_weights": "pissa", "auto_mapping": {"parent_library": "evil"}, "peft_version": "99"}
    save(**remarks, an_option_of_tomorrow=None)
    fresh.load_lora_adapter(path)
    assert torch.equal(fresh(x, 0.1).sample, model(x, 0.1).sample)
    fresh.unload_lora()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), make_model().parameters()))


def test_lora_is_never_pickled_nor_unpickled(make_model, make_refiner, lora, tmp_path):
    for make, modules in ((make_model, ATTENTION), (make_refiner, ["conv1"])):
        model = make()
        model.add_adapter(lora(modules))
        with pytest.raises(ValueError, match="saves safetensors only, but got safe_serialization=False"):
            model.save_lora_adapter(tmp_path, safe_serialization=False)
        assert not list(tmp_path.iterdir())
        (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps({"conv": 1}))
        with pytest.raises((OSError, ValueError), match="safetensors"):
            make().load_lora_adapter(tmp_path)
        (tmp_path / "pytorch_lora_weights.bin").unlink()


@pytest.mark.slow
def test_fused_lora_compiles(small_model, lora):
    torch._dynamo.reset()
    x = draw(2, 3, 13, 10)
    small_model.add_adapter(lora(CONV_3X3, SPECTRAL))
    small_model.fuse_lora()
    expected = small_model(x, 0.1).sample
    compiled = torch.compile(small_model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x, 0.1).sample, expected)


# --- Export: sizes that are symbols ---


@pytest.mark.parametrize(
    "config",
    [dict(), dict(conv_type="spectral"), dict(spectral_boundary=("mirror", "periodic"), tileable="x")],
    ids=["dual", "spectral", "boundaries"],
)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (4, 7), (13, 10), (33, 57)])
def test_branch_for_symbolic_sizes(make_model, monkeypatch, config, size):
    """What a graph holds, run as it is: all modes with zeros for those a grid cannot resolve, and one formula to
    resize by."""
    model, x = make_model(fourier_modes=((4, 3), 2, (3, 2)), **config), draw(2, 3, *size)
    expected = model(x, 0.1).sample
    for module in (resampling, spectral):
        monkeypatch.setattr(module, "_is_symbolic", lambda *sizes: True)
    spectral._cached_fourier_matrices.clear()
    assert_near(model(x, 0.1).sample, expected)
    spectral._cached_fourier_matrices.clear()


def test_symbolic_resizing_at_all_sizes():
    """Between n and (n + 1) / 2, upwards where a centre lies between two pixels included (n = 3, 7, 11, ...)."""
    for n in range(1, 130):
        half = (n + 1) // 2
        x = draw(1, 2, n, 1, seed=n)
        shrunk = resampling._resize_symbolic(x, half, 2)
        torch.testing.assert_close(shrunk, resampling.resample(x, (half, 1)))
        grown = resampling._resize_symbolic(shrunk, n, 2)
        torch.testing.assert_close(grown, resampling.resample(shrunk, (n, 1)))


SIZES = [(2, 22, 19), (1, 16, 16), (3, 33, 50), (1, 3, 7)]  # batch, height, width


@pytest.mark.slow  # test_export_of_layers is the quick form
def test_torch_export(small_model):
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in dict(b=1, h=3, w=3).items())
    program = torch.export.export(
        small_model,
        (draw(2, 3, 22, 19), draw(2)),
        dynamic_shapes=({0: batch, 2: height, 3: width}, {0: batch}),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    exported = program.module()
    for images, *size in SIZES:
        x, t = draw(images, 3, *size), draw(images)
        assert_near(exported(x, t).sample, small_model(x, t).sample)


@pytest.mark.slow
def test_torch_export_of_one_size_keeps_the_modes_it_has(small_model):
    x = draw(1, 3, 5, 4)
    program = torch.export.export(small_model, (x, 0.1))
    assert_near(program.module()(x, 0.1).sample, small_model(x, 0.1).sample)


class DownAndUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = DualConv2d(2, 3, (4, 3)), DualConv2d(3, 2, None)

    def forward(self, x):
        height, width = x.shape[-2:]
        return self.up(self.down(x, ((height + 1) // 2, (width + 1) // 2)), (height, width))


def test_export_of_layers(tmp_path):
    """By torch.export and to ONNX: the parts that depend on the size. The whole model takes longer."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    layers = redraw(DownAndUp())
    batch, height, width = (torch.export.Dim(name, min=least) for name, least in dict(b=1, h=3, w=3).items())
    program = torch.export.export(
        layers,
        (draw(2, 2, 10, 7),),
        dynamic_shapes=({0: batch, 2: height, 3: width},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    torch.onnx.export(program, input_names=["x"], verbose=False).save(tmp_path / "layers.onnx")
    exported = program.module()
    session = onnxruntime.InferenceSession(tmp_path / "layers.onnx", providers=["CPUExecutionProvider"])
    for images, *size in [*SIZES, (2, 1, 1), (1, 99, 115)]:
        x = draw(images, 2, *size)
        (result,) = session.run(None, {"x": x.numpy()})
        if min(size) > 2:  # as told to torch.export
            assert_near(exported(x), layers(x))
        torch.testing.assert_close(torch.from_numpy(result), layers(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", ["0", "32x", "big"])
def test_sizes_that_are_none_to_check_an_export_at(capsys, wrong):
    pytest.importorskip("onnxruntime")
    from examples import export_onnx

    with pytest.raises(SystemExit):
        export_onnx.main(["--sizes", "32", wrong])
    assert f"in whole pixels, such as 64 or 64x96, not '{wrong}'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, 3])
def test_onnx_of_a_model(make_model, tmp_path, capsys, classes):
    """One file, any batch, height and width: odd, non-square and single pixels included."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from examples import export_onnx

    changes = dict(num_class_embeds=3, block_out_channels=(8, 12), fourier_modes=((4, 3), 2)) if classes else {}
    model = make_model(**changes)
    DFUPipeline(model, EDMHeunScheduler()).save_pretrained(tmp_path / "model")
    file = tmp_path / "folder" / "model.onnx"
    sizes = ["16", "33x50", "19x7", "1"]
    export_onnx.main(["--model", str(tmp_path / "model"), "--output", str(file), "--sizes", *sizes])
    assert capsys.readouterr().out.count("largest difference from torch") == len(sizes)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    shapes = {argument.name: argument.shape for argument in session.get_inputs()}
    assert shapes["sample"] == ["batch", 3, "height", "width"] and shapes["timestep"] == ["batch"]
    assert ("class_labels" in shapes) == bool(classes)
    for images, *size in SIZES:
        assert export_onnx.largest_difference(model, session, images, *size) < 1e-4


# --- Compilation and memory ---


def test_pipeline_with_a_compiled_model(small_model):
    torch._dynamo.reset()
    pipe = silent(DFUPipeline(small_model, EDMHeunScheduler()))
    expected = generate(pipe)
    keys = set(small_model.state_dict())
    pipe.unet.compile(fullgraph=True, backend="eager")
    assert_near(generate(pipe), expected)
    assert set(pipe.unet.state_dict()) == keys  # compiled in place: it saves as before


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_pipeline_with_a_compiled_model_by_other_backends(small_model, backend, regional):
    torch._dynamo.reset()
    pipe = silent(DFUPipeline(small_model, EDMHeunScheduler()))
    expected = generate(pipe)
    (pipe.unet.compile_repeated_blocks if regional else pipe.unet.compile)(fullgraph=True, backend=backend)
    torch.testing.assert_close(generate(pipe), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_of_a_pipeline(pipe, kind):
    expected = generate(pipe)
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)
    assert_near(generate(pipe), expected)


def test_group_offload_with_lora(pipe, lora, tmp_path):
    pipe.unet.add_adapter(lora(*EVERYTHING))
    expected = generate(pipe)
    pipe.unet.save_lora_adapter(tmp_path)
    pipe.unet.unload_lora()
    pipe.unet.load_lora_adapter(tmp_path)
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    assert_near(generate(pipe), expected)


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map_of_a_pipeline(pipe, tmp_path, device_map):
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = silent(DFUPipeline.from_pretrained(tmp_path, device_map=device_map))
    assert_near(generate(loaded), expected)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}], ids=str)
def test_device_map_of_a_model(make_model, tmp_path, device_map):
    model, x = make_model(), draw(1, 3, 8, 8)
    model.save_pretrained(tmp_path)
    loaded = DFUModel.from_pretrained(tmp_path, device_map=device_map)
    assert_near(loaded.cpu()(x, 0.1).sample, model(x, 0.1).sample)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about machines without an accelerator")
def test_cpu_offload_without_an_accelerator(pipe):
    """Nothing to save memory on, and diffusers says so."""
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["model", "sequential", "group", "stream", "layerwise", "compile", "regional"])
def test_pipeline_on_an_accelerator(pipe, way):
    torch._dynamo.reset()
    expected = generate(pipe)
    cuda = torch.device("cuda")
    if way == "model":
        pipe.enable_model_cpu_offload()
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload()
    elif way in ("group", "stream"):
        pipe.enable_group_offload(cuda, offload_type="leaf_level", use_stream=way == "stream")
    else:
        pipe.to(cuda)
    if way == "layerwise":
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    elif way == "compile":
        pipe.unet.compile()
    elif way == "regional":
        pipe.unet.compile_repeated_blocks()
    images = generate(pipe).cpu()
    if way == "layerwise":  # weights of 8 bits: another picture, but one
        assert images.isfinite().all()
    else:
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-2)


# --- diffusers' unconditional training: the model is the one line that changes ---


@pytest.mark.parametrize("name", ["UNet2DModel", "DFUModel"])
def test_unconditional_training_by_one_line(name, tmp_path):
    torch.manual_seed(0)
    images = render_portraits(portrait_parameters(range(8)), 16, 16)
    if name == "UNet2DModel":
        model = UNet2DModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    else:
        model = DFUModel(
            sample_size=16, block_out_channels=(8, 16), layers_per_block=1, fourier_modes=(4, None), dropout=0.0,
            attention_levels=(),
        )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(images),))
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.unet).__name__ == name
    images = pipe(batch_size=2, num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and images.std() > 0
