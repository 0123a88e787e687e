"""Fair timing on a noisy machine: contenders take turns, and ratios are taken within a turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds of each contender, one for each turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """How many times as fast as the reference: the median over the turns of the ratio within a turn."""
        pairs = zip(self.seconds[reference], self.seconds[name], strict=True)
        return median(theirs / ours for theirs, ours in pairs)


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """The function as a contender: one that says how many seconds it took."""

    def run() -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    return run


def take_turns(contenders: dict[str, Callable[[], float]], repeats: int, warmup: int = 1) -> Timing:
    """Run every contender once a turn, in an order that changes from turn to turn; the first turns are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for turn in range(warmup + repeats):
        shuffle(order)
        for name in order:
            spent = contenders[name]()
            if turn >= warmup:
                seconds[name].append(spent)
    return Timing(seconds)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The p of the power law, cost = c * size^p, that fits best."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])
