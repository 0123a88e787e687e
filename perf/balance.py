"""How evenly ranks are loaded on the paper's mixtures: the busiest rank's tokens over the mean, which all wait for."""

from __future__ import annotations

from functools import partial
from statistics import mean

import numpy as np

from perf.timing import timed
from vllava.data.deal import among_ranks

HEADER = (
    "simulated: media as in the paper (256 tokens an image, 8 x 257 a video), texts log-normal around 60 tokens in "
    "stage 1 and 220 in stage 2; the busiest rank over the mean, averaged over steps; ms to deal a global batch"
)
COUNTS = {"stage1": (558, 0, 702), "stage2": (624, 41, 100)}  # thousands of images, texts and videos: 4.1.2
TEXT = {"stage1": (60, 0.3), "stage2": (220, 0.8)}  # median and spread
STEPS = 20


def drawn(stage: str, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Costs of samples drawn from a stage's mixture, [samples, 2]: tokens, and frames to encode."""
    shares = np.array(COUNTS[stage]) / sum(COUNTS[stage])
    kind = rng.choice(3, size=samples, p=shares)
    median, spread = TEXT[stage]
    text = np.clip(rng.lognormal(np.log(median), spread, samples), 30, 2000).astype(int)
    return np.stack([np.array([256, 0, 2056])[kind] + text, np.array([1, 0, 8])[kind]], axis=1)


def excess(batch: np.ndarray, shares: list[np.ndarray]) -> np.ndarray:
    """The busiest rank over the mean, of tokens and of frames."""
    loads = np.array([batch[share].sum(0) for share in shares])
    return loads.max(0) / loads.mean(0)


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows for 8 and 64 ranks, and 2 to 32 samples a rank."""
    rows = []
    for stage in COUNTS:
        for ranks, each in ((8, 16), (8, 32), (64, 2), (64, 4), (64, 16)):
            rng = np.random.default_rng(0)
            batches = [drawn(stage, ranks * each, rng) for _ in range(STEPS)]
            seconds = [timed(partial(among_ranks, batch, ranks))() for batch in batches]
            before = [excess(batch, [np.arange(rank, len(batch), ranks) for rank in range(ranks)]) for batch in batches]
            after = [excess(batch, among_ranks(batch, ranks)) for batch in batches]
            rows.append(
                {
                    "stage": stage,
                    "ranks": ranks,
                    "samples a rank": each,
                    "every n-th: tokens": mean(one[0] for one in before),
                    "dealt: tokens": mean(one[0] for one in after),
                    "dealt: frames": mean(one[1] for one in after),
                    "ms": 1000 * mean(seconds),
                }
            )
    return rows
