"""Figures over seeds, and differences of two systems over seeds and questions at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllava.errors import UserError

LEVEL = 0.95  # of every interval
ALPHA = 0.05  # what p must be below, corrected for the number of claims


def _stats() -> Any:
    """scipy.stats, which takes a second to import; raises UserError where it is not installed."""
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("A study's report needs SciPy: pip install 'vllava[study]'.") from error
    return stats


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, the interval of that mean, and the one in which a further seed is expected.

    The intervals are NaN where there is one seed alone: it says nothing about seeds.
    """

    mean: float
    low: float
    high: float
    next_low: float
    next_high: float
    seeds: int


@dataclass(frozen=True)
class Gain:
    """How much larger a share of right answers is than another's on the same questions, its interval, and its p.

    over: what the interval speaks for: "seeds and questions", or "questions" alone where there is one seed. freedom:
    the degrees of freedom of its t distribution. seeds, questions: how many were compared. better, worse: answers, over
    all seeds, that were right here alone and there alone. effect: Cohen's h of the two shares. mended: the share of the
    other's errors that are gone; NaN where it has none. by_seeds: the share of the interval's variance that further
    questions to the same seeds would not take away; NaN where it is not known.
    """

    value: float
    low: float
    high: float
    p: float
    freedom: float
    over: str
    seeds: int
    questions: int
    better: float
    worse: float
    effect: float
    mended: float
    by_seeds: float


def over_seeds(values: Sequence[float]) -> Spread:
    """Student's t intervals of a figure, of which there is one value for each seed; raises ValueError without any."""
    found = np.asarray(values, float)
    count = len(found)
    if not count:
        raise ValueError("no seed has this figure")
    mean = float(found.mean())
    if count == 1:
        return Spread(mean, math.nan, math.nan, math.nan, math.nan, 1)
    reach = float(_stats().t.ppf((1 + LEVEL) / 2, count - 1) * found.std(ddof=1))
    own, further = reach / math.sqrt(count), reach * math.sqrt(1 + 1 / count)
    return Spread(mean, mean - own, mean + own, mean - further, mean + further, count)


def gain(ours: np.ndarray, others: np.ndarray) -> Gain:
    """How much more of the questions `ours` answers than `others`: both [seeds, questions], 1 where right, in pairs.

    A linear model of the paired differences, d = gain + seed + question + rest, in which seeds and questions are both
    drawn from many (crossed random effects). The layout is balanced, so that mean squares give the variances that REML
    would, and Satterthwaite's approximation the degrees of freedom. A part whose mean square lies below that of the
    rest counts as the rest's, so that an interval is rather too wide than too narrow.
    With one seed: McNemar's exact test and the t interval, over questions alone.
    """
    shape = np.shape(ours)
    if len(shape) != 2 or 0 in shape or shape != np.shape(others):
        raise ValueError(f"the same seeds' answers to the same questions are needed: {shape}, {np.shape(others)}")
    d = np.asarray(ours, float) - np.asarray(others, float)
    seeds, questions = shape
    value = float(d.mean())
    better, worse = float(d[d > 0].sum()), float(-d[d < 0].sum())
    variance, freedom, by_seeds = _variance(d) if seeds > 1 else (*_over_questions(d[0]), math.nan)
    if seeds == 1 or variance == 0:
        p = _mcnemar(better, worse)
    else:
        p = float(2 * _stats().t.sf(abs(value) / math.sqrt(variance), freedom))
    reach = float(_stats().t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance) if variance > 0 else 0.0
    if math.isnan(variance):
        reach = math.nan
    share, other = float(np.mean(ours)), float(np.mean(others))
    return Gain(
        value,
        value - reach,
        value + reach,
        p,
        freedom,
        "seeds and questions" if seeds > 1 else "questions",
        seeds,
        questions,
        better,
        worse,
        cohens_h(share, other),
        (share - other) / (1 - other) if other < 1 else math.nan,
        by_seeds,
    )


def _variance(d: np.ndarray) -> tuple[float, float, float]:
    """The variance of the mean of [seeds, questions], its degrees of freedom, and the share of it that is by seeds."""
    seeds, questions = d.shape
    if questions == 1:
        return float(d[:, 0].var(ddof=1)) / seeds, seeds - 1, math.nan
    by_seed, by_question = d.mean(axis=1), d.mean(axis=0)
    rest = d - by_seed[:, None] - by_question[None, :] + d.mean()
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
    of_seeds = max(questions * float(by_seed.var(ddof=1)), of_rest)
    of_questions = max(seeds * float(by_question.var(ddof=1)), of_rest)
    total = of_seeds + of_questions - of_rest
    if total <= 1e-15:
        return 0.0, math.inf, math.nan
    spread = (
        of_seeds**2 / (seeds - 1) + of_questions**2 / (questions - 1) + of_rest**2 / ((seeds - 1) * (questions - 1))
    )
    return total / d.size, total**2 / spread, (of_seeds - of_rest) / total


def _over_questions(d: np.ndarray) -> tuple[float, float]:
    return (float(d.var(ddof=1)) / len(d), len(d) - 1) if len(d) > 1 else (math.nan, math.nan)


def _mcnemar(better: float, worse: float) -> float:
    """The exact two-sided p of so many answers that one alone has right, and the other alone."""
    more, less = round(better), round(worse)
    return float(_stats().binomtest(more, more + less).pvalue) if more + less else 1.0


def cohens_h(share: float, other: float) -> float:
    """The distance of two shares on the scale on which their noise is the same everywhere: 0.2 is small, 0.8 large."""
    return 2 * math.asin(math.sqrt(share)) - 2 * math.asin(math.sqrt(other))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p corrected for their number by Holm's method; NaN stays, and counts as one that is tested."""
    order = sorted(range(len(ps)), key=lambda place: (math.isnan(ps[place]), ps[place]))
    found, largest = [math.nan] * len(ps), 0.0
    for rank, place in enumerate(order):
        if not math.isnan(ps[place]):
            largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
            found[place] = largest
    return found
