"""Scores, their intervals, and differences of two models."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from vllava.evaluation.benchmark import Metric, Row, ratio
from vllava.evaluation.statistics import difference, measured, paired, scores, share_interval

ACCURACY = Metric("accuracy", ("right",), headline=True)
PRECISION = Metric("precision", ("hit", "said"), ratio)


def right(values, groups=()):
    """A row for each value, each about a medium of its own."""
    return [Row(str(number), {"right": float(value)}, groups) for number, value in enumerate(values)]


def test_scores_are_functions_of_means_by_hand():
    rows = [
        Row("a", {"right": 1.0, "hit": 1.0, "said": 1.0}, ("kind/x",)),
        Row("a", {"right": 0.0, "said": 1.0}, ("kind/y",)),
        Row("b", {"right": 1.0}, ("kind/x",)),
        Row("c", {"right": 0.6, "said": 1.0, "hit": 1.0}, ("kind/y", "size/big")),
    ]
    found = {(one.metric, one.group): one for one in scores(rows, [ACCURACY, PRECISION])}
    values = {key: one.value for key, one in found.items()}
    assert values == pytest.approx(
        {
            ("accuracy", ""): 65.0,  # (1 + 0 + 1 + 0.6) / 4
            ("precision", ""): 200 / 3,  # 2 of the 3 that were said
            ("accuracy", "kind/x"): 100.0,
            ("precision", "kind/x"): 100.0,
            ("accuracy", "kind/y"): 30.0,
            ("precision", "kind/y"): 50.0,
            ("accuracy", "size/big"): 60.0,
            ("precision", "size/big"): 100.0,
        }
    )
    assert [one.n for key, one in found.items() if key[0] == "accuracy"] == [4, 2, 2, 1]
    assert found["accuracy", ""].headline and not found["precision", ""].headline


def test_an_interval_is_that_of_the_binomial_distribution_for_independent_questions():
    (found,) = scores(right([1] * 300 + [0] * 100), [ACCURACY], resamples=4000)
    deviation = 100 * math.sqrt(0.75 * 0.25 / 400)
    assert found.low == pytest.approx(75 - 1.96 * deviation, abs=0.4)
    assert found.high == pytest.approx(75 + 1.96 * deviation, abs=0.4)


def test_questions_about_one_medium_count_as_one_draw():
    """Answers that are the same within a medium say as little as one of each: the interval is sqrt(5) as wide."""
    values = [number % 3 > 0 for number in range(120)]
    alone = [Row(str(number), {"right": float(v)}) for number, v in enumerate(values * 5)]
    together = [Row(str(number % 120), row.values) for number, row in enumerate(alone)]
    (narrow,), (wide,) = scores(alone, [ACCURACY], 2000), scores(together, [ACCURACY], 2000)
    assert narrow.value == wide.value == pytest.approx(200 / 3)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(math.sqrt(5), rel=0.1)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    """Of 300 benchmarks of 60 media with 1 to 4 questions each, whose difficulty is the medium's."""
    random = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        chances = random.beta(3, 2, 60)  # mean 0.6
        rows = [
            Row(str(medium), {"right": float(random.random() < chances[medium])})
            for medium in range(60)
            for _ in range(random.integers(1, 5))
        ]
        (found,) = scores(rows, [ACCURACY], resamples=200)
        held += found.low <= 60 <= found.high
    assert 0.90 <= held / 300 <= 0.98


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0])), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
)
def test_the_order_of_rows_changes_nothing(said, random):
    rows = [Row(medium, {"right": value, "said": 1.0}, (f"of/{medium}",)) for medium, value in said]
    other = random.sample(rows, len(rows))
    a, b = measured(rows, [ACCURACY, PRECISION], 50), measured(other, [ACCURACY, PRECISION], 50)
    assert repr(a[0]) == repr(b[0])  # which NaN equals itself in
    assert a[1].clusters == b[1].clusters
    np.testing.assert_array_equal(a[1].resampled["accuracy"], b[1].resampled["accuracy"])


def test_a_group_more_does_not_change_the_others():
    rows = right([1, 0, 1, 1, 0, 0], ("one",))
    more = [Row(row.cluster, row.values, ("all", "one")) for row in rows]
    assert [one for one in scores(more, [ACCURACY]) if one.group != "all"] == scores(rows, [ACCURACY])


def test_what_is_not_defined_is_nan():
    (nothing,) = scores([], [ACCURACY])
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.n == 0
    (single,) = scores([Row("a", {"right": 1.0}), Row("a", {"right": 0.0})], [ACCURACY])
    assert single.value == 50.0 and math.isnan(single.low) and math.isnan(single.high)
    (unsaid,) = scores(right([1, 0]), [PRECISION])
    assert math.isnan(unsaid.value) and math.isnan(unsaid.high)


def test_a_paired_difference_is_narrower_than_the_intervals_of_the_two():
    random = np.random.default_rng(2)
    a = random.random(500) < 0.7
    b = np.where(random.random(500) < 0.06, ~a, a)  # the same but for some questions
    found = paired(right(a), right(b), ACCURACY)
    (alone, *_) = scores(right(a), [ACCURACY])
    assert found.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low <= found.value <= found.high
    changed = a.astype(float) - b
    deviation = 100 * changed.std() / math.sqrt(500)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.15)
    assert found.high - found.low < 0.7 * (alone.high - alone.low)


def test_p_is_small_for_a_clear_difference_and_large_for_none():
    a, b = right([1] * 80 + [0] * 20), right([1] * 50 + [0] * 50)
    assert paired(a, b, ACCURACY).p < 0.01
    same = paired(a, a, ACCURACY)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_spread_evenly_where_two_models_are_equally_good():
    random = np.random.default_rng(3)
    found = [
        paired(right(random.random(80) < 0.6), right(random.random(80) < 0.6), ACCURACY, 200).p for _ in range(150)
    ]
    assert np.mean(np.array(found) < 0.1) == pytest.approx(0.1, abs=0.07)
    assert np.mean(np.array(found) < 0.5) == pytest.approx(0.5, abs=0.13)


def test_models_are_compared_on_the_same_media_alone_wherever_these_lie():
    rows = [Row(f"/data/a/{number}.jpg", {"right": number % 2}) for number in range(10)]
    moved = [Row(f"/mnt/other/{number}.jpg", row.values) for number, row in enumerate(rows)]
    assert paired(rows, moved, ACCURACY).value == 0.0
    with pytest.raises(ValueError, match="same questions"):
        paired(rows, rows[1:], ACCURACY)
    with pytest.raises(ValueError, match="same questions"):
        paired(rows, [*rows[:-1], Row("/data/a/x.jpg", {})], ACCURACY)
    with pytest.raises(ValueError, match="drawn otherwise"):
        difference(measured(rows, [ACCURACY], seed=0)[1], measured(rows, [ACCURACY], seed=1)[1], "accuracy")


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_wilsons_as_another_package_has_it(counts):
    right, n = counts
    assert share_interval(right / n, n) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-9)


def test_a_share_of_nothing_has_no_interval():
    assert all(map(math.isnan, share_interval(0.5, 0)))
