"""Publishing: real client, real sockets, and a stand-in for the Hub (hub_stand_in.py)."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import RepositoryNotFoundError

from dfu_diffusers import DFUPipeline, EDMHeunScheduler
from dfu_diffusers.hub import HubError, check_card, check_push, files_to_push, main, model_card, push_folder

pytest_plugins = "hub_stand_in"

TEMPLATE = Path(__file__).parent.parent / "model_card.md"
REPO = "me/tiny"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BELONGS = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}
FACTS = {
    "train_sizes": ["16", "16x24"],
    "advised_sizes": "12 to 24 px",
    "data": "Procedural portraits, series 0.",
    "command": "accelerate launch /home/ann/dfu/train_dfu.py --train_data_dir=/data/ann/faces --token hf_" + 34 * "s",
    "options": {"batch_size": 32, "output_dir": "/scratch/ann/run 7", "cache": r"D:\Users\ann\cache", "ema": None},
    "images_seen": 339_200,
    "hardware": "one core of a CPU",
    "time": "3 min",
    "final_loss": 0.0934,
    "validation": {"16": 0.102, "20": 0.1084},
    "limits": "Eyes break into patterns at 96 px.",
    "license": "apache-2.0",
    "datasets": ["ann/faces"],
    "commit": "1b5adb4",
}


@pytest.fixture(scope="session")
def pipe(make_model):
    pipe = DFUPipeline(make_model(), EDMHeunScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path):
    """What a training run leaves: the pipeline, its card and pictures, and much that is nobody's business."""
    folder = tmp_path / "run"
    pipe.save_pretrained(folder)
    private = ["checkpoint-2/model.safetensors", "checkpoint-2/optimizer.bin", "logs/events.out", "evil.pkl"]
    private += ["optimizer.bin", "unet/diffusion_pytorch_model.bin", "unet/evil.pkl", "unet/.config.json.partial"]
    private += ["unet/.hidden.json", "passport.png", "run.json", "args.json", "ema.safetensors"]
    for name in [*private, "samples.png", "loss.png", "loss.csv"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "README.md").write_text(model_card(TEMPLATE, folder, REPO, **FACTS))
    return folder


def run(code_or_module: list[str], environment: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, *code_or_module]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


# --- What is pushed ---


def test_only_what_belongs_is_listed_with_its_size(folder):
    listed = dict(files_to_push(folder))
    assert listed.keys() == BELONGS | {"README.md", "samples.png", "loss.png", "loss.csv"}
    assert all((folder / path).stat().st_size == size for path, size in listed.items())


def test_pictures_that_the_card_shows_go_along_if_they_lie_beside_it(folder):
    (folder / "demo.png").write_text("a picture")
    (folder.parent / "secret.png").write_text("not a picture of this model")
    card = folder / "README.md"
    card.write_text(
        card.read_text() + "![a](demo.png) ![b](../secret.png) ![c](missing.png) ![d](https://x.y/z.png)\n"
    )
    assert dict(files_to_push(folder)).keys() - BELONGS == {
        "README.md", "samples.png", "loss.png", "loss.csv", "demo.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    "index, message",
    [
        (None, "no model_index.json"),
        ("{", "no model_index.json"),
        ('{"../elsewhere": ["dfu_diffusers", "DFUModel"]}', "'../elsewhere', which is no name of a folder"),
        ('{"vae": ["diffusers", "AutoencoderKL"]}', "vae, a component of the pipeline, holds no .*save_pretrained"),
    ],
)
def test_a_folder_without_a_whole_pipeline_is_refused(folder, index, message):
    path = folder / "model_index.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(HubError, match=message):
        files_to_push(folder)


def test_pickled_weights_alone_are_refused(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(HubError, match="unet, a component of the pipeline, holds no .*safetensors weights"):
        files_to_push(folder)


# --- Push and load ---


def test_pushed_pipelines_load_in_a_fresh_process_and_draw_the_same_image(hub, folder, pipe, tmp_path):
    assert check_push("tiny", private=True) == REPO
    assert hub.repos[REPO].private
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"

    repo = hub.repos[REPO]
    assert [summary for _, summary, _ in repo.commits] == ["initial commit", "Upload DFUPipeline"]
    assert repo.files.keys() - {".gitattributes"} == dict(files_to_push(folder)).keys()
    assert all(content == (folder / path).read_bytes() for path, content in repo.files.items() if path[0] != ".")

    code = f"""
import sys
import numpy, torch, dfu_diffusers, diffusers
assert "dfu_diffusers.hub" not in sys.modules
images = []
for loader in (dfu_diffusers.DFUPipeline, diffusers.DiffusionPipeline):
    pipe = loader.from_pretrained({REPO!r})
    assert type(pipe) is dfu_diffusers.DFUPipeline
    images.append(pipe(height=13, width=18, num_inference_steps=2, output_type="np",
                       generator=torch.Generator().manual_seed(0)).images)
numpy.save({str(tmp_path / "images.npy")!r}, images)
"""
    result = run(["-c", code], hub.environment(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    expected = pipe(
        height=13, width=18, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    for image in np.load(tmp_path / "images.npy"):
        assert np.array_equal(image, expected)


def test_the_command_line_lists_then_pushes(hub, folder, capsys):
    main([str(folder), REPO, "--dry_run"])
    listing = capsys.readouterr().out
    assert hub.requests == [] and hub.repos == {}
    assert all(path in listing and f"{size:,}" in listing for path, size in files_to_push(folder))

    main([str(folder), REPO])
    assert not hub.repos[REPO].private
    assert capsys.readouterr().out == f"{listing}{hub.url}/{REPO}\n"

    main([str(folder), REPO])  # again, nothing having changed
    assert len(hub.repos[REPO].commits) == 2


def test_weights_of_an_earlier_push_go_and_other_files_stay(hub, folder):
    shards = {"unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"old", "LICENSE": b"theirs"}
    shards |= {"unet/diffusion_pytorch_model.safetensors.index.json": b"{}", "lora/weights.safetensors": b"theirs"}
    repo = hub.add_repo(REPO, **shards)
    push_folder(folder, REPO)
    assert repo.files.keys() - dict(files_to_push(folder)).keys() == {
        ".gitattributes", "LICENSE", "lora/weights.safetensors"
    }  # fmt: skip
    assert len(repo.commits) == 2


# --- Whether it may be pushed ---


def test_check_push_leaves_an_existing_repository_as_it_is(hub):
    repo = hub.add_repo(REPO, private=True)
    assert check_push(REPO) == check_push("tiny", private=True) == REPO
    assert repo.private and len(repo.commits) == 1 and hub.lfs == {}


def test_check_push_never_lets_a_private_run_go_public(hub):
    hub.add_repo(REPO)
    with pytest.raises(HubError, match="me/tiny is there already and public.*or choose another name"):
        check_push(REPO, private=True)


@pytest.mark.parametrize("name", ["", "a/b/c", "-tiny", "two words", "tiny.git", "a--b", "tiné", "me/"])
def test_check_push_refuses_malformed_names_without_asking(hub, name):
    with pytest.raises(HubError, match="cannot name a repository on the Hub.*use NAME or USER/NAME"):
        check_push(name)
    assert hub.requests == []


def assert_one_line(error) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and "hf_writer" not in text


def test_an_unknown_token_is_named(hub, folder):
    hub.add_repo(REPO)
    for call in (lambda: check_push(REPO, token="hf_wrong"), lambda: push_folder(folder, REPO, token="hf_wrong")):
        with pytest.raises(HubError, match="does not accept this token.*hf auth login") as error:
            call()
        assert_one_line(error)
    assert len(hub.repos[REPO].commits) == 1


def test_nobody_logged_in(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="Nobody is logged in.*hf auth login") as error:
        check_push(REPO)
    assert_one_line(error)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("repo_id, role", [(REPO, "read"), ("other/tiny", "write")])
def test_no_permission_is_found_before_training(hub, repo_id, role, exists):
    if exists:
        hub.add_repo(repo_id)
    with pytest.raises(HubError, match=f"may not write to {repo_id}.*write permission") as error:
        check_push(repo_id, token={"read": hub.READER, "write": hub.WRITER}[role])
    assert_one_line(error)


def test_a_repository_that_is_not_there(hub, folder):
    with pytest.raises(HubError, match="sees no repository me/tiny.*check the name") as error:
        push_folder(folder, REPO)
    assert_one_line(error)


def test_no_network(hub, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(HubError, match="did not answer .*refused.*check the network and try again") as error:
            check_push(REPO)
    assert_one_line(error)


def test_offline_mode_as_a_command(hub, folder, tmp_path):
    environment = {**hub.environment(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = run(["-m", "dfu_diffusers.hub", str(folder), REPO], environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "me/tiny cannot be reached: offline mode is on. Unset HF_HUB_OFFLINE to push."
    )
    assert "Traceback" not in result.stderr and hub.requests == []


# --- Faults on the way ---


@pytest.mark.parametrize("where", ["whoami", "create", "preupload", "objects/batch", "PUT /lfs", "verify", "commit/"])
def test_two_server_errors_then_success(hub, folder, where):
    hub.fail(where, 500)
    hub.fail(where, 503)
    push_folder(folder, check_push(REPO))
    assert len(hub.repos[REPO].commits) == 2
    assert len(hub.waits) == 2


def test_the_hub_says_how_long_to_wait(hub, folder):
    hub.add_repo(REPO)
    hub.fail("commit/", 429, Retry_After="77")
    push_folder(folder, REPO)
    assert hub.waits == [77]


def test_an_upload_cut_in_the_middle_leaves_the_remote_unchanged_and_the_next_try_finishes(hub, folder):
    repo = hub.add_repo(REPO)
    before = repo.files
    for where in ("PUT /lfs", "commit/"):
        hub.cut(where, times=1000)
        with pytest.raises(HubError, match="did not answer .*me/tiny is as it was.*try again") as error:
            push_folder(folder, REPO)
        assert_one_line(error)
        assert repo.files is before and len(repo.commits) == 1
        hub.faults.clear()

    uploads = sum(request.startswith("PUT") for request in hub.requests)
    push_folder(folder, REPO)
    assert len(repo.commits) == 2 and repo.files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert uploads == sum(request.startswith("PUT") for request in hub.requests)  # what had arrived is not sent again


@pytest.mark.parametrize("where", ["PUT /lfs", "commit/"])
def test_one_cut_is_survived(hub, folder, where):
    repo = hub.add_repo(REPO)
    hub.cut(where)
    push_folder(folder, REPO)
    assert len(repo.commits) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, folder):
    repo = hub.add_repo(REPO)
    hub.lose_answer("commit/")
    push_folder(folder, REPO)
    assert len(repo.commits) == 2


@pytest.mark.parametrize("status, message", [(400, "could not be pushed"), (403, "may not write"), (409, "could not")])
def test_refusals_are_not_repeated(hub, folder, status, message):
    hub.add_repo(REPO)
    hub.fail("commit/", status, times=9)
    with pytest.raises(HubError, match=message) as error:
        push_folder(folder, REPO)
    assert_one_line(error)
    assert hub.waits == []


# --- Card ---


def test_a_full_card_tells_all_facts(folder, pipe):
    card = model_card(TEMPLATE, folder, REPO, **FACTS)
    data = ModelCard(card).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "unconditional-image-generation"
    assert {"diffusers", "dfu_diffusers"} <= set(data.tags)
    assert data.license == "apache-2.0" and data.datasets == ["ann/faces"]
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    for text in (
        "# tiny", f"{parameters:,} parameters", 'from_pretrained("me/tiny")', "height=16, width=16, generator",
        "339,200", "16, 16x24 px", "Advised are 12 to 24 px.", "Procedural portraits", "`ann/faces`",
        "| 16 | yes | 0.1020 |", "| 20 | no | 0.1084 |", "](samples.png)", "](loss.png)", "Eyes break", "0.0934",
        "batch_size: 32", "1b5adb4", f"torch {torch.__version__.split('+')[0]}", "## Licence", "Havrilla",
    ):  # fmt: skip
        assert text in card, text
    assert "validation.png" not in card


def test_no_placeholder_and_nothing_private_remains(folder):
    card = model_card(TEMPLATE, folder, REPO, **FACTS)
    assert not any(text in card for text in ("{", "}", "None", "Undefined", "/home", "/data", "/scratch", "ssss"))
    assert "accelerate launch train_dfu.py --train_data_dir=faces --token hf_***" in card
    assert "output_dir: run 7\ncache: cache\nema: null\n" in card


def test_sections_without_facts_are_left_out(folder):
    for path in folder.glob("*.png"):
        path.unlink()
    card = model_card(TEMPLATE, folder, REPO)
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert headings == ["# tiny", "## Use", "## Limits", "## Citation"]
    assert ModelCard(card).data.license is None
    assert "None" not in card and "![" not in card and "\n\n\n" not in card
    for fact in FACTS:
        model_card(TEMPLATE, folder, REPO, **{fact: FACTS[fact]})


def test_python_in_the_card_runs(folder, tmp_path, monkeypatch):
    card = model_card(TEMPLATE, folder, str(folder), name="tiny")
    block = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("from_pretrained(", f"from_pretrained({str(folder)!r} or "), "card", "exec"), {})
    assert (tmp_path / "image.png").exists()


def test_a_class_conditional_model_is_called_with_a_class(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "num_class_embeds": 10, "sample_size": [16, 24]}))
    card = model_card(TEMPLATE, folder, REPO)
    assert "height=16, width=24, class_labels=0, generator" in card and "from 0 to 9" in card


def test_the_hub_validates_the_card(hub, folder):
    card = model_card(TEMPLATE, folder, REPO, **FACTS)
    ModelCard(card).validate()
    with pytest.raises(ValueError, match="must be a string"):
        ModelCard(card.replace("license: apache-2.0", "license: 2")).validate()
    assert hub.requests == 2 * ["POST /api/validate-yaml"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("# A model\n", "lack library_name, pipeline_tag, tags: write"),
        ("---\nlibrary_name: diffusers\ntags: []\n---\n", "lack pipeline_tag, tags"),
        ("---\ntags: [\n---\n", "cannot be read"),
        ("---\n- a list\n---\n", "cannot be read"),
    ],
)
def test_a_card_without_metadata_is_refused_before_anything_is_sent(hub, folder, text, message):
    with pytest.raises(HubError, match=message):
        check_card(text)
    (folder / "README.md").write_text(text)
    with pytest.raises(HubError, match=message):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_unknown_facts_are_refused(folder):
    with pytest.raises(TypeError, match="no place for trian_sizes: it knows .*train_sizes"):
        model_card(TEMPLATE, folder, REPO, trian_sizes=["16"])


# --- The stand-in itself ---


def test_old_revisions_stay_and_private_ones_are_hidden(hub, folder):
    push_folder(folder, check_push(REPO, private=True))
    (folder / "samples.png").write_text("better samples")
    push_folder(folder, REPO)
    api = HfApi()
    _, first, second = (sha for sha, _, _ in hub.repos[REPO].commits)
    assert api.repo_info(REPO).sha == second and api.repo_info(REPO, revision=first).sha == first
    path = api.hf_hub_download(REPO, "samples.png", revision=first, cache_dir=folder.parent / "cache")
    assert Path(path).read_text() == "content of samples.png"
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).repo_info(REPO)
