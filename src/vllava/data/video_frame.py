"""What is in a packet and in a decoded frame: hidden frames, pixels the right way up."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from PIL import Image

from vllava.data.container import MAX_PIXELS
from vllava.errors import UserError


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
    # One thread: FFmpeg would start some for each frame, and a loader has a process for each core already.
    pixels = frame.to_ndarray(format="rgb24", threads=1)
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
