"""The structures in which data and model meet.

Shape glossary: T tokens of a packed row, S samples, N images or videos, F frames of a video, P visual
tokens of one medium, H W pixels, D hidden size of the LLM, E hidden size of an encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token without loss; torch's cross entropy skips it
MEDIA_KINDS = ("image", "video")

Self = TypeVar("Self", bound="_Movable")


@dataclass
class _Movable:
    """Tensors among the fields, also in lists, move to a device or into pinned memory together."""

    def _map(self: Self, change) -> Self:
        def apply(value: Any) -> Any:
            if isinstance(value, (Tensor, _Movable)):
                return change(value)
            if isinstance(value, list):
                return [apply(item) for item in value]
            return value

        return type(self)(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def to(self: Self, device: Any, non_blocking: bool = False) -> Self:
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def clone(self: Self) -> Self:
        return self._map(lambda value: value.clone())

    def pin_memory(self: Self) -> Self:
        return self._map(lambda value: value.pin_memory())


@dataclass(frozen=True)
class MediumSpec:
    """What an encoder takes and gives for one medium: its pixel size, frames and number of visual tokens."""

    size: int  # H = W, pixels
    tokens: int  # P
    frames: int = 1  # F
    width: int | None = field(default=None, compare=False)  # E, if known


@dataclass
class Batch(_Movable):
    """Samples laid end to end in one row, without padding, and their media stacked by kind.

    A visual token's place in `token_ids` holds 0 and its index is in `image_slots` or `video_slots`, in the
    order of the stacked media. Sample s occupies `cu_seqlens[s]:cu_seqlens[s + 1]`; positions restart there.
    """

    token_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64; labels[t] is the target *at* t (the model shifts), IGNORE_INDEX where there is no loss
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [S + 1] int32
    images: Tensor  # [N, 3, H, W] uint8 (floating point: normalised), or features [N, P, E] from the encoder
    videos: Tensor  # [N, F, 3, H, W], or features [N, P, E]
    image_slots: Tensor  # [N * P] int64
    video_slots: Tensor  # [N * P] int64
    keys: list[str] = field(default_factory=list)  # S sample keys
    longest: int | None = None  # tokens of the longest sample, if known; looking it up makes a GPU wait

    @property
    def num_samples(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass
class CaptionBatch(_Movable):
    """Images or videos with one caption each, for contrastive or masked pre-training of encoders."""

    pixels: Tensor  # [N, 3, H, W] or [N, F, 3, H, W], uint8
    token_ids: Tensor  # [N, L] int64, right-padded
    attention_mask: Tensor  # [N, L] int64


@dataclass
class Step(_Movable):
    """One rank's share of one global batch: the micro-batches to accumulate, and what had to be left out."""

    micro_batches: list  # of Batch or CaptionBatch
    samples: int  # drawn for this rank, broken ones included
    broken: list[tuple[str, str]] = field(default_factory=list)  # (sample key, reason)
    tracebacks: dict[str, str] = field(default_factory=dict)  # by key, of those whose reason nobody foresaw
    dropped_turns: int = 0  # first turns from gpt, which no question came before
    drawn: dict[int, int] = field(default_factory=dict)  # samples by the number of their source
    more: bool = False  # whether this is but a part, and another one follows
    keys: list[str] = field(default_factory=list)  # of the samples in it, each with its shard

    @classmethod
    def joined(cls, parts: Sequence[Step]) -> Step:
        """The step that was prepared in parts."""
        drawn: Counter[int] = Counter()
        for part in parts:
            drawn.update(part.drawn)
        return cls(
            micro_batches=[batch for part in parts for batch in part.micro_batches],
            samples=sum(part.samples for part in parts),
            broken=[item for part in parts for item in part.broken],
            tracebacks={key: text for part in parts for key, text in part.tracebacks.items()},
            dropped_turns=sum(part.dropped_turns for part in parts),
            drawn=dict(drawn),
            keys=[key for part in parts for key in part.keys],
        )


def idle_batch() -> Batch:
    """A row of two tokens, one of them supervised: something to compute where a rank has no sample."""
    return Batch(
        token_ids=torch.zeros(2, dtype=torch.int64),
        labels=torch.tensor([IGNORE_INDEX, 0]),
        position_ids=torch.arange(2),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        images=empty_images(),
        videos=empty_videos(),
        image_slots=torch.empty(0, dtype=torch.int64),
        video_slots=torch.empty(0, dtype=torch.int64),
    )


def empty_images() -> Tensor:
    return torch.empty(0, 3, 0, 0)


def empty_videos() -> Tensor:
    return torch.empty(0, 0, 3, 0, 0)
