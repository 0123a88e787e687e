"""The data stream: every sample once, in an order that nothing but the seed decides, and none replaced."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import (
    SPECS,
    image_sample,
    jpeg,
    mp4,
    talk,
    text_sample,
    video_sample,
    write_plain_manifest,
    write_source,
    write_tar,
)

from vllava.data.build import caption_data, conversation_data
from vllava.data.datamodule import GlobalBatchSampler, ShardDataset
from vllava.data.shards import Shard
from vllava.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sources of images, videos and text, and all their keys: 35 samples in 9 shards."""
    root = tmp_path_factory.mktemp("world")
    keys = write_source(root / "images", [image_sample(f"image{i:02d}", 10 * i) for i in range(15)], per_shard=4)
    keys += write_source(root / "videos", [video_sample(f"video{i:02d}", 10 * i) for i in range(14)], per_shard=4)
    keys += write_source(root / "text", [text_sample(f"text{i:02d}") for i in range(6)], per_shard=6)
    return root, keys


def data_of(root, tokenizer, **changes):
    given = {
        "sources": {
            "image": [str(root / "images")],
            "video": [str(root / "videos")],
            "text": [str(root / "text")],
        },
        "modalities": ["image", "video", "text"],
        "global_batch": GLOBAL_BATCH,
        "seed": 1,
        "workers": 0,
    }
    return conversation_data(SPECS, tokenizer, **{**given, **changes})


def keys_of(step):
    return [key for batch in step.micro_batches for key in batch.keys]


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.position = lambda: (number, 0)
    return list(loader)


# --- every sample once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_an_epoch_holds_every_sample_exactly_once(world, tokenizer, workers):
    root, keys = world
    steps = epoch(data_of(root, tokenizer, workers=workers))
    assert sorted(key for step in steps for key in keys_of(step)) == sorted(keys)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_and_the_pixels_do_not_depend_on_the_number_of_workers(world, tokenizer, workers):
    root, _ = world
    alone, shared = epoch(data_of(root, tokenizer)), epoch(data_of(root, tokenizer, workers=workers))
    assert [keys_of(step) for step in alone] == [keys_of(step) for step in shared]
    for one, other in zip(alone, shared, strict=True):
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert a.images.equal(b.images) and a.videos.equal(b.videos) and a.token_ids.equal(b.token_ids)


def test_another_epoch_has_another_order_and_a_repeated_one_the_same(world, tokenizer):
    root, _ = world
    data = data_of(root, tokenizer)
    first, second, again = ([key for step in epoch(data, n) for key in keys_of(step)] for n in (0, 1, 0))
    assert first == again
    assert first != second and sorted(first) == sorted(second)


def test_a_loader_with_lasting_workers_follows_the_epoch(world, tokenizer):
    root, keys = world
    loader = data_of(root, tokenizer, workers=1).train_dataloader()
    orders = []
    for number in range(2):
        loader.sampler.position = lambda number=number: (number, 0)
        orders.append([key for step in loader for key in keys_of(step)])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted(keys)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_every_global_batch_without_overlap(world, tokenizer, ranks):
    root, keys = world
    data = data_of(root, tokenizer)
    dataset = ShardDataset(data.shards, data.decode, data.assembler, open_shards=4)
    deal = data.assembler.deal(data.shards)
    shares = [
        steps_of(GlobalBatchSampler(data.shards, GLOBAL_BATCH, 1, 64, rank, ranks, deal)) for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1  # the same number of steps on every rank
    seen = []
    for number, pieces in enumerate(zip(*shares, strict=True)):
        batch = [key for share in pieces for piece in share for key in keys_of(dataset[piece])]
        assert len(batch) == (GLOBAL_BATCH if number < len(keys) // GLOBAL_BATCH else len(keys) % GLOBAL_BATCH)
        seen += batch
    assert sorted(seen) == sorted(keys)


def test_a_global_batch_holds_the_same_samples_for_any_number_of_ranks(world, tokenizer):
    shards = data_of(world[0], tokenizer).shards
    batches = {}
    for ranks in (1, 2, 3):
        shares = zip(
            *(steps_of(GlobalBatchSampler(shards, GLOBAL_BATCH, 1, 64, rank, ranks)) for rank in range(ranks)),
            strict=True,
        )
        batches[ranks] = [
            sorted(tuple(row) for share in pieces for piece in share for row in piece.rows.tolist())
            for pieces in shares
        ]
    assert batches[1] == batches[2] == batches[3]


shards_of_any_size = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=shards_of_any_size, batch=st.integers(1, 16), ranks=st.integers(1, 4))
def test_an_epoch_has_as_many_batches_as_the_sampler_says(sizes, batch, ranks):
    for rank in range(ranks):
        sampler = GlobalBatchSampler(_shards(sizes), batch, 0, 3, rank, ranks)
        assert len(steps_of(sampler)) == len(sampler)


@settings(max_examples=60, deadline=None)
@given(sizes=shards_of_any_size, batch=st.integers(1, 16), ranks=st.integers(1, 4), data=st.data())
def test_a_resumed_epoch_goes_on_with_the_next_unseen_sample(sizes, batch, ranks, data):
    for rank in range(ranks):
        whole, resumed = (GlobalBatchSampler(_shards(sizes), batch, 7, 3, rank, ranks) for _ in range(2))
        start = data.draw(st.integers(0, len(whole)))
        whole.position, resumed.position = lambda: (3, 0), lambda start=start: (3, start)
        rest = [piece for step in steps_of(whole)[start:] for piece in step]
        assert [piece.rows.tolist() for piece in resumed] == [piece.rows.tolist() for piece in rest]


def steps_of(sampler):
    """The pieces of each step."""
    steps = [[]]
    for piece in sampler:
        steps[-1].append(piece)
        if not piece.more:
            steps.append([])
    assert steps.pop() == []
    return steps


def _shards(sizes):
    return [Shard(f"{number}.tar", size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_prepares_a_row_at_a_time_and_nothing_stays_in_memory_it_shares(world, tokenizer, workers):
    data = data_of(world[0], tokenizer, token_budget=400, workers=workers)
    loader = data.train_dataloader()
    parts = list(loader.pieces)
    assert len(parts) > 2 * len(loader) and all(len(part.micro_batches) == 1 for part in parts)
    steps = epoch(data)
    assert [len(step.micro_batches) for step in steps] == rows_of(parts)
    tensors = [t for step in steps for b in step.micro_batches for t in (b.token_ids, b.images, b.videos)]
    assert not any(tensor.is_shared() for tensor in tensors)
    assert {t.dtype for t in tensors if t.numel() and t.ndim > 1} == {torch.uint8}


def rows_of(parts):
    counts, row = [], 0
    for part in parts:
        row += 1
        if not part.more:
            counts.append(row)
            row = 0
    return counts


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_mix_the_sources(world, tokenizer):
    steps = epoch(data_of(world[0], tokenizer))
    kinds = [{key.rstrip("0123456789") for key in keys_of(step)} for step in steps if step.samples == GLOBAL_BATCH]
    assert all({"image", "video"} <= found for found in kinds)
    assert any("text" in found for found in kinds)


def test_the_last_batch_is_smaller_not_dropped(world, tokenizer):
    data = data_of(world[0], tokenizer)
    assert [step.samples for step in epoch(data)] == [8, 8, 8, 8, 3]
    assert data.steps_per_epoch == 5


@pytest.mark.parametrize("budget", [1, 200, 700, 100_000])
def test_the_global_batch_does_not_depend_on_the_token_budget(world, tokenizer, budget):
    steps = epoch(data_of(world[0], tokenizer, token_budget=budget))
    reference = epoch(data_of(world[0], tokenizer))
    assert [sorted(keys_of(step)) for step in steps] == [sorted(keys_of(step)) for step in reference]
    for batch in (batch for step in steps for batch in step.micro_batches):
        assert len(batch.token_ids) <= budget or batch.num_samples == 1


def test_a_smaller_token_budget_makes_more_micro_batches(world, tokenizer):
    counts = [
        sum(len(s.micro_batches) for s in epoch(data_of(world[0], tokenizer, token_budget=b))) for b in (1, 400, 9999)
    ]
    assert counts == [35, counts[1], 5]
    assert 5 < counts[1] < 35


@pytest.mark.parametrize(
    ("modalities", "expected"),
    [(["video"], {"video"}), (["image", "text"], {"image", "text"}), (["image", "video"], {"image", "video"})],
)
def test_only_the_wanted_modalities_are_read(world, tokenizer, modalities, expected):
    steps = epoch(data_of(world[0], tokenizer, modalities=modalities))
    assert {key.rstrip("0123456789") for step in steps for key in keys_of(step)} == expected


def test_an_unknown_modality_is_an_error(world, tokenizer):
    with pytest.raises(UserError, match="audio"):
        data_of(world[0], tokenizer, modalities=["image", "audio"])


def test_no_source_for_any_wanted_modality_is_an_error(world, tokenizer):
    with pytest.raises(UserError, match="sources"):
        data_of(world[0], tokenizer, sources={"image": [str(world[0] / "images")]}, modalities=["video"])


def test_a_source_that_is_no_list_of_folders_is_an_error(world, tokenizer):
    with pytest.raises(UserError, match=r"data\.sources\.image is a list of folders"):
        data_of(world[0], tokenizer, sources={"image": {"mine": str(world[0] / "images")}})


def test_caption_batches_pair_each_medium_with_its_own_caption(tmp_path, tokenizer):
    words = ["red circle", "blue square", "green triangle", "white ring", "orange cross"]
    samples = [
        (f"k{i}", {"conversations": talk(answer=f"a {words[i]}")}, [("jpg", jpeg(50 * i))]) for i in range(len(words))
    ]
    write_source(tmp_path / "s", samples, per_shard=2)
    data = caption_data(SPECS, tokenizer, {"image": [str(tmp_path / "s")]}, ["image"], 5, seed=0, workers=0)
    [step] = epoch(data)
    [batch] = step.micro_batches
    shades = batch.pixels.float().mean((1, 2, 3)).tolist()
    rank = {i: sorted(shades).index(shade) for i, shade in enumerate(shades)}
    for row, (ids, mask) in enumerate(zip(batch.token_ids, batch.attention_mask, strict=True)):
        assert tokenizer.decode(ids[mask.bool()]) == f"<s>a {words[rank[row]]}</s>"
        assert (ids[~mask.bool()] == tokenizer.pad_token_id).all()


# --- broken samples ---------------------------------------------------------------------------------------------------


def _with(conversations, media):
    return lambda key: (key, {"id": key, "conversations": conversations}, media)


BROKEN = {
    "a corrupt video": (_with(talk(placeholder="<video>"), [("mp4", mp4()[:700])]), "video"),
    "a file that is no video": (_with(talk(placeholder="<video>"), [("mp4", b"nothing" * 99)]), "unreadable video"),
    "an empty picture": (_with(talk(), [("jpg", b"")]), "unreadable image"),
    "a picture too few": (
        _with(talk(placeholder="<image><image>"), [("jpg", jpeg())]),
        "placeholders and media differ",
    ),
    "a picture too many": (_with(talk(placeholder=""), [("jpg", jpeg())]), "placeholders and media differ"),
    "a video where the text says image": (_with(talk(), [("mp4", mp4())]), "unreadable image"),
    "no answer": (_with(talk(placeholder="")[:1], []), "no token of the conversation is supervised"),
    "an empty conversation": (_with([], []), "empty"),
    "turns in the wrong order": (_with(talk(placeholder="")[:1] * 2, []), "expected 'gpt'"),
    "a conversation longer than the limit": (_with(talk(answer="very " * 4000, placeholder=""), []), "max_length"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_sample_is_reported_and_the_others_survive(tmp_path, tokenizer, name):
    make, reason = BROKEN[name]
    samples = [text_sample("good1"), make("bad"), text_sample("good2")]
    write_source(tmp_path / "s", samples, per_shard=3)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]}, global_batch=3)
    [step] = epoch(data)
    assert sorted(keys_of(step)) == ["good1", "good2"]
    assert step.samples == 3
    [(key, why)] = step.broken
    assert key.endswith("00000.tar:bad") and str(tmp_path) in key
    assert reason in why


def the_step_of(folder, members, tokenizer):
    """The only step of a shard with these members and one sample."""
    folder.mkdir()
    write_tar(folder / "a.tar", members)
    write_plain_manifest(folder, {"a.tar": 1})
    [step] = epoch(data_of(folder, tokenizer, sources={"text": [str(folder)]}))
    return step


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b"[" * 10**6, b'{"a": ' * 10**5, b'{"id": ' + b"9" * 10**5 + b"}"],
    ids=["empty", "cut", "a list", "null", "no UTF-8", "nested lists", "nested objects", "a long number"],
)
def test_a_record_that_is_not_one_is_reported(tmp_path, tokenizer, data):
    step = the_step_of(tmp_path / "s", [("bad.json", data)], tokenizer)
    assert step.micro_batches == [] and step.samples == 1
    [(key, why)] = step.broken
    assert key.endswith("a.tar:bad") and "no readable JSON record" in why


@pytest.mark.parametrize(
    "conversation", [5, True, None, "hello", {"from": "human"}, [5], [{"from": "human", "value": 3}], [[]], [None] * 9]
)
def test_a_conversation_that_is_not_one_is_reported(tmp_path, tokenizer, conversation):
    step = the_step_of(tmp_path / "s", [("bad.json", json.dumps({"conversations": conversation}).encode())], tokenizer)
    assert step.micro_batches == []
    [(key, why)] = step.broken
    assert key.endswith("a.tar:bad") and ("conversation" in why or "turn 1" in why)


def test_a_sample_without_a_record_is_reported(tmp_path, tokenizer):
    step = the_step_of(tmp_path / "s", [("k.0.jpg", jpeg())], tokenizer)
    assert step.micro_batches == [] and "no readable JSON record" in step.broken[0][1]


def test_broken_samples_are_not_replaced_and_reach_the_step_from_a_worker(tmp_path, tokenizer):
    good = [text_sample(f"good{i:02d}") for i in range(14)]
    bad = [BROKEN["an empty picture"][0](f"bad{i:02d}") for i in range(6)]
    mixed = [sample for pair in zip(good[:6], bad, strict=True) for sample in pair] + good[6:]
    write_source(tmp_path / "s", mixed, per_shard=7)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]}, global_batch=5, workers=2)
    steps = epoch(data)
    assert Counter(key for step in steps for key in keys_of(step)) == Counter(key for key, _, _ in good)
    assert sorted(key.split(":")[-1] for step in steps for key, _ in step.broken) == [key for key, _, _ in bad]
    assert [step.samples for step in steps] == [5, 5, 5, 5]
    assert all(len(keys_of(step)) + len(step.broken) == step.samples for step in steps)


class Unforeseen:
    """A decoder of samples that fails at some keys as no library should."""

    def __init__(self, decode, errors):
        self.decode, self.errors = decode, errors

    def __call__(self, key, members):
        if key in self.errors:
            raise self.errors[key]
        return self.decode(key, members)


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_goes_wrong_with_a_sample_makes_it_a_broken_one(tmp_path, tokenizer, workers):
    write_source(tmp_path / "s", [text_sample(f"k{i}") for i in range(5)], per_shard=5)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]}, workers=workers)
    errors = {
        "k0": ZeroDivisionError("by zero"),
        "k1": MemoryError(),
        "k2": RecursionError("too deep"),
        "k3": KeyError("x"),
    }
    data.decode = Unforeseen(data.decode, errors)
    [step] = epoch(data)
    assert keys_of(step) == ["k4"] and step.samples == 5
    reasons = {key.split(":")[-1]: reason for key, reason in step.broken}
    assert reasons == {
        "k0": "unexpected ZeroDivisionError: by zero",
        "k1": "unexpected MemoryError: MemoryError",
        "k2": "unexpected RecursionError: too deep",
        "k3": "unexpected KeyError: KeyError: 'x'",
    }
    assert sorted(step.tracebacks) == sorted(key for key, _ in step.broken)
    assert all("in __call__" in text and "raise self.errors[key]" in text for text in step.tracebacks.values())


def test_ctrl_c_is_no_broken_sample(tmp_path, tokenizer):
    write_source(tmp_path / "s", [text_sample("k0")], per_shard=1)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]})
    data.decode = Unforeseen(data.decode, {"k0": KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        epoch(data)


def test_a_reason_is_one_short_line_without_what_a_terminal_obeys(tmp_path, tokenizer):
    write_source(tmp_path / "s", [text_sample("k0")], per_shard=1)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]})
    data.decode = Unforeseen(data.decode, {"k0": UserError("a\nb\x1b[2J\ud800\u202e" + "x" * 10**6)})
    [step] = epoch(data)
    [(_, reason)] = step.broken
    assert reason.startswith(r"a\nb\x1b[2J\ud800\u202exxx") and len(reason) == 1000
    assert step.tracebacks == {}  # it was foreseen


def test_first_turns_that_were_dropped_are_counted_of_the_samples_that_are_used(tmp_path, tokenizer):
    write_source(tmp_path / "s", [text_sample(f"k{i}") for i in range(4)], per_shard=4)
    data = data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]})
    decode = data.decode
    data.decode = lambda key, members: replace(decode(key, members), dropped_turns=int(key == "k1") + int(key > "k1"))
    [step] = epoch(data)
    assert step.dropped_turns == 3


def test_a_step_of_broken_samples_alone_has_no_micro_batch(tmp_path, tokenizer):
    write_source(tmp_path / "s", [BROKEN["no answer"][0](f"bad{i}") for i in range(3)], per_shard=3)
    [step] = epoch(data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]}))
    assert step.micro_batches == [] and len(step.broken) == step.samples == 3


def test_a_damaged_shard_stops_the_stream_with_its_name(tmp_path, tokenizer):
    write_source(tmp_path / "s", [text_sample(f"k{i}") for i in range(4)], per_shard=4)
    path = tmp_path / "s" / "00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError) as error:
        epoch(data_of(tmp_path, tokenizer, sources={"text": [str(tmp_path / "s")]}, workers=1))
    assert str(path) in error.value.paragraph and "Traceback" not in error.value.paragraph
