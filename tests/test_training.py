"""The stages in Lightning's real Trainer on the CPU: what changes, what does not, and what lands on disk."""

import json
import logging
import math
import shutil
import time
from dataclasses import replace
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from vllava.batch import Step
from vllava.data.packing import pack
from vllava.data.samples import Medium
from vllava.errors import UserError
from vllava.evaluation.answers import ask
from vllava.folders import RECORD, replacing
from vllava.model.build import load_llm, video_llava
from vllava.model.checkpoint import load, load_projector, read_description
from vllava.model.encoders import ClipEncoder
from vllava.pixels import normalised
from vllava.training.broken import BrokenLimit, BrokenList
from vllava.training.stage import Stage
from vllava.training.task import Recipe, freeze_all_but

STAGES = {"stage 1": ["projector"], "stage 2": ["projector", "llm"]}


class Shares(L.LightningDataModule):
    """Steps in order, a list of them for each process."""

    def __init__(self, *shares):
        super().__init__()
        self.shares = shares

    def train_dataloader(self):
        return DataLoader(self.shares[self.trainer.global_rank], batch_size=None)


def fit(model, trained, *shares, recipe=None, callbacks=(), **settings):
    """Train on steps in order, with as many processes as there are lists of them; the task and its last metrics."""
    task = Stage(model, trained, recipe or Recipe(lr=1e-2, warmup_ratio=0.0), **settings)
    spawn = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=len(shares),
        strategy="auto" if len(shares) == 1 else spawn,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Shares(*shares))
    return task, trainer.callback_metrics


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def parts_that_changed(model, before):
    """The top-level parts of which at least one tensor is not bit for bit what it was."""
    return {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


class Recorder(L.Callback):
    """Keeps what each optimiser step is about to use, and what was logged."""

    def __init__(self):
        self.gradients, self.logged = [], []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        named = task.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, task, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def packer(model, make_packer):
    return make_packer(model)


@pytest.fixture
def step(packer, mixed_samples):
    prepared = [packer.prepare(sample) for sample in mixed_samples]
    return Step(packer.collate(prepared), samples=len(prepared))


@pytest.mark.parametrize("trained", STAGES.values(), ids=STAGES)
def test_stage_changes_what_it_trains_and_nothing_else(trained, model, step):
    before = copies(model)
    fit(model, trained, [step] * 3)
    assert parts_that_changed(model, before) == set(trained)
    still = [n for n, p in model.named_parameters() if n.split(".")[0] in trained and torch.equal(p, before[n])]
    assert still == []


@pytest.mark.parametrize("trained", STAGES.values(), ids=STAGES)
def test_all_but_the_encoders_is_in_training_mode_while_it_trains(trained, model, step):
    """Models come in evaluation mode from disk, and Lightning leaves modes as they are; dropout and checkpointing
    of activations need training mode."""
    modes = {}

    class Modes(L.Callback):
        def on_before_backward(self, trainer, task, loss):
            modes.update({name: module.training for name, module in task.model.named_modules()})

    fit(model.eval(), trained, [step], callbacks=[Modes()])
    assert all(modes[name] for name in ("llm", "projector", "llm.model.layers.0"))
    assert not any(training for name, training in modes.items() if name.startswith("encoders"))


def test_freezing_counts_the_parameters_of_each_part(model):
    counts = freeze_all_but(model, ["projector", "llm.model.layers.1"])
    assert counts["projector"] == 2 * (32 * 32 + 32)
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {name for name in copies(model) if name.startswith(("projector.", "llm.model.layers.1."))}
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_part_that_does_not_exist_is_refused_with_those_that_do(model):
    with pytest.raises(UserError, match=r"'projektor'.*llm, encoders, projector"):
        Stage(model, ["projektor"], Recipe(lr=1e-2))


@pytest.mark.parametrize("trained", STAGES.values(), ids=STAGES)
def test_model_learns_to_tell_media_apart_by_what_they_show(trained, make_model, make_packer, make_sample):
    """Samples that differ by their pixels alone: only a gradient that reaches the right medium brings the loss down."""
    model = make_model()
    model.llm.lm_head.weight.data *= 5  # a frozen random LLM must at least be able to say one word clearly
    packer = make_packer(model, "plain")
    kinds = {"red": "image", "green": "image", "grey": "video", "blue": "video"}
    samples = [make_sample(f"<{kind}>", word, key=word, seed=n) for n, (word, kind) in enumerate(kinds.items())]
    batch = pack([packer.prepare(sample) for sample in samples])

    recipe = Recipe(lr=3e-2 if trained == ["projector"] else 3e-3, warmup_ratio=0.0)
    before = model.loss(batch).item()
    fit(model, trained, [Step([batch], samples=4)] * (250 if trained == ["projector"] else 60), recipe=recipe)
    assert model.loss(batch).item() < 0.05 < 1 < before
    model.llm.generation_config.eos_token_id = packer.tokenizer.encode("red\n")[-1]  # what ends an answer here
    assert ask(model, packer, samples, max_new_tokens=4) == list(kinds)


def test_gradient_of_a_step_does_not_depend_on_its_micro_batches(make_model, make_packer, mixed_samples):
    """And it is that of the mean over all supervised tokens of the global batch."""
    recorded, losses = {}, {}
    recipe = Recipe(lr=1e-2, warmup_ratio=0.0, clip_norm=1e9)
    for budget in (1, 150, 4096):
        model = make_model()
        packer = make_packer(model, token_budget=budget)
        micro_batches = packer.collate([packer.prepare(sample) for sample in mixed_samples])
        recorder = Recorder()
        fit(model, ["projector", "llm"], [Step(micro_batches, samples=5)], recipe=recipe, callbacks=[recorder])
        [recorded[len(micro_batches)]] = recorder.gradients
        losses[len(micro_batches)] = recorder.logged[0]["loss"]
    assert sorted(recorded)[0] == 1 and sorted(recorded)[-1] == 5 and len(recorded) == 3

    model = make_model()
    freeze_all_but(model, ["projector", "llm"])
    loss = model.loss(pack([packer.prepare(sample) for sample in mixed_samples]))
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for number, gradients in recorded.items():
        assert gradients.keys() == expected.keys()
        assert losses[number] == pytest.approx(loss.item(), rel=1e-5)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-5)


def test_two_processes_train_as_one_whatever_the_share_of_each_holds(make_model, make_packer, mixed_samples):
    """A process may have more micro-batches than another, none with a medium, or none at all."""
    packer = make_packer(make_model())
    image, text, video, several, rounds = (pack([packer.prepare(sample)]) for sample in mixed_samples)
    uneven = [image, several, rounds], [video]
    text_last = [image, text], [video, text]
    text_alone = [image], [text]
    none_left = [video, image], []
    shares = [
        [Step(part, samples=1) for part in parts]
        for parts in zip(uneven, text_last, text_alone, none_left, strict=True)
    ]
    whole = [Step(first.micro_batches + second.micro_batches, samples=2) for first, second in zip(*shares, strict=True)]

    together, alone = make_model(), make_model()
    recipe = Recipe(lr=1e-2, warmup_ratio=0.0)
    _, one = fit(alone, ["projector", "llm"], whole, recipe=recipe)
    _, two = fit(together, ["projector", "llm"], *shares, recipe=recipe)
    for name in ("loss", "gradient_norm"):  # AdamW would hide gradients that are too large or too small as a whole
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=0)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_gradients_do_not_pile_up_from_step_to_step(model, step):
    recorder = Recorder()
    fit(model, ["projector"], [step] * 2, recipe=Recipe(lr=0.0, warmup_ratio=0.0, clip_norm=1e9), callbacks=[recorder])
    first, second = recorder.gradients
    for name in first:
        assert torch.equal(first[name], second[name])


def test_gradient_is_clipped_and_its_norm_before_that_is_logged(model, step):
    clipped, free = Recorder(), Recorder()
    fit(model, ["projector"], [step], recipe=Recipe(lr=0.0, warmup_ratio=0.0, clip_norm=1e-3), callbacks=[clipped])
    fit(model, ["projector"], [step], recipe=Recipe(lr=0.0, warmup_ratio=0.0, clip_norm=1e9), callbacks=[free])
    norm = {r: torch.cat([g.flatten() for g in r.gradients[0].values()]).norm().item() for r in (clipped, free)}
    assert norm[clipped] == pytest.approx(1e-3, rel=1e-3)
    assert norm[free] > 0.1
    assert clipped.logged[0]["gradient_norm"] == pytest.approx(norm[free], rel=1e-5)


def test_learning_rate_warms_up_and_follows_a_cosine_to_zero(model, step):
    recorder = Recorder()
    fit(model, ["projector"], [step] * 20, recipe=Recipe(lr=0.01, warmup_ratio=0.2), callbacks=[recorder])
    warm_up = [0.01 * n / 4 for n in range(4)]
    decay = [0.01 * (1 + math.cos(math.pi * n / 16)) / 2 for n in range(16)]
    assert [row["lr"] for row in recorder.logged] == pytest.approx(warm_up + decay, rel=1e-5)


def test_updates_are_those_of_adamw(model, step):
    recipe = Recipe(lr=1e-2, warmup_ratio=0.25, weight_decay=0.1, betas=(0.8, 0.95))
    weights = {name: value.clone() for name, value in model.projector.state_dict(prefix="projector.").items()}
    recorder = Recorder()
    fit(model, ["projector"], [step] * 6, recipe=recipe, callbacks=[recorder])

    means, squares = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for count, (gradients, logged) in enumerate(zip(recorder.gradients, recorder.logged, strict=True), start=1):
        for name, gradient in gradients.items():
            means[name] = 0.8 * means[name] + 0.2 * gradient
            squares[name] = 0.95 * squares[name] + 0.05 * gradient**2
            direction = means[name] / (1 - 0.8**count) / ((squares[name] / (1 - 0.95**count)).sqrt() + 1e-8)
            weights[name] = weights[name] * (1 - logged["lr"] * 0.1) - logged["lr"] * direction
    for name, value in weights.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_broken_samples_are_counted_and_logged_with_key_and_reason(model, step, caplog):
    step.broken = [("shard.tar:0007", "unreadable image")]
    step.samples += 1
    step.dropped_turns = 2
    with caplog.at_level(logging.WARNING):
        task, _ = fit(model, ["projector"], [step])
    assert task.counts.broken == [("shard.tar:0007", "unreadable image")]
    assert (task.counts.samples_seen, task.counts.samples_broken, task.counts.turns_dropped) == (6, 1, 2)
    assert "shard.tar:0007: unreadable image" in caplog.text
    facts = task.facts()
    assert (facts["samples"], facts["broken"], facts["dropped_first_turns"]) == (6, 1, 2)
    assert "1 of 6 samples (16.67%) were broken and left out, more than task.max_broken_share=0.01" in facts["warning"]


def test_a_run_within_its_limit_has_no_warning(model, step):
    step.broken = [("shard.tar:0007", "unreadable image")]
    task, _ = fit(model, ["projector"], [step], max_broken_share=0.2)
    assert "warning" not in task.facts()


@pytest.mark.parametrize(("share", "allowed"), [(0.01, 3), (0.1, 14), (0.0, 0)])
def test_more_broken_samples_than_the_limit_stop_the_run(share, allowed, model, step):
    """A third of the samples is broken. One broken sample at the start stops nothing, unless none is allowed."""
    limit = BrokenLimit(share)
    assert limit.exceeded(allowed, 3 * max(allowed, 1)) is None and limit.exceeded(allowed + 1, 3 * (allowed + 1))
    steps = [Step(step.micro_batches, 3, [(f"key{n}", "no answer")]) for n in range(allowed + 1)]
    if allowed:
        fit(model, ["projector"], steps[:allowed], max_broken_share=share)
    seen = rf"{allowed + 1} of the first {3 * (allowed + 1)} samples are broken"
    with pytest.raises(
        UserError, match=rf"{seen}: .*max_broken_share={share:g}.*The last one: key{allowed}: no answer"
    ):
        fit(model, ["projector"], steps, max_broken_share=share)


class Listed(L.Callback):
    """Gives the task its list, and writes down in which step each process ended, and why."""

    def __init__(self, folder):
        self.folder = folder

    def setup(self, trainer, task, stage):
        task.broken_list = BrokenList(self.folder / "broken.jsonl")
        take = task.training_step

        def step(*arguments):
            try:
                take(*arguments)
            except UserError as error:
                (self.folder / f"rank{trainer.global_rank}").write_text(f"{trainer.global_step} {error}")
                deadline = time.time() + 30  # the first process to end takes the others with it
                while len(list(self.folder.glob("rank*"))) < trainer.world_size and time.time() < deadline:
                    time.sleep(0.05)
                raise

        task.training_step = step


def test_two_processes_stop_in_the_same_step_and_list_what_both_left_out(model, step, tmp_path):
    good, bad = step.micro_batches, [(f"key{n}", f"reason {n}") for n in range(4)]
    first = [Step(good, 2), Step(good, 2), Step(good, 2)]
    second = [Step(good, 2, bad[:1], {"key0": "Traceback of key0"}), Step([], 2, bad[1:3]), Step([], 1, bad[3:])]
    with pytest.raises(Exception, match="key2: reason 2"):
        fit(model, ["projector"], first, second, callbacks=[Listed(tmp_path)], max_broken_share=0.01)
    messages = {(tmp_path / f"rank{rank}").read_text() for rank in range(2)}
    assert len(messages) == 1 and messages.pop().startswith("1 3 of the first 8 samples are broken")
    assert [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()] == [
        {"step": 1, "key": "key0", "reason": "reason 0", "traceback": "Traceback of key0"},
        {"step": 2, "key": "key1", "reason": "reason 1"},
        {"step": 2, "key": "key2", "reason": "reason 2"},
    ]


def test_step_whose_samples_are_all_broken_changes_nothing(model, step):
    before = copies(model)
    fit(model, ["projector"], [Step([], samples=1, broken=[("key", "no answer")])])
    assert parts_that_changed(model, before) == set()


@pytest.fixture
def llm_folder(model, tokenizer, tmp_path):
    """The model's LLM, saved as a public checkpoint would be, in half precision."""
    # Parameters alone are rounded, so that nothing is lost when they are written; rotary frequencies are never saved.
    model.llm.load_state_dict({name: value.half().float() for name, value in model.llm.state_dict().items()})
    model.llm.save_pretrained(tmp_path / "some-llm")
    tokenizer.save_pretrained(tmp_path / "some-llm")
    return tmp_path / "some-llm"


@pytest.fixture
def settings(image_folder, video_folder, llm_folder):
    """What of a run's configuration a checkpoint keeps."""
    encoders = {"image": image_folder, "video": video_folder}
    target = "vllava.model.encoders.ClipEncoder"
    return {
        "encoder": {k: {"_target_": target, "path": str(f), "medium": k} for k, f in encoders.items()},
        "tokenizer": str(llm_folder),
        "data": {"template": "vicuna_v1", "image_fit": "pad"},
    }


@pytest.fixture
def export(model, step, settings, tokenizer, tmp_path):
    """Train a step and write the checkpoint; returns its folder."""

    def run(trained):
        task, _ = fit(model, trained, [step])
        task.export(tmp_path / "checkpoint", tokenizer, settings)
        return tmp_path / "checkpoint"

    return run


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trained", STAGES.values(), ids=STAGES)
def test_loaded_model_is_the_saved_one(trained, export, model, tokenizer, packer, mixed_samples):
    folder = export(trained)
    loaded, loaded_tokenizer, description = load(folder)

    for name, value in loaded.projector.state_dict().items():
        assert torch.equal(value, model.projector.state_dict()[name])
    rounded = {name: value.half().float() for name, value in model.llm.state_dict().items()}
    model.llm.load_state_dict(rounded)
    for name, value in rounded.items():
        assert torch.equal(loaded.llm.state_dict()[name], value)
    for name, value in loaded.encoders.state_dict().items():
        assert torch.equal(value, model.encoders.state_dict()[name])
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    assert (description.template, description.image_fit, description.trained) == ("vicuna_v1", "pad", trained)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert not loaded.training
    batch = pack([packer.prepare(sample) for sample in mixed_samples])
    places = torch.arange(len(batch.token_ids))
    torch.testing.assert_close(loaded.logits(batch, places), model.eval().logits(batch, places))


def test_first_stage_keeps_the_projector_alone(export, model):
    folder = export(["projector"])
    assert files(folder) == {"vllava.json", "projector.safetensors", RECORD}
    assert set(load_file(folder / "projector.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (folder / "projector.safetensors").stat().st_size < 4 * 2 * (32 * 32 + 32) + 1000


def test_second_stage_keeps_projector_and_llm_but_no_encoder(export, model):
    folder = export(["projector", "llm"])
    weights = {name for name in files(folder) if name.endswith((".safetensors", ".bin"))}
    assert weights == {"projector.safetensors", "llm/model.safetensors"}
    tensors = load_file(folder / "llm" / "model.safetensors")
    assert tensors.keys() == model.llm.state_dict().keys()
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_tied_embeddings_survive_saving_and_loading(
    make_llm, image_folder, video_folder, step, settings, tokenizer, tmp_path
):
    encoders = ClipEncoder(str(image_folder), "image"), ClipEncoder(str(video_folder), "video")
    model = video_llava(make_llm(tie_word_embeddings=True), *encoders)
    task, _ = fit(model, ["projector", "llm"], [step])
    task.export(tmp_path / "checkpoint", tokenizer, settings)
    llm = load(tmp_path / "checkpoint")[0].llm
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    assert torch.equal(llm.lm_head.weight, model.llm.lm_head.weight.half().float())


@pytest.fixture
def other_folder(tmp_path):
    """Copies a checkpoint folder and changes one number in it."""

    def make(folder, key):
        shutil.copytree(folder, tmp_path / "other")
        tensors = load_file(tmp_path / "other" / "model.safetensors")
        tensors[key].view(-1)[0] += 1
        save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
        return tmp_path / "other"

    return make


def redirect(folder, change):
    """Edit a checkpoint's description."""
    description = json.loads((folder / "vllava.json").read_text())
    change(description)
    (folder / "vllava.json").write_text(json.dumps(description))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_projector_is_refused_for_another_encoder_than_it_was_trained_with(kind, export, settings, other_folder):
    folder = export(["projector"])
    other = other_folder(settings["encoder"][kind]["path"], "vision_model.pre_layrnorm.bias")
    redirect(folder, lambda description: description["encoders"][kind].update(path=str(other)))
    with pytest.raises(UserError, match=rf"another {kind} encoder than {other}"):
        load(folder)


def test_projector_is_refused_for_another_llm_than_it_was_trained_with(export, llm_folder, other_folder):
    folder = export(["projector"])
    other = other_folder(llm_folder, "lm_head.weight")
    redirect(folder, lambda description: description.update(llm=str(other)))
    with pytest.raises(UserError, match=rf"another (LLM|language model) than {other}"):
        load(folder)


def test_second_stage_starts_from_the_first_stages_projector(export, settings, make_llm, image_folder, video_folder):
    folder = export(["projector"])
    encoders = ClipEncoder(str(image_folder), "image"), ClipEncoder(str(video_folder), "video")
    model = video_llava(load_llm(settings["tokenizer"]), *encoders)
    load_projector(model, folder / "projector.safetensors")
    for name, value in load_file(folder / "projector.safetensors").items():
        assert torch.equal(model.projector.state_dict()[name], value)


def test_missing_projector_is_refused_with_the_command_that_makes_one(export):
    folder = export(["projector"])
    (folder / "projector.safetensors").unlink()
    with pytest.raises(UserError, match=rf"No projector at {folder}.*experiment=stage1"):
        load(folder)


def test_projector_of_other_sizes_is_refused(model, tmp_path):
    tensors = {name: value[:16].contiguous() for name, value in model.projector.state_dict().items()}
    save_file(tensors, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match=r"other sizes.*16, 32.*32, 32"):
        load_projector(model, tmp_path / "projector.safetensors")


def test_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path} is not a vllava checkpoint"):
        load(tmp_path)


def test_unreadable_description_is_refused(tmp_path):
    (tmp_path / "vllava.json").write_text('{"encoders": {}}')
    with pytest.raises(UserError, match=r"vllava\.json cannot be understood"):
        read_description(tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        {"_target_": "shutil.copy", "src": "{marker}", "dst": "{marker}.sprung"},
        # Names reached through this package are not this package's encoders either.
        {
            "_target_": "vllava.run.instantiate",
            "config": {"_target_": "shutil.copy", "_args_": ["{marker}", "{marker}.sprung"]},
        },
        {"_target_": "vllava.model.files.replacing", "folder": "{marker}"},
        {"_target_": "vllava.model.encoders.NoSuchEncoder"},
        {"_target_": "vllava.no_such_module.Encoder"},
        {"path": "{marker}"},
    ],
    ids=lambda target: target.get("_target_", "none"),
)
def test_checkpoint_cannot_name_code_that_is_no_encoder_of_this_package(target, export, tmp_path):
    (tmp_path / "marker").touch()
    folder = export(["projector"])
    written = json.dumps(target).replace("{marker}", str(tmp_path / "marker"))
    redirect(folder, lambda description: description["encoders"].update(image=json.loads(written)))
    with pytest.raises(UserError):
        load(folder)
    assert not (tmp_path / "marker.sprung").exists()


def test_interrupted_writing_leaves_the_old_checkpoint_whole(tmp_path):
    folder = tmp_path / "checkpoint"
    with replacing(folder) as unfinished:
        (unfinished / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(folder) as unfinished:
        (unfinished / "weights").write_text("half of the n")
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "old"
    with replacing(folder) as unfinished:
        (unfinished / "weights").write_text("new")
    assert {path.name: path.read_text() for path in folder.iterdir()} | {RECORD: ""} == {
        "weights": "new",
        RECORD: "",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# --- ranks that do not agree, pixels as bytes -------------------------------------------------------------------------


class Announced(Shares):
    """Steps of which it is known how many samples they should have."""

    sources = ("a", "b")
    global_batch, samples, steps_per_epoch = 5, 9, 2


@pytest.mark.parametrize("counts", [(5, 4), (5, 5), (4, 4)])
def test_ranks_whose_shares_are_no_global_batch_together_stop_the_run(counts, model, step):
    steps = [Step(step.micro_batches, samples=count, drawn={0: count - 1, 1: 1}) for count in counts]
    task = Stage(model, ["projector"], Recipe(lr=1e-2))
    trainer = bare_trainer()
    if counts == (5, 4):
        trainer.fit(task, Announced(steps))
        assert task.facts()["mixture"] == {"a": 7, "b": 2}
        return
    with pytest.raises(UserError, match="the ranks see different shards or indexes"):
        trainer.fit(task, Announced(steps))


def bare_trainer():
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_bytes_give_the_loss_of_the_pixels_that_they_are(model, make_packer, make_sample):
    generator = torch.Generator().manual_seed(0)
    losses = []
    for change in (lambda pixels: pixels, normalised):
        sample = make_sample("<image> and <video>", "It is red.")
        media = [
            Medium(m.kind, change(torch.randint(256, m.pixels.shape, generator=generator.manual_seed(i)).byte()))
            for i, m in enumerate(sample.media)
        ]
        batch = make_packer(model).collate([make_packer(model).prepare(replace(sample, media=media))])[0]
        losses.append(float(model.loss(batch)))
    assert batch.images.dtype == torch.float32
    assert losses[0] == losses[1]
