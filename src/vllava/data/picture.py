"""What is in a packet and in a decoded frame: hidden frames, holes, pixels the right way up."""

from __future__ import annotations

import math
import re
import struct
from typing import Any

import numpy as np
from PIL import Image

from vllava.data.container import MAX_PIXELS
from vllava.errors import UserError

# Codecs whose frames never hold 64 zero bytes in a row, as a download with a hole does. Those of MPEG may have zeros
# between their parts, and at the end.
_PADDED = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "h263", "flv", "wmv1", "wmv2", "msmpeg4", "msmpeg4v2"}
_DENSE = {*_PADDED, "vp8", "vp9", "libdav1d", "av1", "gif"}
_HOLE = b"\0" * 64
_HOLE_IN_PARTS = re.compile(rb"\0{64,}[^\0\x01]")


def has_hole(codec: str, packet: bytes) -> bool:
    """Whether zeros have taken the place of data."""
    if codec not in _DENSE or _HOLE not in packet:
        return False
    if codec == "gif":
        return packet.find(_HOLE, _gif_pixels(packet)) >= 0
    return codec not in _PADDED or _HOLE_IN_PARTS.search(packet) is not None or not any(packet)


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


def is_hidden(codec: str, packet: bytes) -> bool:
    """Whether a packet of VP8 or VP9 holds nothing but a frame that others refer to and nobody sees."""
    first = packet[0]
    if codec == "vp8":
        return not first & 0x10
    if codec == "vp9" and packet[-1] & 0xE0 != 0xC0:  # not several frames in one
        behind_profile = 2 if first & 0x30 == 0x30 else 3
        return not first >> behind_profile & 1 and not first >> (behind_profile - 2) & 1
    return False


def upright(frame: Any) -> Image.Image:
    """A decoded frame as an RGB picture, turned and mirrored as its display matrix says.

    FFmpeg's conversion to RGB, which respects the frame's colour matrix and range. A turn that is not by quarters keeps
    the frame's size, with black corners, as FFmpeg's own does.
    """
    if frame.width * frame.height > MAX_PIXELS:
        raise UserError(f"frames of {frame.width} x {frame.height} pixels, the limit is {MAX_PIXELS:,} pixels")
    pixels = frame.to_ndarray(format="rgb24")
    matrix = _matrix(frame)
    return Image.fromarray(pixels) if matrix is None else _turned(pixels, *matrix)


def _matrix(frame: Any) -> tuple[float, float, float, float] | None:
    """The a, b, c, d of a frame's display matrix: a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # something beside it that PyAV has no name for
        angle = math.radians(-frame.rotation)
        return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(data))
    return a, b, c, d


def _turned(pixels: np.ndarray, a: float, b: float, c: float, d: float) -> Image.Image:
    angle = math.degrees(math.atan2(b, a))  # clockwise
    if a * d - b * c > 0 and abs((angle + 45) % 90 - 45) > 1:
        return Image.fromarray(pixels).rotate(-angle, Image.Resampling.BILINEAR)
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return Image.fromarray(np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]))
