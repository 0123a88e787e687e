"""A shard's record and media files become a sample: a conversation and its media as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import safetensors.torch
import torch
from torch import Tensor

from vllava.batch import MediumSpec
from vllava.conversation import Message
from vllava.data.media import Preprocess, decode_image
from vllava.data.record import MediumFile, parse
from vllava.data.video import VideoDecoder
from vllava.errors import UserError, reading

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)  # of features
BROKEN = "broken"  # instead of media that could not be read: the reason


@dataclass(frozen=True)
class Medium:
    """An image [3, H, W] or a video [F, 3, H, W], uint8 (or normalised), or what its encoder made of it [P, E]."""

    kind: str
    pixels: Tensor
    times: tuple[float, ...] = field(default=(), compare=False)  # of a video's frames, in seconds, where they are known


@dataclass(frozen=True)
class Sample:
    """A conversation, its media in placeholder order, and whatever else the record says."""

    key: str
    conversation: list[Message]
    media: list[Medium]
    record: dict = field(default_factory=dict)
    dropped_turns: int = 0  # a first turn from gpt, which is left out

    @property
    def kinds(self) -> list[str]:
        """The kinds of the media, in order."""
        return [medium.kind for medium in self.media]


@dataclass(frozen=True)
class SampleDecoder:
    """Turns the members of a shard's sample into a Sample; `specs` says which media the model takes, at which size."""

    specs: dict[str, MediumSpec]
    preprocess: Preprocess
    video_decoder: VideoDecoder

    def __call__(self, key: str, members: dict[str, bytes]) -> Sample:
        """Raises UserError, without the key, for anything that is wrong with this sample."""
        if BROKEN in members:
            raise UserError(members[BROKEN].decode(errors="replace"))
        parsed = parse(members)
        media = [self._medium(*medium) for medium in zip(parsed.kinds, parsed.files, parsed.frame_times, strict=True)]
        return Sample(key, parsed.conversation, media, parsed.record, parsed.dropped_turns)

    def medium(self, members: dict[str, bytes], number: int) -> Medium:
        """One of the media of a sample, as all of it would have it; raises UserError as for all of it."""
        if BROKEN in members:
            raise UserError(members[BROKEN].decode(errors="replace"))
        parsed = parse(members)
        return self._medium(parsed.kinds[number], parsed.files[number], parsed.frame_times[number])

    def image(self, data: bytes) -> Medium:
        """An image file as the model takes it; raises UserError if it cannot be read or the model takes none."""
        return Medium("image", self.preprocess.image_pixels(decode_image(data), self._spec("image").size))

    def video(self, data: bytes) -> Medium:
        """A video file as the model takes it; raises UserError if it cannot be read or the model takes none."""
        spec = self._spec("video")
        clip = self.video_decoder(data, spec.frames)
        return Medium("video", self.preprocess.video_pixels(clip, spec.size), tuple(clip.times))

    def frames(self, files: list[bytes], times: Sequence[float] = ()) -> Medium:
        """A video whose frames were taken at preparation time."""
        spec = self._spec("video")
        if len(files) != spec.frames:
            raise UserError(f"{len(files)} prepared frames, the model takes {spec.frames}")
        pictures = [decode_image(data) for data in files]
        return Medium("video", self.preprocess.video_pixels(pictures, spec.size), tuple(times))

    def features(self, kind: str, data: bytes) -> Medium:
        """A medium that was encoded before."""
        spec = self._spec(kind)
        with reading(f"the file of {kind} features", "Delete the folder of features: it will be made again."):
            features = safetensors.torch.load(data)["features"]
        if features.ndim != 2 or len(features) != spec.tokens or spec.width not in (None, features.shape[1]):
            wanted = f"{spec.tokens} x {spec.width or 'E'}"
            raise UserError(f"features of shape {tuple(features.shape)}, the model's {kind} encoder gives {wanted}")
        if features.dtype not in PRECISIONS or not _finite(features):
            raise UserError(f"{kind} features that are no finite numbers of 16 or 32 bits")
        return Medium(kind, features)

    def _medium(self, kind: str, file: MediumFile, times: Sequence[float]) -> Medium:
        if file.kind not in (None, kind):
            held = f"frames or features of a medium of kind {file.kind}"
            raise UserError(f"the text shows <{kind}>, the sample holds {held}")
        if file.features_of:
            return self.features(kind, file.data[0])
        if file.prepared:
            return self.frames(file.data, times)
        return self.image(file.data[0]) if kind == "image" else self.video(file.data[0])

    def _spec(self, kind: str) -> MediumSpec:
        if kind not in self.specs:
            raise UserError(f"the model has no encoder for a medium of kind {kind}")
        return self.specs[kind]


def _finite(values: Tensor) -> bool:
    # The least and the greatest are NaN or infinite if any is: twenty times as fast as asking each.
    return values.numel() > 0 and all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))
