"""A run that was interrupted and started again ends as an undisturbed one."""

import json
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


def stop(command, run_dir, sent, after):
    """Start a run and send it a signal after so many steps."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([*command, f"run_dir={run_dir}"], cwd=ROOT, **pipes)
    deadline = time.time() + 120
    while steps(run_dir) < after and time.time() < deadline:
        time.sleep(0.02)
    running.send_signal(sent)
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert after <= steps(run_dir) < 20
    assert not (run_dir / "checkpoint").exists()


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


def test_a_run_that_was_interrupted_and_then_killed_ends_with_the_same_weights(command, whole, tmp_path):
    broken = tmp_path / "broken"
    stop(command, broken, signal.SIGINT, after=7)

    other = run([*command, f"run_dir={broken}", "task.recipe.lr=0.5"])
    assert other.returncode == 1
    assert "unfinished run of another configuration" in other.stderr

    stop(command, broken, signal.SIGKILL, after=steps(broken) + 4)  # goes on from the last save, not from its end
    assert "resuming" in run([*command, f"run_dir={broken}"], check=True).stdout
    assert_ended_as(whole, broken)
