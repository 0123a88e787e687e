"""Values of wrong types and out of their ranges are named before any work is done."""

import re
from copy import deepcopy
from functools import cache

import pytest
from config_fixtures import composed
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf, open_dict

from vllava.config import check, check_command_line
from vllava.errors import UserError

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
