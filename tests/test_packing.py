"""Samples lie end to end in one row: nothing padded, nothing lost, every medium at its place."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllava.batch import IGNORE_INDEX, MediumSpec
from vllava.conversation import PLACEHOLDER_IDS, TEMPLATES, EncodedConversation
from vllava.data.packing import CaptionPairs, ConversationPacker, PackedSample, expand, pack
from vllava.data.samples import Medium
from vllava.errors import UserError

SPECS = {"image": MediumSpec(size=2, tokens=3), "video": MediumSpec(size=2, tokens=5, frames=2)}
SHAPES = {"image": (3, 2, 2), "video": (2, 3, 2, 2)}
IMAGE, VIDEO = PLACEHOLDER_IDS["image"], PLACEHOLDER_IDS["video"]


def medium(kind, value):
    """A medium that can be told from others by its pixels."""
    return Medium(kind, torch.full(SHAPES[kind], float(value)))


def encoded(*tokens):
    """Positive tokens are supervised, placeholders and 0 are not."""
    return EncodedConversation(list(tokens), [token if token > 0 else IGNORE_INDEX for token in tokens])


def sample(key, *tokens, first_value=0):
    kinds = [{IMAGE: "image", VIDEO: "video"}[token] for token in tokens if token < 0]
    media = [medium(kind, first_value + index) for index, kind in enumerate(kinds)]
    return expand(key, encoded(*tokens), media, SPECS)


def test_placeholder_becomes_as_many_slots_as_the_encoder_gives_tokens():
    packed = sample("a", 0, IMAGE, 7, VIDEO, 8)
    assert packed.token_ids == [0, *[IMAGE] * 3, 7, *[VIDEO] * 5, 8]
    assert packed.labels == [-100, *[-100] * 3, 7, *[-100] * 5, 8]
    assert len(packed) == 11


def test_first_token_is_never_supervised():
    assert sample("a", 7, 8).labels == [-100, 8]
    assert pack([sample("a", 7, 8), sample("b", 9, 9)]).labels.tolist() == [-100, 8, -100, 9]


@pytest.mark.parametrize("kinds", [[], ["image"], ["video", "image"], ["image", "video", "video"]])
def test_media_that_differ_from_the_placeholders_are_refused(kinds):
    media = [medium(kind, 0) for kind in kinds]
    with pytest.raises(UserError, match="placeholders and media differ"):
        expand("a", encoded(0, IMAGE, 7, VIDEO), media, SPECS)


def test_row_of_three_samples():
    batch = pack(
        [sample("a", 0, IMAGE, 7, first_value=1), sample("b", 0, 8), sample("c", 0, VIDEO, IMAGE, first_value=2)]
    )
    assert batch.keys == ["a", "b", "c"]
    assert batch.num_samples == 3
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 16]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.token_ids.tolist() == [0, 0, 0, 0, 7, 0, 8, *[0] * 9]
    assert batch.image_slots.tolist() == [1, 2, 3, 13, 14, 15]
    assert batch.video_slots.tolist() == [8, 9, 10, 11, 12]
    assert batch.images[:, 0, 0, 0].tolist() == [1, 3]
    assert batch.videos[:, 0, 0, 0, 0].tolist() == [2]
    assert batch.num_supervised == 2


def test_row_without_media_has_none():
    batch = pack([sample("a", 0, 7)])
    assert len(batch.images) == len(batch.videos) == len(batch.image_slots) == len(batch.video_slots) == 0


contents = st.lists(st.sampled_from([0, 7, 8, IMAGE, VIDEO]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(contents, min_size=1, max_size=6))
def test_every_token_label_and_medium_can_be_found_again_in_the_row(rows):
    samples = [sample(str(index), *tokens, first_value=100 * index) for index, tokens in enumerate(rows)]
    batch = pack(samples)

    stacked = {"image": batch.images.flatten(1), "video": batch.videos.flatten(1)}
    slots = {"image": batch.image_slots.tolist(), "video": batch.video_slots.tolist()}
    used = {"image": 0, "video": 0}
    place = 0
    for index, tokens in enumerate(rows):
        assert batch.cu_seqlens[index] == place
        begin = place
        value = 100 * index
        for token in tokens:
            kind = {IMAGE: "image", VIDEO: "video"}.get(token)
            width = SPECS[kind].tokens if kind else 1
            assert batch.position_ids[place : place + width].tolist() == list(
                range(place - begin, place - begin + width)
            )
            assert batch.token_ids[place : place + width].tolist() == [max(token, 0)] * width
            supervised = token > 0 and place > begin
            assert batch.labels[place : place + width].tolist() == [token if supervised else IGNORE_INDEX] * width
            if kind:
                first = used[kind] * width
                assert slots[kind][first : first + width] == list(range(place, place + width))
                assert set(stacked[kind][used[kind]].tolist()) == {float(value)}
                used[kind] += 1
                value += 1
            place += width
    assert batch.cu_seqlens[-1] == place == len(batch.token_ids)
    assert {kind: len(stacked[kind]) for kind in used} == used
    assert {kind: len(slots[kind]) for kind in used} == {kind: used[kind] * SPECS[kind].tokens for kind in used}


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=25), budget=st.integers(1, 60))
def test_micro_batches_keep_the_order_and_are_closed_before_the_budget_is_exceeded(lengths, budget, tokenizer):
    packer = ConversationPacker(tokenizer, TEMPLATES["plain"], SPECS, token_budget=budget, max_length=30)
    samples = [PackedSample(str(index), [1] * length, [1] * length, []) for index, length in enumerate(lengths)]
    batches = packer.collate(samples)

    assert [key for batch in batches for key in batch.keys] == [sample.key for sample in samples]
    assert [n for batch in batches for n in batch.cu_seqlens.diff().tolist()] == lengths
    for batch in batches:
        assert len(batch.token_ids) <= budget or batch.num_samples == 1
    for batch, following in itertools.pairwise(batches):
        assert len(batch.token_ids) + following.cu_seqlens[1] > budget


def test_sample_is_prepared_with_its_visual_tokens(model, make_packer, make_sample, tokenizer):
    packed = make_packer(model, "plain").prepare(make_sample("<image><video>", "A ball"))
    text = [tokenizer.bos_token_id, *tokenizer("A ball\n", add_special_tokens=False)["input_ids"]]
    assert packed.token_ids == [text[0], *[IMAGE] * 4, *[VIDEO] * 20, *text[1:]]
    assert packed.key == "sample"


def test_sample_longer_than_the_limit_is_refused_with_both_lengths(model, make_packer, make_sample):
    sample = make_sample("<image>", "A ball")
    length = len(make_packer(model, "plain").prepare(sample))
    assert len(make_packer(model, "plain", max_length=length).prepare(sample)) == length
    with pytest.raises(UserError, match=rf"{length} tokens, more than data.max_length={length - 1}"):
        make_packer(model, "plain", max_length=length - 1).prepare(sample)


def test_sample_without_a_supervised_token_is_refused(model, make_packer, make_sample):
    with pytest.raises(UserError, match="no token of the conversation is supervised"):
        make_packer(model).prepare(make_sample("<image> What is it?"))


def test_prompt_ends_where_the_last_answer_begins(model, make_packer, make_sample):
    packer = make_packer(model)
    turns = ("<image> What is it?", "A ball", "Which colour?")
    answered = packer.prompt(make_sample(*turns, "Red"))
    asked = packer.prompt(make_sample(*turns))
    whole = packer.prepare(make_sample(*turns, "Red"))
    assert answered.token_ids == asked.token_ids == whole.token_ids[: len(asked)]
    assert packer.tokenizer.decode(whole.token_ids[len(asked) :]) == " Red</s>"


def test_captions_are_padded_on_the_right_and_keep_their_end_token(tokenizer, make_sample):
    pairs = CaptionPairs(tokenizer, max_length=6)
    long = pairs.prepare(make_sample("<image>", "a red ball on a green field under a blue sky"))
    short = pairs.prepare(make_sample("<image>", "a"))
    [batch] = pairs.collate([long, short])
    words = tokenizer("a red ball on a green field under a blue sky", add_special_tokens=False)["input_ids"]
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert batch.token_ids.tolist() == [[begin, *words[:4], end], [begin, words[0], end, pad, pad, pad]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.pixels.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("turns", [("What is it?", "A ball"), ("<image>",)])
def test_caption_pair_needs_a_medium_and_an_answer(turns, tokenizer, make_sample):
    with pytest.raises(UserError, match="one medium and one answer"):
        CaptionPairs(tokenizer, max_length=6).prepare(make_sample(*turns))
