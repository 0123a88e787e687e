"""Rows of annotation files, one after the other: JSON, JSON lines, Parquet, Hugging Face data sets on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.dataset import Dataset, Fields, read_dataset

__all__ = ["Dataset", "Fields", "annotation_files", "count", "read_dataset", "rows"]


def annotation_files(dataset: Dataset) -> list[Path]:
    """The files that are read, in order; raises UserError where a name or glob leads to none."""
    raise NotImplementedError


def rows(dataset: Dataset) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where it stands, the row, or in words why it cannot be parsed) of all rows, in a fixed order.

    "data/train.json row 16" counts from 0, "train.jsonl line 17" from 1. One row, or one batch of Parquet rows, is in
    memory at a time. Raises UserError where the rest of a file cannot be read: cut, damaged, no such format.
    """
    raise NotImplementedError


def count(dataset: Dataset) -> int | None:
    """How many rows there are, where that is cheap to know."""
    raise NotImplementedError
