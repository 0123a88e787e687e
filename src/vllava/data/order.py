"""The order of an epoch: which samples it holds, in which order, from nothing but the seed and the epoch."""

from __future__ import annotations

import numpy as np

from vllava.data.shards import Shard


def epoch_order(shards: list[Shard], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order in which an epoch visits samples [sum of samples, 2]: rows of (shard index, index in the shard).

    Shards are shuffled, taken `window` at a time, and the samples of a window are shuffled together: every
    sample comes exactly once, a batch mixes the sources, and only `window` shards are being read at any time.
    The order depends on nothing but the arguments, so it is the same for any number of workers and ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(shards))
    parts = []
    for start in range(0, len(shards), window):
        chosen = shuffled[start : start + window]
        counts = [shards[i].samples for i in chosen]
        rows = np.stack([np.repeat(chosen, counts), np.concatenate([np.arange(count) for count in counts])], axis=1)
        parts.append(rng.permutation(rows))
    return np.concatenate(parts)
