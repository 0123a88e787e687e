"""A mistake on the command line is one paragraph that names it, before any work is done."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from config_fixtures import CONF, EXPERIMENTS, assert_one_paragraph
from shard_fixtures import ROOT


def test_without_an_experiment_the_command_says_what_there_is(tmp_path):
    """As a user starts it, in a new process."""
    command = [sys.executable, "train.py", f"runs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_one_paragraph((done.returncode, done.stderr), "+experiment=", *EXPERIMENTS)
    assert done.stdout == ""


def test_an_unknown_experiment_is_an_error_that_lists_them(train):
    code, printed = train("+experiment=stage3")
    assert code != 0 and "Traceback" not in printed
    assert all(name in printed for name in ("experiment/stage3", *EXPERIMENTS))


@pytest.mark.parametrize("option", ["data.globl_batch=8", "sede=3", "task.recipe.learning_rate=1"])
def test_an_unknown_option_is_an_error_that_names_it(train, option):
    code, printed = train("+experiment=stage1", option)
    assert code != 0 and "Traceback" not in printed
    assert option.split("=")[0].split(".")[-1] in printed


def test_an_unknown_option_that_is_added_is_an_error_that_names_the_right_one(train):
    assert_one_paragraph(train("+experiment=stage1", "+data.globl_batch=8"), "'globl_batch'", "'global_batch'")


@pytest.mark.parametrize("experiment", ["llm", "stage1"])
def test_missing_shards_are_an_error_that_names_the_command_that_makes_them(train, tmp_path, experiment):
    split = {"llm": "foundations"}.get(experiment, experiment)
    result = train(f"+experiment={experiment}", f"world={tmp_path / 'world'}")
    assert_one_paragraph(result, str(tmp_path / "world"), f"python -m data_prep.toy {split}")


def test_a_missing_stage_1_projector_is_an_error_that_names_it_and_the_command(train, tmp_path):
    result = train("+experiment=stage2")
    assert_one_paragraph(
        result, f"{tmp_path}/runs/stage1-united-s1/checkpoint/projector.safetensors", "+experiment=stage1"
    )


@pytest.mark.parametrize("part", ["llm", "languagebind_video"])
def test_a_missing_foundation_is_an_error_that_names_it(train, tmp_path, part):
    result = train("+experiment=stage1", f"foundations.{part}={tmp_path / 'nowhere'}")
    assert_one_paragraph(result, str(tmp_path / "nowhere"))


def test_a_missing_checkpoint_to_evaluate_is_an_error_that_names_it(train, tmp_path):
    assert_one_paragraph(train("+experiment=evaluate"), f"{tmp_path}/runs/stage2-united-s1/checkpoint")


@pytest.mark.parametrize("wrong", ["data.global_batch=0", "trainer.precision=fp8", "+trainer.val_check_interval=2"])
def test_values_are_checked_before_data_or_weights_are_read(train, wrong):
    result = train("+experiment=stage1", "world=/nowhere", "foundations.llm=/nowhere", wrong)
    assert_one_paragraph(result, wrong.split("=")[0].lstrip("+"))


def test_an_ablation_before_the_experiment_is_an_error_that_says_the_order(train):
    result = train("+ablation=image_only", "+experiment=stage1")
    assert_one_paragraph(result, "after +experiment=")


def test_a_misspelt_key_of_a_copied_configuration_stops_the_command(train, tmp_path):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    file = conf / "experiment" / "stage1.yaml"
    file.write_text(file.read_text().replace("global_batch:", "globl_batch:"))
    assert_one_paragraph(train("--config-path", str(conf), "+experiment=stage1"), "'globl_batch'", "'global_batch'")
