"""What becomes of a block, some consecutive rows: one shard, or in a dry run its numbers. The same for every executor.

A block's shard depends on its rows, their media and the settings alone, so it is the same whoever makes it, and when.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.annotations import Dataset, rows
from data_prep.media import Loaded, MediaSettings, load, measure
from data_prep.rows import Draft, MediaRef, draft
from data_prep.shards import members
from vllava.data.broken import printable, why
from vllava.data.index import SAMPLE_BYTES, SAMPLE_MEMBERS, Facts, facts_of, facts_of_parsed, index_path
from vllava.data.record import MediumFile
from vllava.data.tar import BLOCK
from vllava.data.tar_writer import RECORD
from vllava.data.writing import write_json, write_tar
from vllava.errors import UserError, reason

STATE = ".unfinished"  # in the folder: what is known of the blocks that are done
BLOCK_BYTES = 1 << 27  # that rows themselves hold, media among it: a block ends with the row that reaches it
TRAIN, HELD_OUT = "train", "held-out"


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a part of the data: of each its number, where it stands, and the row or why there is none."""

    part: str  # the folder within the folder: "", or train and held-out
    number: int
    rows: list[tuple[int, str, dict[str, Any] | str]]

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


@dataclass(frozen=True)
class Reject:
    """A row that is left out, and why; `medium` is the name of the one that is at fault, if one is."""

    row: int
    where: str
    id: str | int | None
    medium: str | None
    reason: str


@dataclass
class Outcome:
    """What became of a block: its shard's entry in the manifest (None without samples), its rejects, its samples' ids.

    In a dry run there is no shard; `modalities` and `bytes` say what there would be.
    """

    rows: int = 0
    shard: dict | None = None
    rejects: list[Reject] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # as JSON; of the rows that have one
    modalities: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def written(self) -> int:
        return sum(self.modalities.values())


# --- rows to blocks ---------------------------------------------------------------------------------------------------


def blocks(dataset: Dataset, rows_per_shard: int, held_out: float) -> Iterator[Block]:
    """All rows of a data set as blocks; raises UserError where the annotations cannot be read on."""
    waiting: dict[str, list] = {}
    numbers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for number, (where, row) in enumerate(rows(dataset)):
        part = _part(number, row, dataset, held_out) if held_out else ""
        waiting.setdefault(part, []).append((number, where, row))
        weights[part] += _weight(row)
        if len(waiting[part]) == rows_per_shard or weights[part] >= BLOCK_BYTES:
            yield Block(part, numbers[part], waiting.pop(part))
            numbers[part] += 1
            weights[part] = 0
    for part in sorted(waiting):
        yield Block(part, numbers[part], waiting[part])


def _weight(row: Any) -> int:
    """The bytes, about, of what a row holds: texts, which may be media in base64, and media."""
    total, values = 0, [row]
    while values:  # every row passes here: no recursion
        value = values.pop()
        if isinstance(value, (str, bytes, bytearray)):
            total += len(value)
        elif isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            values.extend(value)
    return total


def _part(number: int, row: dict | str, dataset: Dataset, held_out: float) -> str:
    """Drawn for each row by its number; rows that name the same media stay together, so that none is in both parts."""
    names = (*dataset.fields.image, *dataset.fields.video, *dataset.fields.video_id)
    media = [row[name] for name in names if isinstance(row.get(name), (str, list))] if isinstance(row, dict) else []
    what = json.dumps(media or number, default=lambda _: number)
    drawn = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big")
    return HELD_OUT if drawn < held_out * 2**64 else TRAIN


# --- a block ----------------------------------------------------------------------------------------------------------


def make_block(folder: Path, dataset: Dataset, settings: MediaSettings, block: Block) -> Outcome:
    """Write a block's shard and, when that is whole, what became of the block; returns it without rejects and ids.

    Raises UserError where the folder cannot be written.
    """
    try:
        outcome = _write(folder / block.part / f"{block.name}.tar", block, dataset, settings)
        write_outcome(folder, block, outcome)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{folder} cannot be written ({reason(error)}). What was finished is kept: "
            f"{'make room' if full else 'mend that'} and run the same command again."
        ) from error
    return Outcome(outcome.rows, outcome.shard, modalities=outcome.modalities, bytes=outcome.bytes)


def _write(path: Path, block: Block, dataset: Dataset, settings: MediaSettings) -> Outcome:
    outcome = Outcome(len(block.rows))
    samples = _samples(block, dataset, settings, outcome)
    for first in samples:  # without one there is no shard
        outcome.shard = write_tar(path, chain([first], samples))
        outcome.modalities, outcome.bytes = Counter(outcome.shard["modalities"]), outcome.shard["bytes"]
    if outcome.shard is None:
        for left in (path, index_path(path)):
            left.unlink(missing_ok=True)
    return outcome


def _samples(
    block: Block, dataset: Dataset, settings: MediaSettings, outcome: Outcome
) -> Iterator[tuple[str, dict[str, bytes], Facts]]:
    """Keys, files and facts of the block's samples; its rejects and ids are put down in the outcome on the way."""
    for number, where, row in block.rows:
        key = f"{number:09d}"
        with _rejecting(outcome, number, where, row) as medium:
            drafted = _draft(row, dataset)
            media = [load(medium.now(ref), settings) for ref in drafted.media]
            medium.now(None)
            files = _files(key, drafted.record, media)
            facts = _facts(drafted, media, files)
            if "id" in drafted.record:
                outcome.ids.append(json.dumps(drafted.record["id"], default=str))
        if not medium.failed:
            yield key, files, facts


def _facts(drafted: Draft, media: list[Loaded], files: dict[str, bytes]) -> Facts:
    """The facts of a sample; raises UserError if a reader would not find one in its files."""
    if drafted.certain:
        opened = [
            MediumFile(one.data, prepared=True) if isinstance(one.data, list) else MediumFile([one.data])
            for one in media
        ]
        return facts_of_parsed(drafted.record["conversations"], [ref.kind for ref in drafted.media], opened)
    facts = facts_of(files)
    if facts.broken is not None:
        raise UserError(facts.broken)
    return facts


def look_at_block(dataset: Dataset, settings: MediaSettings, block: Block) -> Outcome:
    """What `make_block` would do, without writing, and without reading media unless they are to be decoded."""
    outcome = Outcome(len(block.rows))
    for number, where, row in block.rows:
        with _rejecting(outcome, number, where, row) as medium:
            drafted = _draft(row, dataset)
            sizes = [measure(medium.now(ref), settings) for ref in drafted.media]
            text = len(json.dumps(drafted.record, ensure_ascii=False).encode())
            kinds = sorted({ref.kind for ref in drafted.media}) or ["text"]
            outcome.modalities["mixed" if len(kinds) > 1 else kinds[0]] += 1
            outcome.bytes += sum(BLOCK + -(-size // BLOCK) * BLOCK for size in (text, *sizes))
            if "id" in drafted.record:
                outcome.ids.append(json.dumps(drafted.record["id"], default=str))
    if outcome.written:
        outcome.bytes = -(-(outcome.bytes + 2 * BLOCK) // RECORD) * RECORD
    return outcome


class _rejecting:  # noqa: N801 (used as a with statement)
    """Whatever goes wrong inside makes the row a reject: of the medium that is looked at, if one is."""

    def __init__(self, outcome: Outcome, number: int, where: str, row: dict | str) -> None:
        self.outcome, self.number, self.where, self.row = outcome, number, where, row
        self.medium: MediaRef | None = None
        self.failed = False

    def now(self, ref: Any) -> Any:
        """Say which medium is looked at."""
        self.medium = ref
        return ref

    def __enter__(self) -> _rejecting:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed = True
        given = self.row.get("id") if isinstance(self.row, dict) else None
        given = printable(given, 200) if isinstance(given, str) else given if type(given) is int else None
        medium = printable(self.medium.name, 500) if self.medium else None
        self.outcome.rejects.append(Reject(self.number, self.where, given, medium, why(error)))
        return True


def _draft(row: dict | str, dataset: Dataset) -> Draft:
    if isinstance(row, str):
        raise UserError(row)
    return draft(row, dataset)


def _files(key: str, record: dict, media: list[Loaded]) -> dict[str, bytes]:
    """The members of a sample; raises UserError if it would not be read again."""
    times = {str(number): medium.times for number, medium in enumerate(media) if medium.times is not None}
    record = {**({} if "id" in record else {"id": key}), **record, **({"frame_times": times} if times else {})}
    files = members(key, record, [(medium.extension, medium.data) for medium in media])
    if (total := sum(map(len, files.values()))) > SAMPLE_BYTES or len(files) > SAMPLE_MEMBERS:
        raise UserError(
            f"its {len(files)} files have {total} bytes; a sample has at most {SAMPLE_MEMBERS} files of {SAMPLE_BYTES}"
        )
    return files


# --- what is known of blocks that are done ----------------------------------------------------------------------------


def outcome_path(folder: Path, part: str, name: str) -> Path:
    return folder / STATE / part / f"{name}.json"


def write_outcome(folder: Path, block: Block, outcome: Outcome) -> None:
    """Put down what became of a block."""
    content = {
        "rows": outcome.rows,
        "shard": outcome.shard,
        "rejects": [vars(reject) for reject in outcome.rejects],
        "ids": outcome.ids,
    }
    write_json(outcome_path(folder, block.part, block.name), content)


def read_outcome(folder: Path, part: str, name: str) -> Outcome | None:
    """What became of a block; None where it is not known to be done, or its shard is not as it was written."""
    try:
        content = json.loads(outcome_path(folder, part, name).read_bytes())
        shard = content["shard"]
        if shard and (folder / part / shard["name"]).stat().st_size != shard["bytes"]:
            return None
        modalities = Counter(shard["modalities"] if shard else {})
        rejects = [Reject(**reject) for reject in content["rejects"]]
        return Outcome(content["rows"], shard, rejects, content["ids"], modalities, shard["bytes"] if shard else 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
