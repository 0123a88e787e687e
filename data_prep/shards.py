"""Shards from records and media: what to use for your own data. The format: README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllava.data.writing import MANIFEST, PLACEHOLDERS, modality, write_manifest, write_tar

__all__ = ["MANIFEST", "PLACEHOLDERS", "modality", "write_manifest", "write_shard"]


Medium = tuple[str, bytes | list[bytes]]  # a file by its extension, or the extension of each frame and the frames


def write_shard(path: Path, samples: Iterable[tuple[str, dict, Sequence[Medium]]]) -> dict:
    """Write one tar shard and return its manifest entry.

    `samples` yields (key, record, media); a medium is (extension, bytes), in placeholder order, or (extension, [bytes,
    …]) for a video whose frames were taken already.
    """
    return write_tar(path, ((key, _members(record, media)) for key, record, media in samples))


def _members(record: dict, media: Sequence[Medium]) -> dict[str, bytes]:
    members = {"json": json.dumps(record, ensure_ascii=False).encode()}
    for number, (extension, data) in enumerate(media):
        if isinstance(data, bytes):
            members[f"{number}.{extension}"] = data
        else:
            members |= {f"{number}.frame{index:02d}.{extension}": frame for index, frame in enumerate(data)}
    return members
