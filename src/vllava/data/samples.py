"""A shard's record and media files become a sample: a conversation and its media as pixels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import safetensors.torch
from torch import Tensor

from vllava.batch import MediumSpec
from vllava.conversation import Message
from vllava.data.media import Preprocess, decode_image
from vllava.data.video import VideoDecoder
from vllava.errors import UserError

FEATURES = ".safetensors"  # as in KEY.0.image.safetensors: the encoder's output for the first medium, an image
BROKEN = "broken"  # instead of media that could not be read: the reason
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "avi", "mov", "gif")


@dataclass(frozen=True)
class Medium:
    """An image [3, H, W] or a video [F, 3, H, W], or what its encoder made of it [P, E]."""

    kind: str
    pixels: Tensor


@dataclass(frozen=True)
class Sample:
    """A conversation, its media in placeholder order, and whatever else the record says."""

    key: str
    conversation: list[Message]
    media: list[Medium]
    record: dict = field(default_factory=dict)
    dropped_turns: int = 0  # first turns from gpt, which no question came before


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the members of a shard's sample into a Sample; `specs` says which media the model takes, at which size."""

    specs: dict[str, MediumSpec]
    preprocess: Preprocess
    video_decoder: VideoDecoder

    def __call__(self, key: str, members: dict[str, bytes]) -> Sample:
        """Raises UserError, without the key, for anything that is wrong with this sample."""
        if BROKEN in members:
            raise UserError(members[BROKEN].decode())
        try:
            record = json.loads(members["json"])
            conversation = record["conversations"]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"no readable JSON record with a conversation ({error!r})") from error
        return Sample(key, conversation, [self._medium(files) for files in _media_files(members)], record)

    def image(self, data: bytes) -> Medium:
        """An image file as the model takes it; raises UserError if it cannot be read or the model takes none."""
        return Medium("image", self.preprocess.image(decode_image(data), self._spec("image").size))

    def video(self, data: bytes) -> Medium:
        """A video file as the model takes it; raises UserError if it cannot be read or the model takes none."""
        spec = self._spec("video")
        return Medium("video", self.preprocess.video(self.video_decoder(data, spec.frames), spec.size))

    def frames(self, files: list[bytes]) -> Medium:
        """A video whose frames were taken at preparation time."""
        spec = self._spec("video")
        if len(files) != spec.frames:
            raise UserError(f"{len(files)} prepared frames, the model takes {spec.frames}")
        return Medium("video", self.preprocess.video([decode_image(data) for data in files], spec.size))

    def features(self, kind: str, data: bytes) -> Medium:
        """A medium that was encoded before."""
        features = safetensors.torch.load(data)["features"]
        if len(features) != self._spec(kind).tokens:
            raise UserError(f"{len(features)} features of an encoder, the model takes {self._spec(kind).tokens}")
        return Medium(kind, features)

    def _medium(self, files: list[tuple[str, bytes]]) -> Medium:
        extension, data = files[0]
        if extension.endswith(FEATURES):
            return self.features(extension.removesuffix(FEATURES), data)
        if extension.startswith("frame"):
            return self.frames([frame for _, frame in files])
        return self.video(data) if extension in VIDEO_EXTENSIONS else self.image(data)

    def _spec(self, kind: str) -> MediumSpec:
        if kind not in self.specs:
            raise UserError(f"the model has no encoder for a medium of kind {kind}")
        return self.specs[kind]


def _media_files(members: dict[str, bytes]) -> list[list[tuple[str, bytes]]]:
    """Files of each medium, in order: members `0.jpg`, `1.mp4`, or several `1.frame00.jpg` for prepared frames."""
    media: dict[int, list[tuple[str, bytes]]] = {}
    for name in sorted(members):
        number, _, extension = name.partition(".")
        if number.isdigit() and extension:
            media.setdefault(int(number), []).append((extension.lower(), members[name]))
    return [media[number] for number in sorted(media)]
