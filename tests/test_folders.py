"""Folders that are written: whole or not at all, and never in the place of somebody's work."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep import toy
from vllava.errors import UserError
from vllava.folders import RECORD, entries, replacing, require_replaceable, strangers


def write(folder, content="one", **settings):
    with replacing(folder, **settings) as unfinished:
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "weights").write_text(content)
        (unfinished / "vllava.json").write_text("{}")


def contents(folder):
    """Every file and link below a folder, with what is in it."""
    return {name: (folder / name).read_bytes() for name in entries(folder) if (folder / name).is_file()}


def test_what_was_written_is_ours_and_is_replaced_by_what_is_written_next(tmp_path):
    write(tmp_path / "out")
    assert strangers(tmp_path / "out") == []
    write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "sub" / "weights").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_a_copy_and_a_moved_folder_are_still_ours(tmp_path):
    write(tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    (tmp_path / "out").rename(tmp_path / "moved")
    assert strangers(tmp_path / "copy") == strangers(tmp_path / "moved") == []


def add(folder):
    (folder / "sub" / "notes.txt").write_text("mine")


def change(folder):
    (folder / "sub" / "weights").write_text("eno")  # of the same size


def link(folder):
    shutil.move(folder / "sub" / "weights", folder.parent / "weights")
    (folder / "sub" / "weights").symlink_to(folder.parent / "weights")


def empty_folder(folder):
    (folder / "new").mkdir()


def damage_record(folder):
    (folder / RECORD).write_text("[" * 100_000)


@pytest.mark.parametrize("work", [add, change, link, empty_folder, damage_record])
def test_what_the_user_added_or_changed_later_is_noticed_and_kept(tmp_path, work):
    out = tmp_path / "out"
    write(out)
    work(out)
    before = contents(out)
    with pytest.raises(UserError, match=r"did not write, or what changed since: (sub|new|\.vllava)"):
        write(out)
    assert contents(out) == before
    write(out, "two", overwrite=True)
    assert (out / "sub" / "weights").read_text() == "two" and strangers(out) == []


def test_somebodys_folder_is_kept_and_an_empty_one_is_used(tmp_path):
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine")
    other, part = tmp_path / "thesis", tmp_path / "thesis.part"
    for folder in (other, part):
        folder.mkdir()
        (folder / "chapter1.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis holds what this program did not write.*chapter1\.tex"):
        write(other)
    assert contents(other) == contents(part) == {"chapter1.tex": b"years of work"}
    write(tmp_path / "thesis2")
    assert contents(part) == {"chapter1.tex": b"years of work"}


def test_a_file_that_appears_while_we_write_is_kept(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(UserError, match=r"notes\.txt"), replacing(tmp_path / "out"):
        add(tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_folder_as_it_was_and_nothing_beside_it(tmp_path, error):
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError if error is OSError else error), replacing(tmp_path / "out") as unfinished:
        (unfinished / "half").write_text("")
        raise error
    assert contents(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


def test_a_swap_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    write(tmp_path / "out")
    before = contents(tmp_path / "out")
    rename = os.rename

    def fail(source, target):
        if Path(source).name == "new":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "out")
    assert contents(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_folder_is_written_where_it_would_do_harm(tmp_path, monkeypatch, overwrite):
    here, home, source = tmp_path / "a" / "here", tmp_path / "home" / "me", tmp_path / "models" / "source"
    for folder in (here, home, source / "llm"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "models")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    before = contents(tmp_path)
    cases = {
        "": "current folder",
        ".": "current folder",
        "..": "current folder or one above",
        "../here": "current folder",
        "/": "current folder or one above",
        str(home): "home folder",
        str(home.parent): "home folder or one above",
        str(source): "which is being read",
        str(source.parent): "which is being read",
        str(source / "llm"): "which is being read",
        "../../models/../models/source": "which is being read",
        str(tmp_path / "link"): "is a link",
        str(tmp_path / "dangling"): "is a link",
        str(source / "file"): "is a file",
        str(source / "llm" / "file" / "below"): "cannot be written",
        "x" * 300: "cannot be written",
    }
    (source / "file").write_text("mine")
    before = contents(tmp_path)
    for name, words in cases.items():
        with pytest.raises(UserError, match=words):
            write(Path(name), overwrite=overwrite, inputs=[source])
    assert contents(tmp_path) == before
    write(source / "new", inputs=[source])  # beside what is read, nothing is lost
    write(Path("deep/new"))


def test_a_checkpoint_of_a_version_that_kept_no_record_is_known_by_its_names(tmp_path):
    for name in ("vllava.json", "projector.safetensors", "llm/config.json", "llm/model.safetensors"):
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_text("x")
    require_replaceable(tmp_path / "old")
    (tmp_path / "old" / "llm" / "my notes.md").write_text("x")
    assert strangers(tmp_path / "old") == ["llm/my notes.md"]
    (tmp_path / "old" / "llm" / "my notes.md").unlink()
    (tmp_path / "old" / "vllava.json").unlink()
    assert len(strangers(tmp_path / "old")) == 3  # any model's files: not ours


def test_the_foundations_shipped_are_as_recorded_so_that_they_can_be_rebuilt_in_place():
    assets = Path(__file__).parents[1] / "assets"
    assert {folder.name: strangers(folder) for folder in assets.iterdir() if folder.is_dir()} == {
        name: [] for name in ("clip", "languagebind-image", "languagebind-video", "llm", "mae", "tokenizer")
    }


def test_the_toy_world_replaces_and_removes_its_own_shards_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(toy.SPLITS, "tiny", (toy.Source("tiny/text", "text", "questions", 3),))
    folder = tmp_path / "tiny" / "text"

    def make(*more):
        return toy.main(["tiny", "--out", str(tmp_path), "--processes", "1", *more])

    make()
    first = contents(folder)
    cache = folder / "features" / ("0" * 16)
    cache.mkdir(parents=True)
    (cache / "00000.tar").write_bytes(b"encoder outputs")
    make()
    assert contents(folder) == first

    manifest = json.loads((folder / "manifest.json").read_text())
    shard = folder / manifest["shards"][0]["name"]
    written = shard.read_bytes()
    shard.write_bytes(b"mine")
    with pytest.raises(SystemExit, match=shard.name):
        make()
    shard.write_bytes(written)

    (folder / "mine.tar").write_bytes(b"mine")
    for change in ((), ("--remove",)):
        with pytest.raises(SystemExit, match=r"error: .*mine\.tar"):
            make(*change)
    assert (folder / "mine.tar").read_bytes() == b"mine" and shard.read_bytes() == written
    (folder / "mine.tar").unlink()
    (tmp_path / "own").mkdir()
    make("--remove")
    assert os.listdir(tmp_path) == ["own"]
