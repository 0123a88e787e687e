"""WebDataset shards on disk: the manifest, and random access to single samples."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from vllava.data.index import SAMPLE_BYTES, SHARD_SAMPLES, Entry, Facts, index_path, read_index, scan, with_facts
from vllava.data.tar import BLOCK, CONTROL
from vllava.errors import UserError, reading, reason

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 24  # of a manifest at most, about 80,000 shards


@dataclass(frozen=True)
class Shard:
    """One tar file and its number of samples; `source` counts the folders of a run, from 0."""

    path: Path
    samples: int
    source: int = 0


def read_manifest(folder: str | Path, remedy: str) -> list[Shard]:
    """The shards of a folder.

    Every entry is checked against its file: its name leads to a file in the folder, its size is the one listed (its
    checksum is not read), and the file is large enough for its samples. Raises UserError, which ends with `remedy`,
    for whatever is missing or wrong.
    """
    folder = _folder(folder)
    path = folder / MANIFEST
    with reading(path, remedy):
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"No shards at {folder}: {path} {what}. {remedy}")
        try:
            shards = [_listed(folder, entry) for entry in _listing(path)]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is not a shard manifest ({reason(error)}). {remedy}") from error
        if not any(shard.samples for shard, _ in shards):
            raise UserError(f"{path} lists no samples. {remedy}")
        for shard, size in shards:
            _check_file(shard, size, path, remedy)
    _require_distinct([shard for shard, _ in shards])
    return [shard for shard, _ in shards]


def read_sources(folders: Sequence[str | Path], remedy: str) -> list[Shard]:
    """The shards of several folders; raises UserError where one file is among them twice, by whatever names."""
    shards = [
        replace(shard, source=number)
        for number, folder in enumerate(folders)
        for shard in read_manifest(folder, remedy)
    ]
    _require_distinct(shards)
    return shards


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder):
        raise UserError(f"{folder!r} is not a folder of shards: name one by its path.")
    return Path(folder)


def _listing(path: Path) -> list:
    if path.stat().st_size > MANIFEST_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes; a manifest has at most {MANIFEST_BYTES}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise ValueError('it is not of the form {"shards": [{"name": …, "samples": …}, …]}')
    return manifest["shards"]


def _listed(folder: Path, entry: Any) -> tuple[Shard, int | None]:
    """A shard and its size in bytes as the manifest lists them."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ValueError(f"an entry has no name: {_short(entry)}")
    name: str = entry["name"]
    size: Any = entry.get("bytes")
    samples: Any = entry.get("samples")
    parts = name.split("/")
    if not name or CONTROL.search(name) or not set(parts).isdisjoint(("", "..")) or os.path.isabs(name):
        raise ValueError(f"the name {_short(name)} does not lead to a file in this folder")
    if not _is_count(samples) or not (size is None or _is_count(size)):
        raise ValueError(f"{name} has {_short(samples)} samples and {_short(size)} bytes: counts are whole numbers")
    return Shard(folder / name, samples), size


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) else f"{value:.6g}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _check_file(shard: Shard, listed: int | None, manifest: Path, remedy: str) -> None:
    """The shard is there, as large as the manifest lists it, and large enough for its samples."""
    try:
        found = os.stat(shard.path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shard.path} is listed in {manifest} but does not exist. {remedy}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{shard.path} is listed in {manifest} but is not a file. {remedy}")
    if listed is not None and listed != found.st_size:
        raise UserError(
            f"{shard.path} has {found.st_size} bytes, {manifest} lists it with {_short(listed)}: one of the two was "
            f"replaced, or the shard was cut. Make this shard again, or its manifest. {remedy}"
        )
    if shard.samples * BLOCK > found.st_size or shard.samples > SHARD_SAMPLES:
        raise UserError(
            f"{manifest} says that {shard.path} holds {_short(shard.samples)} samples, but the file has "
            f"{found.st_size} bytes: a sample takes {BLOCK} of them or more, and a shard holds at most "
            f"{SHARD_SAMPLES:,} samples. "
            f"{remedy}"
        )


def _require_distinct(shards: Sequence[Shard]) -> None:
    """Raises UserError where two shards are one file, also through links: its samples would be seen twice."""
    seen: dict[tuple[int, int], Path] = {}
    for shard in shards:
        found = os.stat(shard.path)
        first = seen.setdefault((found.st_dev, found.st_ino), shard.path)
        if first is not shard.path and found.st_ino:
            raise UserError(
                f"{first} and {shard.path} are the same file: its samples would be seen twice. Name each shard once, "
                "in one manifest and in one source."
            )


class ShardReader:
    """Reads single samples out of tar shards; keeps the `capacity` shards used last open.

    Members are found by the index beside a shard, or else by its headers. They are read by offset and never unpickled
    or written anywhere, and no shard name reaches a shell: a member called `/etc/x` or `../x` is but a key.
    """

    def __init__(self, shards: list[Shard], capacity: int) -> None:
        self.shards = shards
        self.capacity = capacity
        self._open: OrderedDict[int, tuple[BinaryIO, list[Entry]]] = OrderedDict()

    def key(self, shard: int, index: int) -> str:
        """The key of a sample; raises UserError where the shard as a whole cannot be read."""
        return self._shard(shard)[1][index].key

    def read(self, shard: int, index: int, only: Sequence[str] | None = None) -> tuple[str, dict[str, bytes]]:
        """The key of a sample and its members by extension (what follows the key and a dot), or `only` these.

        Raises UserError where the shard cannot be read, the sample is larger than a worker can hold, or is not the one
        that the index speaks of.
        """
        file, entries = self._shard(shard)
        key, places, _ = entries[index]
        wanted = {name: place for name, place in places.items() if only is None or name in only}
        total = sum(place.size for place in wanted.values())
        if total > SAMPLE_BYTES:
            raise UserError(f"its files have {total} bytes; a sample may have at most {SAMPLE_BYTES}")
        content = {}
        with reading("the sample"):
            for extension, place in wanted.items():
                file.seek(place.offset)
                content[extension] = file.read(place.size)
                if len(content[extension]) < place.size:
                    raise UserError("the shard has become shorter since it was opened")
                if place.crc is not None and zlib.crc32(content[extension]) != place.crc:
                    raise UserError(f"the bytes of {extension!r} are not those that the shard's index speaks of")
        return key, content

    def facts(self, shard: int) -> list[Facts]:
        """What is known of a shard's samples before they are decoded: from its index, or else from their records."""
        return [entry.facts or Facts() for entry in self.entries(shard)]

    def entries(self, shard: int) -> list[Entry]:
        """A shard's samples with what is known of them; their members' checksums only where the shard has an index."""
        file, entries = self._shard(shard)
        if any(entry.facts is None for entry in entries):
            with reading(self.shards[shard].path, "Make this shard again."):
                entries = list(with_facts(entries, file, probe=False))
            self._open[shard] = file, entries
        return entries

    def _shard(self, shard: int) -> tuple[BinaryIO, list[Entry]]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = _opened(self.shards[shard])
            if len(self._open) > self.capacity:
                self._open.popitem(last=False)[1][0].close()
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "capacity": self.capacity, "_open": OrderedDict()}  # open files do not travel


def _opened(shard: Shard) -> tuple[BinaryIO, list[Entry]]:
    """A shard's file and its samples; raises UserError where it cannot be read or they are not as many as announced."""
    file = None
    try:
        file = open(shard.path, "rb")  # noqa: SIM115
        return file, _entries_of(shard, file)
    except Exception as error:
        if file:
            file.close()
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{shard.path} cannot be read as a tar file ({reason(error)}). Make this shard again."
        ) from error


def _entries_of(shard: Shard, file: BinaryIO) -> list[Entry]:
    size, index = os.fstat(file.fileno()).st_size, index_path(Path(shard.path))
    others: list[str] = []
    if index.is_file():
        entries, most = read_index(index, size), SHARD_SAMPLES
    else:
        most = 2 * shard.samples + 1000  # no need to count on
        entries, others = scan(file, size, most)
    if len(entries) != shard.samples:
        raise _miscounted(shard, str(len(entries)) if len(entries) <= most else f"more than {most}", others)
    return entries


def _miscounted(shard: Shard, found: str, others: list[str]) -> UserError:
    ignored = f" (files that belong to no key, such as {others[0]}, not counted)" if others else ""
    return UserError(
        f"{shard.path} holds {found} samples{ignored}, its manifest says {shard.samples}. A key ends at the first dot "
        "of a file's name. Make this shard again."
    )
