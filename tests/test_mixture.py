"""A mixture is kept exactly: so many times, or such a share, whatever the sizes and wherever a run is stopped."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import SPECS, image_sample, text_sample, write_source

from vllava.data.build import conversation_data
from vllava.data.datamodule import GlobalBatchSampler
from vllava.data.mixture import Portion, Source, draws, portions
from vllava.data.order import epoch_order
from vllava.data.shards import Shard
from vllava.errors import UserError

SOURCES = [Source("image", "data/a"), Source("image", "s3://bucket/deep/b"), Source("text", "/abs/c/")]

sources_of_shards = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3)


def shards_of(sources):
    return [Shard(f"{n}-{i}", size, n) for n, sizes in enumerate(sources) for i, size in enumerate(sizes)]


@settings(max_examples=150, deadline=None)
@given(sources=sources_of_shards, data=st.data(), seed=st.integers(0, 99), window=st.integers(1, 5))
def test_every_sample_of_a_source_comes_as_often_as_any_other_or_once_more(sources, data, seed, window):
    shards = shards_of(sources)
    taken = [data.draw(st.integers(0, 3 * sum(sizes))) for sizes in sources]
    seen = Counter()
    for epoch in range(4):
        order = epoch_order(shards, seed, epoch, window, taken)
        assert len(order) == sum(taken)
        found = Counter(shards[shard].source for shard in order[:, 0])
        assert [found[number] for number in range(len(sources))] == taken
        seen.update(map(tuple, order.tolist()))
        for source, count in enumerate(taken):
            size = sum(sources[source])
            times = {seen[n, i] for n, s in enumerate(shards) if s.source == source for i in range(s.samples)}
            assert times <= {(epoch + 1) * count // size, -(-(epoch + 1) * count // size)}


@settings(max_examples=60, deadline=None)
@given(sources=sources_of_shards, seed=st.integers(0, 99), epoch=st.integers(0, 3), window=st.integers(1, 5))
def test_all_of_each_once_is_the_order_without_a_mixture(sources, seed, epoch, window):
    shards = shards_of(sources)
    without = epoch_order(shards, seed, epoch, window)
    assert (epoch_order(shards, seed, epoch, window, [sum(sizes) for sizes in sources]) == without).all()


@settings(max_examples=60, deadline=None)
@given(sources=sources_of_shards, data=st.data(), batch=st.integers(1, 9), ranks=st.integers(1, 4))
def test_a_mixture_is_resumed_where_it_was_left_by_any_rank(sources, data, batch, ranks):
    shards = shards_of(sources)
    taken = [data.draw(st.integers(1, 2 * sum(sizes))) for sizes in sources]
    samplers = [GlobalBatchSampler(shards, batch, 3, 2, rank, ranks, None, taken) for rank in range(ranks)]
    stop = data.draw(st.integers(0, len(samplers[0])))
    for sampler in samplers:
        sampler.position = lambda: (2, 0)
        whole = [piece.rows.tolist() for piece in sampler]
        sampler.position = lambda: (2, stop)
        assert [piece.rows.tolist() for piece in sampler] == whole[stop:]
    for sampler in samplers:
        sampler.position = lambda: (2, 0)
    rows = np.concatenate([piece.rows for sampler in samplers for piece in sampler])
    assert sorted(rows.tolist()) == sorted(epoch_order(shards, 3, 2, 2, taken).tolist())


def test_repeats_are_times_and_weights_are_shares_of_the_epoch():
    sizes = [100, 50, 200]
    assert draws(portions({"data/a": 2, "text": 0.25}, SOURCES), sizes) == [200, 50, 50]
    assert draws(portions({"b": {"repeats": 3}}, SOURCES), sizes) == [100, 150, 200]
    assert draws(portions({"b": {"weight": 0.25}}, SOURCES), sizes) == [100, 100, 200]
    assert draws(portions({"image": {"weight": 1}, "c": {"weight": 2}}, SOURCES), sizes) == [88, 88, 175]
    assert draws(portions(None, SOURCES), sizes) == sizes
    assert draws(portions({"text": 0}, SOURCES), sizes) == [100, 50, 0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.01, 0.3)), min_size=2, max_size=3))
def test_realised_shares_are_the_weights(parts):
    sizes = [1000, *(size for size, _ in parts)]
    shares = [Portion(), *(Portion(weight=Fraction(str(weight))) for _, weight in parts)]
    taken = draws(shares, sizes)
    assert taken[0] == 1000
    for (_, weight), count in zip(parts, taken[1:], strict=True):
        assert count / sum(taken) == pytest.approx(weight, abs=2 / sum(taken))


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        ({"nowhere": 2}, "no source of this run"),
        ({"data/a": 2, "a": 3}, "twice"),
        ({"image": 2, "a": 3}, "twice"),
        ({"a": -1}, "a number from 0"),
        ({"a": True}, "a number from 0"),
        ({"a": "lots"}, "a number from 0"),
        ({"a": {"weight": float("nan")}}, "a number from 0"),
        ({"a": {"times": 2}}, "the form is"),
        ({"a": {"weight": 0.1, "repeats": 2}}, "the form is"),
    ],
)
def test_a_wrong_mixture_is_refused_with_the_right_form(mixture, said):
    with pytest.raises(UserError, match=said):
        portions(mixture, SOURCES)


def test_a_name_that_means_two_sources_is_refused():
    twins = [Source("image", "x/train"), Source("video", "y/train")]
    with pytest.raises(UserError, match="2 sources of this run"):
        portions({"train": 2}, twins)
    assert portions({"y/train": 2}, twins)[1].repeats == 2


def test_weights_leave_room_for_what_has_none():
    with pytest.raises(UserError, match=r"add up to 1\.2"):
        draws(portions({"a": {"weight": 0.7}, "b": {"weight": 0.5}}, SOURCES), [10, 10, 10])
    with pytest.raises(UserError, match="leaves nothing"):
        draws(portions({"image": 0, "text": 0}, SOURCES), [10, 10, 10])


def test_a_stream_holds_what_its_mixture_says(tmp_path, tokenizer):
    write_source(tmp_path / "pictures", [image_sample(f"i{n}") for n in range(4)], per_shard=2)
    write_source(tmp_path / "words", [text_sample(f"t{n}") for n in range(6)], per_shard=3)
    sources = {"image": [str(tmp_path / "pictures")], "text": [str(tmp_path / "words")]}
    data = conversation_data(
        SPECS, tokenizer, sources, ["image", "text"], 4, seed=1, workers=0, mixture={"pictures": 2, "text": 0.5}
    )
    steps = list(data.train_dataloader())
    keys = Counter(key for step in steps for batch in step.micro_batches for key in batch.keys)
    assert len(steps) == data.steps_per_epoch == 3 and data.samples == 11
    assert [keys[f"i{n}"] for n in range(4)] == [2] * 4
    assert sum(keys[f"t{n}"] for n in range(6)) == 3
    assert sum((Counter(step.drawn) for step in steps), Counter()) == {0: 8, 1: 3}


def test_a_signed_address_is_named_without_its_signature_and_shown_so():
    signed = [Source("image", "https://host/a?sig=secret"), Source("image", "https://host/b?sig=secret")]
    assert portions({"b": 2}, signed)[1] == portions({"https://host/b": 2}, signed)[1] == Portion(Fraction(2))
    assert portions({signed[1].folder: 2}, signed)[1] == Portion(Fraction(2))
    with pytest.raises(UserError) as caught:
        portions({"c": 2}, signed)
    assert "https://host/a" in str(caught.value) and "secret" not in str(caught.value)
