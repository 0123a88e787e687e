"""The index beside a shard, NAME.tar.index: where each member lies, and what its samples will cost to train on.

With it nothing has to read a tar file's headers, the stream knows a sample's length before it reads it, and a member
can be fetched alone. It is one line of JSON about the shard, then one for each sample, in the shard's order.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from vllava.batch import MEDIA_KINDS
from vllava.conversation import Message
from vllava.data.address import RemotePath
from vllava.data.frames import measure
from vllava.data.picture import image_size
from vllava.data.record import MediumFile, parse
from vllava.data.tar import members
from vllava.errors import UserError, reason

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
SUFFIX = ".index"
VERSION = 1
INDEX_BYTES = 1 << 30  # of an index at most
SHARD_SAMPLES = 1_000_000  # of a shard at most: its index and the epoch's order are kept in memory
SAMPLE_MEMBERS = 100_000  # files of a sample at most
SAMPLE_BYTES = 1 << 29  # of a sample's files at most: a worker holds several in memory
HEAD = 16  # bytes of a medium that tell a picture from a video
REMEDY = "Make this shard again, or its index: python -m data_prep.index --again FOLDER."


class Place(NamedTuple):
    """Where a member's bytes are in the shard, and their CRC-32, if it is known."""

    offset: int
    size: int
    crc: int | None = None


class MediumFacts(NamedTuple):
    """What is known of a medium before it is decoded; None where its file does not tell."""

    kind: str
    width: int | None = None
    height: int | None = None
    frames: int | None = None  # of a video
    seconds: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a sample before it is decoded: what it says, and its media in placeholder order.

    characters, turns: of its conversation; text: its CRC-32, by which equal ones are found; broken: why it is no
    sample, where it is none.
    """

    media: tuple[MediumFacts, ...] = ()
    characters: int = 0
    turns: int = 0
    text: int = 0
    broken: str | None = None

    @property
    def modality(self) -> str:
        """'image', 'video', 'mixed' or 'text'; 'unreadable' for what is no sample."""
        kinds = {medium.kind for medium in self.media}
        if self.broken is not None:
            return "unreadable"
        return next(iter(kinds), "text") if len(kinds) < 2 else "mixed"


class Entry(NamedTuple):
    """One sample of a shard: its members by extension, and what is known of it, if anything is."""

    key: str
    files: dict[str, Place]
    facts: Facts | None = None

    def with_facts(self, facts: Facts, sums: dict[str, int] | None = None) -> Entry:
        """The entry with what is known of its sample, and perhaps its members' checksums, by extension."""
        files = {name: place._replace(crc=sums[name]) for name, place in self.files.items()} if sums else self.files
        return Entry(self.key, files, facts)


Located = TypeVar("Located", Path, RemotePath)


def index_path(shard: Located) -> Located:
    """Where the index of a shard lies."""
    return shard.with_name(shard.name + SUFFIX)


# --- what a sample holds ----------------------------------------------------------------------------------------------


def facts_of(files: dict[str, bytes], probe: bool = True) -> Facts:
    """The facts of a sample from its members; its media are opened, but not decoded, or not even opened."""
    try:
        parsed = parse(files)
    except UserError as error:
        return Facts(broken=error.paragraph)
    return facts_of_parsed(parsed.conversation, parsed.kinds, parsed.files, probe)


def facts_of_parsed(
    conversation: Sequence[Message], kinds: Sequence[str], files: Sequence[MediumFile], probe: bool = True
) -> Facts:
    """The facts of a sample whose members are known to say this."""
    media = tuple(_medium(kind, file) if probe else MediumFacts(kind) for kind, file in zip(kinds, files, strict=True))
    characters = sum(len(message["value"]) for message in conversation)
    spoken = "\0".join(f"{message['from']}\0{message['value']}" for message in conversation)
    return Facts(media, characters, len(conversation), zlib.crc32(spoken.encode()))


def _medium(kind: str, file: MediumFile) -> MediumFacts:
    """What a medium's file says; whatever is wrong with it is for its decoder to find."""
    if file.features_of:
        return MediumFacts(kind)
    try:
        if file.prepared:
            return MediumFacts(kind, *image_size(file.data[0]), len(file.data))
        if kind == "image":
            return MediumFacts(kind, *image_size(file.data[0]))
        found = measure(file.data[0])
        return MediumFacts(kind, found.width, found.height, found.frames, round(found.seconds, 3))
    except UserError:
        return MediumFacts(kind)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_index(path: Path, shard: str, size: int, entries: Sequence[Entry]) -> None:
    """Write the index of a shard of that name and `size` bytes to `path`."""
    lines = [(_line(entry) + "\n").encode() for entry in entries]
    said = {"version": VERSION, "shard": shard, "bytes": size, "samples": len(entries), "crc32": _crc(lines)}
    with open(path, "wb") as file:
        file.write(json.dumps(said).encode() + b"\n")
        file.writelines(lines)


def _crc(lines: Iterable[bytes]) -> int:
    """The CRC-32 of lines one after the other."""
    crc = 0
    for line in lines:
        crc = zlib.crc32(line, crc)
    return crc


def _line(entry: Entry) -> str:
    facts = entry.facts or Facts()
    said: dict[str, Any] = {"key": entry.key, "modality": facts.modality, "files": entry.files}
    if facts.broken is not None:
        said["broken"] = facts.broken
    else:
        said |= {"characters": facts.characters, "turns": facts.turns, "text": facts.text}
        said["media"] = [{k: v for k, v in medium._asdict().items() if v is not None} for medium in facts.media]
    return _JSON.encode(said)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_index(path: Path, size: int) -> list[Entry]:
    """The entries of an index, each checked against a shard of `size` bytes.

    Raises UserError, which names the index, where it is of another shard, damaged, or leads out of the shard.
    """
    try:
        if path.stat().st_size > INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes; an index has at most {INDEX_BYTES}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unfit(str(path), error) from error
    return parse_index(data, str(path), size)


def parse_index(data: bytes, name: str, size: int) -> list[Entry]:
    """The entries of an index of that name; see read_index."""
    try:
        first, *lines = data.decode().rstrip("\n").split("\n")
        header = json.loads(first)
        if header["version"] != VERSION:
            raise ValueError(f"it is of version {header['version']!r}, known is {VERSION}")
        if header["bytes"] != size:
            raise ValueError(f"it is of a shard of {header['bytes']} bytes, this one has {size}")
        if header["samples"] != len(lines):
            raise ValueError(f"it lists {len(lines)} samples and announces {header['samples']}")
        entries = [_entry(json.loads(line), size) for line in lines]
        if len({entry.key for entry in entries}) != len(entries):
            raise ValueError("it lists a key twice")
        if "crc32" in header and header["crc32"] != zlib.crc32(data[data.index(b"\n") + 1 :]):
            raise ValueError("it is not what was written")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unfit(name, error) from error
    return entries


def _unfit(name: str, error: Exception) -> UserError:
    return UserError(f"{name.removesuffix(SUFFIX)} does not fit its index {name} ({reason(error)}). {REMEDY}")


def _entry(said: dict[str, Any], size: int) -> Entry:
    key, files = said["key"], {sys.intern(name): Place(*place) for name, place in said["files"].items()}
    if not isinstance(key, str) or not files:
        raise ValueError(f"a sample has no key or no files: {str(said)[:80]}")
    for name, (offset, length, crc) in files.items():
        if not (type(offset) is type(length) is int and offset >= 0 and 0 <= length <= size - offset):
            raise ValueError(f"{key}.{name} does not lie in the shard")
        if crc is not None and type(crc) is not int:
            raise ValueError(f"the checksum of {key}.{name} is no number")
    if "broken" in said:
        return Entry(key, files, Facts(broken=str(said["broken"])))
    media = tuple(_checked(MediumFacts(**medium)) for medium in said["media"])
    counts = said["characters"], said["turns"], said["text"]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{key} has counts that are none")
    return Entry(key, files, Facts(media, *counts))


def _checked(medium: MediumFacts) -> MediumFacts:
    numbers = [value for value in medium[1:] if value is not None]
    if medium.kind not in MEDIA_KINDS or not all(type(n) in (int, float) and n >= 0 for n in numbers):
        raise ValueError(f"no medium is like {str(medium)[:120]}")
    return medium


# --- of shards that have none -----------------------------------------------------------------------------------------


def scan(file: BinaryIO, size: int, most: int = SHARD_SAMPLES) -> tuple[list[Entry], list[str]]:
    """The samples of a tar file of `size` bytes from its headers alone; and names of files that belong to no sample.

    Reading ends with the first sample over `most`. Raises ValueError for what is no tar file, or no shard.
    """
    samples: dict[str, dict[str, Place]] = {}
    others: list[str] = []
    for member in members(file, size):
        parts = split_name(member.name)
        if parts is None:
            others = [*others, member.name][:3]
            continue
        key, extension = parts
        places = samples.setdefault(key, {})
        if len(samples) > most:
            break
        if extension in places:
            raise ValueError(f"it holds two files {member.name}")
        if len(places) == SAMPLE_MEMBERS:
            raise ValueError(f"it holds more than {SAMPLE_MEMBERS} files of the key {key}")
        places[sys.intern(extension)] = Place(member.offset, member.size)
    return [Entry(key, files) for key, files in samples.items()], others


def split_name(name: str) -> tuple[str, str] | None:
    """The key and the extension of a member, which the first dot of the file's own name parts; as webdataset does.

    None for a name that belongs to no sample: a file without a dot, or a hidden one.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension) if stem and dot else None


def with_facts(entries: Iterable[Entry], file: BinaryIO, probe: bool) -> Iterator[Entry]:
    """Entries with their facts, read from the shard; with `probe` media are opened, and checksums taken too."""
    for entry in entries:
        total = sum(place.size for place in entry.files.values())
        if total > SAMPLE_BYTES:
            yield entry.with_facts(Facts(broken=f"its files have {total} bytes; at most {SAMPLE_BYTES} are read"))
            continue
        content = {
            name: _read(file, place.offset, place.size if probe or name == "json" else min(HEAD, place.size))
            for name, place in entry.files.items()
        }
        sums = {name: zlib.crc32(data) for name, data in content.items()} if probe else None
        yield entry.with_facts(facts_of(content, probe), sums)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
