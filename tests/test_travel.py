"""Checkpoints that travel: they open from any directory and after a move, with their foundations found by hash."""

import json
import logging
import os
import re
import shutil

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file

from vllava import chat, convert
from vllava.config import PROJECT, composed
from vllava.errors import UserError
from vllava.evaluation.evaluate import evaluate
from vllava.model import files
from vllava.model.build import load_llm, load_tokenizer, video_llava
from vllava.model.checkpoint import Description, load, load_projector, read_description, save_trained
from vllava.model.encoders import ClipEncoder
from vllava.training.stage import Stage
from vllava.training.task import Recipe

PARTS = ("image", "video", "llm")
CLIP = "vllava.model.encoders.ClipEncoder"


def encoders_at(place):
    return {kind: {"_target_": CLIP, "path": f"{place}/{kind}", "medium": kind} for kind in ("image", "video")}


def model_at(place):
    towers = [ClipEncoder(f"{place}/{kind}", kind) for kind in ("image", "video")]
    return video_llava(load_llm(f"{place}/llm"), *towers)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, clip, video_clip, tokenizer):
    """Where a stage-1 checkpoint was written by paths relative to that folder, now moved away; and its weights."""
    from vllava.model.build import fresh_llm  # as conftest's make_llm, once for the module

    home = tmp_path_factory.mktemp("first") / "work"
    clip.save_pretrained(home / "parts" / "image")
    video_clip.save_pretrained(home / "parts" / "video")
    llm = fresh_llm(str(PROJECT / "assets/tokenizer"), 32, 64, 2, 4, 2, max_position_embeddings=512)
    randomise(llm).save_pretrained(home / "parts" / "llm")
    tokenizer.save_pretrained(home / "parts" / "llm")
    before = os.getcwd()
    os.chdir(home)
    try:
        model = model_at("parts")
        randomise(model.projector, seed=3)
        description = Description(encoders_at("parts"), "parts/llm", "vicuna_v1", "pad", ["projector"])
        save_trained(model, tokenizer, description, (home / "outputs/run/checkpoint").relative_to(home))
    finally:
        os.chdir(before)
    kept = tmp_path_factory.mktemp("kept") / "work"
    home.rename(kept)
    return home, kept, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def moved(trained, tmp_path, monkeypatch):
    """The checkpoint alone, at another place, and apart from it the folder of its foundations; another directory."""
    _, kept, _ = trained
    shutil.copytree(kept / "outputs/run/checkpoint", tmp_path / "b/runs/second/checkpoint")
    shutil.copytree(kept / "parts", tmp_path / "elsewhere/parts")
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    return tmp_path / "b/runs/second/checkpoint", tmp_path / "elsewhere"


@pytest.fixture
def opens(trained):
    """Whether a checkpoint opens as the very model that was saved, with its tokenizer."""
    published = load_tokenizer(str(PROJECT / "assets/tokenizer"))

    def check(folder, **how):
        loaded, tokenizer, _ = load(folder, **how)
        found = loaded.state_dict()
        assert found.keys() == trained[2].keys()
        assert all(torch.equal(value, trained[2][name]) for name, value in found.items())
        assert tokenizer("What is it?")["input_ids"] == published("What is it?")["input_ids"]
        return True

    return check


def change(folder, by=1.0):
    """Other weights of the same size, in a folder's file of weights."""
    tensors = load_file(folder / "model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + by}, folder / "model.safetensors", {"format": "pt"})


def edit(checkpoint, **changes):
    path = checkpoint / "vllava.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- opened from anywhere ---------------------------------------------------------------------------------------------


def test_what_is_written_names_every_part_by_its_whole_path_whatever_the_working_directory(trained, opens, tmp_path):
    home, kept, _ = trained
    written = json.loads((kept / "outputs/run/checkpoint/vllava.json").read_text())
    assert {kind: part["path"] for kind, part in written["encoders"].items()} == {
        kind: str(home / "parts" / kind) for kind in ("image", "video")
    }
    assert written["llm"] == str(home / "parts/llm") and written["folder"] == str(home / "outputs/run/checkpoint")
    shutil.copytree(kept, home)
    try:
        assert os.getcwd() != str(home) and opens(home / "outputs/run/checkpoint")
        shutil.copytree(home / "outputs/run/checkpoint", tmp_path / "alone")
        assert opens(tmp_path / "alone")  # moved alone: its foundations lie where they lay
    finally:
        shutil.rmtree(home)


def test_a_checkpoint_moved_together_with_its_foundations_opens(trained, opens, tmp_path, monkeypatch):
    shutil.copytree(trained[1], tmp_path / "there/and/more")
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    assert opens(tmp_path / "there/and/more/outputs/run/checkpoint")
    assert opens("../there/and/more/outputs/run/checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "there/and/more/outputs/run/checkpoint")
    assert opens(tmp_path / "link")


def test_what_is_not_found_is_said_with_its_hash_the_places_and_the_remedy(moved, trained):
    checkpoint, elsewhere = moved
    sha256 = read_description(checkpoint).sha256["image"]
    with pytest.raises(UserError) as raised:
        load(checkpoint, search=[elsewhere / "parts/llm", "no-such-folder"])
    said = str(raised.value)
    wanted = (
        "image encoder",
        f"begins with {sha256[:12]}",
        str(trained[0] / "parts/image"),
        f"{elsewhere}/parts/llm",
    )
    for words in (
        *wanted,
        "no-such-folder (which is not there)",
        "--foundations",
        "foundations.search",
        "convert pack",
    ):
        assert words in said
    assert "\n" not in said


def test_foundations_are_found_in_folders_that_are_named(moved, opens, monkeypatch, capsys):
    checkpoint, elsewhere = moved
    (elsewhere / "parts").rename(elsewhere / "store")
    for old, new in zip(PARTS, ("one", "two", "org/three"), strict=True):
        (elsewhere / "store" / new).parent.mkdir(exist_ok=True)
        (elsewhere / "store" / old).rename(elsewhere / "store" / new)
    assert opens(checkpoint, search=[elsewhere / "nothing", elsewhere / "store"])
    assert opens(checkpoint, search=str(elsewhere / "store"))
    asked = ["--checkpoint", str(checkpoint), "--max-new-tokens", "2", "Hello"]
    with pytest.raises(SystemExit, match="error: No checkpoint of the image encoder"):
        chat.main(asked)
    assert chat.main([*asked, "--foundations", "nothing", "--foundations", "../elsewhere/store"]) == 0
    with pytest.raises(UserError, match="is found"):
        evaluate(str(checkpoint), {}, ".", "")
    with pytest.raises(UserError, match="the model takes image, video"):  # it opened
        evaluate(str(checkpoint), {}, ".", "", search=[str(elsewhere / "store")])
    monkeypatch.setenv("VLLAVA_FOUNDATIONS", f"/nowhere:{elsewhere / 'store'}")
    assert opens(checkpoint)


@pytest.mark.parametrize(
    "place",
    [
        "checkpoint",
        "checkpoint/foundations",
        ".",
        "foundations",
        "models",
        "assets/toy",
        "../../assets",
    ],
)
def test_foundations_are_found_beside_the_checkpoint_under_any_name(moved, opens, place):
    checkpoint, elsewhere = moved
    to = checkpoint.parent / place
    to.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(PARTS):
        (elsewhere / "parts" / kind).rename(to / f"{number}")
    assert opens(checkpoint)


# --- found by hash alone ----------------------------------------------------------------------------------------------


def test_among_many_of_one_name_the_one_of_the_hash_is_taken(moved, opens):
    checkpoint, elsewhere = moved
    for number, place in enumerate(("a", "b", "z")):
        shutil.copytree(elsewhere / "parts", elsewhere / place)
        for kind in PARTS:
            change(elsewhere / place / kind, by=number + 1)
    (elsewhere / "parts").rename(elsewhere / "k")
    (elsewhere / "a/video/model.safetensors").write_bytes(b"cut")
    (elsewhere / "b/video/config.json").write_text("[" * 100_000)
    assert opens(checkpoint, search=[elsewhere])


@pytest.mark.parametrize("kind", PARTS)
def test_another_one_in_its_place_is_refused_and_the_right_one_taken_where_it_is_named(trained, opens, kind, tmp_path):
    shutil.copytree(trained[1], tmp_path / "b")
    checkpoint = tmp_path / "b/outputs/run/checkpoint"
    change(tmp_path / "b/parts" / kind)
    words = rf"trained with another {'LLM' if kind == 'llm' else f'{kind} encoder'} than {tmp_path}/b/parts/{kind} "
    with pytest.raises(UserError, match=words):
        load(checkpoint)
    change(tmp_path / "b/parts" / kind, by=0.5)
    with pytest.raises(UserError, match=words):
        load(checkpoint, search=[tmp_path / "b/parts"])
    assert opens(checkpoint, search=[trained[1] / "parts"])


def test_a_damaged_one_in_its_place_is_said_to_be_damaged(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "b")
    os.truncate(tmp_path / "b/parts/video/model.safetensors", 5000)
    with pytest.raises(UserError, match=r"b/parts/video/model\.safetensors cannot be read"):
        load(tmp_path / "b/outputs/run/checkpoint")


def test_the_same_weights_with_other_settings_come_last_and_with_a_warning(moved, opens, caplog):
    checkpoint, elsewhere = moved
    shutil.copytree(elsewhere / "parts", elsewhere / "a")
    settings = elsewhere / "a/video/config.json"
    settings.write_text(settings.read_text().replace('"quick_gelu"', '"gelu"'))
    (elsewhere / "a/llm/chat_template.jinja").write_text("{{ bos_token }}")
    with caplog.at_level(logging.WARNING):
        assert opens(checkpoint, search=[elsewhere]) and not caplog.records
        shutil.rmtree(elsewhere / "parts")
        load(checkpoint, search=[elsewhere])
    assert [record.getMessage().split("not the same ")[1] for record in caplog.records] == [
        "config.json",
        "chat_template.jinja",
    ]


def test_checkpoints_of_earlier_versions_open_from_where_they_were_trained_and_are_found_by_hash(
    trained, opens, tmp_path, monkeypatch
):
    def without_places(checkpoint):
        written = json.loads((checkpoint / "vllava.json").read_text())
        written = {key: value for key, value in written.items() if key not in ("folder", "files", "tokenizer")}
        written |= {"encoders": encoders_at("parts"), "llm": "parts/llm"}
        (checkpoint / "vllava.json").write_text(json.dumps(written))
        return checkpoint

    shutil.copytree(trained[1], tmp_path / "b")
    checkpoint = without_places(tmp_path / "b/outputs/run/checkpoint")
    shutil.copytree(checkpoint, tmp_path / "alone")
    monkeypatch.chdir(tmp_path / "b")
    assert opens("outputs/run/checkpoint") and opens(tmp_path / "alone")
    for kind in PARTS:  # of the same names
        shutil.copytree(tmp_path / "b/parts" / kind, tmp_path / "c/parts" / kind)
        change(tmp_path / "c/parts" / kind)
    monkeypatch.chdir(tmp_path / "c")
    assert opens(checkpoint)
    with pytest.raises(UserError, match=rf"another image encoder than {tmp_path}/c/parts/image"):
        load(tmp_path / "alone")
    assert opens(tmp_path / "alone", search=[tmp_path / "b"])


def test_a_hub_id_is_kept_and_asked_for_when_nothing_of_the_hash_lies_nearer(moved, trained, tmp_path, monkeypatch):
    checkpoint, elsewhere = moved
    edit(checkpoint, llm="lmsys/vicuna")
    asked = []

    def snapshot_download(name, **_):
        asked.append(name)
        return {"lmsys/vicuna": str(tmp_path / "hub")}[name]

    monkeypatch.setattr(files, "snapshot_download", snapshot_download)
    load(checkpoint, search=[elsewhere])
    assert asked == []
    (elsewhere / "parts/llm").rename(tmp_path / "hub")
    with pytest.raises(UserError, match="No tokenizer"):  # which the hub is asked for apart, and is offline here
        load(checkpoint, search=[elsewhere])
    assert set(asked) == {"lmsys/vicuna"}
    change(tmp_path / "hub")
    with pytest.raises(UserError, match=r"LLM .*on the hub, lmsys/vicuna is another now"):
        load(checkpoint, search=[elsewhere])


@pytest.mark.parametrize(
    "harm",
    [
        *({"files": value} for value in ([], {"llm": 3}, {"llm": {"bytes": "7"}}, {"llm": {"settings": 1}})),
        {"folder": 3},
        {"tokenizer": "../../secret"},
    ],
    ids=str,
)
def test_hostile_places_in_a_description_are_refused(moved, harm):
    edit(moved[0], **harm)
    with pytest.raises(UserError, match=rf"cannot be understood: {next(iter(harm))} is"):
        load(moved[0])


# --- packed -----------------------------------------------------------------------------------------------------------


def listing(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_packed_checkpoint_needs_nothing_beside_itself(moved, opens, tmp_path, capsys):
    checkpoint, elsewhere = moved
    pack = ["pack", str(checkpoint), "packed", "--foundations", str(elsewhere)]
    (elsewhere / "parts/llm/model.py").write_text("")
    (elsewhere / "parts/llm/pytorch_model.bin").write_text("other weights of the same model")
    assert convert.main(pack) == 0 and convert.main(pack) == 0  # in place of our own earlier output
    packed = tmp_path / "packed-and-moved"
    (tmp_path / "c/packed").rename(packed)
    expected = {"vllava.json", "projector.safetensors", ".vllava-files.json"}
    expected |= {
        f"{kind}_encoder/{name}" for kind in ("image", "video") for name in ("config.json", "model.safetensors")
    }
    tokens = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "model.safetensors")
    assert listing(packed).keys() == expected | {f"llm/{name}" for name in tokens}
    for name, data in listing(elsewhere / "parts/llm").items():
        assert name in ("model.py", "pytorch_model.bin") or listing(packed / "llm")[name] == data
    assert str(tmp_path) not in (packed / "vllava.json").read_text()
    assert read_description(packed).sha256 == read_description(checkpoint).sha256
    shutil.rmtree(elsewhere)
    shutil.rmtree(checkpoint)
    assert opens(packed)
    change(packed / "image_encoder")
    with pytest.raises(UserError, match=rf"another image encoder than {packed}/image_encoder"):
        load(packed)


def test_a_packed_checkpoint_starts_stage_2_packs_again_and_holds_the_foundations_of_others(
    moved, opens, trained, tmp_path
):
    checkpoint, elsewhere = moved
    convert.main(["pack", str(checkpoint), str(tmp_path / "packed"), "--foundations", str(elsewhere), "--link"])
    packed = tmp_path / "packed"
    inode = (elsewhere / "parts/llm/model.safetensors").stat().st_ino
    assert (packed / "llm/model.safetensors").stat().st_ino == inode
    shutil.rmtree(elsewhere)
    towers = [ClipEncoder(f"{packed}/{kind}_encoder", kind) for kind in ("image", "video")]
    model = video_llava(load_llm(f"{packed}/llm"), *towers)
    load_projector(model, packed / "projector.safetensors")
    assert all(
        torch.equal(value, trained[2][f"projector.{name}"]) for name, value in model.projector.state_dict().items()
    )
    load_projector(model, checkpoint / "projector.safetensors")  # of the same hashes, wherever it was trained
    change(packed / "llm")
    with pytest.raises(UserError, match="another LLM than"):
        load_projector(video_llava(load_llm(f"{packed}/llm"), *towers), checkpoint / "projector.safetensors")


def test_nothing_is_packed_where_a_part_is_missing_or_the_users_files_lie(moved, tmp_path):
    checkpoint, elsewhere = moved
    with pytest.raises(SystemExit, match="error: No checkpoint of the image encoder"):
        convert.main(["pack", str(checkpoint), "packed"])
    assert os.listdir() == []
    found = ["--foundations", str(elsewhere)]
    for out in (checkpoint, checkpoint.parent, elsewhere, elsewhere / "parts/llm", tmp_path / "c"):
        with pytest.raises(SystemExit, match="error: "):
            convert.main(["pack", str(checkpoint), str(out), *found, "--overwrite"])
    (tmp_path / "c/mine").mkdir()
    (tmp_path / "c/mine/notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: .*notes\.txt"):
        convert.main(["pack", str(checkpoint), "mine", *found])
    assert (tmp_path / "c/mine/notes.txt").read_text() == "mine"


def test_export_finds_the_foundations_too_and_gives_the_same_from_a_packed_one(moved, tmp_path):
    checkpoint, elsewhere = moved
    found = ["--foundations", str(elsewhere)]
    convert.main(["export", str(checkpoint), "out", "--to", "original", *found])
    convert.main(["pack", str(checkpoint), "packed", *found])
    convert.main(["export", "packed", "again", "--to", "original"])
    assert listing(tmp_path / "c/out")["model.safetensors"] == listing(tmp_path / "c/again")["model.safetensors"]


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_not_the_llms_own_stays_with_the_checkpoint(trained, tokenizer, tmp_path):
    place = trained[1] / "parts"
    settings = {
        "encoder": {kind: dict(part) for kind, part in encoders_at(place).items()},
        "model": {"llm": {"path": str(place / "llm")}},
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": {"template": "vicuna_v1", "image_fit": "crop"},
    }
    before = json.dumps(settings)
    another = load_tokenizer(str(place / "llm"))
    another.add_tokens(["<mine>"])
    task = Stage(model_at(place), ["projector"], Recipe(lr=1.0))
    task.export(tmp_path / "checkpoint", another, settings)
    assert json.dumps(settings) == before
    convert.main(["pack", str(tmp_path / "checkpoint"), str(tmp_path / "packed")])
    for folder in ("checkpoint", "packed"):
        loaded, found, description = load(tmp_path / folder)
        assert found.get_vocab() == {**tokenizer.get_vocab(), "<mine>": len(tokenizer)}
        assert description.trained == ["projector"] and loaded.llm.sha256 == description.sha256["llm"]


def test_what_is_the_projects_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    assert composed(["+experiment=stage1"]).tokenizer == "assets/llm"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets/llm").mkdir(parents=True)  # another project's
    cfg = composed(["+experiment=stage1"])
    for name in ("languagebind_image", "languagebind_video", "clip", "mae", "llm"):
        assert cfg.foundations[name] == str(PROJECT / "assets" / name.replace("_", "-"))
    assert cfg.model.image_encoder.path == str(PROJECT / "assets/languagebind-image")
    assert cfg.world == "data/toy" and cfg.runs == "outputs/runs"  # the working directory's
    assert composed(["+experiment=stage1", "foundations.llm=mine/llm"]).model.llm.path == "mine/llm"
    assert composed(["+experiment=align_image"]).tokenizer == str(PROJECT / "assets/tokenizer")
    for path in (PROJECT / "conf").rglob("*.yaml"):
        assert not re.search(r"[: ]assets/", re.sub("#.*", "", path.read_text()).replace("${project:assets/", "")), path


def test_folders_to_search_are_handed_to_the_evaluation():
    cfg = composed(["+experiment=evaluate", "foundations.search=[/store]"])
    assert list(cfg.evaluation.search) == ["/store"]
