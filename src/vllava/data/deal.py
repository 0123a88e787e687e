"""A global batch dealt to ranks and rows, so that all have nearly the same to do: every rank waits for the busiest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Deal = Callable[[np.ndarray, int], list[list[np.ndarray]]]  # rows of a global batch and the ranks, to each one's pieces


FRAMES_WEIGH = 0.95  # of tokens: the LLM costs more than the encoders, and is trained
EVEN = 1.005  # the busiest rank over the mean, at which a deal is good enough
SLACK = 1.02  # texts' lengths are estimates


def every_nth(rows: np.ndarray, ranks: int) -> list[list[np.ndarray]]:
    """Every n-th sample to a rank, all in one piece."""
    return [[rows[rank::ranks]] for rank in range(ranks)]


def among_ranks(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Which samples of a global batch each rank gets; a pure function of its arguments, each sample exactly once.

    costs [samples, 2]: tokens, and frames to encode. The most costly goes first, to the rank that is then least busy
    (Graham, 1969, "Bounds on Multiprocessing Timing Anomalies"); then the busiest rank exchanges a sample, as long as
    that helps.
    """
    if ranks == 1:
        return [np.arange(len(costs))]
    weight = costs * (ranks / np.maximum(costs.sum(0), 1)) * (1.0, FRAMES_WEIGH)  # 1.0 is a rank's fair share of tokens
    load = np.zeros((ranks, 2))
    owner = np.empty(len(costs), np.int64)
    for sample in np.argsort(-weight.max(1), kind="stable"):
        then = load + weight[sample]
        owner[sample] = np.argmin(then.max(1) + 1e-6 * then.sum(1))
        load[owner[sample]] += weight[sample]
    _exchange(weight, owner, load)
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


def _exchange(weight: np.ndarray, owner: np.ndarray, load: np.ndarray) -> None:
    """Improve a deal in place: the busiest rank gives a sample to another one, or changes it for one of theirs."""
    ranks = len(load)
    for _ in range(4 * ranks):
        busiest = int(np.argmax(load.max(1)))
        worst = load[busiest].max()
        mine, theirs = np.flatnonzero(owner == busiest), np.flatnonzero(owner != busiest)
        if worst <= EVEN or len(mine) < 2:
            return
        others = np.flatnonzero(np.arange(ranks) != busiest)
        partner = np.concatenate([owner[theirs], others])
        back = np.concatenate([weight[theirs], np.zeros((len(others), 2))])  # the last of them: nothing in return
        given = weight[mine][:, None] - back
        after = np.maximum((load[busiest] - given).max(2), (load[partner] + given).max(2))
        own, other = np.unravel_index(np.argmin(after), after.shape)
        if after[own, other] >= worst - 1e-6:
            return
        owner[mine[own]] = partner[other]
        if other < len(theirs):
            owner[theirs[other]] = busiest
        load[busiest] -= given[own, other]
        load[partner[other]] += given[own, other]


def into_rows(tokens: list[np.ndarray], budget: int) -> list[list[np.ndarray]]:
    """The rows of each rank, from the tokens of each rank's samples: evenly filled, and as many on each rank.

    As few rows as keep every one within the budget; only a sample that alone is longer has a row to itself that is
    not. Rows are empty where a rank has fewer samples.
    """
    count = max(1, *(-(-int(SLACK * sizes.sum()) // budget) for sizes in tokens))
    while True:
        dealt = [_evenly(sizes, count) for sizes in tokens]
        fits = [
            SLACK * sizes[row].sum() <= budget or len(row) == 1
            for sizes, rows in zip(tokens, dealt, strict=True)
            for row in rows
        ]
        if all(fits):
            return dealt
        count += 1


def _evenly(sizes: np.ndarray, count: int) -> list[np.ndarray]:
    filled = np.zeros(count, np.int64)
    row = np.empty(len(sizes), np.int64)
    for sample in np.argsort(-sizes, kind="stable"):
        row[sample] = np.argmin(filled)
        filled[row[sample]] += sizes[sample]
    return [np.flatnonzero(row == number) for number in range(count)]
