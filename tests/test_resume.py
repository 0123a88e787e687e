"""A run that was interrupted and started again ends as an undisturbed one."""

import json
import os
import re
import signal
import tarfile
import time
from pathlib import Path

import pytest
import warm
from safetensors.torch import load_file

from data_prep.toy import make


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    make("stage1", world, seed=0, scale=0.04, processes=2)  # 240 samples
    make("eval", world, seed=0, scale=0.02, processes=2)
    spoil(next((world / "stage1" / "images").glob("*.tar")), pictures=2)
    settings = [f"world={world}", "logger=none", "data.global_batch=12", "data.workers=1", "save_minutes=0"]
    settings.append("trainer=single")
    return ["+experiment=stage1", *settings]


def spoil(shard, pictures):
    """Overwrite the beginning of a few pictures: broken samples, less than one in a hundred."""
    with tarfile.open(shard) as tar:
        places = [member.offset_data for member in tar if member.name.endswith(".jpg")][:pictures]
    with open(shard, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes(20))


def run(command, folder):
    """Run to the end; returns what was printed."""
    code, printed, told = warm.train([*command, f"run_dir={folder}"], folder.with_suffix(".log"))
    assert code == 0, told
    return printed


def steps(run_dir):
    history = run_dir / "history.jsonl"
    return len(history.read_text().splitlines()) if history.is_file() else 0


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run(command, folder)
    assert steps(folder) == 20
    return folder


def stop(command, run_dir, sent, after, whom="run"):
    """Start a run and send it, or its data worker, a signal after so many steps; returns exit code and output."""
    running = warm.Started([*command, f"run_dir={run_dir}"], run_dir.with_suffix(".log"))
    deadline = time.time() + 120
    while steps(run_dir) < after and time.time() < deadline:
        time.sleep(0.02)
    pid = running.pid if whom == "run" else children(running.pid)[0]
    os.kill(pid, sent)
    code, printed, told = running.end(60)
    assert after <= steps(run_dir) < 20
    assert not (run_dir / "checkpoint").exists()
    return code, printed + told


def said(told):
    """What a run says, without what Python adds where torch's handler of a lost worker is called amid a collection."""
    return re.sub(r"Exception ignored in: .*?\nRuntimeError: DataLoader worker .*?\n", "", told, flags=re.DOTALL)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def left_out(run_dir):
    """Step, key and reason of each broken sample."""
    rows = [json.loads(line) for line in (run_dir / "broken.jsonl").read_text().splitlines()]
    return [(row["step"], row["key"], row["reason"]) for row in rows]


def assert_ended_as(whole, broken):
    assert steps(broken) == 20
    first, second = (load_file(folder / "checkpoint" / "projector.safetensors") for folder in (whole, broken))
    for name, value in first.items():
        assert (value - second[name]).abs().max() < 1e-6
    assert not (broken / "resume").exists()
    lists = [left_out(folder) for folder in (whole, broken)]
    assert lists[0] == lists[1] and len(lists[0]) == 2
    assert json.loads((broken / "metrics.json").read_text())["broken"] == 2


def test_a_run_that_was_stopped_lost_its_worker_and_was_killed_ends_with_the_same_weights(command, whole, tmp_path):
    broken = tmp_path / "broken"
    code, told = stop(command, broken, signal.SIGTERM, after=4)
    assert code == 143 and "stopped by SIGTERM after step" in told and "Traceback" not in told

    code, told = stop(command, broken, signal.SIGKILL, after=steps(broken) + 3, whom="worker")
    assert code == 1 and "A process that reads data was ended from outside" in told and "Traceback" not in said(told)

    newest = sorted((broken / "resume").glob("step-*"))[-2]  # the last is its record
    with open(newest, "r+b") as file:
        file.truncate(100)
    code, told = stop(command, broken, signal.SIGKILL, after=steps(broken) + 4)  # goes on from the save before
    assert code == -signal.SIGKILL and f"{newest} is damaged" in told
    assert "resuming" in run(command, broken)
    assert_ended_as(whole, broken)


def test_a_run_of_a_constant_learning_rate_may_be_given_more_steps(command, tmp_path):
    """To the bit, whether it had finished within an epoch, at its end, or was stopped."""
    constant = [*command, "task.recipe.schedule=constant", "task.recipe.warmup_steps=2", "save_minutes=5"]
    longest = [*constant, "trainer.max_epochs=2", "trainer.max_steps=23"]
    run(longest, tmp_path / "whole")
    grown = tmp_path / "grown"
    run([*constant, "trainer.max_steps=5"], grown)
    run([*constant, "trainer.max_steps=20"], grown)
    assert steps(grown) == 20 and "resuming" in run(longest, grown)
    assert "is finished" in run(longest, grown)
    weights = [load_file(tmp_path / name / "checkpoint" / "projector.safetensors") for name in ("whole", "grown")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    histories = [(tmp_path / name / "history.jsonl").read_text().splitlines() for name in ("whole", "grown")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 23
