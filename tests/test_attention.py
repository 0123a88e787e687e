"""Attention and loss of packed rows equal what `transformers` computes sample by sample, for several kinds of LLM."""

import itertools

import pytest
import torch
from conftest import TEXT, randomise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from vllava.batch import IGNORE_INDEX
from vllava.data.packing import PackedSample, pack
from vllava.errors import UserError
from vllava.model import attention, video_llava
from vllava.model.attention import PACKED, by_segment, packed_attention
from vllava.model.loss import PLAIN_HEADS, chunked_cross_entropy
from vllava.model.video_llava import VideoLlava

LENGTHS = [5, 1, 17, 9]


def llms(kind, **settings):
    """The same tiny random LLM twice: with packed attention, and with the attention of `transformers`."""
    sizes = {**TEXT, "max_position_embeddings": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8}
    models = []
    for name in (PACKED, "eager"):
        config = AutoConfig.for_model(kind, **sizes, **settings)
        models.append(AutoModelForCausalLM.from_config(config, attn_implementation=name))
    return [randomise(model).eval() for model in models]


@pytest.fixture
def text_samples():
    ids = torch.randint(10, 600, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    rows = [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
    return [PackedSample("", row, [IGNORE_INDEX, *row[1:]], []) for row in rows]


def loss_alone(llm, samples):
    """The summed loss of the samples, one at a time, by the LLM of `transformers`."""
    losses = []
    for sample in samples:
        logits = llm(input_ids=torch.tensor([sample.token_ids])).logits[0]
        losses.append(cross_entropy(logits[:-1], torch.tensor(sample.labels[1:], dtype=torch.int64), reduction="sum"))
    return torch.stack(losses).sum()


def gradients(llm, loss):
    llm.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in llm.named_parameters()}


@pytest.mark.parametrize("kind", PLAIN_HEADS)
def test_loss_in_chunks_is_the_whole_loss(kind, text_samples, monkeypatch):
    monkeypatch.setattr(video_llava, "CHUNK", 1)
    packed, plain = llms(kind)
    calls = []
    packed.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    loss, expected = VideoLlava(packed).loss_sum(pack(text_samples)), loss_alone(plain, text_samples)
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    ours, theirs = gradients(packed, loss), gradients(plain, expected)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, atol=1e-5, rtol=1e-4)
    assert calls  # the head was called by our loss: the rows went through it apart


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_of_any_size_give_the_same_loss_and_gradients(chunk):
    torch.manual_seed(0)
    head, hidden, labels = torch.nn.Linear(8, 50), torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    whole = cross_entropy(head(hidden), labels, reduction="sum")
    parts = chunked_cross_entropy(hidden, head, labels, chunk)
    assert_close(parts, whole)
    for wanted in (hidden, head.weight, head.bias):
        [one], [other] = (torch.autograd.grad(loss, wanted, retain_graph=True) for loss in (parts, whole))
        assert_close(one, other)


def test_loss_of_an_llm_that_caps_its_logits_is_its_own(text_samples, monkeypatch):
    monkeypatch.setattr(video_llava, "CHUNK", 1)
    packed, plain = llms("gemma2", final_logit_softcapping=0.5, attn_logit_softcapping=None, sliding_window=64)
    assert_close(VideoLlava(packed).loss_sum(pack(text_samples)), loss_alone(plain, text_samples), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 9, 100])
def test_a_sliding_window_is_kept_within_each_sample(window, text_samples):
    packed, plain = llms("mistral", sliding_window=window)
    assert_close(VideoLlava(packed).loss_sum(pack(text_samples)), loss_alone(plain, text_samples), atol=1e-4, rtol=1e-5)


def test_an_llm_whose_attention_wants_more_is_refused(text_samples):
    packed, _ = llms("gemma2", attn_logit_softcapping=50.0)
    with pytest.raises(UserError, match="softcap"):
        VideoLlava(packed).loss_sum(pack(text_samples))


def test_attention_drops_out_while_it_trains(text_samples):
    packed, _ = llms("llama", attention_dropout=0.5)
    batch = pack(text_samples)
    trained, model = VideoLlava(packed).train(), VideoLlava(packed)
    losses = {float(trained.loss(batch)) for _ in range(3)}
    assert len(losses) == 3
    assert len({float(model.eval().loss(batch)) for _ in range(3)}) == 1


def row(key_heads):
    total = sum(LENGTHS)
    query, key, value = (torch.randn(1, n, total, 8) for n in (4, key_heads, key_heads))
    boundaries = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return query, key, value, boundaries


def documented_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size, enable_gqa=False):
    """What torch documents of its kernel for CUDA, in loops: [T, heads, d], windows (left, right), -1 for no limit."""
    assert cu_q is cu_k and max_q == max_k == max(LENGTHS) and cu_q.dtype == torch.int32
    out = torch.empty_like(query)
    for first, last in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
        left, right = window_size
        seen = (distance >= -right if right >= 0 else distance > -9999) & (distance <= left if left >= 0 else True)
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        part = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        out[first:last] = part[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("longest", [None, max(LENGTHS)])
def test_one_call_for_all_segments_means_the_same_as_one_for_each(key_heads, window, longest, monkeypatch):
    query, key, value, boundaries = row(key_heads=key_heads)
    monkeypatch.setattr(attention, "varlen_attn", documented_varlen, raising=False)
    together = attention.flash(query, key, value, boundaries, longest, 0.3, window)
    assert_close(together, by_segment(query, key, value, boundaries, 0.3, window))


@pytest.mark.skipif(not attention.HAS_FLASH, reason="this torch has no such call")
@pytest.mark.parametrize("key_heads", [4, 2])
def test_on_cuda_in_half_precision_torch_takes_the_call_for_all_segments(key_heads):
    """Tensors of a CUDA device without contents: torch checks the call as it would on one."""
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, n, sum(LENGTHS), 8, dtype=torch.bfloat16, device="cuda") for n in (4, key_heads, key_heads)
        )
        boundaries = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="cuda")
        out, _ = packed_attention(torch.nn.Module(), query, key, value, None, boundaries, max(LENGTHS), scaling=0.3)
    assert out.device.type == "cuda" and out.shape == (1, sum(LENGTHS), 4, 8)
