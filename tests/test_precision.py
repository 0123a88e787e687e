"""Frozen matrices in bfloat16 change nothing but the memory they take."""

import shutil

import pytest
import torch
from torch import nn

from vllava.data.packing import pack
from vllava.model.build import load_llm
from vllava.model.lora import Lora, add_lora
from vllava.model.precision import halve_frozen
from vllava.model.video_llava import VideoLlava
from vllava.training.task import freeze_all_but


@pytest.fixture
def batch(model, make_packer, mixed_samples):
    packer = make_packer(model)
    return pack([packer.prepare(sample) for sample in mixed_samples])


def loss_and_gradients(model, batch):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("trained", [["projector"], ["projector", "llm"], ["projector", "llm.model.layers.1"]])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_stay_the_same_to_the_bit(trained, tied, make_model, batch):
    model = make_model(tie_word_embeddings=tied)
    freeze_all_but(model, trained)
    expected = loss_and_gradients(model, batch)
    halve_frozen(model)
    assert all(map(torch.equal, loss_and_gradients(model, batch), expected))


def halved(module):
    return {m.weight.dtype for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def test_what_is_trained_keeps_its_precision(make_model):
    model = make_model()
    freeze_all_but(model, ["projector", "llm.model.layers.1"])
    assert halve_frozen(model, llm=False)
    assert halved(model.llm) == halved(model.projector) == {torch.float32}
    assert halved(model.encoders) == {torch.bfloat16}
    assert halve_frozen(model)
    assert halved(model.projector) == halved(model.llm.model.layers[1]) == {torch.float32}
    assert halved(model.llm.model.layers[0]) == halved(model.llm.lm_head) == {torch.bfloat16}


def test_quantised_matrices_are_left(make_model):
    model = make_model()
    freeze_all_but(model, ["projector"])
    packed_weight = torch.arange(64, dtype=torch.uint8)
    model.llm.model.layers[0].mlp.up_proj.weight = nn.Parameter(packed_weight, requires_grad=False)
    halve_frozen(model)
    assert torch.equal(model.llm.model.layers[0].mlp.up_proj.weight, packed_weight)


def test_a_model_that_is_trained_whole_is_left(make_llm):
    model = VideoLlava(make_llm())
    assert not halve_frozen(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_adapters_train_on_halved_weights_as_on_whole_ones(make_model, batch):
    model = make_model()
    model.llm = add_lora(model.llm, Lora(r=4, alpha=8, dropout=0.0))
    freeze_all_but(model, ["projector", "llm.*.lora_*"])
    expected = loss_and_gradients(model, batch)
    assert halve_frozen(model)
    assert all(map(torch.equal, loss_and_gradients(model, batch), expected))


def test_embeddings_tied_to_the_head_are_left(make_model):
    model = make_model(tie_word_embeddings=True)
    freeze_all_but(model, ["projector"])
    halve_frozen(model)
    assert model.llm.get_input_embeddings().weight.dtype == model.llm.lm_head.weight.dtype == torch.float32


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_layers_give_the_same_loss_and_gradients(make_llm, batch, model, tmp_path):
    make_llm(num_hidden_layers=1).save_pretrained(tmp_path)
    found = []
    for compiled in (False, True):
        model.llm = load_llm(str(tmp_path), compile_layers=compiled)
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        gradients = [p.grad for part in (model.llm, model.projector) for p in part.parameters()]
        found.append([loss.detach(), *(gradient.clone() for gradient in gradients)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
