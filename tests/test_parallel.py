"""Several processes train as one: the same losses, the same weights, whatever shares the model out."""

import json
import os
import signal
import time

import pytest
import warm
from safetensors.torch import load_file

from data_prep.toy import make

STEPS = 6


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains a stage for a few steps, once, and returns the losses and the folder of the run.

    With `stop_after` it is interrupted after so many steps and started again.
    """
    world = tmp_path_factory.mktemp("world")
    for split in ("stage1", "stage2", "eval"):
        make(split, world, seed=0, scale=0.03, processes=2)
    runs = tmp_path_factory.mktemp("runs")

    def run(stage, name, *settings, stop_after=None):
        folder = runs / f"{stage}-{name}"
        given = [f"+experiment={stage}", f"world={world}", f"run_dir={folder}", "logger=none", "data.workers=0"]
        given += [f"trainer.max_steps={STEPS}", "trainer.precision=32-true", "trainer.accelerator=cpu"]
        given += ["data.token_budget=700"]  # so that ranks differ in their number of micro-batches
        given += ["validation.every_steps=5", "validation.samples=7"]
        if stage == "stage2":
            given.append("projector=null")
        if stop_after:
            interrupt([*given, *settings], folder, stop_after)
        if not (folder / "checkpoint").exists():
            code, _, told = warm.train([*given, *settings], folder)
            assert code == 0, told
        return history(folder), folder

    return run


def history(folder):
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def interrupt(arguments, folder, steps):
    """Start a run and, after so many steps, interrupt the first of its processes alone: all have to stop."""
    running = warm.Started(arguments, folder)
    while len(history(folder)) < steps and running.poll() is None:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)
    code, _, told = running.end(60)
    assert code == 130 and steps <= len(history(folder)) < STEPS, told
    assert (folder / "resume").exists() and not (folder / "checkpoint").exists()


@pytest.mark.parametrize(("stage", "trainers"), [("stage1", ["fsdp"]), ("stage2", ["ddp", "fsdp"])])
def test_two_processes_have_the_losses_and_end_with_the_weights_of_one(train, stage, trainers):
    alone, one = train(stage, "one", "trainer=single")
    assert len(alone) == STEPS and alone[-1]["loss"] < alone[0]["loss"]
    for trainer in trainers:
        together, two = train(stage, trainer, f"trainer={trainer}", "trainer.devices=2")
        for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("lr", 1e-9)):
            assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], abs=tolerance), trainer
        for step in (4, STEPS - 1):  # held-out samples: one number, whatever the number of ranks
            for name in ("val_loss", "val_loss/image", "val_loss/videos"):
                assert together[step][name] == pytest.approx(alone[step][name], abs=1e-5), trainer
        for file in one.glob("checkpoint/**/*.safetensors"):
            mine, theirs = load_file(file), load_file(two / file.relative_to(one))
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                assert (value.float() - theirs[name].float()).abs().max() < 2e-3, (trainer, name)


def test_two_processes_that_were_interrupted_end_as_two_undisturbed_ones(train):
    settings = "trainer=fsdp", "trainer.devices=2"
    undisturbed, whole = train("stage2", "fsdp", *settings)
    resumed, broken = train("stage2", "fsdp-broken", *settings, stop_after=3)
    for key in ("step", "loss", "gradient_norm", "lr"):
        assert [row[key] for row in resumed] == pytest.approx([row[key] for row in undisturbed], abs=1e-5)
    for file in whole.glob("checkpoint/**/*.safetensors"):
        mine, theirs = load_file(file), load_file(broken / file.relative_to(whole))
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert (value.float() - theirs[name].float()).abs().max() < 1e-5, name
    assert not (broken / "resume").exists()


def test_deepspeed_on_a_machine_without_cuda_is_an_error_that_says_so(tmp_path):
    asked = ["+experiment=stage1", "trainer=zero2", f"run_dir={tmp_path / 'run'}", "logger=none"]
    code, _, told = warm.train(asked, tmp_path / "log")
    assert code == 1 and told.startswith("error: DeepSpeed runs on CUDA GPUs")
