"""Several processes train as one: the same losses, the same weights, whatever shares the model out."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from shard_fixtures import ROOT

from data_prep.toy import make

STEPS = 10


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains a stage for ten steps and returns the losses and the folder of the run."""
    world = tmp_path_factory.mktemp("world")
    for split in ("stage1", "stage2", "eval"):
        make(split, world, seed=0, scale=0.03, processes=2)
    runs = tmp_path_factory.mktemp("runs")

    def run(stage, name, *settings):
        folder = runs / f"{stage}-{name}"
        given = [f"+experiment={stage}", f"world={world}", f"run_dir={folder}", "logger=none", "data.workers=0"]
        given += [f"trainer.max_steps={STEPS}", "trainer.precision=32-true", "trainer.accelerator=cpu"]
        given += ["data.token_budget=700"]  # so that ranks differ in their number of micro-batches
        if stage == "stage2":
            given.append("projector=null")
        done = subprocess.run([sys.executable, "train.py", *given, *settings], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()], folder

    return run


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_have_the_losses_and_end_with_the_weights_of_one(train, stage):
    alone, one = train(stage, "one")
    assert len(alone) == STEPS and alone[-1]["loss"] < alone[0]["loss"]
    for trainer in ("ddp", "fsdp"):
        together, two = train(stage, trainer, f"trainer={trainer}", "trainer.devices=2")
        for key, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("lr", 1e-9)):
            assert [row[key] for row in together] == pytest.approx([row[key] for row in alone], abs=tolerance), trainer
        for file in one.glob("checkpoint/**/*.safetensors"):
            mine, theirs = load_file(file), load_file(two / file.relative_to(one))
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                assert (value.float() - theirs[name].float()).abs().max() < 2e-3, (trainer, name)


def test_deepspeed_on_a_machine_without_cuda_is_an_error_that_says_so(tmp_path):
    command = [sys.executable, "train.py", "+experiment=stage1", "trainer=zero2", f"run_dir={tmp_path}", "logger=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: DeepSpeed runs on CUDA GPUs")
