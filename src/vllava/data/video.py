"""Some frames of a video file as pictures: which ones, and who decodes them."""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from PIL import Image

from vllava.data.decord import Decord
from vllava.data.frames import Taken, take
from vllava.errors import UserError


def frame_indices(total: int, frames: int) -> list[int]:
    """`frames` uniformly spaced indices, first and last included, truncated as the original code does."""
    return np.linspace(0, total - 1, frames).astype(int).tolist()


def frames_by_index(times: Sequence[float], frames: int) -> list[int]:
    """Evenly spaced in their numbers: the original's rule, whatever the times."""
    return frame_indices(len(times), frames) if times else []


def frames_by_time(times: Sequence[float], frames: int) -> list[int]:
    """Evenly spaced in time from the first frame to the last: the frames nearest to those times, the earlier of two."""
    if not times:
        return []
    wanted = np.linspace(times[0], times[-1], frames).tolist()
    return [_nearest(times, time) for time in wanted]


def _nearest(times: Sequence[float], time: float) -> int:
    after = bisect_left(times, time)
    return min((at for at in (after - 1, after) if 0 <= at < len(times)), key=lambda at: abs(times[at] - time))


SAMPLINGS: dict[str, Callable[[Sequence[float], int], list[int]]] = {"index": frames_by_index, "time": frames_by_time}


@dataclass(frozen=True)
class Clip(Sequence[Image.Image]):
    """Frames taken from a video, as RGB pictures.

    times: when each is shown, in seconds from the first frame of the video; fps: frames per second of the whole video
    on average, None where it is not known; duration: of the whole video, in seconds, the last frame's time included.
    """

    pictures: list[Image.Image]
    times: list[float]
    fps: float | None
    duration: float

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self.pictures[index]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.pictures)


class VideoDecoder:
    """Maps a video file's bytes and a number of frames to that many pictures.

    sampling: "index" (evenly spaced in their numbers, the original's rule) or "time". seconds: of work for a video, at
    most. Which frames a video has, and what makes it a broken one: see vllava.data.frames.
    """

    def __init__(self, sampling: str = "index", seconds: float = 120.0) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(f"data.frame_sampling={sampling!r} is not known; there are: {', '.join(SAMPLINGS)}.")
        self.sampling, self.seconds = sampling, seconds

    def __call__(self, data: bytes, frames: int) -> Clip:
        """Raises UserError, in one line, if the file is unreadable, damaged, too large or without frames."""
        taken = self._take(data, frames)
        return Clip(taken.pictures, taken.times, taken.fps, taken.duration)

    @property
    def identity(self) -> str:
        """What decides the frames, for those who keep what was made of them."""
        return f"{type(self).__name__}({self.sampling})"

    def _take(self, data: bytes, frames: int) -> Taken:
        return take(data, lambda times: SAMPLINGS[self.sampling](times, frames), self.seconds)


class PyavDecoder(VideoDecoder):
    """FFmpeg through PyAV, in this process."""


class DecordDecoder(VideoDecoder):
    """decord's own pixels, which the original code sees, wherever decord gives the frames that the video has.

    decord knows nothing of edit lists, hidden frames or damage, and its seeks miss. So PyAV decodes each video first;
    decord, in a process of its own, then reads forward, and its frames are taken if they show the same. What it
    cannot read, or reads as something else, is PyAV's: nothing is broken because decord says so. It is slower than
    PyAV alone.
    """

    def __init__(self, sampling: str = "index", seconds: float = 120.0, videos: int = 500) -> None:
        super().__init__(sampling, seconds)
        self.process = Decord(seconds, videos)

    def _take(self, data: bytes, frames: int) -> Taken:
        taken = super()._take(data, frames)
        try:
            theirs = self.process.read(data, taken.numbers)
        except UserError:  # PyAV has read it
            return taken
        return Taken(taken.numbers, theirs, taken.times, taken.fps, taken.duration) if _alike(theirs, taken) else taken


def _alike(theirs: list[Image.Image], taken: Taken) -> bool:
    """Whether two decoders' pictures are the same but for the rounding of colours."""
    if [picture.size for picture in theirs] != [picture.size for picture in taken.pictures]:
        return False
    pairs = zip(theirs, taken.pictures, strict=True)
    return all(np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 3 for one, other in pairs)


DECODERS: dict[str, type[VideoDecoder]] = {"decord": DecordDecoder, "pyav": PyavDecoder}


def video_decoder(name: str, sampling: str = "index") -> VideoDecoder:
    """The decoder of that name, or for "auto" PyAV, which is right with every file that it reads and the fastest.

    Raises UserError for an unknown name or sampling, or if decord is asked for and not installed.
    """
    if name == "auto":
        name = "pyav"
    if name not in DECODERS:
        raise UserError(f"data.decoder={name!r} is not known; there are: auto, {', '.join(DECODERS)}.")
    if name == "decord" and importlib.util.find_spec("decord") is None:
        raise UserError("decord is not installed here (pip install 'vllava[decord]'): choose data.decoder=pyav.")
    return DECODERS[name](sampling)
