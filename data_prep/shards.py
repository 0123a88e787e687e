"""Shards from records and media: what to use for your own data. The format: README.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllava.data.writing import MANIFEST, PLACEHOLDERS, modality, write_manifest, write_tar
from vllava.errors import UserError, reason

__all__ = ["MANIFEST", "PLACEHOLDERS", "members", "modality", "write_manifest", "write_shard"]


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
Medium = tuple[str, bytes | list[bytes]]  # a file by its extension, or the extension of each frame and the frames


def write_shard(path: Path, samples: Iterable[tuple[str, dict, Sequence[Medium]]]) -> dict:
    """Write one tar shard and return its manifest entry.

    `samples` yields (key, record, media); a medium is (extension, bytes), in placeholder order, or (extension, [bytes,
    …]) for a video whose frames were taken already. Raises UserError, which names the key, for a key, record or medium
    that could not be read again. Whether a model can be trained on the sample is for the reader to say.
    """
    return write_tar(Path(path), ((key, members(key, record, media)) for key, record, media in samples))


def members(key: str, record: dict, media: Sequence[Medium]) -> dict[str, bytes]:
    """The files of a sample by extension; raises UserError, which names the key, for what cannot be written as such."""
    if isinstance(key, str) and not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise UserError(f"The key {key!r} cannot be written: unpacked, its files would not lie where the shard does.")
    try:
        members = {"json": _JSON.encode(record).encode()}
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, or half of a surrogate pair
        raise UserError(f"The record of {key!r} cannot be written as JSON ({reason(error)}).") from error
    for number, (extension, data) in enumerate(media):
        if not isinstance(extension, str) or extension.startswith("."):
            raise UserError(f"Medium {number} of {key!r}: {extension!r} is no extension; write jpg or mp4.")
        if isinstance(data, (list, tuple)):
            members |= _frames(key, number, extension, data)
        else:
            members[f"{number}.{extension}"] = data
    return members


def _frames(key: str, number: int, extension: str, frames: Sequence[bytes]) -> dict[str, bytes]:
    """Frames under numbers of equal width, so that their names sort as they do."""
    if not frames:
        raise UserError(f"Medium {number} of {key!r} has no frames.")
    width = max(len(str(len(frames) - 1)), 2)
    return {f"{number}.frame{index:0{width}d}.{extension}": frame for index, frame in enumerate(frames)}
