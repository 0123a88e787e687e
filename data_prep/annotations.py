"""Rows of a data set's annotation files, one after the other: JSON, JSON lines, Parquet, Hugging Face data sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.dataset import Dataset, Fields, first_there, found, read_dataset
from data_prep.json_rows import json_count, json_rows
from data_prep.references import PATTERN
from data_prep.tables import is_table, table_count, table_files, table_rows
from vllava.errors import UserError

__all__ = ["Dataset", "Fields", "annotation_files", "count", "read_dataset", "rows"]

COUNTED_BYTES = 2**32  # of JSON that is parsed to know how many rows there are


def annotation_files(dataset: Dataset) -> list[Path]:
    """The files that are read, in order; raises UserError where a name or glob leads to none, or a file comes twice."""
    files = [file for name in dataset.annotations for file in _found(dataset, name)]
    for index, file in enumerate(files):
        if file in files[:index]:
            raise UserError(f"{file} is named twice in annotations: its rows would count twice.")
    return files


def rows(dataset: Dataset) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where it stands, the row, or in words why it is none) of all rows, in a fixed order.

    "train.json row 16" counts from 0, "train.jsonl line 17" from 1. One row, or a batch of a table's, is in memory at a
    time. Raises UserError where the rest of a file cannot be read: cut, damaged, no known format.
    """
    for file in annotation_files(dataset):
        name = file.relative_to(dataset.root).as_posix() if file.is_relative_to(dataset.root) else str(file)
        for where, row in _rows(file, dataset):
            if isinstance(row, UserError):
                row = row.paragraph
            elif not isinstance(row, dict):
                row = f"the row is not an object but {type(row).__name__}"
            yield f"{name} {where}", row


def count(dataset: Dataset) -> int | None:
    """How many rows there are, or None where it would take long to know."""
    files = annotation_files(dataset)
    tables = [is_table(file) for file in files]
    if sum(file.stat().st_size for file, table in zip(files, tables, strict=True) if not table) > COUNTED_BYTES:
        return None
    counts = (table_count(f) if table else json_count(f, dataset.rows) for f, table in zip(files, tables, strict=True))
    return sum(counts)


def _rows(file: Path, dataset: Dataset) -> Iterator[tuple[str, Any]]:
    return table_rows(file, _columns(dataset.fields)) if is_table(file) else json_rows(file, dataset.rows)


def _columns(fields: Fields) -> set[str]:
    """The columns of a table that may be of use: pictures nobody asks for are not read."""
    names = {name for names in dataclasses.astuple(fields) for name in names}
    patterns = {name for name in names if "{" in name}
    return names - patterns | {match[1] for pattern in patterns for match in PATTERN.finditer(pattern)}


def _found(dataset: Dataset, name: str) -> list[Path]:
    name = first_there(dataset.root, name)
    paths = found(dataset.root, name)
    if not paths:
        raise UserError(
            f"There is no {dataset.root / name}, which the data set {dataset.name} names as its annotations: set "
            "root=… to the folder where it is, or annotations=… to its name."
        )
    return [file for path in paths for file in (table_files(path, dataset.split) if path.is_dir() else [path])]
