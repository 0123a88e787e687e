"""Scores with intervals, and differences of two models on the same questions: a bootstrap over media."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import NormalDist

import numpy as np

from vllava.evaluation.benchmark import Metric, Row

RESAMPLES = 1000
LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Score:
    """A figure of a benchmark, of all of it (group "") or of a part, and the interval around it.

    NaN where a figure is not defined; low and high also where there are fewer than two clusters to draw from, so that
    nothing can be said of the spread. n: the rows it is made of.
    """

    metric: str
    group: str
    value: float
    low: float
    high: float
    n: int
    headline: bool = False
    scale: float = 100.0  # of the metric: 100 for percents


@dataclass(frozen=True)
class Draws:
    """What the metrics of a whole benchmark are in each resample, to compare two models in the very same ones.

    clusters: a hash of what was drawn from, and how; only draws that agree in it can be compared. values: metric -> its
    figure, and metric -> its figures in the resamples.
    """

    clusters: str
    values: Mapping[str, float]
    resampled: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """How much larger a figure is than another model's on the same questions, its interval, and the chance of it.

    p: how often the resamples differ from the difference found by as much as it differs from 0 (two-sided).
    """

    metric: str
    value: float
    low: float
    high: float
    p: float


def scores(rows: Sequence[Row], metrics: Sequence[Metric], resamples: int = RESAMPLES, seed: int = 0) -> list[Score]:
    """The metrics of all rows, then of each group in the order of its name, each with its 95 % interval.

    Clusters are drawn as a whole, with replacement, those of a group for itself. The order of rows changes nothing.
    """
    return measured(rows, metrics, resamples, seed)[0]


def measured(
    rows: Sequence[Row], metrics: Sequence[Metric], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[list[Score], Draws]:
    """The scores, and the resamples of the whole that they come from."""
    columns = list(dict.fromkeys(column for metric in metrics for column in metric.columns))
    values = np.array([[row.values.get(column, 0.0) for column in columns] for row in rows], float)
    values = values.reshape(len(rows), len(columns))
    names, cluster = np.unique([row.cluster for row in rows], return_inverse=True)
    members: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        for group in row.groups:
            members.setdefault(group, []).append(number)
    found = []
    whole, spread, drawn = _means(values, cluster, resamples, _seeds("", seed))
    found += _scores("", metrics, columns, len(rows), whole, spread)
    for group, chosen in sorted(members.items()):
        part = _means(values[chosen], cluster[chosen], resamples, _seeds(group, seed))
        found += _scores(group, metrics, columns, len(chosen), *part[:2])
    draws = Draws(
        _fingerprint([str(name) for name in names], cluster, drawn),
        {metric.name: _figure(metric, columns, whole[None])[0] for metric in metrics},
        {metric.name: _figure(metric, columns, spread) for metric in metrics},
    )
    return found, draws


def paired(
    rows_a: Sequence[Row], rows_b: Sequence[Row], metric: Metric, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """How much larger a metric is for a than for b, whose rows are about the same questions; see `difference`."""
    a, b = (measured(rows, [metric], resamples, seed)[1] for rows in (rows_a, rows_b))
    return difference(a, b, metric.name)


def difference(a: Draws, b: Draws, metric: str) -> Difference:
    """How much larger a metric is in a than in b, from the same resamples of both.

    Raises ValueError where they were not drawn from the same clusters.
    """
    if a.clusters != b.clusters:
        raise ValueError("the two are not about the same questions, or were drawn otherwise")
    value = float(a.values[metric] - b.values[metric])
    drawn = np.asarray(a.resampled[metric], float) - np.asarray(b.resampled[metric], float)
    drawn = drawn[~np.isnan(drawn)]
    if math.isnan(value) or not len(drawn):
        return Difference(metric, value, math.nan, math.nan, math.nan)
    # Rounding, of the means or of what is stored, must not make a difference where there is none.
    beyond = np.abs(drawn - value) >= abs(value) - 1e-9 * max(1.0, abs(a.values[metric]))
    return Difference(metric, value, *_interval(drawn), (1 + int(beyond.sum())) / (1 + len(drawn)))


def share_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n answers, each of which is about something else; NaN where there are none."""
    if not n:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _means(
    values: np.ndarray, cluster: np.ndarray, resamples: int, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means [columns] over rows, means in each resample [resamples, columns], how often the first drew each cluster.

    values: [rows, columns]. There are no resamples where there are fewer than two clusters. Memory: a few numbers for
    each cluster, and the means of each resample.
    """
    if not len(values):
        return np.full(values.shape[1], np.nan), np.empty((0, values.shape[1])), np.empty(0, int)
    order = np.lexsort((*values.T, cluster))  # or sums would depend on the order of rows in their last digit
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    sums = np.add.reduceat(values[order], starts, axis=0)
    sizes = np.diff(starts, append=len(values)).astype(float)
    count = len(sizes)
    means = sums.sum(axis=0) / sizes.sum()
    if count < 2:
        return means, np.empty((0, values.shape[1])), np.empty(0, int)
    random = np.random.default_rng(seeds)
    spread = np.empty((resamples, values.shape[1]))
    first = np.empty(0, int)
    for number in range(resamples):
        times = np.bincount(random.integers(count, size=count), minlength=count)
        first = times if number == 0 else first
        spread[number] = times @ sums / (times @ sizes)
    return means, spread, first


def _seeds(group: str, seed: int) -> list[int]:
    """Of a group's own resamples, so that other groups do not change them."""
    return [seed, zlib.crc32(group.encode())]


def _scores(
    group: str, metrics: Sequence[Metric], columns: list[str], n: int, whole: np.ndarray, spread: np.ndarray
) -> list[Score]:
    return [
        Score(
            metric.name,
            group,
            float(_figure(metric, columns, whole[None])[0]),
            *_interval(_figure(metric, columns, spread)),
            n,
            metric.headline,
            metric.scale,
        )
        for metric in metrics
    ]


def _figure(metric: Metric, columns: list[str], means: np.ndarray) -> np.ndarray:
    """A metric of many means at once: [times, columns] to [times]."""
    return metric.scale * metric.of(*(means[:, columns.index(column)] for column in metric.columns))


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    """The quantiles that hold LEVEL of the resamples; those in which a figure is not defined are left out."""
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _fingerprint(names: list[str], cluster: np.ndarray, drawn: np.ndarray) -> str:
    """A hash of clusters, of how many rows each has, and of the first draw, which shows that all are the same.

    What all names begin with is left out: it is the folder in which the media lie.
    """
    ends = zip(names[0], names[-1], strict=False) if len(names) > 1 else ()  # names are sorted
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    digest = hashlib.sha256("\n".join(name[shared:] for name in names).encode(errors="surrogatepass"))
    digest.update(np.bincount(cluster, minlength=len(names)).astype("<i8").tobytes())
    digest.update(drawn.astype("<i8").tobytes())
    return digest.hexdigest()
