"""The numbers of a preparation: rows, samples, rejects by their reasons, ids that come more than once."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.blocks import Outcome, Reject

EXAMPLES = 3  # of each reason
REASONS = 100  # different ones that are told apart
_AT_ONCE = 1 << 19  # hashes of ids that are in memory at a time
# What differs between two rejects of one kind: quoted names, numbers, a library's words about the file at hand.
_DETAIL = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d.,]*")


@dataclass
class Kind:
    """Rejects of one reason: how many, and those with the lowest numbers."""

    count: int = 0
    examples: list[Reject] = field(default_factory=list)

    def add(self, reject: Reject) -> None:
        self.count += 1
        self.examples = sorted([*self.examples, reject], key=lambda one: one.row)[:EXAMPLES]


@dataclass
class Tally:
    """The sums over blocks."""

    rows: int = 0
    rejected: int = 0
    shards: int = 0
    bytes: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Kind] = field(default_factory=dict)
    repeated: dict = field(default_factory=dict)  # see Ids.repeated

    @property
    def written(self) -> int:
        return sum(self.modalities.values())

    def add(self, outcome: Outcome) -> None:
        """Count a block; raises RuntimeError where its rows are not as many as its samples and rejects."""
        if outcome.rows != outcome.written + len(outcome.rejects):
            raise RuntimeError(
                f"{outcome.rows} rows gave {outcome.written} samples and {len(outcome.rejects)} rejects: "
                "this is an error in the program."
            )
        self.rows += outcome.rows
        self.rejected += len(outcome.rejects)
        self.shards += outcome.written > 0
        self.bytes += outcome.bytes
        self.modalities.update(outcome.modalities)
        for reject in outcome.rejects:
            kind = _DETAIL.sub("…", reject.reason)
            if kind not in self.reasons and len(self.reasons) >= REASONS:
                kind = "other reasons"
            self.reasons.setdefault(kind, Kind()).add(reject)

    def counts(self) -> dict:
        """For the manifest."""
        return {
            "rows": self.rows,
            "written": self.written,
            "rejected": self.rejected,
            "modalities": dict(sorted(self.modalities.items())),
            "repeated_ids": self.repeated,
        }

    def lines(self, would: bool = False) -> list[str]:
        """In words, for the screen; of a dry run, what would be."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.modalities.items())) or "none"
        size, about = _size(self.bytes), "about " if would else ""
        shards = f"{self.shards:,} shard{'s' if self.shards != 1 else ''}"
        written, rejected = ("would be written", "would be rejected") if would else ("written", "rejected")
        lines = [
            f"{self.written:,} of {self.rows:,} rows {written} ({kinds}): {shards}, {about}{size}",
            f"{self.rejected:,} rows {rejected}{':' if self.rejected else ''}",
        ]
        for reason, kind in sorted(self.reasons.items(), key=lambda item: (-item[1].count, item[0])):
            lines.append(f"  {kind.count:,} x {reason}")
            lines += [f"      {_example(reject, reason)}" for reject in kind.examples]
        if self.repeated.get("ids"):
            names = ", ".join(self.repeated["examples"])
            lines.append(
                f"{self.repeated['rows']:,} samples share {self.repeated['ids']:,} ids (such as {names}): they are "
                "kept, as keys are made from the rows' numbers"
            )
        return lines


def _example(reject: Reject, said: str) -> str:
    medium = f", {reject.medium}" if reject.medium else ""
    return f"{reject.where}{medium}" + (f": {reject.reason}" if reject.reason != said else "")


def _size(size: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


class Ids:
    """Which ids come more than once, in bounded memory: they are kept in two temporary files."""

    def __init__(self, folder: Path | None = None) -> None:
        self._hashes = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._texts = tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder)  # noqa: SIM115
        self.total = 0

    def add(self, ids: list[str]) -> None:
        """Ids as JSON, which is one line."""
        digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in ids)
        self._hashes.write(b"".join(digests))
        self._texts.writelines(f"{text}\n" for text in ids)
        self.total += len(ids)

    def repeated(self) -> dict:
        """{"ids": how many come more than once, "rows": how many rows have them, "examples": the first of them}."""
        ids = rows = 0
        some: list[int] = []
        turns = -(-self.total // _AT_ONCE) or 1
        for turn in range(turns):
            kept = [part[part % turns == turn] for part in self._parts()]
            values, counts = np.unique(np.concatenate(kept or [np.empty(0, np.uint64)]), return_counts=True)
            again = values[counts > 1]
            ids, rows = ids + len(again), rows + int(counts[counts > 1].sum())
            some = sorted([*some, *again[:EXAMPLES].tolist()])[:EXAMPLES]
        return {"ids": ids, "rows": rows, "examples": self._named(some)}

    def _parts(self) -> Iterator[np.ndarray]:
        self._hashes.seek(0)
        while part := self._hashes.read(_AT_ONCE):
            yield np.frombuffer(part, np.uint64)

    def _named(self, hashes: list[int]) -> list[str]:
        """The texts of hashes."""
        wanted, found, start = np.array(hashes, np.uint64), [], 0
        self._texts.seek(0)
        for part in self._parts() if hashes else ():
            places = [int(np.flatnonzero(part == value)[0]) for value in wanted if value in part]
            lines = list(islice(self._texts, len(part)))
            found += [str(json.loads(lines[place])) for place in places]
            wanted = wanted[~np.isin(wanted, part)]
            start += len(part)
            if not len(wanted):
                break
        return sorted(found)
