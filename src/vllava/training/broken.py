"""Samples that had to be left out of a run: when they are too many, and the list of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.training.lines import cut_back

log = logging.getLogger(__name__)

FALSE_ALARM = 0.001  # the probability that a run within its limit is ever stopped by bad luck
BUNCHED = 10
SHOWN = 5  # broken samples that the screen shows one by one


@dataclass(frozen=True)
class BrokenLimit:
    """Decides when more samples are broken than `share` of them may be.

    planned: samples in the run, if known; window: shards that are mixed at a time, 0 where all are.

    A run stops when it is certain that more will have been broken than `share` of what is planned (of a hundred, if
    fewer are), or when a sequential test rejects that the true share is within the limit. The test weighs the samples
    seen under several larger shares against the limit: the mean E of these likelihood ratios is a supermartingale as
    long as the chance of a broken sample is at most the limit, so that by Ville's inequality E exceeds 1/FALSE_ALARM
    in no more than FALSE_ALARM of all runs, however often and however long one looks (Ville 1939; Robbins 1970).

    That supposes samples in random order. Shards come in random order, but their samples only as far as the window
    reaches: where there are more shards, two that are broken as a whole may by chance lie in the first window. A
    shard's broken samples then count as no more than one and BUNCHED times what the limit allows of its samples.
    """

    share: float
    planned: int | None = None
    window: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise UserError(f"task.max_broken_share={self.share!r} is not a share: it lies between 0 and 1.")

    def exceeded(self, broken: int, seen: int, by_shard: Mapping[str, int] | None = None) -> str | None:
        """Why the run has to stop, in words; None if it may go on. `by_shard`: the broken samples of each shard."""
        limit = f"task.max_broken_share={self.share:g}"
        if self.share == 0 and broken:
            return f"{limit} allows none"
        if not broken or self.share == 1:
            return None
        if self.planned and broken > (allowed := self.share * max(self.planned, 100)):
            return f"{limit} allows no more than {math.floor(allowed)} in this run of {self.planned}"
        if self.evidence(self._counted(by_shard, seen) if by_shard else broken, seen) >= -math.log(FALSE_ALARM):
            return f"if the true share were within {limit}, not one run in {1 / FALSE_ALARM:g} would see so many"
        return None

    def _counted(self, by_shard: Mapping[str, int], seen: int) -> float:
        most = 1 + BUNCHED * self.share * seen / self.window if self.window else math.inf
        return sum(min(count, most) for count in by_shard.values())

    def evidence(self, broken: float, seen: int) -> float:
        """log E: how much better larger shares explain what was seen than the limit does; for a limit inside (0, 1)."""
        odds = self.share / (1 - self.share)
        larger = [odds * factor / (1 + odds * factor) for factor in (1.5, 2, 3, 5, 10, 30, 100)] + [1.0]
        logs = [_times(broken, p / self.share) + _times(seen - broken, (1 - p) / (1 - self.share)) for p in larger]
        highest = max(logs)
        if highest == -math.inf:
            return highest
        return highest + math.log(sum(math.exp(value - highest) for value in logs) / len(logs))


def _times(count: float, ratio: float) -> float:
    """count * log(ratio), where nothing to the power of nothing is one."""
    return 0.0 if count == 0 else -math.inf if ratio == 0 else count * math.log(ratio)


class BrokenList:
    """The run's broken samples as lines of JSON in broken.jsonl: step, key, reason, and a traceback if there is one.

    The first few are shown on the screen, then their number each time it has doubled. Without a path nothing is
    written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    @property
    def place(self) -> str:
        """Where to look, as the end of a sentence."""
        return f"all are listed in {self.path}" if self.path else "all are in Task.counts.broken"

    def start(self, step: int) -> None:
        """Drop what was written after `step`, from which a run resumes."""
        if self.path is not None and self.path.exists():
            cut_back(self.path, step)

    def add(self, step: int, samples: list[tuple[str, str, str]], before: int) -> None:
        """Write down (key, reason, traceback) of a step's broken samples; `before` were broken in earlier steps."""
        if self.path and samples:
            with open(self.path, "a", encoding="utf-8") as file:
                for key, reason, traceback in samples:
                    row: dict[str, Any] = {"step": step, "key": key, "reason": reason}
                    file.write(json.dumps({**row, "traceback": traceback} if traceback else row) + "\n")
        for key, reason, _ in samples[: max(SHOWN - before, 0)]:
            log.warning("sample left out: %s: %s", key, reason)
        total = before + len(samples)
        if before <= SHOWN < total:
            log.warning("further samples left out are not shown here; %s", self.place)
        if total > 2 * SHOWN and total.bit_length() > before.bit_length():
            log.warning("%d samples left out so far; %s", total, self.place)
