"""Sweeps: every combination runs once, in a folder whose name says what it is, also on several devices."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from shard_fixtures import ROOT

from data_prep.toy import make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for split in ("stage1", "stage2", "eval"):
        make(split, folder, seed=0, scale=0.005, processes=2)
    return folder


@pytest.fixture(scope="module")
def sweep(world, tmp_path_factory):
    """A function that runs a sweep on a small world and returns its folder and what it printed."""

    def run(*arguments):
        runs = tmp_path_factory.mktemp("runs")
        settings = [f"world={world}", f"runs={runs}", "logger=none", "trainer=single"]
        done = subprocess.run(
            [sys.executable, "train.py", "-m", *arguments, *settings], cwd=ROOT, capture_output=True, text=True
        )
        return runs, done

    return run


def folders(runs):
    return {path.name for path in runs.iterdir() if path.is_dir()}


def test_a_sweep_of_chains_has_a_folder_for_each_with_its_parts_in_it(sweep):
    runs, done = sweep("+experiment=full", "+ablation=image_only,video_only", "chain=[stage1]")
    assert done.returncode == 0, done.stderr
    for ablation, medium in (("image_only", "image"), ("video_only", "video")):
        [chain] = runs.glob(f"full-{ablation}-s1-*")
        part = chain / f"stage1-{ablation}-s1"
        assert folders(chain) == {part.name}
        assert set(json.loads((chain / "metrics.json").read_text())["seconds"]) == {"stage1", "total"}
        identity = json.loads((part / "run.json").read_text())["identity"]
        assert list(identity["data"]["sources"]) == [medium]


def test_each_run_of_a_sweep_may_use_several_devices(sweep):
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", "data.workers=0")
    runs, done = sweep("+experiment=stage1", "seed=1,2", "trainer.max_steps=1", *devices)
    assert done.returncode == 0, done.stderr
    assert {name[:-7] for name in folders(runs)} == {f"stage1-united-s{seed}" for seed in (1, 2)}
    assert done.stdout.count("stage1: done") == 2
    for folder in runs.iterdir():
        if folder.is_dir():
            assert json.loads((folder / "metrics.json").read_text())["samples"] == 16


def test_a_sweep_stops_at_a_run_that_lacks_its_projector(sweep):
    runs, done = sweep("+experiment=stage2", "+ablation=image_only,video_only")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"{runs}/stage1-image_only-s1/checkpoint/projector.safetensors" in done.stderr


def test_an_interrupted_chain_goes_on_with_the_part_it_was_in(world, tmp_path):
    settings = [f"world={world}", f"run_dir={tmp_path}", "logger=none", "trainer=single"]
    command = [sys.executable, "train.py", "+experiment=full", *settings]
    second = tmp_path / "stage2-united-s1"
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    history = second / "history.jsonl"
    while not (history.is_file() and history.read_text()) and running.poll() is None:  # until a step is done
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)  # the chain, which passes it on to the run in it
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "stage2 was stopped by SIGINT" in told and "Traceback" not in told
    assert (second / "resume").is_dir() and not (second / "checkpoint").exists()

    first = (tmp_path / "stage1-united-s1" / "metrics.json").stat().st_mtime_ns
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "stage1: was done already" in again.stdout and "resuming the interrupted run" in again.stdout
    assert (tmp_path / "stage1-united-s1" / "metrics.json").stat().st_mtime_ns == first
    start = json.loads((second / "run.json").read_text())["identity"]["projector"]["path"]
    assert start == f"{tmp_path}/stage1-united-s1/checkpoint/projector.safetensors"
    assert set(json.loads((tmp_path / "metrics.json").read_text())["seconds"]) == {
        "stage1",
        "stage2",
        "evaluate",
        "total",
    }
