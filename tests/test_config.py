"""Configurations: every one that is offered composes, and every mistake is named before any work is done."""

import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from config_fixtures import CONF, EXPERIMENTS, composed
from omegaconf import OmegaConf
from shard_fixtures import ROOT

from vllava.config import check, run_name
from vllava.errors import UserError
from vllava.lineage import AUTO
from vllava.model.files import write_tensors
from vllava.model.mapped import with_weights
from vllava.run import foundation
from vllava.runs import MARK, claim

ABLATIONS = sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))
PAPER = ["stage1", "stage2", "evaluate", "full"]  # what an ablation is made for


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


def test_a_model_made_anew_has_the_projector_that_the_run_started_from(tmp_path):
    """Also where the run does not train it."""
    settings = ["+experiment=stage2", "task.trained=[llm]", f"projector={tmp_path}/projector.safetensors"]
    cfg = composed(*settings)
    model = foundation(OmegaConf.merge(cfg, {"projector": None}))
    weights = {name: torch.full_like(value, 0.5) for name, value in model.projector.state_dict().items()}
    write_tensors(weights, tmp_path, "projector.safetensors")
    anew = with_weights(partial(foundation, cfg), {}, tmp_path)
    assert all(value.equal(weights[name]) for name, value in anew.projector.state_dict().items())
