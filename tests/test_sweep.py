"""Sweeps: every combination runs once, in a folder whose name says what it is, also on several devices."""

import json
import os
import signal
import time

import pytest
from warm import Started, train

from data_prep.toy import make


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for split in ("stage1", "stage2", "eval"):
        make(split, folder, seed=0, scale=0.005, processes=2)
    return folder


@pytest.fixture(scope="module")
def sweep(world, tmp_path_factory):
    """A function that runs a sweep on a small world; returns its folder, exit code, and what it wrote."""

    def run(*arguments):
        runs = tmp_path_factory.mktemp("runs")
        settings = [f"world={world}", f"runs={runs}", "logger=none", "trainer=single"]
        return runs, *train(["-m", *arguments, *settings], tmp_path_factory.mktemp("logs") / "log")

    return run


def folders(runs):
    return {path.name for path in runs.iterdir() if path.is_dir()}


def test_a_sweep_of_chains_has_a_folder_for_each_with_its_parts_in_it(sweep):
    runs, code, _, told = sweep("+experiment=full", "+ablation=image_only,video_only", "chain=[stage1]")
    assert code == 0, told
    for ablation, medium in (("image_only", "image"), ("video_only", "video")):
        [chain] = runs.glob(f"full-{ablation}-s1-*")
        part = chain / f"stage1-{ablation}-s1"
        assert folders(chain) == {part.name}
        assert set(json.loads((chain / "metrics.json").read_text())["seconds"]) == {"stage1", "total"}
        identity = json.loads((part / "run.json").read_text())["identity"]
        assert list(identity["data"]["sources"]) == [medium]


def test_each_run_of_a_sweep_may_use_several_devices(sweep):
    devices = ("trainer.accelerator=cpu", "trainer.devices=2", "data.workers=0")
    runs, code, said, told = sweep("+experiment=stage1", "seed=1,2", "trainer.max_steps=1", *devices)
    assert code == 0, told
    assert {name[:-7] for name in folders(runs)} == {f"stage1-united-s{seed}" for seed in (1, 2)}
    assert said.count("stage1: done") == 2
    for folder in runs.iterdir():
        if folder.is_dir():
            assert json.loads((folder / "metrics.json").read_text())["samples"] == 16


def test_a_sweep_stops_at_a_run_that_lacks_its_projector(sweep):
    runs, code, _, told = sweep("+experiment=stage2", "+ablation=image_only,video_only")
    assert code != 0 and "Traceback" not in told
    assert f"{runs}/stage1-image_only-s1/checkpoint/projector.safetensors" in told


def test_an_interrupted_chain_goes_on_with_the_part_it_was_in(world, tmp_path):
    command = ["+experiment=full", f"world={world}", f"run_dir={tmp_path / 'run'}", "logger=none", "trainer=single"]
    second = tmp_path / "run" / "stage2-united-s1"
    running = Started(command, tmp_path / "log")
    history = second / "history.jsonl"
    while not (history.is_file() and history.read_text()) and running.poll() is None:  # until a step is done
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)  # the chain, which passes it on to the run in it
    code, _, told = running.end(60)
    assert code == 130 and "stage2 was stopped by SIGINT" in told and "Traceback" not in told
    assert (second / "resume").is_dir() and not (second / "checkpoint").exists()

    first = second.with_name("stage1-united-s1")
    made = (first / "metrics.json").stat().st_mtime_ns
    code, said, told = train(command, tmp_path / "log")
    assert code == 0, told
    assert "stage1: was done already" in said and "resuming the interrupted run" in said
    assert (first / "metrics.json").stat().st_mtime_ns == made
    start = json.loads((second / "run.json").read_text())["identity"]["projector"]["path"]
    assert start == f"{first}/checkpoint/projector.safetensors"
    seconds = json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"]
    assert set(seconds) == {"stage1", "stage2", "evaluate", "total"}
