"""Reads the files that benchmarks are published in. Tables of Parquet: tables.py; where they all lie: places.py."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vllava.errors import UserError, reading, reason
from vllava.evaluation.benchmark import Benchmark
from vllava.evaluation.questions import FileMedium, Medium, Question

REMEDY = "Is it cut or damaged? Copy or download it again."


class Record(dict[str, Any]):
    """A record that knows where it was read, for the errors about it."""

    def __init__(self, values: Mapping[str, Any], path: Path, place: str) -> None:
        super().__init__(values)
        self.path, self.place = path, place

    @property
    def where(self) -> str:
        return f"{self.path}{self.place}"

    def need(self, *names: str) -> Any:
        """The value of the first of these fields that is there; raises UserError where none is."""
        for name in names:
            if self.get(name) is not None:
                return self[name]
        wanted = " or ".join(map(repr, names))
        raise UserError(f"{self.where}: the record has no {wanted}; it has {', '.join(map(repr, list(self)[:20]))}.")

    def text(self, *names: str) -> str:
        """The same, as a text; raises UserError also where it is neither text nor number."""
        value = self.need(*names)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{self.where}: {names[0]!r} is no text but a {type(value).__name__}.")
        return str(value)


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises UserError that names the file and, where that is no JSON, the line."""
    with _opened(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: this is no JSON ({error.msg}). {REMEDY}") from error


def read_records(path: Path, name: str = "") -> list[Record]:
    """The records of a file that holds a JSON list of objects, or has it under a name."""
    found, inside = read_json(path), f", {name}" if name else ""
    if name:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise UserError(f"{path}{inside} holds no list of records but a {type(found).__name__}. {REMEDY}")
    return [_record(values, path, f"{inside}, record {number}") for number, values in enumerate(found)]


def read_by_id(path: Path) -> dict[str, Record]:
    """The records of a file that holds a JSON object with one for each id."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no records by their ids but a {type(found).__name__}. {REMEDY}")
    return {id: _record(values, path, f", {id}") for id, values in found.items()}


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file with a JSON object on each line; empty lines are passed over."""
    records = []
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: this is no JSON ({reason(error)}). {REMEDY}") from error
                records.append(_record(values, path, f":{number}"))
    return records


def read_tsv(path: Path) -> list[Record]:
    """The rows of a file of tab-separated values with a header: every value the text that stands there."""
    return [row for row, _, _ in tsv_rows(path)]


def tsv_rows(path: Path) -> Iterator[tuple[Record, int, int]]:
    """The rows of such a file, one in memory at a time; of each, at which byte it begins, and how many it takes."""
    csv.field_size_limit(sys.maxsize)  # pictures lie in cells
    at = number = 0

    def lines(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal at, number
        for line in file:
            at, number = at + len(line), number + 1
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    def named(rows: Iterator[list[str]]) -> Iterator[list[str]]:
        try:
            yield from rows
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{number}: the row cannot be read ({reason(error)}). {REMEDY}") from error

    _require(path)
    with reading(path, REMEDY), open(path, "rb") as file:
        rows = named(csv.reader(lines(file), delimiter="\t", strict=True))
        header = next(rows, [])
        start, first = at, number + 1
        for cells in rows:
            if cells:
                if len(cells) != len(header):
                    told = f"{len(cells)} cells, the header {len(header)}"
                    raise UserError(f"{path}:{first}: the row has {told}. {REMEDY}")
                yield Record(dict(zip(header, cells, strict=True)), path, f":{first}"), start, at - start
            start, first = at, number + 1


@dataclass(frozen=True)
class TsvMedium:
    """An image or a video in a cell of a file of tab-separated values, in base64.

    start, size: the bytes of its row in the file; column: of the cell in the row; key: of what the cell holds.
    """

    kind: str
    path: Path
    start: int
    size: int
    column: int
    key: str

    def read(self) -> bytes:
        with reading(f"The {self.kind} at byte {self.start} of {self.path}", REMEDY), open(self.path, "rb") as file:
            csv.field_size_limit(sys.maxsize)
            file.seek(self.start)
            lines = (line.decode("utf-8-sig") for line in io.BytesIO(file.read(self.size)))
            cell = next(csv.reader(lines, delimiter="\t"))[self.column]
            return base64.b64decode(cell, validate=True)


def _record(values: Any, path: Path, place: str) -> Record:
    if not isinstance(values, dict):
        raise UserError(f"{path}{place}: this is no record but a {type(values).__name__}. {REMEDY}")
    return Record(values, path, place)


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    _require(path)
    with reading(path, REMEDY), open(path, encoding="utf-8-sig") as file:
        yield file


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"There is no file {path}. docs/benchmarks.md says where it comes from.")


def image_file(folder: Path, name: str) -> FileMedium:
    """The image of this name in a folder; see `medium_file`."""
    return medium_file("image", folder, name)


def medium_file(kind: str, folder: Path, name: str) -> FileMedium:
    """The medium of this name in a folder, there or not; raises UserError for a name that leads out of it."""
    path = PurePosixPath(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
        raise UserError(f"{folder}: {name[:100]!r} is no name of a file in this folder.")
    return FileMedium(kind, folder / path)


def unique(ids: Iterable[str], what: object) -> None:
    """Raises UserError that names an id of which there are two; `what` is where they lie."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            raise UserError(f"{what}: the id {id!r} is there twice. Answers are joined by id: keep one of them.")
        seen.add(id)


def warn(benchmark: Benchmark, warning: str) -> None:
    """Adds a warning to the benchmark's, once."""
    if warning not in benchmark.warnings:
        benchmark.warnings.append(warning)


def counted(benchmark: Benchmark, found: int, *also: int) -> None:
    """Warns where another number of questions is found than was published, in one release or `also` in another."""
    if benchmark.expected is not None and found not in (benchmark.expected, *also):
        published = " or ".join(f"{number:,}" for number in (benchmark.expected, *also))
        warn(benchmark, f"{found:,} questions are found, {published} were published")


def checked(benchmark: Benchmark, questions: list[Question], *also: int) -> list[Question]:
    """A benchmark's questions, their ids unique; warns of another number, see `counted`, and of missing media."""
    unique((question.id for question in questions), benchmark.root)
    counted(benchmark, len(questions), *also)
    present(benchmark, [medium for question in questions for medium in question.media])
    return questions


def present(benchmark: Benchmark, media: Sequence[Medium]) -> None:
    """Warns of media whose files are not there: a folder is listed once, no file is opened."""
    wanted: dict[Path, dict[str, Path]] = {}
    for medium in media:
        if isinstance(medium, FileMedium):
            wanted.setdefault(medium.path.parent, {})[medium.path.name] = medium.path
    missing: list[Path] = []
    for folder, names in wanted.items():
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        missing += [path for name, path in names.items() if name not in there]
    if missing:
        total = sum(map(len, wanted.values()))
        told = f"{len(missing):,} of {total:,} files of images and videos are not there, {missing[0]} is one of them"
        warn(benchmark, f"{told}: questions about them count as wrong")
