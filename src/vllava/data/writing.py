"""Write samples into WebDataset tar shards with a manifest beside them. The format: data_prep/README.md."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from vllava.data.index import (
    SAMPLE_BYTES,
    SAMPLE_MEMBERS,
    Entry,
    Facts,
    Place,
    facts_of,
    index_path,
    scan,
    split_name,
    with_facts,
    write_index,
)
from vllava.data.shards import MANIFEST
from vllava.data.tar import CONTROL, NAME_LIMIT
from vllava.data.tar_writer import TarWriter
from vllava.errors import UserError, reading
from vllava.folders import sha256_of

_SampleWithFacts = tuple[str, dict[str, bytes], Facts]
PLACEHOLDERS = {"image": "<image>", "video": "<video>"}


def write_tar(
    path: Path, samples: Iterable[tuple[str, dict[str, bytes]] | tuple[str, dict[str, bytes], Facts]]
) -> dict:
    """Write one shard from (key, members by extension), its index beside it, and return its manifest entry.

    Where a sample comes with its facts, they are taken for what `facts_of` finds in its members.

    Members carry no time and no owner, so equal samples give equal bytes. The file appears whole or not at all.
    Raises UserError, which names the key, for what would not be read again as it was given: a key that is empty, has a
    dot or comes twice, an extension that is none, a member that is not bytes.
    """
    entries: dict[str, Entry] = {}
    with appearing(path) as unfinished, appearing(index_path(path)) as index:
        with open(unfinished, "wb") as file:
            tar = TarWriter(file, "vllava")
            for key, members, *facts in samples:
                content = _checked(key, members, entries)
                places = {
                    name: Place(tar.add(f"{key}.{name}", content[name]), len(content[name]), zlib.crc32(content[name]))
                    for name in sorted(content)
                }
                entries[key] = Entry(key, places, facts[0] if facts else facts_of(content))
            checksum = tar.close()
        write_index(index, path.name, tar.length, list(entries.values()))
    return _listed(path.name, [entry.facts for entry in entries.values() if entry.facts], tar.length, checksum)


def _checked(key: Any, members: dict, seen: Container[str]) -> dict[str, bytes]:
    """The members of a sample as bytes; raises UserError for what would not be read again as it was given."""
    file = key.rpartition("/")[2] if isinstance(key, str) else ""
    if not file or "." in file or not _is_name(key):
        raise UserError(
            f"The key {key!r} cannot be written: a key is text without a dot or control characters and with no slash "
            "at its end; the first dot of a file's name ends its key. Folders before it may have dots: v1.5/clip."
        )
    if key in seen:
        raise UserError(f"The key {key!r} comes twice: give every sample of a shard a key of its own.")
    if not members:
        raise UserError(f"The sample {key!r} has no files: it would be lost.")
    for extension, data in members.items():
        whole = isinstance(extension, str) and len(key) + 1 + len(extension) <= NAME_LIMIT
        if not whole or not _is_extension(extension):
            raise UserError(
                f"The sample {key!r} cannot have a file of the extension {extension!r}: an extension is text without "
                "slashes or control characters, and begins with a letter or digit."
            )
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise UserError(f"The file {extension!r} of the sample {key!r} is not bytes but {type(data).__name__}.")
    content = {extension: bytes(data) for extension, data in members.items()}
    total = sum(map(len, content.values()))
    if total > SAMPLE_BYTES or len(content) > SAMPLE_MEMBERS:
        raise UserError(
            f"The sample {key!r} has {len(content)} files of {total} bytes; a sample may have {SAMPLE_MEMBERS} files "
            f"of {SAMPLE_BYTES} bytes. Cut it in parts, or make its media smaller."
        )
    return content


@lru_cache(maxsize=4096)
def _is_extension(extension: str) -> bool:
    """Whether a file KEY.extension is read as this extension of KEY."""
    whole = extension and split_name(f"key.{extension}") == ("key", extension)
    return bool(whole) and not extension.startswith("_") and _is_name(extension)  # webdataset leaves out _names


def _is_name(name: str) -> bool:
    """Whether a file of this name in a tar file is read under the same name."""
    # Halves of surrogate pairs cannot be encoded.
    halves = not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name)
    return len(name) <= NAME_LIMIT and not CONTROL.search(name) and not halves


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when it is whole; several processes and machines may do so at once."""
    unfinished = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def index_shard(shard: Path, folder: Path) -> tuple[dict, dict[str, int]]:
    """Write the index of a shard that somebody made.

    Returns its entry for the manifest of `folder`, and how often each reason makes something no sample. Raises
    UserError where it is no tar file.
    """
    with reading(shard, "Make this shard again."), open(shard, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        entries = list(with_facts(scan(file, size)[0], file, probe=True))
    with appearing(index_path(shard)) as unfinished:
        write_index(unfinished, shard.name, size, entries)
    facts = [entry.facts for entry in entries if entry.facts]
    reasons = Counter(fact.broken for fact in facts if fact.broken is not None)
    return _listed(shard.relative_to(folder).as_posix(), facts, size, sha256_of(shard)), dict(reasons)


def _listed(name: str, facts: Collection[Facts], size: int, checksum: str) -> dict:
    """A shard's entry in a manifest."""
    kinds = Counter(fact.modality for fact in facts)
    return {
        "name": name,
        "samples": len(facts),
        "modalities": dict(sorted(kinds.items())),
        "bytes": size,
        "sha256": checksum,
    }


def modality(members: dict[str, bytes]) -> str:
    """'image', 'video', 'mixed' or 'text', by the media of a sample; 'unreadable' if it is none."""
    return facts_of(members, probe=False).modality


def write_manifest(folder: Path, shards: list[dict], settings: dict) -> None:
    """Write the folder's manifest: its shards, and the settings of the preparation that made them."""
    write_json(folder / MANIFEST, {"version": 1, "settings": settings, "shards": shards})


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that appears whole or not at all."""
    with appearing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
