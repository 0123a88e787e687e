"""Loggers: one W&B run for a run, no step twice and none missing however a run is stopped, and no wait for a server."""

import csv
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import lightning as L
import logged_run
import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from shard_fixtures import ROOT
from wandb_server import WandbServer

from vllava.config import register_resolvers
from vllava.errors import UserError
from vllava.training import wandb_run
from vllava.training.loggers import CsvFile, TensorBoardFiles, build, log_evaluation, log_samples
from vllava.training.wandb_run import parts, records, run_id, usable_mode

STEPS = list(range(1, logged_run.STEPS + 1))
TENSORBOARD = find_spec("tensorboard") is not None
KEY = "0" * 40
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsS7jYwAAAABJRU5ErkJggg=="
)
SAMPLES = [{"pictures": [PICTURE], "question": "What is it?", "answer": "A dot.", "truth": "A dot.", "correct": True}]


@pytest.fixture
def server():
    running = WandbServer()
    yield running
    running.close()


@pytest.fixture
def logged_in(server, monkeypatch, tmp_path):
    """The environment of a user who is logged in to the server."""
    values = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": KEY,
        "NETRC": str(tmp_path / "none"),
        "HOME": str(tmp_path),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return values


@pytest.fixture(scope="module")
def starter():
    """Starts processes that have imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["logged_run", "wandb"])
    return context


def logged(environment, folder, arguments, patches):
    """What a process of its own does: train, and show samples at the end."""
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    logging.basicConfig(level="WARNING", format="%(message)s", force=True)
    for name, value in patches.items():
        setattr(wandb_run, name, value)
    log_samples(logged_run.train(folder, **arguments).loggers, SAMPLES)
    wandb.teardown()  # which W&B does at the end of a process that is not multiprocessing's


def trained(starter, environment, folder, patches=None, **arguments):
    """Train in a process of its own; its exit code."""
    process = starter.Process(target=logged, args=(environment, folder, arguments, patches or {}))
    process.start()
    process.join(200)
    process.kill()  # nothing, if it has ended
    return process.exitcode


def by_step(rows):
    """The loss at each step of a run's rows, which must be as many as the steps and in their order."""
    losses = [
        (row["_step"], row["trainer/global_step"], row["samples_seen"], row["loss"]) for row in rows if "loss" in row
    ]
    assert [step for step, *_ in losses] == STEPS
    assert all(own == step and seen == 10 * step for step, own, seen, _ in losses)
    return [loss for *_, loss in losses]


def expected(folder):
    """The losses in history.jsonl."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == STEPS
    return pytest.approx([row["loss"] for row in rows])


def assert_files_are_whole(folder):
    """CSV and TensorBoard have each step once."""
    with open(folder / "csv" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == STEPS
    assert [float(row["loss"]) for row in rows] == expected(folder)
    if TENSORBOARD:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [point.step for point in events.Scalars("loss")] == STEPS
        assert [point.value for point in events.Scalars("loss")] == expected(folder)
        assert [image.step for image in events.Images("held_out_samples/0")] == [STEPS[-1]]


# --- one run, however often it is interrupted -------------------------------------------------------------------------


def test_a_run_that_was_killed_and_interrupted_offline_is_one_history_after_wandb_sync(
    starter, server, logged_in, tmp_path
):
    chosen = {"wandb": True, "csv": True, "tensorboard": TENSORBOARD, "mode": "offline"}
    assert trained(starter, logged_in, tmp_path, saved=[7], stopped=7, how="interrupt", **chosen) == 1
    assert trained(starter, logged_in, tmp_path, saved=[9], stopped=11, how="kill", **chosen) == -signal.SIGKILL
    assert trained(starter, logged_in, tmp_path, **chosen) == 0
    assert server.asked == []
    name = run_id(tmp_path)
    files = parts(tmp_path, name)
    assert sorted((tmp_path / "wandb").glob("*/*.wandb")) == sorted({*files, *latest_of(tmp_path)})
    command = [sys.executable, "-m", "wandb", "sync", *(str(path.parent) for path in files)]
    synced = subprocess.run(command, check=True, capture_output=True, text=True)  # with W&B's own reader
    assert list(server.runs) == [name], synced.stderr
    assert by_step(server.history(name)) == expected(tmp_path)
    assert "held_out_samples" in server.history(name)[-1]
    assert_files_are_whole(tmp_path)

    steps = [steps_of(path) for path in files]
    assert sorted(step for part in steps for step in part) == STEPS
    whole = files[0].read_bytes()
    for length in range(0, len(whole), 97):  # as a kill leaves it
        files[0].write_bytes(whole[:length])
        assert steps_of(files[0]) == steps[0][: len(steps_of(files[0]))]


def latest_of(folder):
    """W&B's link to the newest part."""
    return (folder / "wandb" / "latest-run").glob("*.wandb")


def steps_of(path):
    return [record.history.step.num for record in records(path) if record.WhichOneof("record_type") == "history"]


def test_a_run_that_was_offline_and_then_killed_online_is_one_run_with_the_users_settings(
    starter, server, logged_in, tmp_path
):
    asked = {"project": "videos", "group": "encoders", "job_type": "stage1", "tags": ["united"], "notes": "A try."}
    chosen = {"wandb": True, "name": "first", **asked}
    assert trained(starter, logged_in, tmp_path, saved=[5], stopped=5, how="interrupt", mode="offline", **chosen) == 1
    assert trained(starter, logged_in, tmp_path, saved=[9], stopped=11, how="kill", **chosen) == -signal.SIGKILL
    assert trained(starter, logged_in, tmp_path, **chosen) == 0
    name = run_id(tmp_path)
    assert list(server.runs) == [name]
    assert by_step(server.history(name)) == expected(tmp_path)
    (offline,) = (path for path in parts(tmp_path, name) if path.parent.name.startswith("offline-"))
    assert offline.with_name(f"{offline.name}.synced").exists()  # or `wandb sync` doubled its steps
    given = server.runs[name]["settings"]
    assert [given[key] for key in ("project", "groupName", "jobType", "tags", "notes", "displayName")] == [
        *asked.values(),
        "first",
    ]
    metrics = json.loads(given["config"])["_wandb"]["value"]["m"]
    names = {number: metric.get("1") for number, metric in enumerate(metrics, 1)}
    everything = next(metric for metric in metrics if metric.get("2") == "*")
    assert names[everything["5"]] == "samples_seen"


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("silent", "does not answer within"),
        (401, "does not accept the key"),
        (403, "does not accept the key"),
        ("nobody", "does not accept the key"),
        (500, "answers with HTTP 500"),
        (404, "answers with HTTP 404"),
        ("page", "is not W&B"),
        ("dead", "cannot be reached"),
        ("no such host", "cannot be reached"),
        ("no address", "cannot be reached"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_in_words_and_at_once(logged_in, server, monkeypatch, fault, said):
    monkeypatch.setattr(wandb_run, "ANSWER_SECONDS", 1.0)
    url = {"dead": "http://127.0.0.1:9", "no such host": "http://wandb.invalid", "no address": "wandb"}.get(fault)
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    server.fault = fault
    started = time.monotonic()
    mode, trouble = usable_mode("auto")
    assert time.monotonic() - started < 10  # at once, beside the two minutes that a client waits by itself
    assert mode == "offline" and (said in trouble or (url and "does not answer" in trouble))
    with pytest.raises(UserError, match=said if not url else "reached|answer"):
        usable_mode("online")


def test_a_server_that_works_is_used(logged_in, server):
    assert usable_mode("auto") == ("online", "") == usable_mode("online")


def test_without_a_key_nobody_is_asked_and_nothing_is_said(logged_in, server, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    assert usable_mode("auto") == ("offline", "")
    with pytest.raises(UserError, match="wandb login"):
        usable_mode("online")
    assert server.asked == []


def test_wandbs_own_variable_has_the_last_word_in_mode_auto(logged_in, server, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert usable_mode("auto") == ("offline", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert build(tmp_path, {}, wandb=True) == []
    assert server.asked == []


def test_the_key_of_wandb_login_is_found(logged_in, server, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "none").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert usable_mode("auto") == ("online", "")


def test_a_server_that_falls_silent_when_the_run_starts_is_a_warning_and_the_run_goes_offline(
    starter, server, logged_in, tmp_path
):
    server.fault = "silent later"
    assert trained(starter, logged_in, tmp_path, {"START_SECONDS": 1.0}, wandb=True) == 0
    printed = (tmp_path / "printed").read_text()
    assert "could not start the run" in printed and "offline" in printed and "Traceback" not in printed
    files = [path for path in parts(tmp_path, run_id(tmp_path)) if path.parent.name.startswith("offline-")]
    assert [steps_of(path) for path in files] == [STEPS]


def test_only_one_rank_asks(logged_in, server, monkeypatch, tmp_path):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    (logger,) = build(tmp_path, {}, wandb=True)
    logger.log_metrics({"loss": 1.0}, 1)
    log_samples([logger], SAMPLES)
    assert isinstance(logger, WandbLogger)
    assert server.asked == [] and list(tmp_path.iterdir()) == []


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_what_an_evaluation_found_is_a_runs_summary_and_a_table(logged_in, server, tmp_path):
    """Offline, under the user's group; of two benchmarks in one run, each under its name."""
    rows = [{"pictures": [PICTURE], "id": "q1", "question": "Who?", "answer": "", "truth": "A", "state": "wrong"}]
    loggers = build(tmp_path, {}, wandb=True, csv=True, tensorboard=TENSORBOARD, mode="offline", group="encoders")
    log_evaluation(loggers, "pope", {"accuracy": 84.5, "category/random/f1": 80.0}, rows)
    log_evaluation(loggers, "gqa", {"accuracy": 61.25}, [])
    loggers[0].experiment.finish()
    wandb.teardown()
    assert server.asked == []
    (file,) = parts(tmp_path, run_id(tmp_path))
    found = list(records(file))
    (group,) = {record.run.run_group for record in found if record.WhichOneof("record_type") == "run"}
    assert group == "encoders"
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert (summary["pope/accuracy"], summary["pope/category/random/f1"], summary["gqa/accuracy"]) == (
        84.5,
        80.0,
        61.25,
    )
    (table,) = (file.parent / "files").rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["frames", "id", "question", "answer", "truth", "state"]
    assert content["data"][0][1:] == ["q1", "Who?", "", "A", "wrong"]
    with open(tmp_path / "csv" / "metrics.csv") as written:
        assert next(csv.DictReader(written))["pope/accuracy"] == "84.5"
    if TENSORBOARD:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [point.value for point in events.Scalars("gqa/accuracy")] == [61.25]
        assert len(events.Images("pope/samples/0")) == 1


# --- the other loggers, and the configuration -------------------------------------------------------------------------


def test_a_logger_that_fails_does_not_stop_the_training(tmp_path, caplog):
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                (tmp_path / "csv" / "metrics.csv").unlink()
                (tmp_path / "csv" / "metrics.csv").mkdir()

    trainer = logged_run.train(tmp_path, csv=True, callbacks=[Spoil()])
    assert trainer.global_step == logged_run.STEPS
    assert caplog.text.count("The CSV file failed") == 1


def test_tensorboard_that_is_not_installed_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'vllava\[tensorboard\]'"):
        build(tmp_path, {}, tensorboard=True)


@pytest.mark.parametrize("wrong", [{"mode": "of"}, {"x_axis": "time"}])
def test_an_unknown_choice_is_an_error_that_lists_what_there_is(tmp_path, wrong):
    with pytest.raises(UserError, match=r"there are: (auto, online, offline|samples_seen, step)"):
        build(tmp_path, {}, wandb=True, **wrong)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ([], [WandbLogger]),
        (["logger=wandb"], [WandbLogger]),
        (["logger=none"], []),
        (["logger=[]"], []),
        (["logger=csv"], [CsvFile]),
        (["logger=[wandb,csv]", "logger.project=mine"], [WandbLogger, CsvFile]),
        pytest.param(
            ["logger=[csv,tensorboard]"],
            [TensorBoardFiles, CsvFile],
            marks=pytest.mark.skipif(not TENSORBOARD, reason="needs tensorboard"),
        ),
    ],
)
def test_loggers_are_chosen_on_the_command_line(given, kinds, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", ["+experiment=stage1", *given])
    loggers = instantiate(cfg.logger)(run_dir=tmp_path, config={}) if cfg.get("logger") else []
    assert len(loggers) == len(kinds) and all(map(isinstance, loggers, kinds))
    if "logger.project=mine" in given:
        assert loggers[0].settings.project == "mine"
