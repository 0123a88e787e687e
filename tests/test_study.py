"""Studies: every arm with every seed, whatever fails or is killed on the way, and nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from shard_fixtures import ROOT
from warm import Started, train

from data_prep.toy import make
from vllava import plan, study_plan
from vllava.config import composed, study_name
from vllava.cores import cores
from vllava.errors import UserError
from vllava.identity import identity_of
from vllava.lineage import resolve
from vllava.runs import Run, finished_as
from vllava.study import Cell, Outcome, Study, gather, keep, record_of, with_checkpoints
from vllava.study_run import given_of, part_of, place
from vllava.study_sweep import cells_of

SMALL = ["data.global_batch=2"]  # steps enough to be killed in
TWO_ARMS = """
# @package _global_
defaults:
  - base
  - _self_
study:
  name: two
  title: Two arms, one of which fails
  baseline: images
  seeds: [1, 2]
  chain: [stage1, stage2]
  overrides: [logger=none, trainer=single, data.workers=0, preview=null, data.features=cache, data.global_batch=2]
  arms:
    images: [+ablation=image_only]
    fails: [+ablation=image_only, "+data.stage2.mixture={video: 2}"]
  claims: {one: {says: Images help}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards for two or three steps, and a study of two arms."""
    folder = tmp_path_factory.mktemp("world")
    for split in ("stage1", "stage2"):
        make(split, folder, seed=0, scale=0.01, processes=2)
    (folder / "conf" / "study").mkdir(parents=True)
    (folder / "conf" / "study" / "two.yaml").write_text(TWO_ARMS)
    both = TWO_ARMS.replace("two\n", "share\n").replace("  fails: ", "  other: ").replace("{video: 2}", "{text: 0}")
    (folder / "conf" / "study" / "share.yaml").write_text(both)
    return folder


SETTINGS = ["logger=none", "trainer=single", "data.workers=0", "preview=null", "data.features=cache", *SMALL]


def arguments(world, runs):
    return ["+study=two", f"world={world}", f"runs={runs}", f"hydra.searchpath=[file://{world}/conf]"]


def study_in(runs):
    [path] = runs.glob("study-*/study.json")
    return json.loads(path.read_text())


def made(runs):
    """When each finished run in a folder of runs was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/metrics.json")}


def starts(runs):
    """How often each experiment was started, by the logs of the study."""
    logs = "".join(path.read_text() for path in runs.glob("study-*/logs/*.log"))
    return Counter(part.split()[0] for part in logs.split("+experiment=")[1:])


def test_a_study_ends_what_it_can_names_what_failed_and_runs_nothing_twice(world, tmp_path):
    """Killed in the middle, started again two runs at a time, and started once more when it had ended."""
    runs = tmp_path / "runs"
    plain = ["+experiment=stage1", "+ablation=image_only", *SETTINGS, "seed=2", f"world={world}", f"runs={runs}"]
    code, _, told = train([*plain, f"run_dir={runs}/mine"], tmp_path / "plain")
    assert code == 0, told

    killed = Started(arguments(world, runs), tmp_path / "killed")
    while not [*runs.glob("stage2-*/history.jsonl")] and killed.poll() is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGTERM)
    code, _, told = killed.end()
    assert code == 143 and "stopped by SIGTERM" in told and "Traceback" not in told, told
    listed = study_in(runs)["runs"]
    assert [(one["arm"], one["seed"]) for one in listed] == [("images", 1), ("images", 2), ("fails", 1), ("fails", 2)]
    assert {one["state"] for one in listed} == {"unfinished"} and not listed[1]["parts"]
    before = made(runs)
    assert sorted(name.split("-")[0] for name in before) == ["mine", "stage1"]

    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "train.py", *arguments(world, runs), *launcher]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and "Traceback" not in again.stderr, again.stderr
    assert "2 finished, 2 failed of 4 runs" in again.stdout
    assert before.items() <= made(runs).items()
    content = study_in(runs)
    facts = {key: content[key] for key in ("name", "title", "baseline", "seeds", "claims")}
    assert facts == {
        **{"name": "two", "title": "Two arms, one of which fails", "baseline": "images", "seeds": [1, 2]},
        "claims": {"one": {"says": "Images help"}},
    }
    images, fails = content["runs"][:2], content["runs"][2:]
    for one in images:
        assert one["state"] == "finished" and one["error"] is None and list(one["parts"]) == ["stage1", "stage2"]
        for folder in one["parts"].values():
            assert (runs / "study-two" / folder / "metrics.json").is_file()
    assert images[1]["parts"]["stage1"] == "../mine"  # which a plain run had made
    for one, good in zip(fails, images, strict=True):
        assert one["state"] == "failed" and one["error"].startswith("stage2: data.mixture names 'video'")
        assert one["parts"] == {"stage1": good["parts"]["stage1"]}  # the same run, made once for both
        assert f"fails-s{one['seed']} failed: stage2: data.mixture" in again.stderr
    assert starts(runs) == {"stage1": 1, "stage2": 5}  # images-s1 twice, for it was killed; each that fails once

    whole = made(runs)
    code, said, told = train([*arguments(world, runs), "arm=images"], tmp_path / "third")
    assert code == 0 and said.count("was done already") == 4, told
    assert made(runs) == whole and len(study_in(runs)["runs"]) == 4


# --- without a process ------------------------------------------------------------------------------------------------

STUDY = {
    **{"name": "s", "title": "", "baseline": "a", "seeds": [1], "chain": ["stage1", "stage2"], "axis": "share"},
    "overrides": ["data.features=cache"],
    "arms": {"a": ["+ablation=united"], "b": {"overrides": ["+ablation=image_only", "x.y=null"], "chain": ["stage2"]}},
    "levels": {0.13: {"overrides": ["+x.y=2", "encoder=@early"], "x": 0.13}, "whole": None},
    "before": {"early": ["+experiment=align_video", "trainer.max_steps=3"]},
    "claims": {},
}


def test_a_run_has_the_overrides_of_its_level_then_its_arm_then_the_command_line():
    study = Study.of(STUDY)
    cell = study.cell("a", 0.13, 7)
    assert cell.name == "a-0.13-s7" and study.chain_of(cell) == ["stage1", "stage2"]
    assert study.overrides_of(cell, ["data.features=online"]) == [
        *("data.features=online", "+x.y=2", "encoder=@early", "+ablation=united", "seed=7"),
    ]
    other = study.cell("b", "0.13", 7)
    assert "x.y=null" in study.overrides_of(other) and "+x.y=2" not in study.overrides_of(other)
    assert study.chain_of(other) == ["stage2"]


def test_a_run_of_before_is_called_by_its_name():
    study = Study.of(STUDY)
    overrides = study.overrides_of(study.cell("a", "0.13", 1))
    assert study.needed(overrides) == ["early"] and study.needed(study.overrides_of(study.cell("a", "whole", 1))) == []
    assert "encoder=/r/x/checkpoint" in with_checkpoints(overrides, {"early": Path("/r/x")})


def test_where_a_level_stands_may_be_measured_of_a_run_that_is_made_first(tmp_path):
    levels = {"early": {"x": "@early"}, "shipped": {"x": str(tmp_path / "shipped")}, "whole": {"x": 1.0}}
    study = Study.of({**STUDY, "levels": levels, "measure": {"_target_": "os.path.getsize", "_partial_": True}})
    (tmp_path / "shipped").write_text("four")
    early = tmp_path / "early" / "checkpoint"
    early.parent.mkdir()
    early.write_text("three")

    def places():
        gather(tmp_path, study, [], [])
        return [level["x"] for level in json.loads((tmp_path / "study.json").read_text())["levels"].values()]

    place(study, "early", tmp_path, {})  # as a run does that needs nothing of what is made first
    assert places() == [None, None, 1.0]
    for level in levels:
        place(study, level, tmp_path, {"early": early.parent})
    assert places() == [5, 4, 1.0]
    early.unlink()
    place(study, "early", tmp_path, {"early": early.parent})  # is not measured twice
    assert places() == [5, 4, 1.0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"levels": {"early": {"x": "@early"}}}, r"study\.levels\.early\.x is '@early', but study\.measure"),
        ({"baseline": "c"}, r"Unknown key 'c' in study\.baseline"),
        ({"seeds": ["one"]}, r"study\.seeds"),
        ({"arms": {"a": {"override": []}}}, r"Unknown key 'override' in study\.arms\.a: did you mean 'overrides'"),
        ({"chain": []}, r"study\.chain is empty"),
        ({"seed": 1}, "Unknown key 'seed' in study: did you mean 'seeds'"),
    ],
)
def test_a_mistake_in_a_study_is_named(change, told):
    with pytest.raises(UserError, match=told):
        Study.of({**STUDY, **change})


@pytest.mark.parametrize("given", ["+experiment=stage1", "projector=x", "+ablation=united", "study.seeds=[1]"])
def test_what_a_study_decides_is_not_for_the_command_line(given):
    with pytest.raises(UserError, match="study"):
        given_of(["arm=a", "seed=1", "+study=two", "logger=none", given])
    assert given_of(["arm=a", "seed=1", "+study=two", "logger=none"]) == ["logger=none"]


def test_a_study_with_other_settings_for_all_of_its_runs_has_a_folder_of_its_own():
    chosen = ["arm=a,b", "seed=1,2", "+study=two", "logger=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert study_name("two", *chosen) == "study-two"
    assert study_name("two", *chosen, "trainer.max_steps=3").startswith("study-two-")


def test_records_of_earlier_starts_count_as_long_as_they_are_of_the_same_runs(tmp_path):
    study = Study.of(STUDY)
    one, two, gone = Cell("a", "whole", 1), Cell("a", "whole", 2), Cell("a", "0.13", 1)
    for cell, changed in ((one, []), (two, []), (gone, ["trainer.max_steps=1"])):
        outcome = Outcome(cell.arm, cell.level, cell.seed, overrides=[*study.overrides_of(cell), *changed])
        outcome.end("finished")
        keep(tmp_path, outcome)
    new = Cell("b", "whole", 1)
    listed = {found.cell: found.state for found in gather(tmp_path, study, [], [one, new])}
    assert listed == {one: "finished", two: "finished", new: "unfinished"}
    content = json.loads((tmp_path / "study.json").read_text())
    assert content["seeds"] == [1, 2] and content["runs"][0] == json.loads(record_of(tmp_path, one).read_text())
    assert content["levels"]["0.13"]["x"] == 0.13 and asdict(study)["axis"] == content["axis"]


@pytest.mark.parametrize("where", ["run", "chain/run"])
def test_a_finished_run_is_found_by_what_it_is_also_in_a_chain(where, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    one = Run(folder, "stage1", "united", 1, {"seed": 1})
    one.write()
    assert finished_as(tmp_path, "stage1", one.digest) is None
    one.finish()
    assert finished_as(tmp_path, "stage1", one.digest).folder == folder
    assert finished_as(tmp_path, "stage1", "another") is None and finished_as(tmp_path, "stage2", one.digest) is None


def test_a_plan_counts_what_is_to_make_once_and_not_what_is_finished(world, tmp_path, capsys):
    settings = ["+study=share", *arguments(world, tmp_path)[1:]]
    assert plan.main([*settings, "--rate", "10", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    # Both arms share their stage 1: for each seed 30 pictures. In stage 2 there are 45, and 10 texts or none.
    assert (first["experiment"], first["to_make"], first["finished"], first["samples"]) == ("stage1", 2, 0, 60)
    assert first["hours"] == pytest.approx(6 / 3600)
    assert (second["experiment"], second["to_make"], second["finished"]) == ("stage2", 4, 0)
    assert second["samples"] == 2 * (55 + 45)

    cfg = study_plan.swept([*settings, "seed=1"])
    study, given, [cell, _] = cells_of(cfg)
    part = part_of("stage1", study.overrides_of(cell, given), tmp_path)
    part.folder.mkdir()
    run = Run(part.folder, "stage1", "image_only", 1, identity_of(part.settings))
    (part.folder / "metrics.json").write_text('{"samples": 300, "seconds": 20.0}')
    run.finish()
    assert plan.main([*settings, "arm=images", "seed=1,2,3"]) == 0
    told = capsys.readouterr().out
    assert "share: 3 runs of stage1, stage2" in told and "15.0 (of 1 finished run)" in told
    assert [line.split()[:4] for line in told.splitlines() if line.startswith("stage1")] == [["stage1", "2", "1", "60"]]


def test_a_plan_counts_the_samples_of_shares_epochs_and_steps(world):
    text = {"text": [f"{world}/stage2/text"]}
    data = {"modalities": ["text"], "sources": text, "remedy": "", "global_batch": 4}
    for trainer, mixture, expected in (
        ({}, None, 10),
        ({"max_epochs": 3}, None, 30),
        ({"max_steps": 2}, None, 8),
        ({"limit_train_batches": 0.5}, None, 4),
        ({"limit_train_batches": 2}, {"text": 3}, 8),
        ({}, {"text": 0.5}, 5),
    ):
        settings = {"evaluation": None, "data": {**data, "mixture": mixture}, "trainer": trainer}
        assert study_plan.samples_of(settings) == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("task.recipe.lr=1e-3,1e-4", "a study sweeps over arm, level, seed alone"),
        ("arm=imagse", "did you mean 'images'"),
    ],
)
def test_a_mistake_on_a_studys_command_line_is_named_before_anything_runs(given, told, world, tmp_path):
    with pytest.raises(UserError, match=told):
        cells_of(study_plan.swept([*arguments(world, tmp_path), given]))


def test_a_plan_names_the_arm_that_cannot_run(world, tmp_path):
    with pytest.raises(SystemExit, match=r"fails-s1, stage2: data\.mixture names 'video'"):
        plan.main([*arguments(world, tmp_path), "--rate", "10"])


PARTS = ("base", "systems", "toy")  # of other studies
STUDIES = sorted({path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")} - {*PARTS})


@pytest.mark.parametrize("name", STUDIES)
def test_the_studies_that_come_along_are_whole(name, tmp_path):
    """Their claims are about arms that there are, and each run of the first seed is a configuration that holds."""
    study, given, cells = cells_of(study_plan.swept([f"+study={name}", "seed=1", f"runs={tmp_path}"]))
    assert {arm for claim in study.claims.values() for arm in (claim["better"], *claim["worse"])} <= set(study.arms)
    assert {cell.arm for cell in cells} == set(study.arms) and study.name == name
    for level in {cell.level for cell in cells}:
        overrides = study.overrides_of(study.cell("image_only", level, 1), given)
        made = dict.fromkeys(study.needed(overrides), tmp_path)
        settings = composed(["+experiment=stage2", *with_checkpoints(overrides, made), f"runs={tmp_path}"])
        assert settings.ablation == "image_only" and settings.data.features == "cache"


def test_an_evaluation_of_a_named_run_shows_its_curves(world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    start = {"projector": {"path": f"{first}/checkpoint/projector.safetensors", "holds": "x"}}
    for folder, identity in ((first, {}), (second, start)):
        folder.mkdir()
        (folder / "loss.png").write_bytes(b"a picture")
        Run(folder, folder.name, "united", 1, identity).write()
    cfg = composed(["+experiment=evaluate", f"world={world}", f"evaluation.checkpoint={second}/checkpoint"])
    resolve(cfg)
    assert cfg.evaluation.plots == {"stage 1": f"{first}/loss.png", "stage 2": f"{second}/loss.png"}


def test_a_process_uses_no_more_cores_than_it_is_given(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert cores() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert cores() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # by level of nesting, which is OpenMP's affair
    assert cores() == 4
