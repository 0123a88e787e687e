"""Why samples are no samples: how often each kind of reason occurs, with an example."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vllava.data.address import is_remote, local_path
from vllava.data.broken import printable
from vllava.errors import reading

REJECTS = "rejects.jsonl"  # beside a manifest: the rows that were left out when the shards were made
KINDS = 200  # of reasons that are told apart
OTHER = "other reasons"
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")


@dataclass
class Reasons:
    """Reasons that differ in names and numbers alone are of one kind, and counted together."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)  # kind -> (where, the reason in full)

    def add(self, where: str, reason: str) -> None:
        """Count one; `where` names the sample."""
        kind = _kind(reason)
        if kind not in self.counts and len(self.counts) >= KINDS:
            kind = OTHER
        self.counts[kind] += 1
        self.examples.setdefault(kind, (printable(where), printable(reason)))

    def __contains__(self, reason: str) -> bool:
        """Whether one of its kind was counted."""
        return _kind(reason) in self.counts

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def rows(self) -> list[tuple[int, str, str]]:
        """(how many, the first one's reason, where it stands), the most frequent first."""
        return [(count, self.examples[kind][1], self.examples[kind][0]) for kind, count in self.counts.most_common()]


def _kind(reason: str) -> str:
    return _PARTICULAR.sub("…", printable(reason, 200))


def read_rejects(folder: str) -> Reasons:
    """The rejects of a folder of shards, if a list of them lies there on this machine; read a line at a time."""
    found = Reasons()
    if is_remote(folder) or not (path := Path(local_path(folder)) / REJECTS).is_file():
        return found
    with reading(path), open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                said = json.loads(line)
                medium = said.get("medium", said.get("media"))
                where = f"{said['where']}, {medium}" if medium else str(said["where"])
                found.add(where, str(said["reason"]))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                found.add(f"line {number} of {REJECTS}", "the line cannot be read")
    return found
