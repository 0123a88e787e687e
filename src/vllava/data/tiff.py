"""The first directory of a TIFF file, which is also what EXIF data are: enough of it to trust the rest to Pillow."""

from __future__ import annotations

import struct
from collections.abc import Iterator

BITS, PHOTOMETRIC, STRIP_OFFSETS, ORIENTATION, TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, SAMPLE_FORMAT = (
    258, 262, 273, 274, 322, 323, 324, 339,
)  # fmt: skip
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I"}  # the types in which an orientation is found

# Each piece becomes objects of Python before a pixel is read. A picture of 50 million pixels has fewer 16 x 16 tiles.
MAX_PIECES = 200_000


def orientation(exif: bytes) -> int:
    """What EXIF data say of the way up: 1 to 8, or 1. Raises struct.error or ValueError where they are malformed."""
    order, entries = _directory(exif)
    for tag, kind, _, value in entries:
        if tag == ORIENTATION and kind in _NUMBERS:
            return struct.unpack_from(order + _NUMBERS[kind], exif, value)[0]
    return 1


def check_directory(data: bytes) -> None:
    """Raises ValueError where the tags of a TIFF would take far more memory than the file."""
    total = 0
    for tag, kind, count, _ in _directory(data)[1]:
        size = _BYTES.get(kind, 0) * count
        total += size if size <= len(data) else 0  # Pillow leaves out what does not fit the file
        if tag in (STRIP_OFFSETS, TILE_OFFSETS) and count > MAX_PIECES:
            raise ValueError(f"{count} pieces")
    if total > 2 * len(data):  # each has its own place in the file, but for a few that share one
        raise ValueError("its tags overlap")


def _directory(data: bytes) -> tuple[str, Iterator[tuple[int, int, int, int]]]:
    """Byte order, and of each entry tag, type, count and the place of its value."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("neither II nor MM")
    if struct.unpack_from(order + "H", data, 2)[0] == 43:  # BigTIFF
        return order, _entries(data, order + "Q", order + "HHQ", struct.unpack_from(order + "Q", data, 8)[0], 20)
    return order, _entries(data, order + "H", order + "HHI", struct.unpack_from(order + "I", data, 4)[0], 12)


def _entries(data: bytes, number: str, entry: str, start: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    (count,) = struct.unpack_from(number, data, start)
    start += struct.calcsize(number)
    for at in range(start, start + count * step, step):
        yield (*struct.unpack_from(entry, data, at), at + struct.calcsize(entry))
