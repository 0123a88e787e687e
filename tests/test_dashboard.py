"""Dashboards made by code: what would be sent to a W&B server, and what a user is told who has none."""

import base64
import json
import re
import sys

import pytest
import wandb_server
from study_fixtures import SKILLS, write_study
from test_training import Recorder, fit
from test_watching import Rows
from wandb_server import WandbServer

from vllava import dashboard
from vllava.batch import Step
from vllava.config import composed
from vllava.training import callbacks, loggers, validation, wandb_run
from vllava.training.callbacks import Peak, Throughput
from vllava.training.task import Recipe
from vllava.training.validation import Validation, Watch, accuracies
from vllava.verdicts import panels
from vllava.verdicts.report import report_on


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard") / "study"
    states = {("image_only", 2): {"state": "failed", "error": "No shards."}}
    return write_study(folder, SKILLS, seeds=(1, 2, 3), states=states, questions=60, probes=36)


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    for name, value in {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def shown(capsys, *arguments):
    """What --show prints, and the panels of the workspace by the name of their section."""
    assert dashboard.main(["--entity", "me", "--project", "toy", "--show", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    sections = found["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return found, {section["name"]: section["panels"] for section in sections}


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_chart_is_of_what_a_run_really_writes(model, make_packer, mixed_samples, monkeypatch):
    packer = make_packer(model, token_budget=1)
    step = Step(packer.collate([packer.prepare(s) for s in mixed_samples]), len(mixed_samples), keys=["a"])
    monkeypatch.setattr(callbacks, "device_peak", lambda device: Peak(1.0, "a peak for the test"))
    answers = [{"type": "image, colour", "correct": True}, {"type": "video, order", "correct": False}]
    written = {}
    watched = Validation(Rows(packer, mixed_samples), Watch(1), written.update, lambda task: answers)
    recorder = Recorder()
    fit(model, ["projector"], [step], recipe=Recipe(lr=1e-3), callbacks=[Throughput(), watched, recorder])
    names = {*recorder.logged[-1], *written}
    assert {*panels.LEARNING, *panels.EFFICIENCY, panels.X} <= names
    for pattern in panels.PARTS:
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    assert written["val_accuracy"] == 0.5 and written["val_accuracy/image"] == 1 and written["val_accuracy/video"] == 0


def test_names_that_are_not_of_metrics_are_those_of_our_loggers_and_configuration():
    assert panels.SAMPLES == loggers.SAMPLES and panels.X in wandb_run.X_AXES
    assert {validation.TOTAL, validation.ACCURACY} <= {*panels.LEARNING}
    settings = composed(["+experiment=stage2", "+ablation=video_only", "seed=3"])
    assert [settings[name] for name in (panels.EXPERIMENT, panels.ARM, panels.SEED)] == ["stage2", "video_only", 3]


def test_accuracies_leave_out_what_has_no_truth():
    rows = [{"type": "image, a", "correct": c} for c in (True, False, False, None)]
    assert accuracies([*rows, {"type": "video, b", "correct": None}]) == pytest.approx(
        {"val_accuracy": 1 / 3, "val_accuracy/image": 1 / 3}
    )
    assert accuracies([]) == {}


# --- what would be sent -----------------------------------------------------------------------------------------------


def test_a_workspace_has_every_metric_by_system_and_by_seed_and_the_samples(capsys, logged_out):
    found, sections = shown(capsys)
    by_system = [*sections["Learning, by system"], *sections["Throughput, by system"]]
    assert [one["config"]["metrics"] for one in by_system] == [[n] for n in (*panels.LEARNING, *panels.EFFICIENCY)]
    for one in by_system:
        config = one["config"]
        assert (config["xAxis"], config["groupBy"]) == ("samples_seen", "ablation.value")
        assert (config["groupAgg"], config["groupArea"], config["aggregate"]) == ("mean", "minmax", True)
    assert all(one["config"]["aggregate"] is False for one in sections["Learning, every seed"])
    assert '"held_out_samples"' in json.dumps(sections["Held-out samples"])
    assert found["workspace"]["entity"] == "me" and found["workspace"]["project"] == "toy"
    [runs] = found["workspace"]["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "ablation.value"}]
    [experiment] = runs["filters"]["filters"]
    assert (experiment["key"], experiment["value"]) == ({"section": "config", "name": "experiment"}, "stage2")
    assert "baselineRunId" not in runs and "report" not in found


@pytest.mark.parametrize("how", ["id", "folder", "study"])
def test_a_baseline_is_a_run_by_its_id_or_folder_or_of_the_studys_baseline(how, study, capsys, logged_out, tmp_path):
    folder = study.parent / "runs/united-all-s2/stage2" if how == "study" else tmp_path
    (folder / "wandb").mkdir(exist_ok=True)
    (folder / "wandb" / "run.json").write_text('{"id": "abc123"}')
    given = {"id": ["--baseline", "abc123"], "folder": ["--baseline", str(tmp_path)], "study": ["--study", str(study)]}
    found, _ = shown(capsys, *given[how])
    [runs] = found["workspace"]["spec"]["section"]["runSets"]
    assert base64.b64decode(runs["baselineRunId"]) == b"Run:v1:abc123:toy:me"


def test_a_studys_report_says_its_verdicts_and_shows_its_tables_curves_and_plots(study, capsys, logged_out):
    found, _ = shown(capsys, "--study", str(study))
    blocks = found["report"]["spec"]["blocks"]
    texts = [one["content"] for one in blocks if one["type"] == "markdown-block"]
    assert "| Alignment before projection helps images | separated_mae |" in texts[0]
    assert "image_only, seed 2 failed: No shards." in texts[0]
    assert all(f"## {title}" in texts[1] for title in ("All systems", "Table 5: alignment", "Table 6", "Figure 5"))
    plots, curves = (one["metadata"] for one in blocks if one["type"] == "panel-grid")
    assert plots["runSets"][0]["filters"]["filters"][0]["value"] == "study-paper"
    assert [one["config"]["metrics"] for one in curves["panelBankSectionConfig"]["panels"]] == [
        [name] for name in panels.LEARNING
    ]


def test_the_plots_that_a_report_shows_are_those_that_the_studys_run_holds(study, tmp_path, monkeypatch, logged_out):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    report = report_on(study)
    panels.log_study("me", "toy", report, mode="offline", dir=tmp_path)
    wandb.teardown()
    [path] = tmp_path.glob("wandb/offline-run-*-study-paper/run-study-paper.wandb")
    rows = [r.history for r in wandb_run.records(path) if r.WhichOneof("record_type") == "history"]
    held = {tuple(item.nested_key): json.loads(item.value_json) for row in rows for item in row.item}
    keys = [key for key, _ in panels._keyed(report)]
    assert len(keys) > 8 and all(held[key, "_type"] == "html-file" for key in keys)
    assert held["study/verdicts", "_type"] == "table-file"
    media = json.dumps(json.loads(panels.specification(panels.study_report("me", "toy", "stage2", report))))
    assert all(json.dumps(key) in media for key in keys)


@pytest.fixture
def server(logged_out, monkeypatch):
    """A server, and a user who is logged in to it."""
    running = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", running.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    yield running
    running.close()


def test_a_workspace_is_sent_as_it_is_shown(server, monkeypatch, capsys):
    taken = []

    def graph(handler, name, given, known=wandb_server._Handler.graph):
        if name != "UpsertView2":
            return known(handler, name, given)
        taken.append(given)
        return {"upsertView": {"view": {**given, "id": "v", "name": "nw-abc-v"}}}

    monkeypatch.setattr(wandb_server._Handler, "graph", graph)
    assert dashboard.main(["--entity", "me", "--project", "toy"]) == 0
    assert "/me/toy?nw=abc" in capsys.readouterr().out
    [given] = taken
    assert (given["entityName"], given["projectName"], given["displayName"]) == (
        "me",
        "toy",
        "stage2: systems and seeds",
    )
    sections = json.loads(given["spec"])["section"]["panelBankConfig"]["sections"]
    assert [one["name"] for one in sections] == [*shown(capsys)[1]]


def test_what_a_server_does_not_take_is_said_in_words(server):
    text = refused()
    assert (
        text.startswith("error: W&B did not take the dashboard of me/toy (") and "UpsertView2 is not known here" in text
    )


# --- mistakes ---------------------------------------------------------------------------------------------------------


def refused(*arguments):
    with pytest.raises(SystemExit) as ended:
        dashboard.main(["--entity", "me", "--project", "toy", *arguments])
    return str(ended.value)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert refused("--show") == "error: Dashboards need wandb-workspaces: pip install 'vllava[study]'."


def test_without_a_key_it_is_said_how_to_get_one(logged_out):
    assert "`wandb login`, or set WANDB_API_KEY" in refused() and "--show" in refused()


@pytest.mark.parametrize(("fault", "said"), [("nobody", "does not accept the key"), (503, "answers with HTTP 503")])
def test_a_server_that_cannot_be_used_is_named(fault, said, server):
    server.fault = fault
    text = refused()
    assert server.url in text and said in text


def test_a_run_that_wandb_does_not_know_cannot_be_the_baseline(tmp_path, logged_out):
    assert "has no W&B run" in refused("--show", "--baseline", str(tmp_path))


def test_a_folder_without_a_study_is_refused(tmp_path, logged_out):
    assert "study.json cannot be read" in refused("--show", "--study", str(tmp_path))
