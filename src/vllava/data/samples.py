"""A shard's record and media files become a sample: a conversation and its media as pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from torch import Tensor

from vllava.batch import MediumSpec
from vllava.conversation import Message
from vllava.data.media import Preprocess, decode_image, decode_video
from vllava.errors import UserError

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "gif")


@dataclass(frozen=True)
class Medium:
    """An image [3, H, W] or a video [F, 3, H, W]."""

    kind: str
    pixels: Tensor


@dataclass(frozen=True)
class Sample:
    """A conversation, its media in placeholder order, and whatever else the record says."""

    key: str
    conversation: list[Message]
    media: list[Medium]
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the members of a shard's sample into a Sample.

    `specs` says which media the model takes and at which size; `decoder` is decord or pyav.
    """

    specs: dict[str, MediumSpec]
    preprocess: Preprocess
    decoder: str = "decord"

    def __call__(self, key: str, members: dict[str, bytes]) -> Sample:
        """Raises UserError, without the key, for anything that is wrong with this sample."""
        try:
            record = json.loads(members["json"])
            conversation = record["conversations"]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"no readable JSON record with a conversation ({error!r})") from error
        return Sample(key, conversation, [self._medium(files) for files in _media_files(members)], record)

    def _medium(self, files: list[tuple[str, bytes]]) -> Medium:
        """One medium from its files: a video file, an image, or a video's frames taken at preparation time."""
        extension, data = files[0]
        if extension.startswith("frame"):
            spec = self._spec("video")
            pictures = [decode_image(frame) for _, frame in files]
            if len(pictures) != spec.frames:
                raise UserError(f"{len(pictures)} prepared frames, the model takes {spec.frames}")
            return Medium("video", self.preprocess.video(pictures, spec.size))
        if extension in VIDEO_EXTENSIONS:
            spec = self._spec("video")
            return Medium("video", self.preprocess.video(decode_video(data, spec.frames, self.decoder), spec.size))
        return Medium("image", self.preprocess.image(decode_image(data), self._spec("image").size))

    def _spec(self, kind: str) -> MediumSpec:
        if kind not in self.specs:
            raise UserError(f"the sample has a medium of kind {kind}, but the model has no encoder for it")
        return self.specs[kind]


def _media_files(members: dict[str, bytes]) -> list[list[tuple[str, bytes]]]:
    """Files of each medium, in order: members `0.jpg`, `1.mp4`, or several `1.frame00.jpg` for prepared frames."""
    media: dict[int, list[tuple[str, bytes]]] = {}
    for name in sorted(members):
        number, _, extension = name.partition(".")
        if number.isdigit() and extension:
            media.setdefault(int(number), []).append((extension.lower(), members[name]))
    return [media[number] for number in sorted(media)]
