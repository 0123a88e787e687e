"""The order of an epoch: which samples it holds, in which order, from nothing but the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vllava.data.shards import Shard


def epoch_order(
    shards: list[Shard], seed: int, epoch: int, window: int, draws: Sequence[int] | None = None
) -> np.ndarray:
    """The order in which an epoch visits samples [sum of draws, 2]: rows of (shard index, index in the shard).

    draws: how many samples of each source an epoch holds; by default all of them once. Samples of a source come in
    passes over it, each in an order of its own, and epochs take up where the last one ended: at any moment every sample
    of a source was seen as often as any other, or once more.

    Shards are shuffled, taken `window` at a time, and the samples of a window are shuffled together: a batch mixes the
    sources, and only `window` shards are being read at any time. The order depends on nothing but the arguments, so it
    is the same for any number of workers and ranks.
    """
    parts = list(_parts(shards, seed, epoch, draws))
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(parts))
    order = [np.empty((0, 2), np.int64)]
    for start in range(0, len(parts), window):
        rows = np.concatenate(
            [
                np.stack([np.full(len(indices), shard), indices], axis=1)
                for shard, indices in (parts[number] for number in shuffled[start : start + window])
            ]
        )
        order.append(rng.permutation(rows))
    return np.concatenate(order)


def _parts(shards: list[Shard], seed: int, epoch: int, draws: Sequence[int] | None) -> Iterator[tuple[int, np.ndarray]]:
    """The shards of an epoch, whole or in part, and one that comes twice twice: its index, the samples' indices."""
    for source in sorted({shard.source for shard in shards}):
        own = [number for number, shard in enumerate(shards) if shard.source == source]
        size = sum(shards[number].samples for number in own)
        taken = size if draws is None else draws[source]
        place, end = epoch * taken, (epoch + 1) * taken  # in the endless row of passes over the source
        while place < end:
            number, start = divmod(place, size)
            stop = min(size, start + end - place)
            yield from _of_pass(shards, own, (start, stop), (start, stop) == (0, size), [seed, source, number])
            place += stop - start


def _of_pass(
    shards: list[Shard], own: list[int], span: tuple[int, int], whole: bool, seed: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """The samples from one place to another of a pass over a source's shards."""
    if whole:
        yield from ((number, np.arange(shards[number].samples)) for number in own)
        return
    first = 0
    for number in np.random.default_rng(seed).permutation(own).tolist():
        count = shards[number].samples
        start, stop = max(span[0] - first, 0), min(span[1] - first, count)
        if start < stop:
            yield number, np.random.default_rng([*seed, number]).permutation(count)[start:stop]
        first += count
