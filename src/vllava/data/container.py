"""A stranger's video file, opened so that it can open nothing else, take no endless time and no endless memory."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vllava.errors import UserError, reason

# FFmpeg's names of the containers that we mean. Everything else it knows (playlists, scripts, lists of files or
# addresses, pictures, sound, subtitles) is refused before it is opened.
FORMATS = (
    "mov,matroska,avi,asf,flv,live_flv,mpeg,mpegts,mpegvideo,m4v,h261,h263,h264,hevc,obu,ivf,ogg,gif,apng,nut,mxf,dv,"
    "rm,wtv,mjpeg"
)
MAX_PIXELS = 4096 * 4096  # of a frame: eight of them and what a decoder keeps stay below 1 GiB
MAX_PACKETS = 1_000_000  # nine hours at 30 frames a second


class TimeLimitError(UserError):
    """A video that took longer than it may."""


class Deadline:
    """Raises TimeLimitError when this thread has worked for more than `seconds`, however busy the machine is."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.thread_time() + seconds

    def check(self) -> None:
        if time.thread_time() > self._end:
            raise TimeLimitError(f"unreadable video (not decoded within {self.seconds:g} s)")


class _Source(io.BytesIO):
    """The file's bytes; reading them is where a demuxer that goes round in circles is stopped."""

    def __init__(self, data: bytes, deadline: Deadline) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        self._deadline.check()
        return super().read(size)


@dataclass(frozen=True)
class Opened:
    """An open container and the video stream that is meant: the default one, else the first; never a cover picture."""

    container: Any
    stream: Any
    deadline: Deadline

    @property
    def codec(self) -> str:
        return self.stream.codec_context.name

    @property
    def codecs(self) -> set[str]:
        """FFmpeg's names of the decoders of all streams."""
        return {stream.codec_context.name if stream.codec_context else "" for stream in self.container.streams}

    @property
    def rate(self) -> float | None:
        """Frames per second as announced."""
        rate = self.stream.average_rate or self.stream.guessed_rate
        return float(rate) if rate else None

    def packets(self) -> Iterator[Any]:
        """The stream's packets in the order of the file; UserError for too many of them, or for a damaged file."""
        for number, packet in enumerate(self.container.demux(self.stream)):
            if number % 16 == 0:  # asking for the time takes time
                self.deadline.check()
            if number > MAX_PACKETS:
                raise UserError(f"the video has more than {MAX_PACKETS:,} frames: cut it into shorter ones")
            if packet.size:  # empty ones would tell the decoder that the video ends
                yield packet


@contextmanager
def opened(data: bytes, deadline: Deadline) -> Iterator[Opened]:
    """Opens a video file for reading forward, one thread; raises UserError for what is not a video of ours.

    Errors of FFmpeg inside the block become a UserError too.
    """
    _check_sample_counts(data)
    try:
        with _open(data, deadline) as container:
            yield Opened(container, _stream(container), deadline)
    except UserError:
        raise
    except Exception as error:  # FFmpeg's and PyAV's, of many kinds, MemoryError among them
        raise UserError(f"unreadable video ({said(error)})") from error


def _open(data: bytes, deadline: Deadline) -> Any:
    import av

    try:
        return av.open(
            _Source(data, deadline),
            options={"max_pixels": str(MAX_PIXELS)},
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none"},
            io_open=_refuse,
            metadata_errors="replace",
        )
    except ValueError as error:  # FFmpeg knows the format, but it is not on the list; or its own "invalid data"
        raise UserError(f"unreadable video (in no format that is taken here; {said(error)})") from error


def said(error: Exception) -> str:
    """FFmpeg's own words alone, or an error in one line."""
    return getattr(error, "strerror", None) or reason(error)


def _refuse(url: str, *_: Any) -> Any:
    raise UserError(f"unreadable video (it asks for another file, {url[:80]!r})")


def _stream(container: Any) -> Any:
    from av.stream import Disposition

    cover = Disposition.attached_pic | Disposition.timed_thumbnails
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise UserError("the video has no frames (no video stream)")
    stream = max(streams, key=lambda stream: bool(stream.disposition & Disposition.default))
    context = stream.codec_context
    if context is None:
        raise UserError("unreadable video (of no known codec)")
    if context.width * context.height > MAX_PIXELS:
        raise UserError(f"frames of {context.width} x {context.height} pixels, the limit is {MAX_PIXELS:,} pixels")
    context.thread_count = 1  # loaders have a process for each core already, and errors belong to their packet
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _check_sample_counts(data: bytes) -> None:
    """UserError for an MP4 whose header makes FFmpeg write an index that has nothing to do with the file's size."""
    for kind, atom in _atoms(data):
        if kind == b"moov":
            edits = max((_number(atom, found.end()) for found in re.finditer(rb"elst[\0\x01]\0\0\0", atom)), default=1)
            for found in re.finditer(rb"stsz\0\0\0\0", atom):
                size, count = _number(atom, found.end()), _number(atom, found.end() + 4)
                sound = atom.rfind(b"soun", 0, found.start()) > atom.rfind(b"vide", 0, found.start())
                if size:  # of all samples, which then need no table
                    _check(count * size, len(data))
                    _check(count, len(data) if sound else MAX_PACKETS)  # PCM: a sample may be a byte
                else:
                    count = min(count, len(atom) // 4)
                _check(count * min(edits, len(atom) // 12), max(len(data), 10 * MAX_PACKETS))
        if kind == b"moof":
            runs = re.finditer(rb"trun[\0\x01]\0[\0-\x0f][\0-\x0f]", atom)
            _check(sum(_number(atom, found.end()) for found in runs), max(len(atom), 10_000))


def _check(announced: int, limit: int) -> None:
    if announced > limit:
        raise UserError(f"unreadable video (it announces {announced:,} samples or bytes, {limit:,} are possible)")


def _atoms(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and contents of an MP4's parts."""
    at = 0
    while at + 8 <= len(data):
        size, kind, head = _number(data, at), data[at + 4 : at + 8], 8
        if size == 1:  # then it is written behind, in eight bytes
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        end = at + size if size else len(data)
        if end < at + head:
            return
        if kind in (b"moov", b"moof"):
            yield kind, data[at + head : end]
        at = end


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
