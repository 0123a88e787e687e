"""What the members of a shard's sample say, before anything is decoded: its record, conversation and media files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllava.batch import MEDIA_KINDS
from vllava.conversation import Message, media_in, read_conversation
from vllava.errors import UserError, reason

FEATURES = "safetensors"  # as in KEY.0.image.safetensors: the encoder's output for the first medium, an image
_MEMBER = re.compile(
    rf"(?P<number>\d+)\.(?:frame(?P<frame>\d+)\.\w+|(?P<kind>{'|'.join(MEDIA_KINDS)})\.{FEATURES}|\w+)", re.ASCII
)
# fmt: off
_MEDIA_EXTENSIONS = {
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif",
    "mp4", "m4v", "mov", "avi", "mkv", "webm", "flv", "3gp", "mpg", "mpeg", "wmv", "ts", FEATURES,
}
# fmt: on


@dataclass(frozen=True)
class MediumFile:
    """The members of one medium: a file, the frames of a video, or features of a kind of medium."""

    data: list[bytes]
    prepared: bool = False  # frames
    features_of: str | None = None

    @property
    def kind(self) -> str | None:
        """What the medium is known to be before it is decoded: the placeholder decides about a file, see `media_in`."""
        return "video" if self.prepared else self.features_of


@dataclass(frozen=True)
class Parsed:
    """A sample whose media are still files."""

    record: dict
    conversation: list[Message]
    dropped_turns: int
    files: list[MediumFile]  # in placeholder order
    kinds: list[str]  # of the files

    @property
    def frame_times(self) -> list[tuple[float, ...]]:
        """When the prepared frames of each medium are shown, in seconds, where the record says so.

        The record's form: {"frame_times": {"0": [0.0, 0.5, …]}}, by the medium's number.
        """
        said = self.record.get("frame_times")
        listed = [said.get(str(number)) if isinstance(said, dict) else None for number in range(len(self.files))]
        return [_times(times, file) for times, file in zip(listed, self.files, strict=True)]


def _times(said: object, file: MediumFile) -> tuple[float, ...]:
    """What a record says of a medium's frames, if it can be true."""
    if not file.prepared or not isinstance(said, list) or len(said) != len(file.data):
        return ()
    return tuple(map(float, said)) if all(type(time) in (int, float) for time in said) else ()


def parse(members: dict[str, bytes]) -> Parsed:
    """Members by extension to a record, a conversation and media files; raises UserError for what is no sample."""
    record = read_record(members)
    conversation, dropped = read_conversation(record)
    files = _media_files(members)
    for kind in MEDIA_KINDS:
        if record.get(kind) and not files:
            raise UserError(f"the record names {kind} {str(record[kind])[:80]!r}, but the sample holds no medium")
    kinds = media_in(conversation, [file.kind for file in files], [_looks_like(file) for file in files])
    return Parsed(record, conversation, dropped, files, kinds)


def read_record(members: dict[str, bytes]) -> dict:
    """The record of a sample; raises UserError where it has none that can be read."""
    if "json" not in members:
        raise UserError("no readable JSON record: the sample has no member KEY.json")
    try:
        record = json.loads(members["json"])
    except Exception as error:  # too deep, too long a number, no UTF-8, no JSON
        raise UserError(f"no readable JSON record ({reason(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"no readable JSON record: it is not an object but {type(record).__name__}")
    return record


def _media_files(members: dict[str, bytes]) -> list[MediumFile]:
    """The files of each medium, in order: members `0.jpg`, `1.mp4`, or several `1.frame00.jpg` for prepared frames.

    Raises UserError for a medium without a number, and for numbers that are missing or given twice.
    """
    media: dict[int, list[tuple[int | None, str | None, bytes]]] = {}
    for name, data in members.items():
        found = _MEMBER.fullmatch(name.lower())
        if found is None:
            if name[0].isdigit() or name.lower().rpartition(".")[2] in _MEDIA_EXTENSIONS:
                raise UserError(f"the member {name[:80]!r} is no medium: those are named 0.jpg, 1.mp4, 1.frame00.jpg")
            continue  # somebody's label or note
        frame = None if found["frame"] is None else int(found["frame"])
        media.setdefault(int(found["number"]), []).append((frame, found["kind"], data))
    _require_run("media", sorted(media), starts=(0,))
    return [_medium_file(number, media[number]) for number in sorted(media)]


def _medium_file(number: int, files: list[tuple[int | None, str | None, bytes]]) -> MediumFile:
    frames = sorted(frame for frame, _, _ in files if frame is not None)
    if not frames and len(files) == 1:
        return MediumFile([files[0][2]], features_of=files[0][1])
    if len(frames) != len(files):
        raise UserError(f"medium {number} has {len(files)} files: it is one file, or the frames of a video")
    _require_run(f"the prepared frames of medium {number}", frames, starts=(0, 1))
    by_number = {frame: data for frame, _, data in files if frame is not None}
    return MediumFile([by_number[frame] for frame in frames], prepared=True)


def _require_run(what: str, numbers: Sequence[int], starts: tuple[int, ...]) -> None:
    """Raises UserError unless the sorted numbers follow one another without a gap from one of `starts`."""
    for index, number in enumerate(numbers):
        before = numbers[index - 1] if index else None
        if number == before:
            raise UserError(f"{what}: two have the number {number}")
        if number != before + 1 if before is not None else number not in starts:
            missing = before + 1 if before is not None else starts[0]
            raise UserError(f"{what}: number {missing} is missing")


# How picture files begin; a GIF may be either. Used only where a text has more placeholders than there are media.
_PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp(?:avif|avis|heic|heix|mif1|msf1)", re.S
)


def _looks_like(file: MediumFile) -> str | None:
    if file.kind or file.data[0].startswith(b"GIF8"):
        return file.kind
    return "image" if _PICTURES.match(file.data[0]) else "video"
