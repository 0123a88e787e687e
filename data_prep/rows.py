"""A row of annotations becomes a record and the media it names, or is rejected with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset import Dataset


@dataclass(frozen=True)
class MediaRef:
    """A medium as a row names it: a path or the bytes themselves."""

    kind: str  # image | video
    path: (
        Path | None
    )  # as named, under the data set's folder; may lack its extension, or have another or upper-case one
    data: bytes | None
    name: str  # for messages: the name in the row, or "image 1 of the row" for bytes


@dataclass(frozen=True)
class Draft:
    """What a row becomes but for its media files.

    record: {"id" where the row has one, "source", "conversations", "question" where given}, ready for KEY.json;
    conversations are in LLaVA's form (from/value) with a placeholder for each medium.
    media: in placeholder order.
    """

    record: dict[str, Any]
    media: list[MediaRef]


def draft(row: Any, dataset: Dataset) -> Draft:
    """The record and media of a row; raises UserError with the reason for a row that is none. Opens no file."""
    raise NotImplementedError
