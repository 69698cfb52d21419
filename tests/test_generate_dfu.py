"""examples/generate_dfu.py on a tiny saved pipeline."""

import numpy as np
import pytest
import torch
from PIL import Image

from dfu_diffusers import DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.command_line import SCHEDULERS
from examples import generate_dfu


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    """Folders of two saved pipelines, an unconditional and a class-conditional one."""
    folders = []
    for overrides in ({}, {"num_class_embeds": 3}):
        folders.append(str(tmp_path_factory.mktemp("model")))
        pipe = DFUPipeline(make_model(sample_size=(6, 9), **overrides), EDMHeunScheduler(sigma_max=40.0))
        pipe.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def generate(saved, tmp_path):
    """Run the script on the CPU; returns its files."""

    def run(*options, model=saved[0]):
        fixed = ["--model", model, "--num_inference_steps", 2, "--device", "cpu", "--output_dir", tmp_path / "out"]
        return generate_dfu.main([str(option) for option in [*fixed, *options]])

    return run


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def test_files_are_named_by_seed_and_size(generate, tmp_path, capsys):
    files = generate("--sizes", "5", "4x7", "--batch_size", 2, "--seed", 8)
    names = ["seed8_5x5.png", "seed9_5x5.png", "seed8_4x7.png", "seed9_4x7.png"]
    assert files == [tmp_path / "out" / name for name in names]
    assert [Image.open(file).size for file in files] == [(5, 5), (5, 5), (7, 4), (7, 4)]
    assert all(str(file) in capsys.readouterr().out for file in files[:1])


def test_size_comes_from_height_and_width_or_the_model(generate):
    assert generate()[0].name == "seed0_6x9.png"
    assert generate("--height", 4)[0].name == "seed0_4x9.png"
    assert generate("--height", 4, "--width", 3)[0].name == "seed0_4x3.png"


def test_image_is_the_pipelines_and_depends_on_its_seed_alone(generate, saved):
    pipe = DFUPipeline.from_pretrained(saved[0])
    expected = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(5)).images[0]
    alone = pixels(generate("--seed", 5)[0])
    np.testing.assert_array_equal(alone, np.asarray(expected))
    beside = generate("--seed", 3, "--batch_size", 4, "--max_batch_size", 3)
    assert abs(pixels(beside[2]) - alone).max() <= 1, "seed 5 is the third from seed 3"
    assert abs(pixels(beside[1]) - alone).max() > 20


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(generate, saved, name):
    pipe = DFUPipeline.from_pretrained(saved[0])
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.sigma_max == 40
    expected = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    np.testing.assert_array_equal(pixels(generate("--scheduler", name)[0]), np.asarray(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_make_nearly_the_same_image(generate, dtype):
    reference = pixels(generate()[0])
    difference = abs(pixels(generate("--dtype", dtype)[0]) - reference).mean()
    assert 0 < difference < 20


def test_class_label(generate, saved):
    first, second = (pixels(generate("--class_label", label, model=saved[1])[0]) for label in (0, 2))
    assert abs(first - second).max() > 20


@pytest.mark.parametrize(
    "options, message",
    [
        (["--sizes", "4", "--height", "4"], "--sizes takes the place of --height and --width"),
        (["--sizes", "4xa"], "HEIGHT or HEIGHTxWIDTH"),
        (["--sizes", "0"], "HEIGHT or HEIGHTxWIDTH"),
        (["--height", "0"], "`height` must be an integer of at least 1, but got 0"),
        (["--width", "-4"], "`width` must be an integer of at least 1, but got -4"),
        (["--width", "4.5"], "argument --width: invalid int value"),
        (["--batch_size", "0"], "`batch_size` must be an integer of at least 1, but got 0"),
        (["--max_batch_size", "0"], "`max_batch_size` must be an integer of at least 1, but got 0"),
        (["--num_inference_steps", "0"], "`num_inference_steps` must be an integer of at least 1, but got 0"),
        (["--seed", "-1"], "--seed must lie in [0, 2^63), not -1"),
        (["--octave_steps", "0"], "`octave_steps` must be an integer of at least 1, but got 0"),
        (["--strategy", "octaves"], "strategy='octaves' needs a refiner"),
        (["--strategy", "guided"], "argument --strategy: invalid choice"),
        (["--class_label", "1"], "This model is unconditional"),
        (["--scheduler", "ddpm"], "argument --scheduler: invalid choice"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used here"),
        (["--model", "no/such/folder"], "--model: there is no folder no/such/folder"),
        (["--model", "tests"], "model_index.json"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options(generate, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        generate(*options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wrong_class_label(generate, saved, capsys):
    with pytest.raises(SystemExit):
        generate("--class_label", 3, model=saved[1])
    assert "one integer in [0, 3)" in capsys.readouterr().err


def test_default_is_the_checkpoint_of_this_repository():
    args = generate_dfu.get_parser().parse_args([])
    assert args.model.endswith("checkpoints/dfu-portraits") and args.model.startswith("/")
    assert str(args.output_dir) == "outputs/generated"


def test_strategy_guidance_and_tiling_reach_the_pipeline(generate, saved):
    pipe = DFUPipeline.from_pretrained(saved[1])
    options = dict(height=12, width=18, strategy="cascade", class_labels=1, guidance_scale=3.0, tileable="x")
    expected = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **options).images[0]
    given = ["--height", 12, "--width", 18, "--strategy", "cascade", "--class_label", 1, "--guidance_scale", 3]
    given += ["--tileable", "x"]
    np.testing.assert_array_equal(pixels(generate(*given, model=saved[1])[0]), np.asarray(expected))
    plain = pixels(generate("--height", 12, "--width", 18, "--class_label", 1, model=saved[1])[0])
    assert abs(plain - np.asarray(expected)).max() > 20
    for others in (given[:4] + given[6:], given[:8] + given[10:], given[:10]):  # one option less
        less = pixels(generate(*others, "--class_label", 1, model=saved[1])[0])
        assert abs(less - np.asarray(expected)).max() > 2


def test_octaves_are_the_default_with_a_refiner(generate, make_model, tmp_path):
    refiner = DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=12)
    pipe = DFUPipeline(make_model(sample_size=8), EDMHeunScheduler(), refiner=refiner)
    pipe.save_pretrained(tmp_path / "model")
    options = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    expected = np.asarray(pipe(octave_steps=3, **options).images[0])
    (file,) = generate("--octave_steps", 3, model=tmp_path / "model")
    assert expected.shape == (12, 12, 3)
    np.testing.assert_array_equal(pixels(file), expected)
    (file,) = generate("--strategy", "direct", model=tmp_path / "model")
    assert abs(pixels(file) - expected).max() > 20
