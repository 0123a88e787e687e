"""When a run stops because of broken samples, how often it does so wrongly, and the list that it leaves."""

import json
import math

import numpy as np
import pytest

from vllava.errors import UserError
from vllava.training.broken import FALSE_ALARM, SHOWN, BrokenLimit, BrokenList

# --- the limit --------------------------------------------------------------------------------------------------------


def stopping_counts(limit, samples):
    """After each number of samples, how many broken ones stop a run; more than there are where none would."""
    counts, broken = [], 1
    for seen in range(1, samples + 1):
        while broken <= seen and limit.exceeded(broken, seen) is None:
            broken += 1
        counts.append(broken)
    return np.array(counts)


def stops(limit, share, runs, samples):
    """After how many samples each of many runs stops, inf if it does not."""
    rng = np.random.default_rng(0)
    counts = stopping_counts(limit, samples)
    found = []
    for _ in range(runs):
        over = np.cumsum(rng.random(samples) < share) >= counts
        found.append(over.argmax() + 1 if over.any() else math.inf)
    return np.array(found)


def test_a_run_at_its_limit_is_stopped_by_bad_luck_less_often_than_stated():
    stopped = np.isfinite(stops(BrokenLimit(0.01), 0.01, runs=2000, samples=20_000)).sum()
    assert stopped <= 2000 * FALSE_ALARM + 3 * math.sqrt(2000 * FALSE_ALARM)


def test_a_run_well_within_its_limit_goes_on():
    assert not np.isfinite(stops(BrokenLimit(0.01), 0.006, runs=2000, samples=20_000)).any()


@pytest.mark.parametrize(("share", "samples"), [(0.02, 6000), (0.03, 2000), (0.05, 700), (0.1, 250), (0.5, 30)])
def test_more_than_the_limit_is_found_soon(share, samples):
    """In 99 of 100 runs."""
    assert np.quantile(stops(BrokenLimit(0.01), share, runs=500, samples=8000), 0.99) <= samples


def first_stop(limit, bad, size):
    """After how many samples a run stops, in which shards of `size` samples are broken as a whole or not at all."""
    rng = np.random.default_rng(0)
    seen, counts = 0, {}
    for start in range(0, len(bad), limit.window):
        mixed = np.arange(start, min(start + limit.window, len(bad))).repeat(size)
        for shards in rng.permutation(mixed).reshape(-1, 256):
            seen += len(shards)
            for shard in shards[bad[shards]].tolist():
                counts[str(shard)] = counts.get(str(shard), 0) + 1
            if limit.exceeded(sum(counts.values()), seen, counts):
                return seen
    return math.inf


def test_a_few_shards_that_are_broken_as_a_whole_do_not_stop_a_run_because_they_come_first():
    """5 of 1,000 are within the limit, though the two in the first window of 64 are three times as many."""
    bad = np.zeros(1000, bool)
    bad[[3, 40, 300, 600, 900]] = True
    assert first_stop(BrokenLimit(0.01, 512_000, window=64), bad, 512) == math.inf
    assert first_stop(BrokenLimit(0.01, window=64), np.ones(1000, bool), 512) == 256
    assert first_stop(BrokenLimit(0.01, window=64), np.arange(1000) % 4 == 0, 512) < 20_000


@pytest.mark.parametrize("limit", [1e-9, 0.001, 0.01, 0.1, 0.4])
def test_data_that_are_broken_altogether_stop_a_run_within_a_dozen_samples(limit):
    assert next(n for n in range(1, 100) if BrokenLimit(limit).exceeded(n, n)) <= 12


def test_evidence_is_the_mean_likelihood_ratio_of_the_larger_shares():
    limit, broken, seen = 0.25, 3, 8
    odds = 1 / 3
    larger = [odds * f / (1 + odds * f) for f in (1.5, 2, 3, 5, 10, 30, 100)] + [1.0]
    ratios = [(p / limit) ** broken * ((1 - p) / (1 - limit)) ** (seen - broken) for p in larger]
    assert BrokenLimit(limit).evidence(broken, seen) == pytest.approx(math.log(np.mean(ratios)))


@pytest.mark.parametrize("limit", [0.01, 0.3])
def test_the_evidence_of_a_fair_run_is_one_in_the_mean(limit):
    """What makes the rate of false alarms hold: summed over all outcomes of n samples at the limit."""
    for n in (1, 2, 7, 40):
        chances = [math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(n + 1)]
        ratios = [math.exp(BrokenLimit(limit).evidence(k, n)) for k in range(n + 1)]
        assert sum(c * r for c, r in zip(chances, ratios, strict=True)) == pytest.approx(1)


def test_a_limit_of_nothing_stops_at_the_first_and_a_limit_of_all_never():
    assert BrokenLimit(0).exceeded(0, 10**6) is None and "allows none" in BrokenLimit(0).exceeded(1, 10**6)
    assert BrokenLimit(1).exceeded(10**6, 10**6) is None
    assert BrokenLimit(0.01).exceeded(0, 10**6) is None


def test_a_run_stops_when_no_luck_can_bring_it_within_its_limit():
    limit = BrokenLimit(0.01, planned=10_000)
    assert limit.exceeded(100, 9000) is None and "no more than 100 in this run of 10000" in limit.exceeded(101, 9000)
    assert BrokenLimit(0.01).exceeded(101, 9000) is None  # unlikely, but luck may
    assert BrokenLimit(0.01, planned=20).exceeded(1, 20) is None  # one of few says little


@pytest.mark.parametrize("share", [-0.1, 1.01, 5, math.nan, "1%", None, True])
def test_a_limit_that_is_no_share_is_an_error(share):
    with pytest.raises(UserError, match=r"max_broken_share.*between 0 and 1"):
        BrokenLimit(share)


# --- the list ---------------------------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def broken(*numbers):
    return [(f"a.tar:k{n}", f"reason {n}", "Traceback …" if n % 2 else "") for n in numbers]


def test_every_broken_sample_is_a_line_with_its_step_key_and_reason(tmp_path):
    kept = BrokenList(tmp_path / "broken.jsonl")
    kept.add(1, broken(2), 0)
    kept.add(4, broken(3, 4), 1)
    assert rows_of(kept.path) == [
        {"step": 1, "key": "a.tar:k2", "reason": "reason 2"},
        {"step": 4, "key": "a.tar:k3", "reason": "reason 3", "traceback": "Traceback …"},
        {"step": 4, "key": "a.tar:k4", "reason": "reason 4"},
    ]


def test_a_resumed_run_keeps_the_lines_of_the_steps_it_goes_on_from(tmp_path):
    kept = BrokenList(tmp_path / "broken.jsonl")
    kept.start(0)
    assert not kept.path.exists()
    for step in range(1, 6):
        kept.add(step, broken(step), step - 1)
    with open(kept.path, "a") as file:
        file.write('{"step": 2, "key": "half of a li')
    kept.start(3)
    assert [row["step"] for row in rows_of(kept.path)] == [1, 2, 3]
    kept.start(0)
    assert rows_of(kept.path) == [] and [path.name for path in tmp_path.iterdir()] == ["broken.jsonl"]


@pytest.mark.parametrize("per_step", [1, 7, 1000])
def test_ten_thousand_broken_samples_do_not_flood_the_screen(tmp_path, caplog, per_step):
    kept = BrokenList(tmp_path / "broken.jsonl")
    for first in range(0, 10_000, per_step):
        kept.add(first, broken(*range(first, min(first + per_step, 10_000))), first)
    assert len(rows_of(kept.path)) == 10_000
    shown = [record.getMessage() for record in caplog.records]
    assert sum("sample left out: a.tar:k" in line for line in shown) == SHOWN
    assert sum("further samples" in line for line in shown) == 1 and len(shown) < SHOWN + 15
    assert str(kept.path) in shown[SHOWN]
