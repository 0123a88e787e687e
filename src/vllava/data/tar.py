"""The members of a tar file, from its headers alone: names, places and sizes, each checked against the file.

The standard library's reader is made for tar files of one's own: it allocates what a header claims, follows links,
understands sparse files and takes a file that was cut for a shorter one. A shard comes from anywhere. What is read
here is POSIX tar with its extended headers, and GNU tar's long names; the layout of the blocks is in POSIX.1-2001,
`pax`, "ustar Interchange Format", and in GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
HEADER_LIMIT = 1 << 20  # bytes of an extended header; attributes beside the name may be long
RECORD_LIMIT = 1000  # attributes in an extended header
NAME_LIMIT = 4096  # characters of a member's name, as of a path in Linux
TAIL_LIMIT = 1 << 26  # bytes after the end mark; writers fill up to a record, 10 KiB unless told otherwise

PACKED = {
    b"\x1f\x8b": "gzip",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what a terminal or a log may take for more than text


class Member(NamedTuple):
    """A plain file in a tar file: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, end: int) -> Iterator[Member]:
    """The plain files in a tar file of `end` bytes, in their order; folders are passed over.

    Nothing larger than a header is read. Raises ValueError, which says what and where, for anything that is no tar
    file, is compressed, cut or joined, for links, devices and sparse files, and for sizes the file does not have.
    """
    start = file.read(16)
    if packed := next((name for mark, name in PACKED.items() if start.startswith(mark)), None):
        raise ValueError(f"it is compressed with {packed}: unpack it")
    place = 0
    said: dict[str, bytes] = {}  # by extended headers, of the member that follows
    while True:
        header = _read(file, place, BLOCK, end)
        if not any(header):
            return _require_end(file, place, end)
        kind, given, size = _parse(header, place)
        content = place + BLOCK
        if kind in b"xXgLK":
            if size > HEADER_LIMIT:
                raise ValueError(f"the extended header at byte {place} claims {size} bytes")
            said |= _extended(kind, _read(file, content, size, end), place)
        else:
            name = _text(said.get("path", given))
            size = _decimal(said["size"], place) if "size" in said else size
            said = {}
            if kind in b"5" or (kind in b"0\0" and name.endswith("/")):
                size = 0  # a folder's is a hint, and no content follows
            elif kind in b"0\x007":
                if size > end - content:
                    raise ValueError(f"{name} claims {size} bytes, of which the file has {max(end - content, 0)}")
                if CONTROL.search(name) or len(name) > NAME_LIMIT:
                    raise ValueError(f"the name {name[:80]!r} contains a control character or is too long")
                yield Member(name, content, size)
            else:
                what = {b"1": "a link", b"2": "a link", b"S": "a sparse file"}.get(kind, "no plain file")
                raise ValueError(f"{name!r} is {what}; shards hold plain files")
        place = content + -(-size // BLOCK) * BLOCK


def _read(file: BinaryIO, place: int, size: int, end: int) -> bytes:
    if size > end - place:
        raise ValueError(f"it ends at byte {end}, before its end mark, as a file that was cut does")
    file.seek(place)
    data = file.read(size)
    if len(data) < size:
        raise ValueError("it has become shorter while it was read")
    return data


def _parse(header: bytes, place: int) -> tuple[bytes, bytes, int]:
    """Type, name and size of a header block."""
    field = header[148:156]
    try:
        claimed = _number(field)
    except ValueError:
        claimed = -1
    total = sum(header) - sum(field) + 8 * ord(" ")
    # Some old writers summed bytes with a sign.
    if claimed != total and claimed != total - 256 * sum(byte > 127 for byte in header[:148] + header[156:]):
        raise ValueError(f"no tar header at byte {place}")
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return header[156:157], prefix + b"/" + name if prefix else name, _number(header[124:136])


def _number(field: bytes) -> int:
    """An octal number, or GNU tar's binary form of one that is too large for it."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise ValueError(f"a header holds {field!r} where a size should be")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, place: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise ValueError(f"the extended header at byte {place} holds {digits[:20]!r} where a number should be")
    return int(digits)


def _extended(kind: bytes, content: bytes, place: int) -> dict[str, bytes]:
    """What an extended header says of the member that follows."""
    if kind == b"L":
        return {"path": content.split(b"\0")[0]}
    if kind == b"K":
        return {}  # the target of a link, which is refused when it comes
    said = dict(_records(content, place))
    if any(key.startswith(b"GNU.sparse.") for key in said):
        raise ValueError(f"the extended header at byte {place} is a sparse file's; shards hold plain files")
    known = {key.decode(): said[key] for key in (b"path", b"size") if key in said}
    if kind == b"g" and known:
        raise ValueError(f"the header at byte {place} gives all files one {' and '.join(known)}")
    return known


def _records(content: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    """The records `LENGTH KEY=VALUE` of a POSIX extended header."""
    start = count = 0
    while start < len(content) and content[start]:
        if (count := count + 1) > RECORD_LIMIT:
            raise ValueError(f"the extended header at byte {place} has more than {RECORD_LIMIT} records")
        space = content.find(b" ", start, start + 9)
        stop = start + _decimal(content[start:space], place) if space > 0 else 0
        key, equals, value = content[space + 1 : stop - 1].partition(b"=")
        if not (space < stop <= len(content) and content[stop - 1 : stop] == b"\n" and equals):
            raise ValueError(f"the extended header at byte {place} is damaged")
        yield key, value
        start = stop


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")  # a name is but a label; one in another encoding harms nothing


def _require_end(file: BinaryIO, place: int, end: int) -> None:
    """After the mark nothing may follow but zeros: a second tar file there would be lost."""
    left = end - place
    while place < end and left <= TAIL_LIMIT:
        piece = _read(file, place, min(1 << 20, end - place), end)
        if any(piece):
            break
        place += len(piece)
    if place < end:
        raise ValueError(f"{left} bytes follow its end mark, as where files were joined")
