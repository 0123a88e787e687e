"""WebDataset shards on disk: the manifest, random access to single samples, and the order of an epoch."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vllava.data.tar import BLOCK, CONTROL, members
from vllava.errors import UserError, reading, reason

MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 24  # of a manifest at most, about 80,000 shards
SHARD_SAMPLES = 1_000_000  # of a shard at most: its index and the epoch's order are kept in memory
SAMPLE_MEMBERS = 100_000  # files of a sample at most
SAMPLE_BYTES = 1 << 29  # of a sample's files at most: a worker holds several in memory

Index = list[tuple[str, dict[str, tuple[int, int]]]]  # of each sample its key, and by extension (offset, size)


@dataclass(frozen=True)
class Shard:
    """One tar file and its number of samples."""

    path: Path
    samples: int


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
            shards = [_listed(folder, entry) for entry in _entries(path)]
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
    shards = [shard for folder in folders for shard in read_manifest(folder, remedy)]
    _require_distinct(shards)
    return shards


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in str(folder):
        raise UserError(f"{folder!r} is not a folder of shards: name one by its path.")
    return Path(folder)


def _entries(path: Path) -> list:
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


def epoch_order(shards: list[Shard], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order in which an epoch visits samples [sum of samples, 2]: rows of (shard index, index in the shard).

    Shards are shuffled, taken `window` at a time, and the samples of a window are shuffled together: every
    sample comes exactly once, a batch mixes the sources, and only `window` shards are being read at any time.
    The order depends on nothing but the arguments, so it is the same for any number of workers and ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(shards))
    parts = []
    for start in range(0, len(shards), window):
        chosen = shuffled[start : start + window]
        counts = [shards[i].samples for i in chosen]
        rows = np.stack([np.repeat(chosen, counts), np.concatenate([np.arange(count) for count in counts])], axis=1)
        parts.append(rng.permutation(rows))
    return np.concatenate(parts)


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the extension of a member, which the first dot of the file's own name parts; as webdataset does.

    None for a name that belongs to no sample: a file without a dot, or a hidden one.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension) if stem and dot else None


class ShardReader:
    """Reads single samples out of tar shards; keeps the `capacity` shards used last open.

    Members are read by offset and never unpickled or written anywhere, and no shard name reaches a shell: a member
    called `/etc/x` or `../x` is but a key.
    """

    def __init__(self, shards: list[Shard], capacity: int) -> None:
        self.shards = shards
        self.capacity = capacity
        self._open: OrderedDict[int, tuple[BinaryIO, Index]] = OrderedDict()

    def key(self, shard: int, index: int) -> str:
        """The key of a sample; raises UserError where the shard as a whole cannot be read."""
        return self._shard(shard)[1][index][0]

    def read(self, shard: int, index: int, only: Sequence[str] | None = None) -> tuple[str, dict[str, bytes]]:
        """The key of a sample and its members by extension (what follows the key and a dot), or `only` these.

        Raises UserError where the shard cannot be read, or the sample is larger than a worker can hold.
        """
        file, samples = self._shard(shard)
        key, places = samples[index]
        wanted = {name: place for name, place in places.items() if only is None or name in only}
        total = sum(size for _, size in wanted.values())
        if total > SAMPLE_BYTES:
            raise UserError(f"its files have {total} bytes; a sample may have at most {SAMPLE_BYTES}")
        content = {}
        with reading("the sample"):
            for extension, (offset, size) in wanted.items():
                file.seek(offset)
                content[extension] = file.read(size)
                if len(content[extension]) < size:
                    raise UserError("the shard has become shorter since it was opened")
        return key, content

    def _shard(self, shard: int) -> tuple[BinaryIO, Index]:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self._scan(self.shards[shard])
            if len(self._open) > self.capacity:
                self._open.popitem(last=False)[1][0].close()
        return self._open[shard]

    @staticmethod
    def _scan(shard: Shard) -> tuple[BinaryIO, Index]:
        """Open a shard and list its samples from the tar headers alone."""
        file = None
        try:
            file = open(shard.path, "rb")  # noqa: SIM115
            return file, _index(shard, file)
        except Exception as error:
            if file:
                file.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{shard.path} cannot be read as a tar file ({reason(error)}). Make this shard again."
            ) from error

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "capacity": self.capacity, "_open": OrderedDict()}  # open files do not travel


def _index(shard: Shard, file: BinaryIO) -> Index:
    """The samples of a shard; raises UserError if they are not as many as the manifest says."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    others: list[str] = []  # names that belong to no sample
    for member in members(file, os.fstat(file.fileno()).st_size):
        parts = split_name(member.name)
        if parts is None:
            others = [*others, member.name][:3]
            continue
        key, extension = parts
        places = samples.setdefault(key, {})
        if extension in places:
            raise ValueError(f"it holds two files {member.name}")
        if len(places) == SAMPLE_MEMBERS:
            raise ValueError(f"it holds more than {SAMPLE_MEMBERS} files of the key {key}")
        if len(samples) > 2 * shard.samples + 1000:  # no need to count on
            raise _miscounted(shard, f"more than {len(samples) - 1}", others)
        places[sys.intern(extension)] = (member.offset, member.size)
    if len(samples) != shard.samples:
        raise _miscounted(shard, str(len(samples)), others)
    return list(samples.items())


def _miscounted(shard: Shard, found: str, others: list[str]) -> UserError:
    ignored = f" (files that belong to no key, such as {others[0]}, not counted)" if others else ""
    return UserError(
        f"{shard.path} holds {found} samples{ignored}, its manifest says {shard.samples}. A key ends at the first dot "
        "of a file's name. Make this shard again."
    )
