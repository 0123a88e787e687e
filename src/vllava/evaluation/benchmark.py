"""What every benchmark is: questions in, rows of values out, and metrics that are computed from the means of those."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllava.evaluation.questions import Answer, Question, Request, Verdict


@dataclass(frozen=True)
class Row:
    """What a score is made of: a question, or several that count together.

    cluster: rows of one cluster are drawn together when an interval is estimated, for they are not independent:
    questions about the same medium. groups: the parts, beside the whole, that it belongs to ("category/sports").
    values: column -> value; a column that a row lacks is 0 there.
    """

    cluster: str
    values: Mapping[str, float]
    groups: tuple[str, ...] = ()


def _itself(*means: np.ndarray) -> np.ndarray:
    return means[0]


@dataclass(frozen=True)
class Metric:
    """A figure that is a function of the means of columns over rows: an accuracy is its column's mean itself.

    of: takes an array for each of `columns`, all of one shape, and gives one of that shape: it is called with the means
    of many resamples at once. A figure that is not defined (a ratio to nothing) is NaN.
    """

    name: str
    columns: tuple[str, ...]
    of: Callable[..., np.ndarray] = _itself
    scale: float = 100.0
    headline: bool = False  # the figure of the paper's table


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under, NaN where there is nothing to divide by."""
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under != 0)


@dataclass
class Benchmark(ABC):
    """Where a benchmark's files lie, and how its answers are scored. A new one is a subclass and a configuration.

    name: as results call it. root: the folder of the data, in either of the layouts that docs/benchmarks.md shows.
    expected: how many questions were published; another number is warned of. template: the prompt's, and
    max_new_tokens: of an answer, as published. paper: metric -> the figure of the paper's Video-LLaVA-7B. `questions`
    raises UserError for files that are missing or are not what they should be, before anything is computed.
    """

    name: str
    root: str
    expected: int | None = None
    template: str | None = None  # as in training
    max_new_tokens: int = 64
    blind: bool = False  # whether all is asked once more without the media
    paper: Mapping[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list, init=False)  # of the data, said before and kept in the result

    metrics: tuple[Metric, ...] = field(default=(), init=False)
    # What becomes of "broken" and "unjudged" questions, where they do not count as wrong.
    counting: Mapping[str, str] = field(default_factory=dict, init=False)

    @abstractmethod
    def questions(self) -> list[Question]:
        """Every question, in the order of the published files; media stay on disk. Ids are unique."""

    @abstractmethod
    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        """What is scored. A question that nobody answered is there too, as the benchmark counts it (wrong)."""

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        """What a judge is asked; empty where none is needed. Nothing about questions that nobody answered."""
        return []

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """File name -> content of the published and upload formats: a list for .jsonl, whatever JSON holds for .json.

        bytes are written as they are.
        """
        return {}
