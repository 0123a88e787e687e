"""Checkpoints along the way: whole ones, of the model as it was then, as many as were asked for, and the best."""

import json

import lightning as L
import pytest
import torch
from shard_fixtures import ROOT
from sharded_run import STEPS, TRAINED, Shares, stage, trainer_for
from torch.testing import assert_close

from vllava.errors import UserError
from vllava.folders import strangers
from vllava.model.build import fresh_llm, load_llm, load_tokenizer, video_llava
from vllava.model.checkpoint import load
from vllava.model.files import save_half
from vllava.model.lora import Lora
from vllava.model.precision import set_precision
from vllava.training.durable import BEST, Checkpoints, Durable

TOKENIZER = str(ROOT / "assets" / "tokenizer")
SETTINGS = {"encoder": {}, "tokenizer": "llm", "data": {"template": "vicuna_v1", "image_fit": "crop"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLM in float16."""
    folder = tmp_path_factory.mktemp("durable")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    save_half(fresh_llm(TOKENIZER, initializer_range=0.2, **sizes), folder / "llm")
    return folder


class Metric(L.Callback):
    """Logs these values, one for each step, and keeps the weights of each."""

    def __init__(self, values):
        self.values = values
        self.weights = []

    def on_train_batch_end(self, trainer, task, *_):
        value = self.values[trainer.global_step - 1]
        if value is not None:
            task.log("val", value)
        self.weights.append({name: w.clone() for name, w in task.trained_weights().items()})


@pytest.fixture
def fit(folder, tmp_path):
    """A function that trains four steps with checkpoints along the way; the task, its callback and the folder."""

    def run(values=(None,) * STEPS, trained=TRAINED, half=False, lora=None, **settings):
        def build():
            return video_llava(load_llm(str(folder / "llm"), as_stored=True), lora=lora)

        torch.manual_seed(0)
        task = stage(folder, trained, lora=lora)
        set_precision(task.model, half)
        metric = Metric(values)
        which = Checkpoints(**settings)
        durable = Durable(tmp_path / "checkpoints", which, build, load_tokenizer(TOKENIZER), SETTINGS)
        precision = "bf16-mixed" if half else "32-true"
        trainer_for(tmp_path, "auto", precision=precision, callbacks=[metric, durable]).fit(task, Shares())
        return task, metric, tmp_path / "checkpoints"

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(*numbers):
    return [f"step-{number:08d}" for number in numbers]


def test_each_is_a_whole_checkpoint_of_the_weights_at_that_step(fit, folder):
    _, metric, written = fit(every_steps=2, keep_last=2, half=True)
    assert names(written) == steps(2, 4)
    foundation = load_llm(str(folder / "llm")).state_dict()
    for step in (2, 4):
        path = written / f"step-{step:08d}"
        model, _, description = load(path)
        assert strangers(path) == [] and description.trained == TRAINED
        for name, weight in model.llm.named_parameters():
            then = metric.weights[step - 1].get(f"llm.{name}")
            # What was not trained is as in the foundation, though the run has it in bfloat16.
            assert_close(weight, (foundation[name] if then is None else then.half()).float(), atol=0, rtol=0)


def test_training_is_the_same_with_them_as_without(fit):
    plain = fit()[0].trained_weights()
    saved = fit(every_steps=1)[0].trained_weights()
    assert all(torch.equal(saved[name], weight) for name, weight in plain.items())


def test_adapters_are_merged_into_what_is_written_and_not_into_what_trains(fit, folder):
    lora = Lora(r=2, alpha=4, dropout=0.0)
    task, _, written = fit(trained=["llm.*.lora_*"], lora=lora, every_steps=4)
    llm = load(written / "step-00000004")[0].llm
    assert not any("lora" in name for name, _ in llm.named_parameters())
    ids = torch.arange(10, 20)[None]
    foundation = load_llm(str(folder / "llm")).eval()
    asked = {"input_ids": ids, "position_ids": torch.arange(10)[None]}
    expected = task.model.llm.eval()(**asked).logits
    assert any("lora" in name for name, _ in task.model.llm.named_parameters())
    assert_close(llm(**asked).logits, expected, atol=2e-2, rtol=2e-2)
    assert (foundation(**asked).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("val", (3.0, 1.0, 2.0, 2.5), 2), ("val", (None, 5.0, float("nan"), 4.0), 4), ("val", (2.0, 2.0, 2.0, 2.0), 1)],
    ids=["smaller", "nan", "the first of equals"],
)
def test_the_newest_and_the_best_are_kept(fit, metric, values, best):
    _, _, written = fit(values, every_steps=1, keep_last=1, keep_best=metric)
    assert names(written) == [BEST, *steps(*sorted({best, 4}))]
    found = json.loads((written / BEST).read_text())
    assert found == {"metric": "val", "value": values[best - 1], "step": best, "checkpoint": steps(best)[0]}


def test_a_metric_that_nobody_measures_is_said_with_those_there_are(fit, caplog):
    _, _, written = fit(every_steps=4, keep_best="val_loss")
    assert names(written) == steps(4)
    assert "val_loss is not measured (there are: gradient_norm, loss, lr" in caplog.text


def test_of_an_accuracy_the_largest_is_best():
    assert Checkpoints(every_steps=1, keep_best="val_accuracy/toy").larger_is_better
    assert not Checkpoints(every_steps=1, keep_best="val_loss/toy").larger_is_better


def test_a_run_that_goes_on_knows_the_best_so_far(fit):
    _, _, written = fit((1.0, 2.0, 3.0, 4.0), every_steps=1, keep_last=1, keep_best="val")
    (written / "step-00000005.unfinished-abc").mkdir()  # of a run that was killed
    fit((9.0, 2.0, 3.0, 4.0), every_steps=2, keep_last=1, keep_best="val")
    assert names(written) == [BEST, *steps(1, 4)]
    assert json.loads((written / BEST).read_text())["step"] == 1


def test_what_somebody_has_put_into_one_is_never_deleted(fit, caplog):
    _, _, written = fit(every_steps=2, keep_last=2)
    (written / "step-00000002" / "notes.txt").write_text("mine")
    (written / "my-own").mkdir()
    fit(every_steps=2, keep_last=1)
    assert names(written) == ["my-own", *steps(2, 4)] and (written / "step-00000002" / "notes.txt").exists()
    assert "no checkpoint of step 2" in caplog.text and "notes.txt" in caplog.text


def test_a_place_that_cannot_be_written_stops_the_run_in_words(fit, tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"checkpoints cannot be written \(.*File exists"):
        fit(every_steps=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_steps": 0}, "checkpoint.every_steps=0: give a whole number from 1 or null"),
        ({"every_steps": True}, "checkpoint.every_steps=True"),
        ({"every_steps": "10"}, "checkpoint.every_steps='10'"),
        ({"every_steps": 5, "keep_last": -1}, "checkpoint.keep_last=-1: give a whole number from 0"),
        ({"keep_best": "val_loss"}, "needs checkpoint.every_steps"),
        ({"every_steps": 5, "keep_last": 0}, "keeps no checkpoint at all"),
        ({"every_steps": 5, "keep_best": 3}, "name of a metric"),
        ({"every": 5}, "every_steps"),
        ([5], "give its keys"),
    ],
)
def test_mistakes_in_the_settings_are_said_in_words(settings, message):
    with pytest.raises(UserError, match=message):
        Checkpoints.of(settings)
