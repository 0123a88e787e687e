"""Adapters on the LLM: they start as nothing, train alone, and end inside the weights."""

import json

import lightning as L
import pytest
import torch
from test_training import Shares, copies

from vllava.batch import Step
from vllava.data.packing import pack
from vllava.errors import UserError
from vllava.model.build import video_llava
from vllava.model.checkpoint import load
from vllava.model.lora import Lora, add_lora, merged
from vllava.training.stage import Stage
from vllava.training.task import Recipe

TRAINED = ["projector", "llm.*.lora_*"]


@pytest.fixture
def adapted(make_model):
    """A model with adapters, and a copy of what its LLM was without them."""
    plain = make_model()
    model = make_model()
    model.llm = add_lora(model.llm, Lora(r=4, alpha=8, dropout=0.0))
    return model, plain


@pytest.fixture
def prepared(model, make_packer, mixed_samples):
    packer = make_packer(model)
    return [packer.prepare(sample) for sample in mixed_samples]


def trained(model, prepared, steps=8, recipe=None, callbacks=()):
    task = Stage(model, TRAINED, recipe or Recipe(lr=1e-2, warmup_ratio=0.0))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(task, Shares([Step([pack(prepared)], samples=len(prepared))] * steps))
    return task


def test_fresh_adapters_change_nothing(adapted, prepared):
    model, plain = adapted
    torch.testing.assert_close(model.loss(pack(prepared)), plain.loss(pack(prepared)))


def test_adapters_are_on_every_linear_layer_but_the_head(adapted):
    model, plain = adapted
    linear = [n for n, m in plain.llm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    with_adapters = {n.split(".lora_A")[0] for n, _ in model.llm.named_parameters() if ".lora_A." in n}
    assert {n.removeprefix("base_model.model.") for n in with_adapters} == set(linear)
    assert len(linear) == 2 * 7


def test_only_projector_and_adapters_are_trained_and_each_at_its_own_rate(adapted, prepared):
    model, _ = adapted
    before = copies(model)
    task = trained(model, prepared, recipe=Recipe(lr=1e-2, lr_of={"projector": 1e-4}, warmup_ratio=0.0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("projector.") or ".lora_" in name for name in changed)
    rates = {group["initial_lr"]: sum(p.numel() for p in group["params"]) for group in task.optimizers().param_groups}
    assert rates == {1e-4: task.trained["projector"], 1e-2: task.trained["llm.*.lora_*"]}


class Drawing(L.Callback):
    """Disturbs the random numbers between steps, as an interruption does."""

    def on_train_batch_end(self, *_):
        torch.rand(5)


def test_what_drops_out_follows_from_the_step_alone(make_model, prepared):
    weights = []
    for callbacks in ([], [Drawing()]):
        torch.manual_seed(0)
        model = make_model()
        model.llm = add_lora(model.llm, Lora(r=4, alpha=8, dropout=0.5))
        weights.append(trained(model, prepared, steps=3, callbacks=callbacks).trained_weights())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_rate_for_a_part_that_is_not_trained_is_an_error(adapted, prepared):
    with pytest.raises(UserError, match=r"lr_of names \['projectr'\]"):
        trained(adapted[0], prepared, recipe=Recipe(lr=1e-2, lr_of={"projectr": 1e-4}))


def test_the_checkpoint_holds_the_merged_model(adapted, prepared, image_folder, video_folder, tokenizer, tmp_path):
    model, _ = adapted
    task = trained(model, prepared)
    model.eval()
    loss = model.loss(pack(prepared)).item()
    encoder = {
        kind: {"_target_": "vllava.model.encoders.ClipEncoder", "path": str(folder), "medium": kind}
        for kind, folder in (("image", image_folder), ("video", video_folder))
    }
    settings = {"encoder": encoder, "tokenizer": "unused", "data": {"template": "vicuna_v1", "image_fit": "pad"}}
    task.export(tmp_path / "checkpoint", tokenizer, settings)
    loaded, _, _ = load(tmp_path / "checkpoint")
    assert not any("lora" in name for name in loaded.state_dict())
    assert loaded.loss(pack(prepared)).item() == pytest.approx(loss, rel=2e-3)  # saved in half precision
    assert json.loads((tmp_path / "checkpoint" / "vllava.json").read_text())["llm"] == "llm"


def test_the_configuration_makes_adapters(make_llm):
    assert any("lora" in n for n, _ in video_llava(make_llm(), lora={"r": 2, "alpha": 4}).named_parameters())


def test_adapters_merged_a_weight_at_a_time_are_those_merged_at_once(make_model, prepared, tmp_path):
    models = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        model = make_model()
        model.llm = add_lora(model.llm, Lora(r=4, alpha=8, dropout=0.0))
        trained(model, prepared, steps=2)
        models.append(merged(model.llm, folder).state_dict())
    assert models[0].keys() == models[1].keys() and not any("lora" in name for name in models[0])
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert list(tmp_path.iterdir()) == []
