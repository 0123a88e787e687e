"""How far a preparation is: rows, rows a second, the time that is left."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from data_prep.annotations import Dataset, annotation_files, count, rows
from vllava.errors import UserError

_SMALL = 1 << 24  # bytes of annotations that are parsed to count their rows
_PIECE = 1 << 24
_TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")


class Progress:
    """A bar that counts rows, with rows a second and the time that is left where the number of rows is known."""

    def __init__(self, total: int | None, shown: bool = True) -> None:
        interval = 0.5 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=total, unit=" rows", disable=not shown, mininterval=interval, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, number: int, before: bool = False) -> None:
        """Count rows; those that were done before say nothing about the speed."""
        if before and not self.bar.disable:
            self.bar.initial += number
        self.bar.update(number)


def rows_about(dataset: Dataset) -> int | None:
    """The number of rows, or nearly so, in a second for each gigabyte; None where nothing tells.

    In large JSON files the first row's first key is counted, as parsing them would take as long as much of the work.
    """
    files = annotation_files(dataset)
    with suppress(UserError, OSError):  # whoever reads the rows will say what is wrong
        heads = [_head(file) for file in files]
        if all(head.startswith(_TABLES) for head in heads) or sum(file.stat().st_size for file in files) < _SMALL:
            return count(dataset)
        if not any(head.startswith((*_TABLES, b"\x1f\x8b")) for head in heads):
            first = next(rows(dataset), ("", {}))[1]
            if isinstance(first, dict) and first:
                return _occurrences(files, json.dumps(next(iter(first))).encode()) or None
    return None


def _head(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(8)


def _occurrences(files: Sequence[Path], what: bytes) -> int:
    return sum(piece.count(what) for file in files for piece in _pieces(file))


def _pieces(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        while piece := opened.read(_PIECE):
            yield piece
