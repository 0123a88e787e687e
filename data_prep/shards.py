"""Shards from records and media: what to use for your own data. The format: README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from vllava.data.writing import MANIFEST, PLACEHOLDERS, modality, write_manifest, write_tar

__all__ = ["MANIFEST", "PLACEHOLDERS", "modality", "write_manifest", "write_shard"]


def write_shard(path: Path, samples: Iterable[tuple[str, dict, list[tuple[str, bytes]]]]) -> dict:
    """Write one tar shard and return its manifest entry.

    `samples` yields (key, record, media); a medium is (extension, bytes), in placeholder order.
    """
    return write_tar(path, ((key, _members(record, media)) for key, record, media in samples))


def _members(record: dict, media: list[tuple[str, bytes]]) -> dict[str, bytes]:
    files = {f"{number}.{extension}": data for number, (extension, data) in enumerate(media)}
    return {"json": json.dumps(record, ensure_ascii=False).encode(), **files}
