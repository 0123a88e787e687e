"""The options of Lightning's Trainer do what its documentation says, or are refused with what to use instead."""

import inspect
import math
from contextlib import suppress

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary, TQDMProgressBar
from omegaconf import OmegaConf
from shard_fixtures import ROOT, text_sample, write_source

from vllava.config import composed
from vllava.data.build import conversation_data
from vllava.errors import UserError
from vllava.options import HINTS, REFUSED, check_trainer
from vllava.run import build_trainer
from vllava.training.callbacks import History, progress_bar
from vllava.training.saving import Generations, SaveToResume
from vllava.training.stage import Stage
from vllava.training.task import Recipe

SAMPLES, BATCH = 14, 4  # four steps, the last of two samples
AUTO = {k: v for k, v in OmegaConf.load(ROOT / "conf" / "trainer" / "auto.yaml").items() if not k.startswith("_")}
ALWAYS = {
    "accelerator": "cpu",
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    "use_distributed_sampler": False,
}


class Rates(L.Callback):
    """The learning rate of every step."""

    def __init__(self):
        self.of = []

    def on_train_batch_end(self, trainer, task, *_):
        self.of.append(float(trainer.callback_metrics["lr"]))


class Dies(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, task, *_):
        if trainer.global_step == self.step:
            raise InterruptedError  # stands for whatever ends a process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    write_source(folder, [text_sample(f"s{number:02d}") for number in range(SAMPLES)], per_shard=5)
    return folder


@pytest.fixture
def fit(folder, make_llm, tokenizer):
    """Trains a tiny LLM with options of the Trainer: the task, the keys of each step, the learning rates."""
    from vllava.model.video_llava import VideoLlava

    def run(callbacks=(), ckpt_path=None, **options):
        torch.manual_seed(0)
        data = conversation_data({}, tokenizer, {"text": [str(folder)]}, ["text"], BATCH, seed=1, workers=0)
        seen, decode = [], data.decode
        data.decode = lambda key, members: (seen.append(key), decode(key, members))[1]
        task, rates = Stage(VideoLlava(make_llm()), ["llm"], Recipe(lr=1e-2, warmup_ratio=0.0)), Rates()
        trainer = L.Trainer(callbacks=[rates, *callbacks], **{**ALWAYS, "max_epochs": 1, **options})
        with suppress(InterruptedError):
            trainer.fit(task, data, ckpt_path=ckpt_path)
        return task, seen, rates.of

    return run


def cosine(steps):
    return [1e-2 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.parameters()])


def test_limited_epochs_are_the_planned_ones_and_each_begins_anew(fit):
    task, seen, rates = fit(max_epochs=2, limit_train_batches=3)
    assert task.global_step == 6 and task.counts.samples_seen == 24
    assert rates == pytest.approx(cosine(6))
    first, second = seen[:12], seen[12:24]
    assert len(set(first)) == len(set(second)) == 12  # no sample twice in an epoch
    assert first != second  # another order, not the rest of the first epoch and on


def test_a_share_of_an_epoch_is_so_many_of_its_steps(fit):
    task, _, rates = fit(limit_train_batches=0.5)
    assert task.global_step == 2 and task.counts.samples_seen == 8
    assert rates == pytest.approx(cosine(2))


def test_a_limit_beyond_the_epoch_is_none(fit):
    task, seen, _ = fit(limit_train_batches=100)
    assert task.global_step == 4 and task.counts.samples_seen == SAMPLES and len(set(seen)) == SAMPLES


def test_a_share_that_leaves_no_step_is_an_error(fit):
    with pytest.raises(UserError, match=r"limit_train_batches=0.2 leaves none of the 4 steps"):
        fit(limit_train_batches=0.2)


def test_overfitting_shows_the_same_samples_in_every_epoch(fit):
    task, seen, rates = fit(max_epochs=3, overfit_batches=2)
    assert task.global_step == 6 and task.counts.samples_seen == 24
    assert seen[:8] == seen[8:16] == seen[16:24] and len(set(seen[:8])) == 8
    assert rates == pytest.approx(cosine(6))


@pytest.mark.parametrize("options", [{"limit_train_batches": 3}, {"overfit_batches": 2}], ids=str)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_run_with_a_limit_ends_as_an_undisturbed_one(fit, tmp_path, options, after):
    whole, _, rates = fit(max_epochs=2, **options)
    states = Generations(tmp_path / "resume")
    fit([SaveToResume(states, 0), Dies(after)], max_epochs=2, **options)
    resumed, _, later = fit([], str(states.newest()[0]), max_epochs=2, **options)
    assert later == pytest.approx(rates[after:])
    assert resumed.counts.samples_seen == whole.counts.samples_seen
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(("asked", "steps"), [(True, 1), (3, 3)])
def test_a_fast_run_is_so_many_steps_with_a_schedule_of_its_own(fit, asked, steps):
    task, _, rates = fit(max_epochs=5, fast_dev_run=asked)
    assert task.global_step == steps and rates == pytest.approx(cosine(steps))


def test_loaders_made_anew_for_every_epoch_show_the_same_samples(fit):
    whole, seen, _ = fit(max_epochs=2)
    again, others, _ = fit(max_epochs=2, reload_dataloaders_every_n_epochs=1)
    assert others == seen and torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("options", [{"deterministic": True}, {"detect_anomaly": True}, {"benchmark": True}], ids=str)
def test_what_helps_to_debug_changes_no_weights(fit, options):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        assert torch.equal(weights(fit(max_steps=2, **options)[0]), weights(fit(max_steps=2)[0]))
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        torch.autograd.set_detect_anomaly(False)


def test_a_run_ends_at_its_time(fit):
    task, _, rates = fit(max_epochs=10_000, max_time={"seconds": 1})
    assert 0 < task.global_step < 40_000
    assert rates[-1] > 0.9e-2  # the schedule was for all that was planned


def test_early_stopping_ends_a_run_and_two_epochs_at_least_are_kept(fit):
    stop = EarlyStopping("loss", patience=0, stopping_threshold=1e9)  # any loss is good enough
    assert fit([stop], max_epochs=4)[0].global_step == 4
    assert fit([stop], max_epochs=4, min_epochs=2)[0].global_step == 8


# --- every option, by configuration -----------------------------------------------------------------------------------


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The Trainer of a command line, and its configuration."""

    def build(*overrides):
        cfg = composed(["+experiment=stage1", "logger=none", f"run_dir={tmp_path}", "trainer=single", *overrides])
        settings = OmegaConf.to_container(cfg, resolve=True)
        saving = SaveToResume(Generations(tmp_path / "resume"), 5)
        return build_trainer(cfg, settings, [History(tmp_path), progress_bar()], saving, None)

    return build


def test_every_option_of_the_trainer_is_spoken_of():
    options = set(inspect.signature(L.Trainer).parameters)
    by_their_types = {"strategy", "precision", "devices", "max_time"}  # checked by functions
    assert options <= set(AUTO) | set(HINTS) | set(REFUSED) | by_their_types
    assert not set(AUTO) & set(REFUSED) - {"num_sanity_val_steps", "use_distributed_sampler"}
    check_trainer(AUTO)


def test_defaults_of_lightning_are_not_refused():
    defaults = {name: p.default for name, p in inspect.signature(L.Trainer).parameters.items()}
    ours = {"logger", "callbacks", "default_root_dir", "enable_checkpointing", "use_distributed_sampler", "precision"}
    check_trainer({**{name: value for name, value in defaults.items() if name not in ours}, "max_epochs": 1})


def test_callbacks_are_added_by_configuration(built):
    stop = "lightning.pytorch.callbacks.EarlyStopping"
    trainer = built(f"+callbacks.stop._target_={stop}", "+callbacks.stop.monitor=loss")
    [added] = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]
    assert added.monitor == "loss"
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names.index("EarlyStopping") < names.index("SaveToResume")  # whose state of the step is saved


def test_a_progress_bar_that_is_added_stands_in_for_ours(built):
    trainer = built("+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar")
    assert [type(c) for c in trainer.callbacks if isinstance(c, TQDMProgressBar)] == [TQDMProgressBar]


def test_a_progress_bar_can_be_left_out(built):
    assert built("trainer.enable_progress_bar=false").progress_bar_callback is None


def test_a_summary_can_be_added(built):
    trainer = built("+callbacks.tree._target_=lightning.pytorch.callbacks.ModelSummary", "+callbacks.tree.max_depth=2")
    assert [c._max_depth for c in trainer.callbacks if isinstance(c, ModelSummary)] == [2]


@pytest.mark.parametrize(
    "asked",
    [
        ["trainer.profiler=simple"],
        ["trainer.profiler=advanced"],
        ["trainer.profiler={_target_:lightning.pytorch.profilers.SimpleProfiler}"],
    ],
    ids=str,
)
def test_a_profile_lies_in_the_runs_folder(built, tmp_path, asked):
    profiler = built(*asked).profiler
    profiler.setup("fit", local_rank=0)
    with profiler.profile("my work"):
        pass
    profiler.describe()
    assert "my work" in (tmp_path / "fit-profile-0.txt").read_text()


def test_what_lightning_refuses_is_said_in_words(built):
    plugin = "+trainer.plugins={_target_: lightning.pytorch.plugins.precision.DoublePrecision}"
    with pytest.raises(UserError, match="do not go together"):
        built(plugin)
