"""Publishing: real client, real sockets, and a stand-in for the Hub (hub_stand_in.py)."""

import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import redraw
from huggingface_hub import ModelCard, constants
from sampling import silent

from dfu_diffusers import DFUInpaintPipeline, DFUPipeline, DFURefiner, EDMHeunScheduler
from dfu_diffusers.hub import (
    TEMPLATE,
    HubError,
    card_head,
    check_card,
    check_push,
    convert,
    files_left_out,
    files_to_push,
    model_card,
    push_folder,
    update_card,
)
from dfu_diffusers.hub.__main__ import main

pytest_plugins = "hub_stand_in"

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "dfu-portraits"

REPO = "me/tiny"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CODE = ["pipeline_dfu.py", "scheduler/scheduling_edm_heun.py", "unet/modeling_dfu.py"]
BELONGS = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}
FACTS = {
    "train_sizes": ["16", "16x24"],
    "advised_sizes": "12 to 24 px",
    "data": "Procedural portraits, series 0.",
    "class_names": ["cat", "<img src=x onerror=alert(1)>", "a_b *c*"],
    "options": {
        "batch_size": 32,
        "resolutions": ["16x16", "16x24"],
        "mixed_precision": "bf16",
        "ema": None,
        "output_dir": "/scratch/ann/run 7",
        "cache": r"D:\Users\ann\cache",
        "dirs": ["a", "~/b"],
        "source": "https://ann:secret@x.y/z",
        "hub_token": "hf_" + 34 * "s",
    },
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
def pipe(make_pipe):
    return make_pipe()


@pytest.fixture(scope="session")
def original(pipe, tmp_path_factory):
    """What a training run leaves: the pipeline, its card and pictures, and much that is nobody's business."""
    folder = tmp_path_factory.mktemp("run")
    pipe.save_pretrained(folder)
    private = ["checkpoint-2/model.safetensors", "checkpoint-2/optimizer.bin", "logs/events.out", "evil.pkl"]
    private += ["optimizer.bin", "unet/diffusion_pytorch_model.bin", "unet/evil.pkl", "unet/.config.json.partial"]
    private += ["unet/.hidden.json", "passport.png", "run.json", "args.json", "ema.safetensors"]
    private += ["unet/service-account.json", "unet/ema.safetensors", "scheduler/notes.json"]
    for name in [*private, "samples.png", "loss.png", "loss.csv"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    (folder / "README.md").write_text(model_card(TEMPLATE, folder, REPO, **FACTS))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


# --- What is pushed ---


def test_only_what_belongs_is_listed_with_its_size(folder):
    listed = dict(files_to_push(folder))
    assert listed.keys() == BELONGS | {"README.md", "samples.png", "loss.png", "loss.csv"}
    assert all((folder / path).stat().st_size == size for path, size in listed.items())


def test_what_is_left_out_is_said(folder, capsys):
    assert files_left_out(folder) == [
        "args.json", "checkpoint-2", "ema.safetensors", "evil.pkl", "logs", "optimizer.bin", "passport.png",
        "run.json", "scheduler/notes.json", "unet/.config.json.partial", "unet/.hidden.json",
        "unet/diffusion_pytorch_model.bin", "unet/ema.safetensors", "unet/evil.pkl", "unet/service-account.json",
    ]  # fmt: skip
    assert "unet/service-account.json" not in files_left_out(folder, include=["unet/service-account.json"])
    main(["push", str(folder), REPO, "--dry_run"])
    assert "Left out, unless --include names them: args.json, checkpoint-2, " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model_index.json", "README.md", "samples.png", "unet/config.json", WEIGHTS, "unet"])
def test_links_out_of_the_folder_are_refused_and_others_are_followed(folder, name):
    elsewhere = folder.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(HubError, match=f"{name}.* is a link that leaves .*: put a copy"):
        files_to_push(folder)
    (folder / name).unlink()
    elsewhere.rename(folder / "kept")
    (folder / name).symlink_to(folder / "kept")
    assert BELONGS <= dict(files_to_push(folder)).keys()


def test_links_out_of_the_folder_are_refused_where_more_is_asked_for(folder):
    (folder / "logs/events.out").unlink()
    (folder.parent / "id_rsa").write_text("a secret")
    (folder / "logs/events.out").symlink_to(folder.parent / "id_rsa")
    with pytest.raises(HubError, match="events.out is a link that leaves"):
        files_to_push(folder, include=["logs"])


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
        ("[]", "no model_index.json that can be read .a list, not a mapping"),
        ("[" * 100_000, "no model_index.json"),
        ('{"../elsewhere": ["dfu_diffusers", "DFUModel"]}', "'../elsewhere', which is no name of a folder"),
        ('{"vae": ["diffusers", "AutoencoderKL"]}', "vae, a component of the pipeline, holds no .*save_pretrained"),
    ],
)
def test_a_folder_without_a_whole_pipeline_is_refused(folder, index, message):
    path = folder / "model_index.json"
    path.unlink() if index is None else path.write_text(index)
    with pytest.raises(HubError, match=message):
        files_to_push(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b"null", b"\xff\xfe{}"])
def test_a_broken_configuration_is_refused(folder, content):
    (folder / "scheduler/scheduler_config.json").write_bytes(content)
    with pytest.raises(HubError, match="holds no scheduler_config.json that can be read .*save the pipeline again"):
        files_to_push(folder)
    (folder / "unet/config.json").write_bytes(content)
    for call in (lambda: convert(folder, "fp16"), lambda: model_card(TEMPLATE, folder, REPO)):
        with pytest.raises(HubError, match="holds no config.json that can be read"):
            call()


def test_a_card_that_is_no_text_is_refused(folder):
    (folder / "README.md").write_bytes(b"\xff\xfe---")
    for call in (lambda: files_to_push(folder), lambda: update_card(folder, {}, {}, "x", "y")):
        with pytest.raises(HubError, match="README.md cannot be read .*save it as text in UTF-8"):
            call()


@pytest.mark.parametrize("secret", ["hf_" + 34 * "s", "https://ann:secret@x.y/z", "https://ghp_abc@github.com/x"])
def test_a_card_with_a_secret_is_refused(folder, secret):
    check_card(card_head() + "ssh://git@github.com/x mail@x.y https://x.y/@ann?q=a@b")
    with pytest.raises(HubError, match="holds an access token, or an address with a password: cut it"):
        check_card(card_head() + f"See {secret}.")


def test_more_files_go_along_if_asked_for(hub, folder):
    more = ["checkpoint-2/model.safetensors", "checkpoint-2/optimizer.bin", "logs/events.out", "run.json"]
    files_to_push(folder, include=["checkpoint-*", "**/events.out", "run.json"])
    main(["push", str(folder), REPO, "--include", "checkpoint-*", "**/events.out", "run.json"])
    pushed = hub.repos[REPO].files
    assert pushed.keys() - {".gitattributes"} == dict(files_to_push(folder)).keys() | set(more)
    assert all(pushed[name] == (folder / name).read_bytes() for name in more)


@pytest.mark.parametrize("pattern", ["chekpoint-*", "../*.png", "/etc/*", "", "."])
def test_patterns_that_match_nothing_of_the_folder(folder, pattern):
    (folder.parent / "secret.png").write_text("not a picture of this model")
    with pytest.raises(HubError, match=re.escape(f"holds no files that match {pattern!r}")):
        files_to_push(folder, include=["logs", pattern])


def test_pickled_weights_alone_are_refused(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(HubError, match="unet, a component of the pipeline, holds no .*safetensors weights"):
        files_to_push(folder)


# --- Push and load ---


def test_a_push_is_one_commit_of_what_belongs(hub, folder):
    """tests/test_remote_code.py loads it in fresh processes."""
    assert check_push("tiny", private=True) == REPO
    assert hub.repos[REPO].private
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"

    repo = hub.repos[REPO]
    assert [summary for _, summary, _ in repo.commits] == ["initial commit", "Upload DFUPipeline"]
    assert repo.files.keys() - {".gitattributes"} == dict(files_to_push(folder)).keys()
    assert all(content == (folder / path).read_bytes() for path, content in repo.files.items() if path[0] != ".")


def test_the_command_line_lists_then_pushes(hub, folder, capsys):
    main(["push", str(folder), REPO, "--dry_run"])
    listing = capsys.readouterr().out
    assert hub.requests == ["POST /api/validate-yaml"] and hub.repos == {}
    assert all(path in listing and f"{size:,}" in listing for path, size in files_to_push(folder))

    main(["push", str(folder), REPO])
    assert not hub.repos[REPO].private
    assert capsys.readouterr().out == f"{listing}{hub.url}/{REPO}\n"

    main(["push", str(folder), REPO])  # again, nothing having changed
    assert len(hub.repos[REPO].commits) == 2


def test_weights_and_modules_of_an_earlier_push_go_and_other_files_stay(hub, folder):
    old = ["unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/modeling_dfu.py", "pipeline_dfu.py"]
    old += ["unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.fp16.safetensors"]
    old += ["unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
    theirs = {".gitattributes", "LICENSE", "lora/weights.safetensors", "weights.safetensors", "train.py"}
    repo = hub.add_repo(REPO, **dict.fromkeys([*old, *theirs], b""))
    push_folder(folder, REPO)
    assert repo.files.keys() - dict(files_to_push(folder)).keys() == theirs
    assert len(repo.commits) == 2


def test_where_a_pipeline_was_loaded_from_is_not_published(hub, folder, tmp_path):
    hub.add_repo(REPO)
    DFUPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert str(folder) in (tmp_path / "again/unet/config.json").read_text()
    push_folder(tmp_path / "again", REPO)
    assert not any(b"_name_or_path" in content for content in hub.repos[REPO].files.values())
    assert all(len(hub.repos[REPO].files[path]) == size for path, size in files_to_push(tmp_path / "again"))


# --- Self-contained ---


def test_a_self_contained_push_adds_the_code_and_leaves_the_folder(hub, folder, capsys):
    hub.add_repo(REPO)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main(["push", str(folder), REPO, "--self_contained", "--dry_run"])
    listing = capsys.readouterr().out
    assert all(path in listing for path in CODE) and hub.requests == ["POST /api/validate-yaml"]
    main(["push", str(folder), REPO, "--self_contained"])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo = hub.repos[REPO]
    pushed = dict(files_to_push(folder, self_contained=True))
    assert pushed.keys() - dict(files_to_push(folder)).keys() == set(CODE)
    assert pushed == {path: len(content) for path, content in repo.files.items() if path != ".gitattributes"}

    push_folder(folder, REPO)  # plain again
    assert not repo.files.keys() & set(CODE)
    assert json.loads(repo.files["model_index.json"])["unet"] == ["dfu_diffusers", "DFUModel"]


def test_the_pipeline_pushes_itself(hub, pipe):
    """By diffusers' own method, which takes no such option."""
    pipe.push_to_hub("alone", self_contained=True, private=True)
    repo = hub.repos["me/alone"]
    assert repo.private and set(CODE) <= repo.files.keys()
    assert json.loads(repo.files["model_index.json"])["_class_name"] == ["pipeline_dfu", "DFUPipeline"]
    pipe.push_to_hub("plain", commit_message="Hello")  # the option holds for one call
    repo = hub.repos["me/plain"]
    assert not set(CODE) & repo.files.keys() and repo.commits[-1][1] == "Hello"


def test_what_was_saved_self_contained_is_pushed_so(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, self_contained=True)
    assert dict(files_to_push(tmp_path)).keys() == BELONGS | set(CODE)
    assert files_to_push(tmp_path, self_contained=True) == files_to_push(tmp_path)
    (tmp_path / "pipeline_dfu.py").unlink()
    with pytest.raises(HubError, match="names pipeline_dfu.py, which is not there.*self_contained=True"):
        files_to_push(tmp_path)


def test_only_the_code_that_the_index_names_goes_along(pipe, tmp_path):
    DFUInpaintPipeline(**pipe.components).save_pretrained(tmp_path / "plain")
    DFUInpaintPipeline(**pipe.components).save_pretrained(tmp_path / "alone", self_contained=True)
    (tmp_path / "alone/secret.py").write_text("TOKEN = 1")
    modules = {"pipeline_dfu_inpaint.py", *CODE} - {"pipeline_dfu.py"}
    for name in ("plain", "alone"):
        pushed = dict(files_to_push(tmp_path / name, self_contained=True))
        assert {path for path in pushed if path.endswith(".py")} == modules


def test_modules_outside_of_the_folder_are_not_published(folder):
    (folder.parent / "secret.py").write_text("TOKEN = 1")
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": ["../../secret", "DFUModel"]}))
    assert not any("secret" in path for path, _ in files_to_push(folder))


# --- With a refiner ---


@pytest.fixture
def octaves(make_model, tmp_path):
    """A saved pipeline with a refiner, and the pipeline."""
    refiner = redraw(DFURefiner(hidden_channels=8, num_layers=1, coarse_size=8, sample_size=24)).eval()
    pipe = silent(DFUPipeline(make_model(sample_size=8), EDMHeunScheduler(), refiner=refiner))
    pipe.save_pretrained(tmp_path / "octaves")
    return tmp_path / "octaves", pipe


def test_a_refiner_is_converted_pushed_and_loaded(hub, octaves):
    folder, pipe = octaves
    hub.add_repo(REPO)
    names = {path.relative_to(folder).as_posix() for path in convert(folder, "fp16")}
    assert names == {f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in ("unet", "refiner")}
    push_folder(folder, REPO)
    assert {"refiner/config.json", *names} <= hub.repos[REPO].files.keys()
    assert np.array_equal(draw(load()), draw(pipe))
    push_folder(folder, REPO, self_contained=True)
    files = hub.repos[REPO].files
    assert {"refiner/modeling_dfu_refiner.py", *CODE} <= files.keys()
    assert json.loads(files["model_index.json"])["refiner"] == ["modeling_dfu_refiner", "DFURefiner"]
    push_folder(folder, REPO)
    assert not [path for path in hub.repos[REPO].files if path.endswith(".py")]


def test_the_card_of_a_pipeline_with_a_refiner(octaves):
    folder, pipe = octaves
    card = model_card(TEMPLATE, folder, REPO)
    counts = [sum(p.numel() for p in model.parameters()) for model in (pipe.unet, pipe.refiner)]
    assert all(f"{count:,} parameters" in card for count in counts)
    assert "height=24, width=24, generator" in card


# --- Precision and shards ---


def load(**kwargs) -> DFUPipeline:
    return silent(DFUPipeline.from_pretrained(REPO, **kwargs))


def draw(pipe) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(height=12, width=15, num_inference_steps=2, output_type="np", generator=generator).images


@pytest.mark.parametrize("name, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants_are_made_pushed_and_loaded(hub, folder, pipe, capsys, name, dtype):
    hub.add_repo(REPO)
    before = (folder / "unet/config.json").read_bytes(), (folder / WEIGHTS).read_bytes()
    main(["convert", str(folder), name])
    path = folder / f"unet/diffusion_pytorch_model.{name}.safetensors"
    assert f"{path.stat().st_size:>15,}  {path}" in capsys.readouterr().out
    assert 0.4 < path.stat().st_size / (folder / WEIGHTS).stat().st_size < 0.6
    assert before == ((folder / "unet/config.json").read_bytes(), (folder / WEIGHTS).read_bytes())

    push_folder(folder, REPO)
    loaded = load(variant=name, torch_dtype=dtype)
    for ours, theirs in zip(pipe.unet.parameters(), loaded.unet.parameters()):
        assert theirs.dtype == dtype and torch.equal(ours.to(dtype), theirs)
    assert np.array_equal(draw(load()), draw(pipe))
    assert not list(folder.glob("tmp*"))


def test_shards_are_made_pushed_and_loaded_and_replaced(hub, folder, pipe):
    hub.add_repo(REPO)
    shards = convert(folder, "fp32", max_shard_size="200KB")
    assert len(shards) > 3 and not (folder / WEIGHTS).exists()
    assert all(path.stat().st_size < 220_000 for path in shards)
    variant = convert(folder, "fp16", max_shard_size="100KB")
    assert all(path.exists() for path in [*shards, *variant])
    push_folder(folder, REPO)
    assert np.array_equal(draw(load()), draw(pipe))
    half = load(variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(a.half(), b) for a, b in zip(pipe.unet.parameters(), half.unet.parameters()))

    assert convert(folder, "fp32") == [folder / WEIGHTS]
    assert not any(path.exists() for path in shards) and all(path.exists() for path in variant)
    push_folder(folder, REPO)
    kept = {path.relative_to(folder).as_posix() for path in [*variant, folder / WEIGHTS]}
    assert {path for path in hub.repos[REPO].files if "diffusion_pytorch_model" in path} == kept


def test_weights_too_large_for_a_precision(make_model, tmp_path):
    model = make_model()
    next(model.parameters()).data[0] = 1e5
    DFUPipeline(model, EDMHeunScheduler()).save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(HubError, match="too large for fp16.*convert them to bf16"):
        convert(tmp_path, "fp16")
    assert sorted(tmp_path.rglob("*")) == before
    convert(tmp_path, "bf16")


def test_what_cannot_be_converted(folder):
    with pytest.raises(HubError, match="'int8' is no precision to convert to: use fp32, fp16, bf16"):
        convert(folder, "int8")
    (folder / WEIGHTS).write_bytes(b"not weights")
    with pytest.raises(HubError, match="unet holds no weights to convert .*save"):
        convert(folder, "fp16")
    with pytest.raises(HubError, match="holds no model_index.json"):
        convert(folder / "unet", "fp16")


# --- Branches and tags ---


def test_a_branch_is_made_and_main_stays(hub, folder):
    repo = hub.add_repo(REPO)
    before = repo.files
    push_folder(folder, REPO, revision="with/code", self_contained=True)
    assert repo.files is before and set(CODE) <= repo.at("with/code")[1].keys()
    (folder / "samples.png").write_text("better samples")
    push_folder(folder, REPO, revision="with/code", self_contained=True)  # there already
    assert repo.at("with/code")[1]["samples.png"] == b"better samples"
    push_folder(folder, REPO)
    assert not set(CODE) & repo.files.keys()
    assert type(load(revision="with/code").unet).__name__ == "DFUModel"


def test_a_tag_keeps_a_state(hub, folder, pipe, make_model):
    repo = hub.add_repo(REPO)
    main(["push", str(folder), REPO, "--tag", "v1"])
    DFUPipeline(make_model(num_class_embeds=3), EDMHeunScheduler()).save_pretrained(folder)
    commits = len(repo.commits)
    with pytest.raises(HubError, match="me/tiny has a tag v1 already.*choose another name") as error:
        push_folder(folder, REPO, tag="v1")
    assert_one_line(error)
    assert len(repo.commits) == commits
    push_folder(folder, REPO, tag="v2")
    assert repo.tags["v1"] != repo.tags["v2"] == repo.branches["main"]
    assert np.array_equal(draw(load(revision="v1")), draw(pipe))


def test_a_tag_in_use_is_found_before_anything_is_sent(hub, folder):
    repo = hub.add_repo(REPO)
    repo.tags["v1"] = repo.branches["main"]
    with pytest.raises(HubError, match="has a tag v1 already"):
        check_push(REPO, tag="v1")
    with pytest.raises(SystemExit, match="has a tag v1 already"):
        main(["push", str(folder), REPO, "--tag", "v1"])
    assert len(repo.commits) == 1 and not any("/lfs" in request for request in hub.requests)
    assert check_push(REPO, tag="v2") == check_push("fresh", tag="v1").replace("fresh", "tiny") == REPO


def test_faults_while_tagging(hub, folder):
    repo = hub.add_repo(REPO)
    hub.fail("/tag/", 503, times=4)
    with pytest.raises(HubError, match="503.*has the new files, but not the tag.*try again"):
        push_folder(folder, REPO, tag="v1")
    assert len(repo.commits) == 2 and not repo.tags
    hub.lose_answer("/tag/")
    push_folder(folder, REPO, tag="v1")
    assert len(repo.commits) == 2 and repo.tags == {"v1": repo.branches["main"]}


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


def test_offline_mode_as_a_command(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as error:
        main(["push", str(folder), REPO])
    assert error.value.code == "me/tiny cannot be reached: offline mode is on. Unset HF_HUB_OFFLINE to push."
    assert hub.requests == []


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


def test_an_interrupted_upload_of_shards_goes_on_where_it_stopped(hub, folder):
    repo = hub.add_repo(REPO)
    shards = [path for path in convert(folder, "fp32", max_shard_size="200KB") if path.suffix == ".safetensors"]
    last = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
    hub.cut(f"PUT /lfs/{last}", times=1000)
    with pytest.raises(HubError, match="is as it was"):
        push_folder(folder, REPO)
    assert len(repo.commits) == 1 and len(hub.lfs) >= len(shards) - 1
    hub.faults.clear()
    hub.requests.clear()
    push_folder(folder, REPO)
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /lfs/{last}"]
    assert len(repo.commits) == 2


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


@pytest.mark.parametrize("status, message", [(400, "could not be pushed"), (403, "may not write"), (409, "Somebody")])
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
    data = "From https://ann:secret@x.y/z with hf_" + 34 * "s"
    card = model_card(TEMPLATE, folder, REPO, **{**FACTS, "data": data})
    assert not any(
        text in card for text in ("{", "}", "None", "Undefined", "/scratch", "Users", "~/b", "ssss", "secret")
    )
    assert "resolutions: ['16x16', '16x24']\nmixed_precision: bf16\nema: null\n```" in card
    assert "From https://x.y/z with hf_***" in card


def test_names_of_classes_are_shown_literally(folder):
    card = model_card(TEMPLATE, folder, REPO, **FACTS)
    assert r"Classes: 0 cat, 1 &lt;img src=x onerror=alert(1)&gt;, 2 a\_b \*c\*" in card and "<img" not in card


def test_a_card_takes_no_command_line(folder):
    with pytest.raises(TypeError, match="no place for command"):
        model_card(TEMPLATE, folder, REPO, command="train_dfu.py --token x")


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


def test_a_card_knows_whether_the_pipeline_is_self_contained(folder, pipe):
    template = folder.parent / "template.md"
    template.write_text("---\n{{ card_data }}\n---\n{{ self_contained }}\n")
    assert model_card(template, folder, REPO).endswith("---\nFalse\n")
    assert model_card(template, folder, REPO, self_contained=True).endswith("---\nTrue\n")
    pipe.save_pretrained(folder, self_contained=True)
    assert model_card(template, folder, REPO).endswith("---\nTrue\n")


def test_results_enter_the_metadata(folder):
    data = ModelCard(model_card(TEMPLATE, folder, REPO, **FACTS, metrics={"FID": {"16": 12.5, "32": 20}})).data
    assert data.model_name == "tiny"
    assert [(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("loss", "held-out loss at 16 px", 0.102), ("loss", "held-out loss at 20 px", 0.1084),
        ("fid", "FID at 16 px", 12.5), ("fid", "FID at 32 px", 20),
    ]  # fmt: skip
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in data.eval_results} == {
        ("unconditional-image-generation", "ann/faces", "ann/faces")
    }
    data = ModelCard(model_card(TEMPLATE, folder, REPO, metrics={"FID": {"16": 12.5}})).data
    assert data.eval_results[0].dataset_name == "held-out images"


def test_results_that_are_none_are_refused():
    head = "---\nlibrary_name: diffusers\npipeline_tag: unconditional-image-generation\ntags: [dfu]\n"
    with pytest.raises(HubError, match="metadata of README.md cannot be read"):
        check_card(head + "model-index: [{name: tiny, results: [{task: 1}]}]\n---\n")


@pytest.mark.parametrize("written_for", ["run", "me/other", "portraits"])
def test_the_card_that_goes_up_loads_what_is_pushed(hub, folder, tmp_path, monkeypatch, written_for):
    """Also one that was written before it had a place on the Hub: the trainer's, or the shipped model's own."""
    hub.add_repo(REPO)
    if written_for == "portraits":
        card = (CHECKPOINT / "README.md").read_text()
        assert 'from_pretrained("checkpoints/dfu-portraits")' in card
    else:
        card = model_card(TEMPLATE, folder, written_for, **FACTS)
    card += '\nbase = DFUPipeline.from_pretrained("me/base")\n'  # another model's
    (folder / "README.md").write_text(card)
    without = 'pipe = DiffusionPipeline.from_pretrained("me/tiny"'

    def pushed(**how) -> str:
        push_folder(folder, REPO, **how)
        _, files = hub.repos[REPO].at(how.get("revision") or "main")
        text = files["README.md"].decode()
        assert (folder / "README.md").read_text() == card and 'from_pretrained("me/base")' in text
        if written_for == "run":
            exec_snippets(text)
        return text

    def exec_snippets(text):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            monkeypatch.chdir(tmp_path)
            block = block.replace("generator=", "num_inference_steps=1, generator=").replace("me/base", "me/tiny")
            exec(compile(block, "card", "exec"), {})

    plain = pushed()
    assert plain == re.sub(r"(pipe = DFUPipeline.from_pretrained\().*\)", r'\1"me/tiny")', card)
    branch = pushed(revision="b/1")
    assert branch == plain.replace(
        'pipe = DFUPipeline.from_pretrained("me/tiny"', 'pipe = DFUPipeline.from_pretrained("me/tiny", revision="b/1"'
    )
    alone = pushed(revision="code", self_contained=True)
    assert alone.count(f'{without}, revision="code", trust_remote_code=True)') == 1 and len(alone) > len(plain)
    assert pushed(self_contained=True).count(f"{without}, trust_remote_code=True)") == 1

    (folder / "README.md").write_text(alone)  # a download of that branch, pushed elsewhere
    card = alone
    assert pushed() == plain


def test_a_card_without_our_code_goes_up_as_it_is(hub, folder):
    hub.add_repo(REPO)
    card = (folder / "README.md").read_text().replace("pipe = DFU", "model = DFU").replace("\n", "\r\n")
    (folder / "README.md").write_bytes(card.encode())
    push_folder(folder, REPO, self_contained=True)
    assert hub.repos[REPO].files["README.md"] == card.encode()


def test_a_class_conditional_model_is_called_with_a_class(folder):
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "num_class_embeds": 10, "sample_size": [16, 24]}))
    card = model_card(TEMPLATE, folder, REPO)
    assert "height=16, width=24, class_labels=0, generator" in card and "from 0 to 9" in card


def test_the_hub_validates_the_card_before_anything_is_sent(hub, folder):
    repo = hub.add_repo(REPO)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: apache-2.0", "license: 2"))
    with pytest.raises(HubError, match="must be a string"):
        push_folder(folder, REPO)
    assert len(repo.commits) == 1 and not hub.lfs
    (folder / "README.md").write_text(card)
    push_folder(folder, REPO)
    assert hub.requests.count("POST /api/validate-yaml") == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("# A model\n", "lack library_name, pipeline_tag, tags: write"),
        ("---\nlibrary_name: diffusers\ntags: []\n---\n", "lack pipeline_tag, tags"),
        ("---\ntags: [\n---\n", "cannot be read"),
        ("---\n- a list\n---\n", "cannot be read"),
        ("---\nlibrary_name: !!binary aGVsbG8=\npipeline_tag: [1]\ntags: a\n---\n", "library_name, pipeline_tag bel"),
        ("---\n" + "[" * 1000 + "\n---\n", "cannot be read"),
    ],
)
def test_a_card_without_metadata_is_refused_before_anything_is_sent(hub, folder, text, message):
    with pytest.raises(HubError, match=message):
        check_card(text)
    (folder / "README.md").write_text(text)
    with pytest.raises(HubError, match=message):
        push_folder(folder, REPO)
    assert hub.requests == []


def test_the_hub_validates_the_card_before_it_creates_the_repository(hub, folder, capsys):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: apache-2.0", "license: 2"))
    for more in (["--dry_run"], []):
        with pytest.raises(SystemExit, match="must be a string"):
            main(["push", str(folder), REPO, *more])
    assert hub.repos == {}
    (folder / "README.md").write_text("# A model")
    for more in (["--dry_run"], []):
        with pytest.raises(SystemExit, match="lack library_name"):
            main(["push", str(folder), REPO, *more])
    assert hub.repos == {}


def test_a_dry_run_without_network(hub, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main(["push", str(folder), REPO, "--dry_run"])
    assert "The Hub has not seen the card: me/tiny cannot be reached: offline mode" in capsys.readouterr().out


@pytest.mark.parametrize("license", ["Apache 2.0", "CC-BY-4.0", "", "a: b"])
def test_licences_that_the_hub_does_not_know_by_that_name(folder, license):
    with pytest.raises(HubError, match="names no licence as the Hub does: write cc-by-4.0"):
        card_head(license)
    with pytest.raises(HubError, match="names no licence"):
        model_card(TEMPLATE, folder, REPO, license=license)
    check_card(card_head("cc-by-nc-4.0"))


def test_unknown_facts_are_refused(folder):
    with pytest.raises(TypeError, match="no place for trian_sizes: it knows .*train_sizes"):
        model_card(TEMPLATE, folder, REPO, trian_sizes=["16"])
