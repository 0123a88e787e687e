"""Damage that FFmpeg passes over: holes of zeros, as torn downloads have them."""

from __future__ import annotations

import re

# Codecs whose frames never hold so many zeros in a row as a download with a hole does: their codes have no long ones.
# Those of MPEG may have zeros between their parts, before a 1, and at the end; not where a container counts bytes.
_PADDED = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "h263", "flv", "wmv1", "wmv2", "msmpeg4", "msmpeg4v2"}
_COUNTED = {"h264", "hevc"}
_COUNTING = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"}
_ARITHMETIC = {"vp8", "vp9", "libdav1d", "av1"}
_HOLE = b"\0" * 64
_ANY_HOLE = re.compile(rb"\0{64,}")
_HOLE_IN_PARTS = re.compile(rb"\0{32,}[^\0\x01]")


def has_hole(container: str, codec: str, packet: bytes) -> bool:
    """Whether zeros have taken the place of data."""
    if codec in _PADDED:
        if _HOLE[:32] not in packet:
            return False
        counted = codec in _COUNTED and container in _COUNTING
        return counted or _HOLE_IN_PARTS.search(packet) is not None or not any(packet)
    if codec == "gif":
        return packet.find(_HOLE, _gif_pixels(packet)) >= 0
    return codec in _ARITHMETIC and _HOLE in packet


def _gif_pixels(packet: bytes) -> int:
    """Where the compressed pixels of a GIF's frame begin, behind its colours."""
    at = 0
    if packet[:3] == b"GIF":
        at = 13 + _colours(packet[10])
    while packet[at : at + 1] == b"!":  # an extension: two bytes, then blocks up to an empty one
        at += 2
        while at < len(packet) and packet[at]:
            at += packet[at] + 1
        at += 1
    if packet[at : at + 1] != b"," or at + 10 > len(packet):
        return len(packet)
    return at + 10 + _colours(packet[at + 9])


def _colours(flags: int) -> int:
    """Bytes of a GIF's table of colours."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def is_torn(container: str, codecs: set[str], data: bytes, first: int) -> bool:
    """Whether there is a hole where a file holds frames, from byte `first` on, but in none of them.

    FFmpeg looks for the next frame behind it. codecs: of all the file's streams. In other containers than these, zeros
    may stand between frames.
    """
    if container == "mpegts":
        return data[:1] == b"G" and data[188:189] == b"G" and data[::188].count(b"G") < len(data[::188])
    if container not in ("matroska,webm", "flv") or not codecs <= {*_PADDED, *_ARITHMETIC, "aac", "opus", "vorbis"}:
        return False
    if data.find(_HOLE, first) < 0:
        return False
    holes = [hole.start() for hole in _ANY_HOLE.finditer(data, first)]
    if container == "matroska,webm":  # its elements of nothing, which begin with this byte and their size
        holes = [at for at in holes if b"\xec" not in data[max(0, at - 9) : at]]
    return bool(holes)
