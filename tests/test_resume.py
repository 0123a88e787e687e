"""A run that was interrupted and started again ends as an undisturbed one."""

import signal
import subprocess
import sys
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
    settings = [f"world={world}", "logger=none", "data.global_batch=12", "data.workers=1"]
    return [sys.executable, "train.py", "+experiment=stage1", *settings]


def run(command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def steps(run_dir):
    history = run_dir / "history.jsonl"
    return len(history.read_text().splitlines()) if history.is_file() else 0


def test_interrupted_run_continues_and_ends_with_the_same_weights(command, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run([*command, f"run_dir={whole}"], check=True)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen([*command, f"run_dir={broken}"], cwd=ROOT, **pipes)
    deadline = time.time() + 120
    while steps(broken) < 7 and time.time() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode != 0
    assert 7 <= steps(broken) < 20
    assert not (broken / "checkpoint").exists()

    other = run([*command, f"run_dir={broken}", "task.recipe.lr=0.5"])
    assert other.returncode == 1
    assert "unfinished run of another configuration" in other.stderr

    resumed = run([*command, f"run_dir={broken}"], check=True)
    assert "resuming" in resumed.stdout
    assert steps(broken) == steps(whole) == 20
    first, second = (load_file(folder / "checkpoint" / "projector.safetensors") for folder in (whole, broken))
    for name, value in first.items():
        assert (value - second[name]).abs().max() < 1e-6
    assert not (broken / "resume.ckpt").exists()
