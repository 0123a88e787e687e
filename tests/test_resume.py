"""A run that was interrupted and started again ends as an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_prep.toy import make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    make("stage1", world, seed=0, scale=0.04, processes=2)  # 240 samples
    make("eval", world, seed=0, scale=0.02, processes=2)
    spoil(next((world / "stage1" / "images").glob("*.tar")), pictures=2)
    settings = [f"world={world}", "logger=none", "data.global_batch=12", "data.workers=1", "save_minutes=0"]
    settings.append("trainer=single")
    return [sys.executable, "train.py", "+experiment=stage1", *settings]


def spoil(shard, pictures):
    """Overwrite the beginning of a few pictures: broken samples, less than one in a hundred."""
    with tarfile.open(shard) as tar:
        places = [member.offset_data for member in tar if member.name.endswith(".jpg")][:pictures]
    with open(shard, "r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes(20))


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def steps(run_dir):
    history = run_dir / "history.jsonl"
    return len(history.read_text().splitlines()) if history.is_file() else 0


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run([*command, f"run_dir={folder}"], check=True)
    assert steps(folder) == 20
    return folder


def stop(command, run_dir, sent, after, whom="run"):
    """Start a run and send it, or its data worker, a signal after so many steps; returns exit code and output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = subprocess.Popen([*command, f"run_dir={run_dir}"], cwd=ROOT, **pipes)
    deadline = time.time() + 120
    while steps(run_dir) < after and time.time() < deadline:
        time.sleep(0.02)
    pid = running.pid if whom == "run" else children(running.pid)[0]
    os.kill(pid, sent)
    told, _ = running.communicate(timeout=60)
    assert after <= steps(run_dir) < 20
    assert not (run_dir / "checkpoint").exists()
    return running.returncode, told.decode()


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
    assert code == 1 and "A process that reads data was ended from outside" in told and "Traceback" not in told

    newest = sorted((broken / "resume").glob("step-*"))[-2]  # the last is its record
    with open(newest, "r+b") as file:
        file.truncate(100)
    code, told = stop(command, broken, signal.SIGKILL, after=steps(broken) + 4)  # goes on from the save before
    assert code == -signal.SIGKILL and f"{newest} is damaged" in told
    assert "resuming" in run([*command, f"run_dir={broken}"], check=True).stdout
    assert_ended_as(whole, broken)
