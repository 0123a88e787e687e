"""What a run looks at while it trains: numbers that are none, held-out samples, FLOPs, the model's parts."""

import json
import math
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from shard_fixtures import image_sample, text_sample, video_sample, write_source
from test_training import Recorder, Shares, copies, fit, parts_that_changed
from torch.utils.flop_counter import FlopCounterMode

from vllava import run
from vllava.batch import Step
from vllava.config import composed
from vllava.data.packing import pack
from vllava.errors import UserError
from vllava.evaluation.held_out import HeldOutRows, short_names
from vllava.model.flops import costs_of, peak
from vllava.model.lora import Lora, add_lora
from vllava.model.tree import tree
from vllava.stops import Stops
from vllava.training.callbacks import History, Throughput, plain, read_history
from vllava.training.finite import IN_A_ROW, OnNan, require_finite
from vllava.training.stage import Stage
from vllava.training.task import Recipe, freeze_all_but
from vllava.training.validation import Validation, Watch, loss_names, means

STEADY = Recipe(lr=1e-2, warmup_ratio=0.0)


@pytest.fixture
def steps(model, make_packer, mixed_samples):
    """A good step and one with a sample whose pixels are not numbers, a micro-batch for each sample."""
    packer = make_packer(model, token_budget=1)
    bad = replace(
        mixed_samples[2], media=[replace(mixed_samples[2].media[0], pixels=torch.full((4, 3, 32, 32), math.nan))]
    )
    keys = [f"shard.tar:{sample.key}" for sample in mixed_samples]
    made = []
    for samples in (mixed_samples, [*mixed_samples[:2], bad, *mixed_samples[3:]]):
        made.append(Step(packer.collate([packer.prepare(s) for s in samples]), len(samples), keys=keys))
    return made


class Weights(L.Callback):
    """Copies the trained weights after each step."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, task, *_):
        self.after.append({name: p.detach().clone() for name, p in task.model.projector.named_parameters()})


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_loss_that_is_not_a_number_stops_the_run_before_it_changes_a_weight_and_names_the_sample(model, steps):
    good, bad = steps
    weights = Weights()
    with pytest.raises(UserError, match=r"Step 2: the loss is nan.*with such a loss: shard.tar:video\. ") as error:
        fit(model, ["projector"], [good, bad], recipe=STEADY, callbacks=[weights])
    assert "shard.tar:image" not in str(error.value) and "task.on_nan=skip" in str(error.value)
    [after_one] = weights.after
    assert equal(dict(model.projector.named_parameters()), after_one)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_the_run_and_all_samples_of_the_step_are_named(value, model, steps):
    before = copies(model)
    model.projector[0].weight.requires_grad_(True).register_hook(lambda gradient: gradient * value)
    with pytest.raises(UserError, match=r"Step 1: the loss is \d.*norm of its gradient (inf|nan)") as error:
        fit(model, ["projector"], steps[:1], recipe=STEADY)
    assert all(f"shard.tar:{key}" in str(error.value) for key in ("image", "text", "video", "several", "rounds"))
    assert parts_that_changed(model, before) == set()


def test_a_skipped_step_changes_neither_weights_nor_the_optimisers_state_and_is_listed(model, steps):
    good, bad = steps
    weights, moments = Weights(), []

    class Moments(L.Callback):
        def on_train_batch_end(self, trainer, task, *_):
            states = task.optimizers().optimizer.state.values()
            moments.append([s[name].clone() for s in states for name in ("step", "exp_avg", "exp_avg_sq")])

    task, logged = fit(
        model, ["projector"], [good, bad, good], recipe=STEADY, callbacks=[weights, Moments()], on_nan="skip"
    )
    first, second, third = weights.after
    assert equal(first, second) and not equal(second, third)
    assert all(map(torch.equal, moments[0], moments[1])) and not all(map(torch.equal, moments[1], moments[2]))
    [skipped] = json.loads(json.dumps(plain(task.facts()), allow_nan=False))["skipped_steps"]
    assert (skipped["step"], skipped["loss"], skipped["keys"]) == (2, None, ["shard.tar:video"])
    assert math.isfinite(logged["loss"]) and logged["samples_seen"] == 15


def test_more_skipped_steps_than_the_limit_stop_the_run(model, steps):
    good, bad = steps
    with pytest.raises(UserError, match=r"Step 3: .*2 steps were such, and task\.max_skipped=0\.01 allows 1 of 3"):
        fit(model, ["projector"], [bad, good, bad], on_nan="skip")
    event = {"step": 1, "loss": math.nan, "gradient_norm": 1.0, "what": "The samples", "keys": []}
    few = OnNan("skip", 0.01)
    few.require(event, 20, IN_A_ROW, planned=2000, half=False)
    with pytest.raises(UserError, match="More than 10 steps in a row"):
        few.require(event, 20, IN_A_ROW + 1, planned=2000, half=False)
    with pytest.raises(UserError, match="allows 20 of 2000"):
        few.require(event, 21, 1, planned=2000, half=False)


@pytest.mark.parametrize("wrong", [{"on_nan": "ignore"}, {"max_skipped": 2}, {"max_skipped": True}])
def test_settings_for_such_steps_are_checked(wrong, model):
    with pytest.raises(UserError, match=r"task\.(on_nan|max_skipped)="):
        Stage(model, ["projector"], STEADY, **wrong)


def test_two_processes_stop_together_and_say_the_same(model, steps, tmp_path):
    """The sample is in the share of one alone; a process that went on would wait for ever."""
    good, bad = steps
    with pytest.raises(Exception, match=r"Step 2: the loss is nan.*such a loss: shard\.tar:video"):
        fit(model, ["projector"], [good, good], [good, bad], recipe=STEADY)


def test_weights_that_a_checkpoint_cannot_hold_are_not_exported():
    require_finite(
        {"llm.a": torch.tensor([-65504.0, 1.0]), "projector.a": torch.tensor([1e30]), "none": torch.empty(0)}
    )
    for name, value in (("llm.a", 1e6), ("llm.a", math.nan), ("projector.a", math.inf), ("projector.a", -math.inf)):
        with pytest.raises(UserError, match=f"{name} reaches .*Nothing was exported"):
            require_finite({name: torch.tensor([0.0, value, 1.0])})


def test_a_run_that_diverges_in_its_last_step_exports_nothing(tmp_path):
    write_source(tmp_path / "images", [image_sample(f"i{i}") for i in range(4)], per_shard=4)
    overrides = ["+experiment=stage2", f"data.sources.image=[{tmp_path}/images]", "projector=null", "logger=none"]
    overrides += ["data.workers=0", "trainer=single", "trainer.max_steps=1", "task.recipe.lr=1e30"]
    overrides += [f"run_dir={tmp_path}/run", "preview=null"]
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"llm\..* reaches .*Nothing was exported"):
        run.train(composed(overrides), Stops(60))
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert "LlamaDecoderLayer" in (tmp_path / "run" / "model.txt").read_text()


# --- float16 ----------------------------------------------------------------------------------------------------------


def half(scale):
    """float16 on the CPU, with a gradient scaler."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def exact(scale):
    """bfloat16, in which a scaler of powers of two changes no digit; none without a scale."""
    plugin = MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    return plugin


def fit_scaled(model, steps, plugin):
    task, recorder = Stage(model, ["projector"], Recipe(lr=1e-3, warmup_ratio=0.0)), Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=plugin,
    )
    trainer.fit(task, Shares(steps))
    return task, recorder, trainer


def test_scaled_gradients_are_clipped_by_their_own_norm(make_model, steps):
    plain_model, scaled_model = make_model(), make_model()
    _, without, _ = fit_scaled(plain_model, steps[:1] * 3, exact(None))
    _, recorder, _ = fit_scaled(scaled_model, steps[:1] * 3, exact(2.0**16))
    norms = [[row["gradient_norm"] for row in r.logged] for r in (recorder, without)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and min(norms[1]) > 1
    for name, value in plain_model.projector.state_dict().items():
        torch.testing.assert_close(scaled_model.projector.state_dict()[name], value, rtol=1e-5, atol=1e-7)


def test_a_step_that_the_scaler_leaves_out_is_none_that_stops_the_run(model, steps):
    before = copies(model)
    task, _, trainer = fit_scaled(model, steps[:1], half(2.0**40))  # times a gradient: more than float16 holds
    assert task.counts.scaler_skips == 1 == task.facts()["scaler_skips"] and not task.counts.skipped
    assert parts_that_changed(model, before) == set() and trainer.precision_plugin.scaler.get_scale() == 2.0**39


def test_a_loss_that_is_not_a_number_stops_a_scaled_run_too(model, steps):
    before = copies(model)
    with pytest.raises(UserError, match="Step 1: the loss is nan"):
        fit_scaled(model, steps[1:], half(2.0**10))
    assert parts_that_changed(model, before) == set()


# --- held-out samples -------------------------------------------------------------------------------------------------


class Rows:
    """Held-out samples of two sources in rows."""

    def __init__(self, packer, samples):
        media = ["text" if not s.media else s.media[0].kind for s in samples]
        self.cells = [("a" if n % 2 else "b", medium) for n, medium in enumerate(media)]
        self.rows = [(n, pack([packer.prepare(sample)])) for n, sample in enumerate(samples)]

    def share(self, rank, ranks):
        return self.rows[rank::ranks]


@pytest.fixture
def rows(model, make_packer, mixed_samples):
    return Rows(make_packer(model), mixed_samples)


@pytest.mark.parametrize("trained", [["projector", "llm"], ["projector", "llm.*.lora_*"]], ids=["whole", "adapters"])
def test_training_is_the_same_to_the_bit_with_and_without_validation(trained, make_model, rows, steps):
    """Adapters bring dropout: random numbers in training, none in evaluation."""
    found = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, recorder, modes = make_model(), Recorder(), []
        if "lora" in trained[1]:
            model.llm = add_lora(model.llm, Lora(r=4, alpha=8, dropout=0.3))

        class Modes(L.Callback):
            def on_train_batch_start(self, trainer, task, *_, modes=modes):
                modes.append([m.training for m in task.model.modules()])

        callbacks = [Validation(rows, Watch(1))] if watched else []
        fit(model, trained, steps[:1] * 3, recipe=STEADY, callbacks=[*callbacks, recorder, Modes()])
        found.append((copies(model), [row["loss"] for row in recorder.logged], modes, torch.get_rng_state()))
    assert ("val_loss" in recorder.logged[0]) and found[0][1] == found[1][1] and found[0][2] == found[1][2]
    assert equal(found[0][0], found[1][0]) and torch.equal(found[0][3], found[1][3])


def test_losses_are_means_over_the_supervised_tokens_of_each_medium_and_source(model, rows, steps):
    history = []
    validation = Validation(rows, Watch(2), history.append)
    fit(model, ["projector"], steps[:1] * 3, recipe=Recipe(lr=0.0), callbacks=[validation])
    model.eval()
    each = [(float(model.loss_sum(row).detach()), row.num_supervised) for _, row in rows.rows]
    places = {
        "val_loss": range(5),
        "val_loss/image": [0, 3],
        "val_loss/text": [1],
        "val_loss/video": [2, 4],
        "val_loss/b": [0, 2, 4],
        "val_loss/a": [1, 3],
    }
    expected = {name: sum(each[i][0] for i in p) / sum(each[i][1] for i in p) for name, p in places.items()}
    assert len(history) == 2  # after two steps, and after the last
    for figures in history:
        assert figures == pytest.approx(expected, rel=1e-5)
    assert validation.facts() == {"held_out": history[-1]}


def test_a_source_that_is_called_as_a_medium_has_a_name_of_its_own():
    cells = [("image", "image"), ("mine", "image"), ("mine", "text")]
    assert means(cells, torch.tensor([[2.0, 1], [4.0, 1], [0.0, 0]])) == {
        "val_loss": 3,
        "val_loss/image": 3,
        "val_loss/source image": 2,
        "val_loss/mine": 4,
    }
    assert loss_names(cells)[-2:] == ["val_loss/source image", "val_loss/mine"]


def test_a_run_that_learns_no_more_ends_early_and_says_why(model, rows, steps, tmp_path):
    validation = Validation(rows, Watch(1, "val_loss/image", patience=2))
    recorder = Recorder()
    fit(model, ["projector"], steps[:1] * 9, recipe=Recipe(lr=0.0), callbacks=[validation, recorder])
    assert len(recorder.logged) == 3  # the first is a new lowest, two more are none
    assert validation.facts()["stopped_early"].startswith("after step 3: val_loss/image has not fallen below")

    resumed = Validation(rows, Watch(1, "val_loss/image", patience=2))
    resumed.load_state_dict(validation.state_dict())
    more = Recorder()
    fit(model, ["projector"], steps[:1] * 9, recipe=Recipe(lr=0.0), callbacks=[resumed, more])
    assert more.logged == [] and resumed.facts() == validation.facts()


def test_a_loss_that_there_is_not_cannot_stop_a_run(model, rows, steps):
    with pytest.raises(
        UserError, match=r"early_stop='val_los' is no loss of this run; there are: val_loss, val_loss/i"
    ):
        fit(model, ["projector"], steps[:1], callbacks=[Validation(rows, Watch(1, "val_los"))])
    for wrong in ({"every_steps": 0}, {"every_steps": 1, "patience": 0}, {"every_steps": "often"}):
        with pytest.raises(UserError, match="validation"):
            Watch(**wrong)


@pytest.fixture
def shards(tmp_path):
    """A folder of images and videos, and one of texts."""
    mixed = [image_sample(f"i{i}") for i in range(5)] + [video_sample(f"v{i}") for i in range(2)]
    write_source(tmp_path / "x" / "mixed", mixed, per_shard=3)
    write_source(tmp_path / "x" / "texts", [text_sample(f"t{i}") for i in range(4)], per_shard=4)
    return {"image": {f"{tmp_path}/x/mixed": f"{tmp_path}/x/mixed"}, "text": {"words": f"{tmp_path}/x/texts"}}


def held_out(shards, model, tokenizer, samples=64, **data):
    settings = {"image_fit": "crop", "decoder": "auto", "template": "vicuna_v1", "max_length": 512, "token_budget": 200}
    return HeldOutRows(shards, model.specs, tokenizer, {"data": {**settings, **data}}, samples)


def test_ranks_share_the_same_rows_whatever_their_number(shards, model, tokenizer):
    rows = held_out(shards, model, tokenizer)
    alone = [(cell, tuple(batch.keys)) for cell, batch in rows.share(0, 1)]
    assert len(alone) > 3 and sorted(key for _, keys in alone for key in keys) == sorted(
        [*(f"i{i}" for i in range(5)), "v0", "v1", *(f"t{i}" for i in range(4))]
    )
    for ranks in (2, 3, 50):
        shared = [(cell, tuple(b.keys)) for rank in range(ranks) for cell, b in rows.share(rank, ranks)]
        assert sorted(shared) == sorted(alone)
    for cell, keys in alone:
        medium = {"i": "image", "v": "video", "t": "text"}
        assert {rows.cells[cell]} == {("words" if k[0] == "t" else "mixed", medium[k[0]]) for k in keys}


def test_samples_are_spread_over_a_source_and_bad_ones_are_left_out_by_name(shards, model, tokenizer, caplog):
    rows = held_out(shards, model, tokenizer, samples=3)
    keys = sorted(key for _, batch in rows.share(0, 1) for key in batch.keys)
    assert keys == ["i0", "i3", "t0", "t1", "t3", "v1"]
    with pytest.raises(UserError, match="None of the held-out samples can be used"):
        held_out(shards, model, tokenizer, max_length=5).share(0, 1)
    assert "held-out sample left out of the validation" in caplog.text and "data.max_length=5" in caplog.text


def test_sources_are_called_by_the_end_of_their_paths():
    folders = {"/a/images": "/a/images", "/b/images": "/b/images", "/c": "mine", "/d/texts": "/d/texts"}
    assert short_names(folders) == {
        "/a/images": "a/images",
        "/b/images": "b/images",
        "/c": "mine",
        "/d/texts": "d/texts",
    }
    assert short_names({"data/x/images": "data/x/images"}) == {"data/x/images": "images"}


def test_held_out_shards_are_those_that_are_named_or_the_toys(tmp_path):
    every = ["+experiment=stage2", "validation.every_steps=5"]
    own = [*every, "data.sources.image=[a]"]
    assert composed(every).validation.sources == {
        kind: {f"data/toy/eval/{kind}s": f"data/toy/eval/{kind}s"} for kind in ("image", "video")
    }
    assert composed([*own, "data.held_out.image=[b]"]).validation.sources == {"image": {"b": "b"}}
    named = [*own, "data.held_out.image=[b]", "validation.sources.image={c: d}"]
    assert composed(named).validation.sources == {"image": {"c": "d"}}
    assert composed(["+experiment=stage2"]).validation.every_steps is None
    with pytest.raises(UserError, match="no held-out shards are named"):
        composed(own)
    with pytest.raises(UserError, match=r"validation\.sources\.images.*did you mean validation\.sources\.image"):
        composed([*every, "validation.sources.images=[a]"])


# --- rates, FLOPs, parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA T400 4GB", None),
        ("Some GPU", None),
    ],
)
def test_the_peak_of_a_device_goes_by_its_name(device, tflops):
    assert peak(device) == tflops


@pytest.mark.parametrize("trained", [["projector"], ["projector", "llm"]])
def test_flops_of_a_row_are_those_that_torch_counts(trained, make_model, make_packer, make_sample):
    """Sizes at which small operations do not count; several samples, so that attention within each shows."""
    model = make_model(hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=8).train()
    freeze_all_but(model, trained)
    packer = make_packer(model)
    samples = [
        make_sample(f"<{kind}> " + "what is it " * 30, "It is red. " * 20, seed=n)
        for n, kind in enumerate(("image", "video"))
    ]
    batch = pack([packer.prepare(sample) for sample in samples])
    with FlopCounterMode(display=False) as counter:
        model.loss_sum(batch).backward()
    assert costs_of(model).of(batch) == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_media_that_were_encoded_before_cost_nothing_again(model, make_packer, mixed_samples):
    batch = pack([make_packer(model).prepare(mixed_samples[0])])
    features = replace(batch, images=torch.zeros(1, model.specs["image"].tokens, 32))
    costs = costs_of(model)
    assert costs.of(batch) - costs.of(features) == pytest.approx(costs.media["image"])


def test_rates_are_those_of_all_processes(model, steps, monkeypatch):
    """A second process has ten more samples: what is logged follows from the sums, not from the first one's share."""
    throughput = Throughput()
    trainer = type("Trainer", (), {"world_size": 2, "is_global_zero": True})
    task, logged = Stage(model, ["projector"], STEADY), {}
    task.log = lambda name, value, **_: logged.update({name: float(value)})
    task.totals = {"samples": 15, "tokens": 900, "terms": 90, "flops": 4e12}
    throughput.on_train_start(trainer, task)
    assert throughput.peak is None and throughput.facts() == {}
    throughput.peak = type("Peak", (), {"tflops": 2.0, "what": "a peak"})
    throughput.on_train_batch_start(trainer, task, steps[0], 0)
    throughput.began -= 10.0
    throughput.on_train_batch_end(trainer, task, None, steps[0], 0)
    assert logged["samples_per_second"] == pytest.approx(1.5, rel=1e-2)
    assert logged["tokens_per_second"] == pytest.approx(90, rel=1e-2)
    assert logged["mfu"] == pytest.approx(4e12 / 10 / 2 / 2e12, rel=1e-2)
    assert logged["supervised_token_share"] == pytest.approx(0.1)
    assert 0.05 < logged["memory_gb"] < 50


def test_each_group_has_its_learning_rate_and_all_counts_are_logged(model, steps, tmp_path):
    recorder, history = Recorder(), History(tmp_path)
    recipe = Recipe(lr=1e-2, lr_of={"projector": 1e-3}, warmup_ratio=0.0)
    fit(model, ["projector", "llm"], steps[:1] * 2, recipe=recipe, callbacks=[Throughput(), recorder, history])
    first, second = recorder.logged
    assert (first["lr/projector"], first["lr/llm"]) == pytest.approx((1e-3, 1e-2))
    tokens = sum(len(batch.token_ids) for batch in steps[0].micro_batches)
    assert (first["tokens_seen"], second["tokens_seen"], second["samples_seen"]) == (tokens, 2 * tokens, 10)
    row = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[1])
    names = {
        "loss",
        "gradient_norm",
        "lr",
        "lr/llm",
        "tokens_seen",
        "samples_per_second",
        "tokens_per_second",
        "memory_gb",
    }
    assert row["step"] == 2 and names <= set(row) and "mfu" not in row


def test_history_and_metrics_are_json_whatever_the_numbers(model, steps, tmp_path):
    history = History(tmp_path)
    good, bad = steps
    task, _ = fit(model, ["projector"], [good, bad, good], callbacks=[history], on_nan="skip")
    history.finish({**task.facts(), "odd": math.inf, "many": [math.nan, 1.0]})

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    rows = [strict(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [False, True, False]
    metrics = strict((tmp_path / "metrics.json").read_text())
    assert metrics["odd"] is None and metrics["many"] == [None, 1.0] and metrics["skipped_steps"][0]["step"] == 2


def test_a_history_that_a_kill_cut_off_is_read_up_to_there(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": nu')
    assert read_history(tmp_path / "history.jsonl") == [{"step": 1, "loss": 2.0}]


def test_the_tree_adds_up_and_folds_layers_that_are_alike(model):
    freeze_all_but(model, ["projector", "llm.model.layers.1"])
    whole, short = tree(model).splitlines(), tree(model, depth=1).splitlines()
    assert len(short) == 5 and f"{sum(p.numel() for p in model.parameters()):,}" in short[1]
    assert [line.split()[1] for line in short[2:]] == ["llm", "encoders", "projector"]
    assert np.sum([int(line.split()[3].replace(",", "")) for line in short[2:]]) == sum(
        p.numel() for p in model.parameters()
    )
    assert any("0 LlamaDecoderLayer" in line and "frozen" in line for line in whole)  # its twin is trained
    assert any("1 LlamaDecoderLayer" in line and "all" in line for line in whole)
    freeze_all_but(model, ["projector"])
    assert any("0 to 1: 2 x LlamaDecoderLayer" in line for line in tree(model).splitlines())
    model.projector.to(torch.bfloat16)
    assert tree(model).splitlines()[-1].endswith("bfloat16")
