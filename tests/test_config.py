"""Configurations: every one that is offered composes, and every mistake is named before any work is done."""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from shard_fixtures import ROOT

from vllava.config import check, register_resolvers, run_name
from vllava.errors import UserError
from vllava.lineage import AUTO
from vllava.runs import MARK, claim

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
ABLATIONS = sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))
PAPER = ["stage1", "stage2", "evaluate", "full"]  # what an ablation is made for


def composed(*overrides, conf=CONF):
    """The configuration of a command line, as train.py sees it."""
    register_resolvers()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


# --- what is offered --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_the_check(experiment):
    cfg = composed(f"+experiment={experiment}")
    check(cfg)
    assert cfg.experiment == experiment


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("experiment", PAPER)
def test_every_ablation_of_the_papers_experiments_composes_and_passes_the_check(experiment, ablation):
    cfg = composed(f"+experiment={experiment}", f"+ablation={ablation}")
    check(cfg)
    assert (cfg.experiment, cfg.ablation) == (experiment, ablation)


@pytest.mark.parametrize(
    "experiment", [name for name in EXPERIMENTS if OmegaConf.load(CONF / "experiment" / f"{name}.yaml").get("chain")]
)
def test_a_chain_names_experiments_that_there_are(experiment):
    assert set(composed(f"+experiment={experiment}").chain) <= set(EXPERIMENTS)


SYSTEMS = {  # encoders of images and of videos, modalities of stage 2
    "united": ("languagebind", "languagebind", {"image", "video", "text"}),
    "separated_mae": ("mae", "languagebind", {"image", "video", "text"}),
    "separated_clip": ("clip", "languagebind", {"image", "video", "text"}),
    "video_only": (None, "languagebind", {"video"}),
    "image_only": ("languagebind", None, {"image", "text"}),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_is_its_system_in_both_stages(ablation):
    image, video, modalities = SYSTEMS[ablation]
    for stage in ("stage1", "stage2"):
        cfg = OmegaConf.to_container(composed(f"+experiment={stage}", f"+ablation={ablation}"), resolve=True)
        for kind, wanted in (("image", image), ("video", video)):
            path = cfg["encoder"][kind].get("path")
            assert path == (
                cfg["foundations"].get(f"{wanted}_{kind}") or cfg["foundations"].get(wanted) if wanted else None
            )
        assert set(cfg["data"]["modalities"]) == modalities


def test_stages_train_what_the_paper_trains():
    assert composed("+experiment=stage1").task.trained == ["projector"]
    assert sorted(composed("+experiment=stage2").task.trained) == ["llm", "projector"]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_later_parts_look_for_the_earlier_ones_and_each_seed_has_a_folder(ablation):
    given = f"+ablation={ablation}", "seed=7"
    assert composed("+experiment=stage2", *given).projector == AUTO
    assert composed("+experiment=evaluate", *given).evaluation.checkpoint == AUTO
    names = {composed("+experiment=stage1", *given).run_dir, composed("+experiment=stage1", given[0]).run_dir}
    assert names == {f"outputs/runs/stage1-{ablation}-s{seed}" for seed in (1, 7)}


def test_a_run_that_changes_a_value_has_a_folder_of_its_own():
    assert run_name("stage1", "united", 1) == "stage1-united-s1"
    assert re.fullmatch("stage1-united-s1-[0-9a-f]{6}", run_name("stage1", "united", 1, "data.template=plain"))
    assert run_name("stage1", "united", 1, "encoder/image=clip") != run_name("stage1", "united", 1, "encoder/image=mae")
    same = "data.workers=0", "logger=none", "trainer=fsdp", "trainer.devices=2", "data.token_budget=99", "world=/data"
    assert run_name("stage1", "united", 1, *same) == "stage1-united-s1"
    assert run_name("stage2", "united", 3, "model=video_llava_7b", "seed=3") == "stage2-united-video_llava_7b-s3"


# --- mistakes in a configuration file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "right", "wrong", "overrides"),
    [
        ("experiment/stage1.yaml", "task:", "tsak:", []),
        ("experiment/stage1.yaml", "  image_fit:", "  image_fitt:", []),
        ("experiment/stage2.yaml", "  trained:", "  traned:", ["+experiment=stage2"]),
        ("experiment/evaluate.yaml", "  max_new_tokens:", "  max_new_token:", ["+experiment=evaluate"]),
        ("ablation/image_only.yaml", "  modalities:", "  modalites:", ["+experiment=stage1", "+ablation=image_only"]),
        ("data/conversation.yaml", "token_budget:", "token_buget:", []),
        ("data/caption.yaml", "shuffle_window:", "shufle_window:", ["+experiment=align_image"]),
        ("task/stage.yaml", "  warmup_ratio:", "  warmup_ration:", []),
        ("task/stage.yaml", "max_broken_share:", "max_broken_shares:", []),
        ("encoder/image/languagebind.yaml", "feature_layer:", "feature_layers:", []),
        ("trainer/auto.yaml", "accelerator:", "acelerator:", []),
        ("logger/wandb.yaml", "mode:", "mod:", []),
        ("model/toy.yaml", "  image_encoder:", "  image_encodr:", []),
        ("model/toy_llm.yaml", "    num_hidden_layers:", "    num_hiden_layers:", ["+experiment=llm"]),
        ("model/toy_mae.yaml", "  mask_ratio:", "  mask_ration:", ["+experiment=mae"]),
        ("model/toy_languagebind.yaml", "    patch_size:", "    pach_size:", ["+experiment=align_image"]),
        ("train.yaml", "log_level:", "log_levle:", []),
    ],
)
def test_a_misspelt_key_is_an_error_that_names_it_and_the_right_one(tmp_path, file, right, wrong, overrides):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    text = (conf / file).read_text()
    found = re.findall(f"^{right}", text, re.MULTILINE)
    assert len(found) == 1
    (conf / file).write_text(re.sub(f"^{right}", wrong, text, flags=re.MULTILINE))
    with pytest.raises(UserError) as error:
        check(composed(*(overrides or ["+experiment=stage1"]), conf=conf))
    assert repr(wrong.strip(" :")) in str(error.value)
    assert repr(right.strip(" :")) in str(error.value)


def test_a_target_that_does_not_exist_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"trainer._target_='lightning.Trainr'"):
        check(composed("+experiment=stage1", "trainer._target_=lightning.Trainr"))


def test_a_value_that_is_missing_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"not complete.*lr"):
        check(composed("+experiment=stage1", "task.recipe.lr=???"))


def test_no_experiment_is_an_error_that_lists_them():
    with pytest.raises(UserError) as error:
        check(composed())
    assert all(name in str(error.value) for name in EXPERIMENTS)


# --- mistakes on the command line -------------------------------------------------------------------------------------


def train_py(folder, arguments):
    """Run train.py in this process with what it prints going to files in `folder`."""
    os.chdir(ROOT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")


@pytest.fixture(scope="module")
def starter():
    """Starts processes that have imported the libraries already, which takes most of a run's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllava.run", "test_config"])
    return context


@pytest.fixture
def train(starter, tmp_path):
    """A function that runs train.py with the given arguments and returns (exit code, what it wrote to stderr)."""

    def run(*arguments):
        settings = [f"runs={tmp_path / 'runs'}", "logger=none"]
        process = starter.Process(target=train_py, args=(tmp_path, [*arguments, *settings]))
        process.start()
        process.join(300)
        process.kill()  # nothing, if it has ended
        assert process.exitcode is not None, "train.py hangs"
        return process.exitcode, (tmp_path / "stderr").read_text()

    return run


def assert_one_paragraph(result, *words):
    """The run ended with a message of one line that holds the words, and nothing else."""
    code, printed = result
    assert code == 1, printed
    assert re.fullmatch(r"error: .+\n", printed), printed
    for word in words:
        assert word in printed


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


def test_an_ablation_before_the_experiment_is_an_error_that_says_the_order(train):
    result = train("+ablation=image_only", "+experiment=stage1")
    assert_one_paragraph(result, "after +experiment=")


def test_a_misspelt_key_of_a_copied_configuration_stops_the_command(train, tmp_path):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    file = conf / "experiment" / "stage1.yaml"
    file.write_text(file.read_text().replace("global_batch:", "globl_batch:"))
    assert_one_paragraph(train("--config-path", str(conf), "+experiment=stage1"), "'globl_batch'", "'global_batch'")


# --- what is in a run's folder ----------------------------------------------------------------------------------------


def test_a_folder_with_files_that_no_run_wrote_is_no_runs(tmp_path):
    claim(tmp_path / "new")
    (tmp_path / "new" / "metrics.json").write_text("{}")
    claim(tmp_path / "new")  # a run's own
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("harmless")
    claim(mine)
    (mine / MARK).unlink()
    (mine / "config.yaml").write_text("my: own")
    with pytest.raises(UserError, match=r"holds config\.yaml, which a run would replace.*touch"):
        claim(mine)
    assert (mine / "config.yaml").read_text() == "my: own"


def test_the_traceback_of_a_users_mistake_is_in_the_log_and_not_on_the_screen(tmp_path):
    command = [sys.executable, "train.py", "+experiment=stage1", f"world={tmp_path}/none", f"run_dir={tmp_path}/run"]
    done = subprocess.run([*command, "logger=none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: No shards") and "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
