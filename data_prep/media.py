"""Media as rows name them: found on disk, read and checked, or taken apart into frames."""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.rows import MediaRef
from vllava.data.frames import take
from vllava.data.index import SAMPLE_BYTES
from vllava.data.picture import FORMATS, decode_image
from vllava.data.video import frames_by_index, video_decoder
from vllava.errors import UserError

CHECKS = ("decode", "none")
VIDEOS = ("files", "frames")
MAX_FRAMES = 5_000  # of a video, as pictures
BATCH = 32  # frames that are decoded and in memory at a time, in the video's own size
QUALITY = 90  # of frames' JPEG files
BYTES_PER_PIXEL = 0.25  # of such files, about: for estimates alone

# The extensions of files that may be meant where the named one is not there, the most usual ones first.
EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif"),
    "video": (*("mp4", "mkv", "webm", "avi", "mov", "m4v", "gif", "flv", "3gp", "mpg", "mpeg", "wmv", "ts", "ogv"),),
}
_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WebP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
# How video files begin. Of those that begin otherwise, the name has to tell what they are.
_VIDEO_STARTS = (
    (rb".{4}ftypqt  |.{4}(moov|mdat|wide|free|skip)", "mov"),
    (rb".{4}ftyp3g", "3gp"),
    (rb".{4}ftyp", "mp4"),
    (rb"\x1a\x45\xdf\xa3.{0,60}webm", "webm"),
    (rb"\x1a\x45\xdf\xa3", "mkv"),
    (rb"RIFF.{4}AVI ", "avi"),
    (rb"GIF8[79]a", "gif"),
    (rb"FLV", "flv"),
    (rb"\0\0\x01[\xba\xb3]", "mpg"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "wmv"),
    (rb"(.{4})?\x47.{187}(.{4})?\x47", "ts"),
    (rb"OggS", "ogv"),
)


@dataclass(frozen=True)
class MediaSettings:
    """How media go into shards.

    check: "decode" tries each as training will, "none" takes their first bytes' word. video: "files" as they are, or
    "frames": JPEG files, of which `frames` says how many ("8": evenly spaced, or "fps:1": so many a second), and
    `short_side` how large, at most, in pixels.
    """

    check: str = "decode"
    video: str = "files"
    frames: str = "8"
    short_side: int = 256

    def __post_init__(self) -> None:
        for value, known in ((self.check, CHECKS), (self.video, VIDEOS)):
            if value not in known:
                raise UserError(f"{value!r} is not known; there are: {', '.join(known)}.")
        if self.short_side < 16:
            raise UserError(f"--short-side {self.short_side}: frames have at least 16 pixels.")
        choice(self.frames)


@dataclass(frozen=True)
class Loaded:
    """A medium as it goes into a shard: the extension of its real format, its bytes or those of each frame, and when
    the frames are shown, in seconds from the first frame of the video."""

    extension: str
    data: bytes | list[bytes]
    times: list[float] | None = None

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.data) if isinstance(self.data, bytes) else sum(map(len, self.data))


def load(ref: MediaRef, settings: MediaSettings) -> Loaded:
    """A medium, read and checked; raises UserError for one that is missing, empty, of no known format or broken."""
    data = _read(ref.path, ref.kind) if ref.data is None and ref.path is not None else ref.data
    if not data:
        raise UserError("the file is empty")
    extension = format_of(data, ref.kind, ref.name)
    if ref.kind == "video" and settings.video == "frames":
        return Loaded("jpg", *frames_of(data, choice(settings.frames), settings.short_side))
    if settings.check == "decode":
        _decode(data, ref.kind)
    return Loaded(extension, data)


def measure(ref: MediaRef, settings: MediaSettings) -> int:
    """About how many bytes a medium will take, without reading it where nothing is to be checked.

    Raises UserError for one that is missing, empty or, with check=decode, broken.
    """
    if settings.check == "decode":
        return load(ref, settings).size
    size = find(ref.path, ref.kind)[1] if ref.data is None and ref.path is not None else len(ref.data or b"")
    if not size:
        raise UserError("the file is empty")
    if ref.kind == "video" and settings.video == "frames" and settings.frames.isdigit():
        return int(int(settings.frames) * settings.short_side**2 * 16 / 9 * BYTES_PER_PIXEL)
    return size


# --- files ------------------------------------------------------------------------------------------------------------


def find(path: Path, kind: str) -> tuple[Path, int]:
    """The file that a name means, and its size in bytes.

    That is the file of this name. Where there is none, one whose name differs only in its extension or its case, or in
    how Unicode writes the same letters (NFC, NFD), if there is exactly one. Raises UserError for none and for several.
    """
    found = _plain(path)
    if found is None:
        others: dict[tuple[int, int], tuple[Path, os.stat_result]] = {}
        for candidate in _candidates(path, kind):
            if (other := _plain(candidate)) is not None:
                others.setdefault((other.st_dev, other.st_ino), (candidate, other))  # a disk may ignore the case
        if not others:
            raise UserError("it is a folder, not a file" if path.is_dir() else "the file does not exist")
        if len(others) > 1:
            names = ", ".join(sorted(candidate.name for candidate, _ in others.values())[:3])
            raise UserError(f"the file does not exist, and several may be meant instead: {names}")
        path, found = next(iter(others.values()))
    if found.st_size > SAMPLE_BYTES:
        raise UserError(f"the file has {found.st_size} bytes; a sample has at most {SAMPLE_BYTES}")
    return path, found.st_size


def _plain(path: Path) -> os.stat_result | None:
    """What the system says of a plain file; None where there is none; raises UserError for what is neither."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte in the name
        return None
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UserError("it is a device or a pipe, not a file")
    return found if stat.S_ISREG(found.st_mode) else None


def _candidates(path: Path, kind: str) -> Iterator[Path]:
    known = {extension for extensions in EXTENSIONS.values() for extension in extensions}
    whole = str(path)
    stem = whole[: -len(path.suffix)] if path.suffix[1:].lower() in known else whole
    for form in dict.fromkeys((whole, *(unicodedata.normalize(form, whole) for form in ("NFC", "NFD")))):
        if form != whole:
            yield Path(form)
    for form in dict.fromkeys((stem, *(unicodedata.normalize(form, stem) for form in ("NFC", "NFD")))):
        for extension in EXTENSIONS[kind]:
            yield from (Path(f"{form}.{case}") for case in (extension, extension.upper(), extension.capitalize()))


def _read(path: Path, kind: str) -> bytes:
    """The contents of the file that a name means; raises UserError as `find` does."""
    try:
        found = _contents(path)
        return _contents(find(path, kind)[0]) or b"" if found is None else found
    except OSError as error:
        raise UserError(f"the file cannot be read ({error.strerror})") from error


def _contents(path: Path) -> bytes | None:
    """The contents of a plain file that is not too large; None for anything else. Nothing is waited for, as on a pipe.

    By as few calls as can be: there are millions of files, and they may be far away.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > SAMPLE_BYTES:
            return None
        data = os.read(handle, found.st_size + 1)
        while 0 < len(data) < found.st_size and (more := os.read(handle, found.st_size)):
            data += more
        return data
    finally:
        os.close(handle)


def format_of(data: bytes, kind: str, name: str) -> str:
    """The extension of a medium's real format, by its first bytes; raises UserError for one of no known format."""
    picture = next((format for format, (start, _) in FORMATS.items() if re.match(start, data, re.DOTALL)), None)
    if kind == "image":
        if picture is None:
            raise UserError(f"unreadable image (of no known format; known are {', '.join(FORMATS)})")
        return _EXTENSION_OF.get(picture, picture.lower())
    if picture not in (None, "GIF", "AVIF", "HEIC"):  # the last two begin as videos do
        raise UserError(f"unreadable video (it is a picture, of the format {picture})")
    extension = next((ext for start, ext in _VIDEO_STARTS if re.match(start, data, re.DOTALL)), None)
    named = name.rpartition(".")[2].lower()
    if extension is None and named not in EXTENSIONS["video"]:
        raise UserError("unreadable video (of no known format)")
    return extension or named


def _decode(data: bytes, kind: str) -> None:
    """Raises UserError for what training could not decode."""
    if kind == "image":
        decode_image(data)
    else:
        video_decoder("auto")(data, 8)


# --- frames -----------------------------------------------------------------------------------------------------------


def choice(frames: str) -> Callable[[Sequence[float]], list[int]]:
    """From the times of a video's frames to the numbers of the wanted ones; raises UserError for no such rule.

    "8" takes eight, evenly spaced in their numbers, as training does. "fps:2" takes those that are shown every half
    second, from the first on.
    """
    count, rate = re.fullmatch(r"[1-9]\d{0,3}", frames), re.fullmatch(r"fps:(\d+(?:\.\d+)?)", frames)
    if count and int(frames) <= MAX_FRAMES:
        return lambda times: frames_by_index(times, int(frames))
    if rate and 0 < float(rate[1]) <= 1000:
        return lambda times: _frames_at_rate(times, float(rate[1]))
    raise UserError(f"--frames {frames}: write a number, such as 8 (at most {MAX_FRAMES}), or a rate, such as fps:1.")


def _frames_at_rate(times: Sequence[float], rate: float) -> list[int]:
    if not times:
        return []
    count = int((times[-1] - times[0]) * rate + 1e-6) + 1
    if count > MAX_FRAMES:
        raise UserError(f"{times[-1]:.0f} s of video give {count:,} frames, at most {MAX_FRAMES:,} are taken")
    return sorted({bisect_right(times, times[0] + step / rate + 1e-6) - 1 for step in range(count)})


def frames_of(
    data: bytes, choose: Callable[[Sequence[float]], list[int]], short_side: int, seconds: float = 120.0
) -> tuple[list[bytes], list[float]]:
    """The chosen frames of a video as JPEG files, and their times in seconds; `seconds` of work for BATCH of them."""
    wanted: list[int] = []

    def first(times: Sequence[float]) -> list[int]:
        wanted[:] = choose(times)
        return wanted[:BATCH]

    taken = take(data, first, seconds)
    files = [_jpeg(picture, short_side) for picture in taken.pictures]
    times = taken.times
    for start in range(BATCH, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        taken = take(data, lambda _, batch=batch: batch, seconds)  # type: ignore[misc]
        files += [_jpeg(picture, short_side) for picture in taken.pictures]
        times = times + taken.times
    return files, [round(time, 3) for time in times]


def _jpeg(picture: Image.Image, short_side: int) -> bytes:
    """A picture as a JPEG file, its short side no longer than `short_side`; never enlarged."""
    short = min(picture.size)
    if short > short_side:
        width, height = (max(1, round(side * short_side / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
