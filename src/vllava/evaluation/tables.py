"""Hugging Face data sets in Parquet files: tables found by their columns, rows, and media that stay where they lie."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllava.errors import UserError, reading
from vllava.evaluation.files import REMEDY, Record, medium_file

Columns = Mapping[str, tuple[str, ...]]  # a name of ours -> the names that a column may have in a file

MEDIA = ("image", "video")  # names of ours whose values are media
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_SPLITS = {"train", "validation", "val", "dev", "test", "testdev"}  # one of these is never taken for another
_ROWS = 4096


@dataclass(frozen=True)
class Table:
    """A Parquet file of a data set. folder: of its configuration, below the data set's; split: as its name says."""

    path: Path
    folder: str
    split: str
    columns: tuple[str, ...]

    def column(self, names: Sequence[str]) -> str | None:
        """The column that has one of these names, in whatever case."""
        by_name = {column.lower(): column for column in self.columns}
        return next((by_name[name.lower()] for name in names if name.lower() in by_name), None)

    def has(self, columns: Columns) -> bool:
        return all(self.column(names) for names in columns.values())


@dataclass(frozen=True)
class TableMedium:
    """An image or a video in a cell of a Parquet file: bytes, or {"bytes", "path"} as the library `datasets` writes it.

    identity: what the data set calls it, where several rows hold the same; else its place is its key.
    """

    kind: str
    path: Path
    row_group: int
    row: int  # in its group
    column: str
    identity: str = ""

    @property
    def key(self) -> str:
        return self.identity or f"{self.path}#{self.row_group}.{self.row}"

    def read(self) -> bytes:
        with reading(f"The {self.kind} in row {self.row} of row group {self.row_group} of {self.path}", REMEDY):
            cell = _cells(self.path, self.row_group, self.column)[self.row].as_py()
            found = cell.get("bytes") if isinstance(cell, dict) else cell
            if found is None:
                name = (cell or {}).get("path") or ""
                return medium_file(self.kind, self.path.parent, name).read()
            return bytes(found)


@lru_cache(maxsize=1)  # a row group of pictures is as large as the pictures
def _cells(path: Path, row_group: int, column: str) -> Any:
    # Not buffered ahead, for the same reason.
    file = _parquet().ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    return file.read_row_group(row_group, columns=[column], use_threads=False).column(0)


def find_tables(folder: Path) -> list[Table]:
    """Every Parquet file in a folder and below it; raises UserError for one that cannot be read."""
    found = []
    for path in sorted(folder.rglob("*.parquet")):
        place, split = path.parent, path.stem
        if shard := _SHARD.fullmatch(split):
            split = shard["split"]
        elif split.isdigit():  # SPLIT/0000.parquet, as the hub itself converts data sets
            place, split = place.parent, place.name.removeprefix("partial-")
        with reading(path, REMEDY):
            names = tuple(_parquet().read_schema(path).names)
        found.append(Table(path, place.relative_to(folder).as_posix(), split, names))
    return found


def choose_tables(
    folder: Path, columns: Columns, splits: Collection[str] = (), configurations: Collection[str] = ()
) -> list[Table]:
    """The files below a folder with these columns, of one split and one configuration, in their order.

    splits: the names that the split may have, none: all are taken. configurations: the folder that is meant where
    several fit. Raises UserError that says what there is, where none fits, or several do.
    """
    every = find_tables(folder)
    found = [table for table in every if table.has(columns)]
    if not found:
        wanted = ", ".join(" or ".join(names) for names in columns.values())
        there = "; ".join(f"{t.path.relative_to(folder)} has {', '.join(t.columns)}" for t in every[:3])
        raise UserError(f"{folder} has no Parquet file with the columns {wanted}. {there or 'It has none at all'}.")
    names = sorted({table.split for table in found})
    chosen = [table for table in found if not splits or table.split.lower() in splits]
    if not chosen and len(names) == 1 and names[0].lower() not in _SPLITS:
        chosen = found  # a name of its own
    if not chosen:
        raise UserError(f"{folder} has no split {' or '.join(splits)}; it has {', '.join(names)}.")
    folders = sorted({table.folder for table in chosen})
    meant = [name for name in folders if Path(name).name.lower() in {c.lower() for c in configurations}]
    if len(folders) > 1 and len(meant) != 1:
        raise UserError(f"{folder} has several data sets that fit: {', '.join(folders)}. Give one of these folders.")
    return [table for table in chosen if table.folder == (meant or folders)[0]]


def read_rows(table: Table, columns: Columns) -> list[Record]:
    """The rows of a file under our names; of `columns`, those that the file lacks are left out.

    "image" and "video" are media, None in a row without; bytes stay in the file. Where there is an "identity", it is
    the medium's key.
    """
    taken = {ours: name for ours, names in columns.items() if (name := table.column(names))}
    with reading(table.path, REMEDY):
        file = _parquet().ParquetFile(table.path, pre_buffer=False, buffer_size=2**20)
        read = {ours: _without_bytes(file.schema_arrow.field(name), ours) for ours, name in taken.items()}
        records: list[Record] = []
        for group in range(file.num_row_groups):
            wanted = list(read.values())
            number = 0
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                for values in batch.to_pylist():
                    record = Record({}, table.path, f", row {len(records)}")
                    for ours, name in taken.items():
                        record[ours] = values[name]
                    for kind in set(taken) & set(MEDIA):
                        stored = TableMedium(kind, table.path, group, number, taken[kind])
                        record[kind] = _medium(stored, record)
                    records.append(record)
                    number += 1
    return records


def _without_bytes(field: Any, ours: str) -> str:
    """What is read of a column: of media what they are called, where that can be read alone."""
    children = [field.type.field(i).name for i in range(field.type.num_fields)]
    return f"{field.name}.path" if ours in MEDIA and "path" in children else field.name


def _medium(stored: TableMedium, record: Record) -> Any:
    value = record[stored.kind]
    if value is None:
        return None
    if isinstance(value, str):  # beside the table
        return medium_file(stored.kind, stored.path.parent, value)
    return replace(stored, identity=str(record["identity"])) if record.get("identity") is not None else stored


def read_table(
    folder: Path,
    columns: Columns,
    optional: Columns | None = None,
    splits: Collection[str] = (),
    configurations: Collection[str] = (),
) -> list[Record]:
    """All rows of the files that `choose_tables` finds by `columns`, with these and the `optional` columns."""
    chosen = choose_tables(folder, columns, splits, configurations)
    return [record for table in chosen for record in read_rows(table, {**columns, **(optional or {})})]


def _parquet() -> Any:
    """pyarrow's reader; raises UserError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow: pip install 'vllava[benchmarks]'.") from error
    return pyarrow.parquet
