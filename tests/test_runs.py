"""A run is what decides its weights: its folder, what goes on from it, and what is refused."""

import json
import multiprocessing
import os
import re
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from shard_fixtures import image_sample, text_sample, write_source

from vllava import runs
from vllava.config import composed, run_name, with_paths_quoted
from vllava.errors import UserError
from vllava.identity import decides, differences, digest, flat, identity_of, tells_apart
from vllava.lineage import PROJECTOR, resolve
from vllava.runs import Run, claim, occupied, place, read_run


@pytest.fixture
def shards(tmp_path):
    write_source(tmp_path / "shards", [image_sample("a"), text_sample("b")], per_shard=2)
    return tmp_path / "shards"


@pytest.fixture
def identity(shards):
    """A function from overrides to a stage's identity, on own data."""

    def identified(*overrides, experiment="stage2", folder=shards):
        cfg = composed([f"+experiment={experiment}", f"data.sources.image=[{folder}]", *overrides])
        settings = OmegaConf.to_container(cfg, resolve=True)
        return identity_of({**settings, "projector": None})

    return identified


# --- identity ---------------------------------------------------------------------------------------------------------

SAME = [
    "data.workers=3", "data.token_budget=512", "data.cache.gigabytes=1", "logger=none", "trainer=fsdp",
    "trainer.devices=2", "log_level=INFO", "save_minutes=1", "preview=null", "run_dir=elsewhere", "runs=there",
    "world=other", "task.max_broken_share=0.5", "model.llm.gradient_checkpointing=true",
    "data.held_out.text=[somewhere]",
]  # fmt: skip
OTHER = {
    "seed=2": "seed", "task.recipe.lr=0.1": "task.recipe.lr", "trainer.max_epochs=2": "trainer.max_epochs",
    "data.global_batch=8": "data.global_batch", "data.image_fit=crop": "data.image_fit",
    "data.max_length=99": "data.max_length", "encoder/image=clip": "model.image_encoder", "recipes.stage2.lr=1": "task",
    "trainer.precision=32-true": "trainer.precision", "data.num_frames=4": "data.num_frames",
    "data.template=plain": "data.template", "task.trained=[projector]": "task.trained",
}  # fmt: skip


@pytest.mark.parametrize("override", SAME)
def test_what_decides_nothing_is_no_part_of_a_run(override, identity):
    assert digest(identity(override)) == digest(identity())
    assert not tells_apart(override)


@pytest.mark.parametrize("override", OTHER)
def test_what_decides_the_weights_is_and_is_named(override, identity):
    found = differences(identity(), identity(override))
    assert OTHER[override] in {key[: len(OTHER[override])] for key in found} and len(found) < 5, found
    assert tells_apart(override)


def test_shards_and_weights_are_known_by_what_they_hold(shards, identity, tmp_path):
    before = identity()
    shards.rename(tmp_path / "moved")
    moved = identity(folder=tmp_path / "moved")
    assert digest(moved) == digest(before) and not differences(before, moved)
    write_source(tmp_path / "other", [image_sample("a", 3), text_sample("b")], per_shard=2)
    other = identity(folder=tmp_path / "other")
    assert list(differences(before, other)) == ["data.sources.image.0"]


def test_of_a_folder_that_is_not_there_the_path_decides(identity, shards, tmp_path):
    known, unknown = identity(), identity(folder=tmp_path / "later")
    assert list(differences(known, unknown)) == ["data.sources.image.0"]
    shards.rename(tmp_path / "elsewhere")
    gone = identity()
    assert not differences(known, gone) and not differences(gone, known)
    assert not differences(unknown, identity(folder=tmp_path / "later"))


@given(
    st.recursive(
        st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("ab", min_size=1), inner),
    )
)
def test_no_leaf_of_a_tree_is_lost(tree):
    def leaves(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return sum(map(leaves, inner)) if inner else 1

    assert len(list(flat(tree))) == leaves(tree)


def test_keys_of_the_same_beginning_are_told_apart():
    assert decides("data.workers_of_mine") and not decides("data.workers") and not decides("trainer.callbacks.x")
    assert decides("trainer.max_steps") and not decides("trainer.max_steps_shown")


def enter(run):
    with occupied(run):
        pass


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(identity, tmp_path):
    """A function that gives a run in a folder; finished, if it is told to be."""

    def made(name="run", *overrides, finished=False, experiment="stage2"):
        found = Run(tmp_path / "runs" / name, experiment, "united", 1, identity(*overrides, experiment=experiment))
        if finished:
            claim(found.folder)
            (found.folder / "checkpoint").mkdir()
            (found.folder / PROJECTOR).write_bytes(b"weights of " + name.encode())
            (found.folder / "metrics.json").write_text("{}")
            found.finish()
        return found

    return made


def test_a_run_is_new_then_unfinished_then_finished_and_then_not_run_again(run):
    with occupied(run()) as first:
        assert not first.is_finished
    with occupied(run()) as again:  # as after a crash
        assert again.identity == first.identity
    run(finished=True)
    with occupied(run("run", "data.workers=7")) as over:
        assert over is None


@pytest.mark.parametrize("gone", [PROJECTOR, "metrics.json"])
@pytest.mark.parametrize("cut", [True, False])
def test_a_run_whose_result_is_not_whole_is_not_finished(gone, cut, run):
    there = run(finished=True).folder / gone
    assert read_run(there.parents[gone.count("/")]).is_finished
    there.write_bytes(b"") if cut else there.unlink()
    with occupied(run()) as found:
        assert found is not None and not found.is_finished


def test_another_configuration_in_its_folder_is_refused_with_what_differs(run):
    run(finished=True)
    with pytest.raises(UserError, match=r"the finished run of .*recipe\.lr was 0.0005 and is 0.1") as error:
        enter(run("run", "task.recipe.lr=0.1"))
    assert "run_dir=" in str(error.value) and "\n" not in str(error.value)
    with occupied(run("begun")):
        pass
    with pytest.raises(UserError, match=r"an unfinished run of another configuration: seed was 1 and is 2.*give it up"):
        enter(run("begun", "seed=2"))


def test_more_steps_than_planned_are_refused_in_words(run):
    for finished in (False, True):
        with occupied(run(finished=finished)):
            pass
        with (
            pytest.raises(UserError, match=r"max_epochs was 1 and is 3.*learning rate"),
            occupied(run("run", "trainer.max_epochs=3")),
        ):
            pass


CONSTANT = ("task.recipe.schedule=constant", "task.recipe.warmup_steps=9")


def test_more_steps_go_on_where_the_learning_rate_does_not_depend_on_them(run):
    enter(run("run", *CONSTANT))
    enter(run("run", *CONSTANT, "trainer.max_epochs=3"))  # unfinished
    enter(run("run", *CONSTANT, "trainer.max_steps=7"))
    done = run("run", *CONSTANT, "trainer.max_steps=7", finished=True)
    with pytest.raises(UserError, match=r"what it would go on from is no longer in .*resume.*run_dir="):
        enter(run("run", *CONSTANT, "trainer.max_steps=8"))
    (done.folder / "resume").mkdir()
    for shorter in (["trainer.max_steps=6"], ["trainer.max_steps=8", "trainer.max_epochs=3", "seed=2"]):
        with pytest.raises(UserError, match=r"gone further already|seed was 1 and is 2"):
            enter(run("run", *CONSTANT, *shorter))
    assert read_run(done.folder).is_finished  # and is still, after what was refused
    enter(run("run", *CONSTANT, "trainer.max_steps=8"))
    assert not read_run(done.folder).is_finished


@pytest.mark.parametrize("warmup", ["task.recipe.warmup_ratio=0.1", "task.recipe.schedule=cosine"])
def test_a_warm_up_that_is_a_share_of_the_steps_depends_on_them(warmup, run):
    given = ("task.recipe.schedule=constant", warmup)
    enter(run("run", *given))
    with pytest.raises(UserError, match="learning rate follows the steps that were planned"):
        enter(run("run", *given, "trainer.max_steps=8"))


def test_a_run_that_may_be_given_more_steps_keeps_its_name():
    def name(*overrides):
        return run_name("stage1", "united", 1, *overrides)

    assert name(*CONSTANT) == name(*CONSTANT, "trainer.max_steps=9")
    assert name() != name("trainer.max_steps=9")


def test_running_again_goes_into_a_folder_of_its_own(run, tmp_path):
    folder = tmp_path / "runs" / "run"
    assert place(folder, rerun=True) == folder
    run(finished=True)
    assert place(folder, rerun=False) == folder
    assert place(folder, rerun=True).name == "run-2"
    with occupied(run("run-2")):
        pass
    assert place(folder, rerun=True).name == "run-2"  # which goes on
    run("run-2", finished=True)
    assert place(folder, rerun=True).name == "run-3"


def hold(run, ready):
    with occupied(run):
        ready.set()
        time.sleep(60)


def test_two_at_once_are_refused_and_a_crash_leaves_no_lock_behind(run, monkeypatch):
    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    ready = multiprocessing.get_context("fork").Event()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(run(), ready))
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="Another process is at work in"), occupied(run()):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with occupied(run()) as found:
        assert found is not None


def test_results_of_a_version_that_kept_no_record_are_not_written_over(run, tmp_path):
    claim(tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="a run of an older version, which would be lost"), occupied(run()):
        pass


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file/run cannot be written \(Not a directory\): choose"):
        claim(tmp_path / "file" / "run")


def test_a_damaged_record_is_an_error_that_names_it(run):
    (run(finished=True).folder / "run.json").write_text('{"version": 1')
    with pytest.raises(UserError, match=r"run\.json cannot be read"), occupied(run()):
        pass


# --- what a run starts from -------------------------------------------------------------------------------------------


@pytest.fixture
def start(shards, tmp_path):
    """A function that resolves what a stage-2 command line starts from."""

    def resolved(*overrides):
        given = [f"data.sources.image=[{shards}]", f"runs={tmp_path}/runs", *overrides]
        cfg = composed(["+experiment=stage2", *given])
        resolve(cfg)
        return cfg.projector

    return resolved


def test_the_stage_1_run_that_the_same_command_line_would_train_is_taken(run, start, capsys):
    wanted = run("renamed by hand", "task.recipe.lr=0.5", experiment="stage1", finished=True)
    run("stage1-united-s1", experiment="stage1", finished=True)
    run("stage1-of-another-seed", "seed=3", experiment="stage1", finished=True)
    assert start("task.recipe.lr=0.5") == str(wanted.folder / PROJECTOR)
    assert f"projector: {wanted.folder / PROJECTOR}\n" in capsys.readouterr().out
    assert "stage1-united-s1" in start("data.workers=0", "trainer=fsdp")


def test_the_only_one_that_fits_is_taken_and_what_it_did_otherwise_is_said(run, start, capsys):
    only = run("one", "task.recipe.lr=0.5", "trainer.max_epochs=2", experiment="stage1", finished=True)
    assert start() == str(only.folder / PROJECTOR)
    said = capsys.readouterr().out
    assert "task.recipe.lr: 0.5 there, 0.001 here" in said and "trainer.max_epochs: 2 there, 1 here" in said


@pytest.mark.parametrize(
    ("runs", "given", "why"),
    [
        ({"a": ["task.recipe.lr=0.5"], "b": ["task.recipe.lr=0.6"]}, [], "of 2 .* more than one may be meant"),
        ({"a": ["data.template=plain"]}, [], "none is the one .*data.template: plain there, vicuna_v1 here"),
        (
            {"a": []},
            ["encoder/image=clip"],
            "none is the one .*image_encoder.path: .*languagebind.* there, .*clip here",
        ),
        ({"a": []}, ["seed=2"], "none is the one .*seed: 1 there, 2 here"),
    ],
)
def test_a_doubtful_start_is_refused_with_the_candidates(runs, given, why, run, start, tmp_path):
    for name, overrides in runs.items():
        run(name, *overrides, experiment="stage1", finished=True)
    with pytest.raises(UserError, match=f"in doubt: .*{why}") as error:
        start(*given)
    for name in runs:
        assert f"projector={tmp_path}/runs/{name}/{PROJECTOR}" in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_finished_one_the_error_says_what_to_do(run, start, tmp_path):
    with pytest.raises(UserError, match=rf"No projector at {tmp_path}/runs/stage1-united-s1-\w+/{PROJECTOR}") as error:
        start()
    assert "+experiment=stage1" in str(error.value)
    name = re.search(r"stage1-united-s1-\w{6}", str(error.value))[0]
    enter(run(name, experiment="stage1"))
    with pytest.raises(UserError, match=f"{name} is unfinished: start it again"):
        start()


def test_a_given_start_is_left_as_it_is(start):
    assert start("projector=null") is None
    assert start("projector=a/b=c,d (1).safetensors") == "a/b=c,d (1).safetensors"


# --- paths on the command line ----------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1))
def test_a_path_may_hold_any_characters(path):
    if path == "null" or path[:1] in "'\"" or "${" in path or path != path.strip():
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser

    [quoted] = with_paths_quoted([f"projector={path}"])
    assert str(OverridesParser.create().parse_override(quoted).value()) == path


def test_several_values_of_a_sweep_stay_several():
    assert with_paths_quoted(["-m", "projector=a,b=c"]) == ["-m", "projector=a,b=c"]
    assert with_paths_quoted(["task.recipe.lr=1,2", "projector=a,b"]) == ["task.recipe.lr=1,2", "projector='a,b'"]


def test_a_record_says_what_it_is_and_what_it_left(run):
    said = json.loads((run(finished=True).folder / "run.json").read_text())
    assert said["digest"] == digest(said["identity"])
    assert set(said["left"]) == {PROJECTOR, "metrics.json"} and said["ended"]
