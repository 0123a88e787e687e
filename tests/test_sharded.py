"""A model that is shared out: read in parts, saved in parts, continued by another number of processes."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import sharded_run
import torch
from safetensors.torch import load_file
from shard_fixtures import ROOT
from sharded_run import STEPS, Losses, Shares, stage, trainer_for
from torch.testing import assert_close

from vllava.errors import UserError
from vllava.model.build import fresh_llm, load_llm
from vllava.model.device import computes_in_bf16
from vllava.model.files import save_half
from vllava.model.lora import Lora
from vllava.model.mapped import put_in_place, spooled, with_weights
from vllava.model.precision import set_precision
from vllava.training.strategies import REST, Fsdp

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENIZER = ROOT / "assets" / "tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny LLM in float16."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    save_half(fresh_llm(str(TOKENIZER), initializer_range=0.2, **SIZES), folder / "llm")
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What each of two processes found that trained together and saved on the way, in the background."""
    command = [sys.executable, sharded_run.__file__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture
def alone():
    """A function that trains in this very process; returns the task and the metrics of each step."""

    def fit(task, folder, strategy, done=0, resumed=None, callbacks=(), **settings):
        losses = Losses()
        trainer = trainer_for(folder, strategy, callbacks=[losses, *callbacks], **settings)
        trainer.fit(task, Shares(done), ckpt_path=resumed)
        assert trainer.global_step == STEPS
        return task, losses.values

    yield fit
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK"):
        os.environ.pop(name, None)


def test_two_processes_with_a_part_each_train_as_one_with_the_whole(two, folder, alone):
    task = stage(folder)
    set_precision(task.model, half=False)
    task, losses = alone(task, folder, "auto")
    for ours, theirs in zip(two[0]["losses"], losses, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert two[0]["seen"] == two[1]["seen"] == task.counts.samples_seen == 2 * STEPS
    assert two[0]["weights"].keys() == task.trained_weights().keys() and not two[1]["weights"]
    for name, weight in task.trained_weights().items():
        assert_close(two[0]["weights"][name], weight, atol=5e-4, rtol=1e-4)  # AdamW divides by tiny gradients
    for rank in two:
        assert {share for share in rank["held"].values() if share != 0.5} == set()


def test_one_process_continues_what_two_have_saved_while_they_trained_on(two, folder, alone):
    parts = [path.stat().st_size for path in sorted((folder / "state.part").glob("*.distcp"))]
    assert len(parts) == 2 and max(parts) < 1.1 * min(parts)
    done = sharded_run.SAVED_AT
    task, losses = alone(stage(folder), folder, Fsdp(), done, folder / "state.part")
    assert task.counts.samples_seen == 2 * STEPS
    for ours, theirs in zip(losses, two[0]["losses"][done:], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for name, weight in task.trained_weights().items():
        assert_close(weight, two[0]["weights"][name], atol=1e-5, rtol=1e-4)


def test_a_state_that_another_trainer_has_saved_is_refused(folder, alone, tmp_path):
    torch.save({}, tmp_path / "resume.ckpt")
    with pytest.raises(UserError, match=f"not saved with trainer=fsdp, which keeps a folder with {REST}"):
        alone(stage(folder), folder, Fsdp(), resumed=tmp_path / "resume.ckpt")


class Fails(L.Callback):
    """Saves where it cannot: at once and in the background."""

    def __init__(self, path, error):
        self.path = path
        self.error = error

    def on_train_batch_end(self, trainer, task, *_):
        with pytest.raises(UserError, match=self.error):
            trainer.save_checkpoint(self.path)
        with pytest.raises(UserError, match=self.error):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_in_background(checkpoint, self.path).result()
        assert not self.path.exists() or not (self.path / ".metadata").exists()


def test_a_place_that_cannot_be_written_is_said_in_words(folder, alone, tmp_path):
    (tmp_path / "file").touch()
    fails = Fails(tmp_path / "file" / "state", r"state(\.part)? cannot be written \(.*Not a directory")
    alone(stage(folder), folder, Fsdp(), callbacks=[fails])


def test_a_part_that_does_not_fit_the_disk_is_said_in_words(folder, alone, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fails = Fails(tmp_path / "state", r"state(\.part)? cannot be written \(process 0: .*File too large")
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"trained weights cannot be kept on the disk of .*File too large"):
            alone(stage(folder), folder, Fsdp(), callbacks=[fails])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not computes_in_bf16(), reason="this processor has no bfloat16")
@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8, dropout=0.0)], ids=["layers", "adapters"])
def test_in_bf16_the_losses_are_those_of_autocast_and_only_frozen_matrices_are_halved(lora, folder, alone):
    trained = ["llm.*.lora_*"] if lora else sharded_run.TRAINED
    torch.manual_seed(0)  # adapters are random
    whole = stage(folder, trained, lora=lora)
    set_precision(whole.model, half=True)
    _, expected = alone(whole, folder, "auto", precision="bf16-mixed")
    torch.manual_seed(0)
    task, losses = alone(stage(folder, trained, lora=lora), folder, Fsdp(), precision="bf16-mixed")
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3)
    for name, weight in task.model.named_parameters():
        frozen_matrix = not weight.requires_grad and weight.ndim == 2 and "embed_tokens" not in name
        assert weight.dtype == (torch.bfloat16 if frozen_matrix else torch.float32), name


def mapped_files(tensor):
    """The files in which a tensor's memory lies."""
    spans = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return {
        Path(fields[5]).name
        for fields in spans
        if len(fields) > 5 and int(fields[0].split("-")[0], 16) <= tensor.data_ptr() < int(fields[0].split("-")[1], 16)
    }


def test_weights_that_are_read_as_stored_stay_in_their_file(folder):
    llm = load_llm(str(folder / "llm"), as_stored=True)
    for name, weight in llm.named_parameters():
        assert weight.dtype == torch.float16 and mapped_files(weight) == {"model.safetensors"}, name
    assert llm.config.dtype == torch.float32  # what it is written as


def test_weights_of_several_types_are_read_in_float32(folder, tmp_path):
    llm = load_llm(str(folder / "llm")).half()
    llm.model.norm.float()
    llm.save_pretrained(tmp_path)
    assert {p.dtype for p in load_llm(str(tmp_path), as_stored=True).parameters()} == {torch.float32}


def test_spooled_tensors_are_what_they_were_in_no_file_that_is_left(tmp_path):
    given = {
        "matrix": torch.randn(5, 7).t(),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "nothing": torch.empty(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, requires_grad=True).half(),
    }
    kept = spooled(given.items(), tmp_path)
    assert list(tmp_path.iterdir()) == [] and list(kept) == list(given)
    for name, tensor in given.items():
        assert_close(kept[name], tensor.detach(), atol=0, rtol=0)
    assert spooled([], tmp_path) == {}
    kept["bytes"] += 1  # a private copy of the page
    assert torch.equal(kept["matrix"], given["matrix"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_written_a_weight_at_a_time_is_the_one_written_at_once(tied, tmp_path):
    llm = fresh_llm(str(TOKENIZER), tie_word_embeddings=tied, **SIZES)
    llm.save_pretrained(tmp_path / "once", state_dict={name: value.half() for name, value in llm.state_dict().items()})
    save_half(llm, tmp_path / "ours")
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()


def test_weights_put_in_place_are_no_copies_and_stay_tied():
    llm = fresh_llm(str(TOKENIZER), tie_word_embeddings=True, **SIZES)
    new = torch.zeros_like(llm.lm_head.weight)
    put_in_place(llm, {"model.embed_tokens.weight": new})
    assert llm.lm_head.weight is llm.get_input_embeddings().weight and llm.lm_head.weight.data_ptr() == new.data_ptr()
    with pytest.raises(KeyError):
        put_in_place(llm, {"model.nothing": new})


def test_an_llm_with_some_trained_weights_is_written_as_from_float32(folder, tmp_path):
    """What was not trained is as in the foundation, to the bit, though it was read as it is stored."""
    norm = torch.full((32,), 1.25)
    model = with_weights(lambda: stage(folder).model, {"llm.model.norm.weight": norm}, tmp_path)
    assert {p.dtype for p in model.llm.parameters()} == {torch.float32}
    save_half(model.llm, tmp_path / "llm")
    before, after = (load_file(path / "llm" / "model.safetensors") for path in (folder, tmp_path))
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {"model.norm.weight"} and torch.equal(after["model.norm.weight"], norm.half())
    assert (folder / "llm" / "config.json").read_text() == (tmp_path / "llm" / "config.json").read_text()
