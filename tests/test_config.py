"""Configurations: every one that is offered composes, and every mistake is named before any work is done."""

import re
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import warm
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf, open_dict
from shard_fixtures import ROOT

from vllava.config import check, check_command_line, register_resolvers, run_name
from vllava.errors import UserError
from vllava.lineage import AUTO
from vllava.model.files import write_tensors
from vllava.model.mapped import with_weights
from vllava.run import foundation
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


# --- values of wrong types, and out of their ranges -------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG = {  # key -> what it cannot be; experiment=stage1 where no other is named
    "data.global_batch": [0, -4, 2.5, 8.0, True, None, [8], "many", NAN],
    "data.workers": [-2, 1.5, 100_000, None],
    "data.shuffle_window": [0, -1],
    "data.max_length": [0, "long"],
    "data.token_budget": [-1, 1e4],
    "data.num_frames": [0, 8.5, -8],
    "data.template": ["vicuna", None, 5],
    "data.image_fit": ["stretch"],
    "data.decoder": ["ffmpeg"],
    "data.features": [True],
    "data.frame_sampling": ["random"],
    "data.modalities": ["image", [5], ["sound"], [], 5, None],
    "data.seed": [-1, "one"],
    "data.mixture": [5, {"image": -1}, {"image": {"weight": "x"}}],
    "data.cache": [5],
    "data.cache.gigabytes": [-1, NAN],
    "data.cache.retries": [1.5],
    "data.template_options": [5],
    "task.recipe": [5, None],
    "task.recipe.lr": [0, -1e-3, NAN, INF, "fast", None, True],
    "task.recipe.lr_of.projector": [0],
    "task.recipe.warmup_ratio": [1.5, -0.1],
    "task.recipe.weight_decay": [-1],
    "task.recipe.betas": [[0.9], [0.9, 1.0], 0.9, [0.9, "a"]],
    "task.recipe.clip_norm": [0, -1, None],
    "task.trained": ["projector", [5]],
    "task.max_broken_share": [2, -0.1, NAN, "many"],
    "trainer.max_epochs": [0, -5, 1.5, None, -1],
    "trainer.max_steps": [0, -5, 1e3],
    "trainer.max_time": [5, "later"],
    "trainer.devices": [0, 999, "many", 2.5, None, "gpu", [], ["a"], [7, 7]],
    "trainer.accelerator": ["tpu", None],
    "trainer.precision": ["bf16-true", "fp8", 64, None],
    "trainer.strategy": ["dp", "fsdp", "deepspeed_stage_2", None, 5, {"stage": 2}],
    "trainer.num_nodes": [0, "two"],
    "trainer.limit_train_batches": [0, 1.5, -1],
    "trainer.overfit_batches": [-1, 1.5],
    "trainer.fast_dev_run": [-1, "x"],
    "trainer.profiler": ["slow"],
    "trainer.deterministic": ["maybe"],
    "trainer.detect_anomaly": [5],
    "trainer.plugins": ["mine"],
    "trainer.min_epochs": [5],
    "save_minutes": [-1, "soon", None, NAN],
    "log_level": ["LOUD", 5, None],
    "seed": [-1, "one", 1.5, None, True, 2**32],
    "chain": [[5], 5, [], "stage", "full", "[stage1,stage1]"],
    "runs": [5, None],
    "projector": [5, ["a"]],
    "evaluation": [5],
    "logger.mode": ["sometimes"],
    "logger.project": [2024, ["a"]],
    "model.llm": [5],
    "model.llm.path": [5],
    "model.llm.gradient_checkpointing": [5, "yes"],
    "model.lora": [5, {"r": 0}, {"dropout": 1}],
    "encoder.image.feature_layer": ["last"],
    "encoder.video.frames": [0],
    "foundations.llm": [5, None],
    "callbacks": [5, {"x": 5}, {"x": {"_target_": "torch.nn.Linear"}}],
    "evaluate: evaluation.batch_size": [0],
    "evaluate: evaluation.max_new_tokens": [-1],
    "evaluate: evaluation.num_frames": ["x"],
    "evaluate: evaluation.template": ["x"],
    "evaluate: evaluation.checkpoint": [5],
    "evaluate: evaluation.plots": [5],
    "full: data.global_batch": [0],
    "full: trainer.devices": [0],
    "mae: model.mask_ratio": [1.5],
    "mae: model.hidden_size": [0],
    "align_image: model.vision.image_size": ["x"],
    "llm: model.llm.num_hidden_layers": [-1],
}
RIGHT = {  # what looks odd, and is possible
    "trainer.precision": [32, "32", "bf16", "bf16-mixed"],
    "trainer.devices": ["2", 1],
    "trainer.max_time": ["00:00:00:05", {"hours": 1}],
    "trainer.limit_train_batches": [1, 1.0, 0.5, 100],
    "trainer.fast_dev_run": [True, 3],
    "trainer.accumulate_grad_batches": [1],
    "trainer.limit_val_batches": [0, 1.0],
    "data.workers": [0, -1],
    "data.num_frames": [16],
    "data.mixture": [{"image": 0.5}, {"image": {"weight": 0.5}}],
    "task.recipe.lr": [1],
    "task.recipe.betas": [[0, 0.5]],
    "task.max_broken_share": [0, 1],
    "save_minutes": [0, 0.5],
    "seed": [0, 2**32 - 1],
    "callbacks": [None, {"x": None}],
}


@cache
def composed_once(experiment):
    """A configuration and Hydra's own, to be copied: composing takes longer than checking."""
    return composed(f"+experiment={experiment}", "trainer.accelerator=cpu"), HydraConfig.instance().cfg


@pytest.fixture
def changed():
    """The configuration of an experiment with one value changed, checked."""

    def change(key, value):
        experiment, _, key = key.rpartition(": ")
        whole, HydraConfig.instance().cfg = composed_once(experiment or "stage1")
        cfg = deepcopy(whole)
        with open_dict(cfg):
            OmegaConf.update(cfg, key, value, merge=isinstance(value, dict))
        check(cfg)

    return change


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_cannot_be_is_an_error_that_names_its_key(changed, key):
    for value in WRONG[key]:
        with pytest.raises(UserError) as error:
            changed(key, value)
        assert key.rpartition(": ")[2] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", RIGHT)
def test_a_value_that_is_possible_passes(changed, key):
    for value in RIGHT[key]:
        changed(key, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.global_batch", 0, "data.global_batch is 0, but must be a whole number from 1."),
        ("trainer.max_steps", 1e3, "trainer.max_steps is 1000.0, but must be a whole number from -1. Write 1000."),
        ("task.recipe.lr", NAN, "task.recipe.lr is nan, but must be a number above 0."),
        ("task.recipe.betas", [0.9, 1], "task.recipe.betas[1] is 1, but must be a number from 0 to below 1."),
        ("data.image_fit", "stretch", "data.image_fit is 'stretch', but must be one of crop, pad."),
        (
            "logger.project",
            2024,
            "logger.project is 2024, but must be a text. Quotes make a text of it: 'logger.project=\"2024\"'",
        ),
        (
            "task.trained",
            "llm",
            "task.trained is the text 'llm', but must be a list, each of it a text. Write task.trained=[llm].",
        ),
        ("save_minutes", None, "save_minutes is null, but must be a number from 0."),
    ],
)
def test_the_message_says_what_a_value_is_and_what_is_possible(changed, key, value, message):
    if key == "logger.project":
        pytest.importorskip("wandb")
    with pytest.raises(UserError) as error:
        changed(key, value)
    assert str(error.value) == message


def test_a_callback_that_lacks_an_argument_is_an_error_that_names_it(changed):
    stop = {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}
    with pytest.raises(UserError, match=r"callbacks\.x\.monitor is missing"):
        changed("callbacks", {"x": stop})
    changed("callbacks", {"x": {**stop, "monitor": "loss"}})


@pytest.mark.parametrize("name", ["ModelCheckpoint", "StochasticWeightAveraging", "GradientAccumulationScheduler"])
def test_callbacks_that_cannot_work_here_are_refused_with_what_does(changed, name):
    with pytest.raises(UserError, match=f"{name} is not for runs of vllava: .{{20}}"):
        changed("callbacks", {"x": {"_target_": f"lightning.pytorch.callbacks.{name}"}})


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("trainer.accumulate_grad_batches=4", "data.global_batch"),
        ("trainer.gradient_clip_val=1.0", "task.recipe.clip_norm"),
        ("trainer.val_check_interval=0.5", "validation.every_steps"),
        ("trainer.logger=false", "logger=none"),
        ("trainer.callbacks=[]", "+callbacks.NAME._target_"),
        ("trainer.default_root_dir=x", "run_dir"),
        ("trainer.enable_checkpointing=true", "save_minutes"),
        ("trainer.gpus=2", "trainer.devices"),
        ("ckpt_path=last.ckpt", "started again"),
    ],
)
def test_an_option_of_lightning_that_does_nothing_here_is_refused_with_what_does_it(override, instead):
    for plus in ("", "+"):
        with pytest.raises(UserError, match=re.escape(instead)):
            check_command_line([plus + override])
    key, value = override.split("=")
    with pytest.raises(UserError, match=re.escape(instead)):
        check(composed("+experiment=stage1", f"++{key}={value}"))


@pytest.mark.parametrize("override", ["data=5", "trainer=1.5", "+ablation=null", "encoder/image=true", "encoder=5"])
def test_a_group_is_chosen_by_a_name(override):
    with pytest.raises(UserError, match="is chosen by a name; there are: "):
        check_command_line([override])


@pytest.mark.parametrize("name", ["llm", "llm_time", "align_image", "align_video", "clip", "mae", "stage1", "stage2"])
def test_who_names_data_of_his_own_is_not_sent_to_the_toy_world(name):
    kind = {"llm": "text", "llm_time": "text", "align_video": "video"}.get(name, "image")
    own = composed(f"+experiment={name}", f"data.sources.{kind}=[/data/mine]")
    toys = composed(f"+experiment={name}")
    check(own)
    check(toys)
    assert own.data.sources == {kind: ["/data/mine"]}
    assert "data_prep.prepare" in own.data.remedy and "data_prep.index" in own.data.remedy
    assert "toy" not in OmegaConf.to_yaml({key: own[key] for key in ("data", "preview", "evaluation")})
    assert "python -m data_prep.toy" in toys.data.remedy


def test_what_is_settled_is_said_by_the_first_process_alone(monkeypatch, caplog):
    same = ["+experiment=full", "data.sources.image=[a]", "data.held_out.image=[a]"]
    check(composed(*same))
    assert "evaluated on and trained on" in caplog.text
    caplog.clear()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    check(composed(*same))
    assert not caplog.text


# --- mistakes on the command line -------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path):
    """A function that runs train.py with the given arguments and returns (exit code, what it wrote to stderr)."""

    def run(*arguments):
        settings = [f"runs={tmp_path / 'runs'}", "logger=none"]
        code, _, told = warm.train([*arguments, *settings], tmp_path / "log")
        return code, told

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
