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
from typing import Any

from vllava.data.address import RemotePath, is_remote, local_path
from vllava.data.index import SAMPLE_BYTES, SHARD_SAMPLES, Entry, Facts, Place, index_path, read_index, scan, with_facts
from vllava.data.patience import AbsentUserError, Remote
from vllava.data.servers import RemoteShard, Servers
from vllava.data.tar import BLOCK, CONTROL
from vllava.errors import UserError, reading, reason

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 24  # of a manifest at most, about 80,000 shards


@dataclass(frozen=True)
class Shard:
    """One tar file and its number of samples; `source` counts the folders of a run, from 0.

    size, sha256: what its manifest lists, if it does. remote: how it is read, if it is on a server.
    """

    path: Path | RemotePath
    samples: int
    source: int = 0
    size: int | None = None
    sha256: str | None = None
    remote: Remote | None = None


def read_manifest(folder: str | Path, remedy: str, remote: Remote | None = None) -> list[Shard]:
    """The shards of a folder, which may be an address; `remote` says how those are read.

    Every entry is checked against its file: its name leads to a file in the folder, its size is the one listed (its
    checksum is not read), and the file is large enough for its samples. Raises UserError, which ends with `remedy`,
    for whatever is missing or wrong.
    """
    where = _folder(folder)
    if isinstance(where, RemotePath):
        return _remote_manifest(where, remedy, remote or Remote())
    path = where / MANIFEST
    with reading(path, remedy):
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"No shards at {where}: {path} {what}. {remedy}")
        if (size := path.stat().st_size) > MANIFEST_BYTES:
            raise UserError(
                f"{path} is not a shard manifest ({size} bytes; a manifest has at most {MANIFEST_BYTES}). {remedy}"
            )
        shards = _parsed(path.read_bytes(), where, path, remedy)
        for shard in shards:
            _check_size(shard, _size_of(shard, path, remedy), path, remedy)
    _require_distinct(shards)
    return shards


def _remote_manifest(folder: RemotePath, remedy: str, remote: Remote) -> list[Shard]:
    path = folder / MANIFEST
    servers = Servers(remote)
    try:
        data = servers.store.read(path, MANIFEST_BYTES)
    except AbsentUserError as error:
        raise UserError(f"No shards at {folder}: {error} {remedy}") from None
    shards = [replace(shard, remote=remote) for shard in _parsed(data, folder, path, remedy)]
    _require_distinct(shards)
    paths = [shard.path for shard in shards if isinstance(shard.path, RemotePath)]
    sizes = servers.sizes(paths)
    for shard, place in zip(shards, paths, strict=True):
        size = sizes.get(place.url)
        if size is None:
            size = shard.size
        if size is not None:
            _check_size(shard, size, path, remedy)
    return shards


def read_sources(folders: Sequence[str | Path], remedy: str, remote: Remote | None = None) -> list[Shard]:
    """The shards of several folders; raises UserError where one file is among them twice, by whatever names."""
    shards = [
        replace(shard, source=number)
        for number, folder in enumerate(folders)
        for shard in read_manifest(folder, remedy, remote)
    ]
    _require_distinct(shards)
    return shards


def _folder(folder: Any) -> Path | RemotePath:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder):
        raise UserError(f"{folder!r} is not a folder of shards: name one by its path.")
    if is_remote(folder):
        return RemotePath(str(folder))
    return Path(local_path(folder)) if isinstance(folder, str) else Path(folder)


def _parsed(data: bytes, folder: Path | RemotePath, path: Path | RemotePath, remedy: str) -> list[Shard]:
    """The shards that a manifest lists; none is looked at."""
    try:
        shards = [_listed(folder, entry) for entry in _listing(data)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a shard manifest ({reason(error)}). {remedy}") from error
    if not any(shard.samples for shard in shards):
        raise UserError(f"{path} lists no samples. {remedy}")
    return shards


def _listing(data: bytes) -> list:
    manifest = json.loads(data.decode())
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise ValueError('it is not of the form {"shards": [{"name": …, "samples": …}, …]}')
    return manifest["shards"]


def _listed(folder: Path | RemotePath, entry: Any) -> Shard:
    """A shard as the manifest lists it."""
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
    checksum = entry.get("sha256")
    return Shard(folder / name, samples, size=size, sha256=checksum if isinstance(checksum, str) else None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) else f"{value:.6g}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def _size_of(shard: Shard, manifest: Path, remedy: str) -> int:
    """The bytes of a file on this machine; raises UserError if it is none."""
    try:
        found = os.stat(str(shard.path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{shard.path} is listed in {manifest} but does not exist. {remedy}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{shard.path} is listed in {manifest} but is not a file. {remedy}")
    return found.st_size


def _check_size(shard: Shard, found: int, manifest: Path | RemotePath, remedy: str) -> None:
    """The shard is as large as the manifest lists it, and large enough for its samples."""
    if shard.size is not None and shard.size != found:
        raise UserError(
            f"{shard.path} has {found} bytes, {manifest} lists it with {_short(shard.size)}: one of the two was "
            f"replaced, or the shard was cut. Make this shard again, or its manifest. {remedy}"
        )
    if shard.samples * BLOCK > found or shard.samples > SHARD_SAMPLES:
        raise UserError(
            f"{manifest} says that {shard.path} holds {_short(shard.samples)} samples, but the file has "
            f"{found} bytes: a sample takes {BLOCK} of them or more, and a shard holds at most "
            f"{SHARD_SAMPLES:,} samples. "
            f"{remedy}"
        )


def _require_distinct(shards: Sequence[Shard]) -> None:
    """Raises UserError where two shards are one file, also through links: its samples would be seen twice."""
    seen: dict[Any, Path | RemotePath] = {}
    for shard in shards:
        if isinstance(shard.path, RemotePath):
            identity: Any = shard.path.identity
        else:
            found = os.stat(shard.path)
            identity = (found.st_dev, found.st_ino) if found.st_ino else shard.path
        first = seen.setdefault(identity, shard.path)
        if first is not shard.path:
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
        self._open: OrderedDict[int, tuple[Any, list[Entry]]] = OrderedDict()  # files, or what reads like one
        settings = next((shard.remote for shard in shards if shard.remote), None)
        self._servers = Servers(settings) if settings else None

    def key(self, shard: int, index: int) -> str:
        """The key of a sample; raises UserError where the shard as a whole cannot be read."""
        return self._shard(shard)[1][index].key

    def members(self, shard: int, index: int) -> list[str]:
        """What a sample has members of, by extension, without reading them; raises UserError as `key` does."""
        return [*self._shard(shard)[1][index].files]

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
                content[extension] = _member(file, place)
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

    def _shard(self, shard: int) -> tuple[Any, list[Entry]]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self._opened(self.shards[shard])
            if len(self._open) > self.capacity:
                self._open.popitem(last=False)[1][0].close()
        return self._open[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # open files do not travel

    def _opened(self, shard: Shard) -> tuple[Any, list[Entry]]:
        """A shard's file and its samples; raises UserError where it cannot be read or has not as many as announced."""
        file: Any = None
        try:
            if self._servers and isinstance(shard.path, RemotePath):
                file = self._servers.shard(shard.path, shard.size, shard.sha256)
            else:
                file = open(str(shard.path), "rb")  # noqa: SIM115
            return file, _entries_of(shard, file)
        except Exception as error:
            if file:
                file.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{shard.path} cannot be read as a tar file ({reason(error)}). Make this shard again."
            ) from error


def _member(file: Any, place: Place) -> bytes:
    if isinstance(file, RemoteShard):
        return file.member(place)
    file.seek(place.offset)
    return file.read(place.size)


def _entries_of(shard: Shard, file: Any) -> list[Entry]:
    others: list[str] = []
    most = SHARD_SAMPLES
    if isinstance(file, RemoteShard):
        size, entries = file.size, file.entries()
    else:
        size, index = os.fstat(file.fileno()).st_size, index_path(Path(str(shard.path)))
        entries = read_index(index, size) if index.is_file() else None
    if entries is None:
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
