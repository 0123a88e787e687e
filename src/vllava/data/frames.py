"""Which frames a video has, when each is shown, and how to get some of them: the one rule, whatever the decoder.

A video's frames are those that FFmpeg gives when it decodes the file from its first packet to its last: in the order in
which they are shown, without those that the file discards (edit lists) or hides (reference frames of VP8, VP9 and AV1),
turned and mirrored as the display matrix says. Pixels that are not square stay as they are stored.

Packets tell without decoding how many frames there are and when they are shown, in most files. `planned`
relies on that: it decodes only what the wanted frames need, and gives up at the first thing that does not fit.
`_through` relies on nothing: it decodes everything and keeps the wanted frames alone. It has the last word, also on
what is damaged.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from PIL import Image

from vllava.data.container import MAX_PIXELS, Deadline, Opened, TimeLimitError, opened, said
from vllava.data.damage import has_hole, is_torn
from vllava.data.video_frame import is_hidden, upright
from vllava.errors import UserError

Choice = Callable[[Sequence[float]], list[int]]  # the times of all frames, s -> the numbers of the wanted ones, rising

# Where packets carry the times at which frames are shown, and a packet is a frame.
_TIMED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "mpegts"}
_TIMED_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "libdav1d", "av1"}
_NO_PICTURE = 8  # bytes: a packet of H.264 or HEVC that is shorter holds no picture
SHORT = 200  # packets: shorter videos are read through, which is quick enough, so that all their damage is seen


@dataclass(frozen=True)
class Taken:
    """The wanted frames: their numbers, pictures and times; frames a second (None where unknown); seconds in all."""

    numbers: list[int]
    pictures: list[Image.Image]
    times: list[float]
    fps: float | None
    duration: float


def take(data: bytes, choose: Choice, seconds: float) -> Taken:
    """The frames of a video file that `choose` wants, decoded by FFmpeg within `seconds`.

    Times count from the first frame that is shown. Raises UserError for what is no video, has no frames, or is
    damaged: an error while reading or decoding, a packet or frame that FFmpeg marks as corrupt, a hole of zeros.
    Other damage to frames of a long video that are not needed, and so not decoded, is not seen.
    """
    deadline = Deadline(seconds)
    with opened(data, deadline) as video:
        packets = _Packets(video)
        if is_torn(video.container.format.name, video.codecs, data, packets.begin):
            raise UserError("damaged video (there is a hole in it)")
    return packets.planned(data, choose, deadline) or _through(data, choose, packets.guess(choose), deadline)


@dataclass(frozen=True)
class Measured:
    """A video before it is decoded, as its packets tell: frames as they are stored, and seconds in all."""

    width: int
    height: int
    frames: int
    seconds: float


def measure(data: bytes, seconds: float = 120.0) -> Measured:
    """The size of a video, without decoding it, within `seconds`; raises UserError for what is no video or is damaged.

    Where packets are not frames, the number of frames is that of packets.
    """
    with opened(data, Deadline(seconds)) as video:
        context = video.stream.codec_context
        packets = _Packets(video)
        return Measured(context.width, context.height, len(packets.order), packets.line.duration)


class _Packets:
    """What a video's packets say, in the order of the file."""

    def __init__(self, video: Opened) -> None:
        """Reads them all; raises UserError for a damaged one after the first key frame."""
        self.base, self.rate, self.codec = float(video.stream.time_base), video.rate, video.codec
        container = video.container.format.name
        self.plain = container in _TIMED_FORMATS and self.codec in _TIMED_CODECS
        self.pts, self.keys, shown = array("q"), array("q"), array("q")
        last, duration = 0, 0  # of the frame that is shown last
        self.begin = 0  # of the first packet, in the file
        for number, packet in enumerate(video.packets()):
            content, pts = bytes(packet), packet.pts
            self.begin = self.begin or packet.pos or 0
            if pts is None or (self.codec in ("h264", "hevc") and len(content) < _NO_PICTURE):
                self.plain, pts = False, pts or 0
            if packet.is_keyframe:
                self.keys.append(number)
            if self.keys and (packet.is_corrupt or has_hole(container, self.codec, content)):
                raise UserError("damaged video (a packet is not whole)")
            if not packet.is_discard and not is_hidden(self.codec, content):
                if not shown or pts > last:
                    last, duration = pts, packet.duration or 0
                shown.append(number)
            self.pts.append(pts)
        times = self.pts.tolist()
        self.order = sorted(shown, key=times.__getitem__)  # the packets of frames, as they are shown
        self.line = _Line([times[place] for place in self.order], self.base, self.rate, duration)
        self.plain = self.plain and self.line.told

    def guess(self, choose: Choice) -> list[int]:
        """The numbers of the wanted frames, if packets are frames."""
        return choose(self.line.times)

    def planned(self, data: bytes, choose: Choice, deadline: Deadline) -> Taken | None:
        """The wanted frames, each decoded from the nearest key frame on.

        None for short videos, and where packets and frames do not fit.
        """
        if not self.plain or len(self.pts) <= SHORT:
            return None
        numbers = choose(self.line.times)
        places = [self.order[number] for number in numbers]
        runs = self._runs(places)
        if not runs:
            return None
        try:
            with opened(data, deadline) as video:
                pictures = self._decode(video, runs, set(places))
        except TimeLimitError:
            raise
        except UserError:  # what is wrong, if anything is, shows in reading through
            return None
        return self.line.taken(numbers, [pictures[place] for place in places])

    def _runs(self, places: list[int]) -> list[tuple[int, int]]:
        """First and last packet of each stretch to decode; none if a frame has no key frame to begin from.

        A key frame that is shown after the frame, as in open groups of pictures, is no help to it.
        """
        runs: list[tuple[int, int]] = []
        for place in places:
            at = bisect_right(self.keys, place) - 1
            while at >= 0 and self.pts[self.keys[at]] > self.pts[place]:
                at -= 1
            if at < 0:
                return []
            if runs and self.keys[at] <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(runs[-1][1], place))
            else:
                runs.append((self.keys[at], place))
        return runs

    def _decode(self, video: Opened, runs: list[tuple[int, int]], wanted: set[int]) -> dict[int, Image.Image]:
        """The pictures of the wanted packets; raises UserError at the first thing that does not fit."""
        place_of = {self.pts[place]: place for place in self.order}
        found: dict[int, Image.Image] = {}
        run, before = -1, 0
        for first, frame in _decoded(video, runs, wanted):
            start = self.pts[first]
            if frame.pts is None or frame.pts not in place_of:
                raise UserError("a frame of no packet")
            if frame.pts < start:
                continue  # shown before the key frame that was decoded first: not whole
            opening, run = first != run, first
            if frame.is_corrupt or frame.interlaced_frame or (frame.pts == start and not frame.key_frame):
                raise UserError("damaged, of two fields, or not begun at a key frame")
            if not opening and frame.pts <= before:
                raise UserError("frames out of order")
            before = frame.pts
            if place_of[before] in wanted:
                found[place_of[before]] = upright(frame)
        if found.keys() < wanted:
            raise UserError("a wanted frame did not come")
        return found


def _decoded(video: Opened, runs: list[tuple[int, int]], wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """Frames of each stretch of packets, with the number of its first packet, but not all that no other one needs."""
    context = video.stream.codec_context
    stretches = iter(runs)
    first, last = next(stretches)
    for place, packet in enumerate(video.packets()):
        if place < first:
            continue
        if video.codec == "h264":  # the others' flags for it are less exact
            context.skip_frame = "DEFAULT" if place in wanted else "NONREF"
        yield from ((first, frame) for frame in context.decode(packet))
        if place == last:
            yield from ((first, frame) for frame in context.decode(None))
            context.flush_buffers()
            if (stretch := next(stretches, None)) is None:
                return
            first, last = stretch


def _through(data: bytes, choose: Choice, wanted: list[int], deadline: Deadline) -> Taken:
    """The wanted frames out of all; decodes a second time if there are not as many as the packets made believe."""
    for _ in range(2):
        with opened(data, deadline) as video:
            base, rate, duration = float(video.stream.time_base), video.rate, 0
            pts, kept, places = [], {}, set(wanted)
            for number, frame in enumerate(_sound(video)):
                pts.append(frame.pts)
                duration = frame.duration
                if number in places:
                    kept[number] = upright(frame)
        if not pts:
            raise UserError("the video has no frames")
        line = _Line(pts, base, rate, duration)
        wanted = choose(line.times)
        if kept.keys() >= set(wanted):
            return line.taken(wanted, [kept[number] for number in wanted])
    raise UserError("unreadable video (its frames differ from one decoding to the next)")


def _sound(video: Opened) -> Iterator[Any]:
    """All frames; raises UserError for damage, except before the first key frame: a recording may begin anywhere."""
    context = video.stream.codec_context
    begun = shown = False
    for packet in _and_end(video.packets()):
        begun = begun or shown or (packet is not None and packet.is_keyframe)
        try:
            frames = context.decode(packet)
        except Exception as error:  # FFmpeg's, of many kinds
            if begun or packet is None:
                large = "" if context.width else f"; or its frames are larger than {MAX_PIXELS:,} pixels"
                raise UserError(f"damaged video ({said(error)}{large})") from error
            continue
        for frame in frames:
            shown = shown or frame.key_frame
            if shown and frame.is_corrupt:
                raise UserError("damaged video (a frame is not whole)")
            yield frame


def _and_end(packets: Iterator[Any]) -> Iterator[Any]:
    yield from packets
    yield None  # the decoder gives what it still holds


class _Line:
    """The times of all frames in seconds from the first; evenly spaced where the file does not tell rising ones."""

    def __init__(self, pts: Sequence[int | None], base: float, rate: float | None, last: int | None) -> None:
        """pts: in units of `base` seconds; rate: announced frames a second; last: how long the last frame is shown."""
        count = len(pts)
        self.told = count > 0 and None not in pts and all(a < b for a, b in pairwise(pts))  # type: ignore[operator]
        step = 1 / (rate or 25)
        if self.told:
            self.times = [(time - pts[0]) * base for time in pts]  # type: ignore[operator]
            step = (last or 0) * base or (self.times[-1] / (count - 1) if count > 1 else step)
        else:
            self.times = [number * step for number in range(count)]
        self.duration = self.times[-1] + step if count else 0.0
        self.fps = count / self.duration if count and (rate or (self.told and count > 1)) else None

    def taken(self, numbers: list[int], pictures: list[Image.Image]) -> Taken:
        return Taken(numbers, pictures, [self.times[number] for number in numbers], self.fps, self.duration)
