"""What a run has taken since it began, over all its processes: kept in what it resumes from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

KEPT = 100  # broken samples in memory and in checkpoints


@dataclass
class Counts:
    """Samples, tokens and steps that were left out; samples that were seen include the broken ones."""

    broken: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of the first of them
    samples_seen: int = 0
    samples_broken: int = 0
    turns_dropped: int = 0
    broken_by_shard: dict[str, int] = field(default_factory=dict)
    drawn: list[int] = field(default_factory=list)  # samples of each source of the data
    tokens_seen: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    scaler_skips: int = 0  # steps in float16 that its scaler left out, to scale the next ones less

    def add_broken(self, found: list[tuple[str, str]]) -> None:
        """Note samples that were left out: "shard:key", and why."""
        self.broken += found[: max(KEPT - len(self.broken), 0)]
        for key, _ in found:
            shard = key.rpartition(":")[0]
            self.broken_by_shard[shard] = self.broken_by_shard.get(shard, 0) + 1

    def state(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state, which may hold other things too."""
        for one in fields(self):
            setattr(self, one.name, state.get(one.name, getattr(self, one.name)))

    def facts(self, sources: list[str]) -> dict[str, Any]:
        """What a run's figures say of them."""
        facts: dict[str, Any] = {
            "samples": self.samples_seen,
            "broken": self.samples_broken,
            "dropped_first_turns": self.turns_dropped,
        }
        if self.skipped:
            facts["skipped_steps"] = self.skipped
        if self.scaler_skips:
            facts["scaler_skips"] = self.scaler_skips
        if len(sources) > 1:
            facts["mixture"] = dict(zip(sources, self.drawn, strict=True))
        return facts
