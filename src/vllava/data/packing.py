"""Samples to batches: packed rows for the LLM, and image-caption pairs for pre-training an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllava.batch import IGNORE_INDEX, Batch, CaptionBatch, MediumSpec, empty_images, empty_videos
from vllava.conversation import PLACEHOLDER_IDS, EncodedConversation, Message, Template, encode, ends_of_turn
from vllava.data.deal import Deal, among_ranks, every_nth, into_rows
from vllava.data.lengths import Lengths
from vllava.data.samples import Medium, Sample
from vllava.data.shards import Shard
from vllava.errors import UserError


@dataclass(frozen=True)
class PackedSample:
    """One sample as it will lie in a row: placeholders expanded to their slots."""

    key: str
    token_ids: list[int]  # visual slots hold a placeholder id
    labels: list[int]
    media: list[Medium]

    def __len__(self) -> int:
        return len(self.token_ids)


def expand(key: str, encoded: EncodedConversation, media: list[Medium], specs: dict[str, MediumSpec]) -> PackedSample:
    """Repeat each placeholder id once for every visual token; raises UserError where media and placeholders differ."""
    given = [medium.kind for medium in media]
    if encoded.media != given:
        raise UserError(f"placeholders and media differ: the text shows {encoded.media}, the sample has {given}")
    spread = {id_: specs[kind].tokens for kind, id_ in PLACEHOLDER_IDS.items() if kind in specs}
    ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(encoded.token_ids, encoded.labels, strict=True):
        repeat = spread.get(token, 1)
        ids += [token] * repeat
        labels += [label] * repeat
    labels[0] = IGNORE_INDEX  # nothing comes before the first token that could predict it
    return PackedSample(key, ids, labels, media)


def pack(samples: Sequence[PackedSample]) -> Batch:
    """Lay samples end to end in one row."""
    ids = torch.tensor([token for sample in samples for token in sample.token_ids])
    lengths = torch.tensor([len(sample) for sample in samples])
    ends = lengths.cumsum(0)
    media = [medium for sample in samples for medium in sample.media]
    images = [medium.pixels for medium in media if medium.kind == "image"]
    videos = [medium.pixels for medium in media if medium.kind == "video"]
    return Batch(
        token_ids=ids.clamp(min=0),
        labels=torch.tensor([label for sample in samples for label in sample.labels]),
        position_ids=torch.arange(len(ids)) - (ends - lengths).repeat_interleave(lengths),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=ends.dtype), ends]).int(),
        images=torch.stack(images) if images else empty_images(),
        videos=torch.stack(videos) if videos else empty_videos(),
        image_slots=_places(ids, "image"),
        video_slots=_places(ids, "video"),
        keys=[sample.key for sample in samples],
        longest=max(len(sample) for sample in samples),
    )


def pack_rows(samples: Sequence[PackedSample], token_budget: int) -> list[Batch]:
    """Rows of samples in the given order, each closed before it would exceed the token budget."""
    batches: list[list[PackedSample]] = []
    filled = 0
    for sample in samples:
        if not batches or filled + len(sample) > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(sample)
        filled += len(sample)
    return [pack(batch) for batch in batches]


def _places(ids: Tensor, kind: str) -> Tensor:
    return (ids == PLACEHOLDER_IDS[kind]).nonzero().squeeze(1)


@dataclass(frozen=True)
class ConversationPacker:
    """Prepares samples for the LLM and fills micro-batches up to a token budget.

    `max_length` is the longest sample, visual tokens included; a longer one is an error that names it,
    never cut in silence.
    """

    tokenizer: Any
    template: Template
    specs: dict[str, MediumSpec]
    token_budget: int
    max_length: int

    def prepare(self, sample: Sample) -> PackedSample:
        """Encode and expand one sample; raises UserError if it cannot be trained on."""
        encoded = encode(sample.conversation, self.tokenizer, self.template, sample.kinds)
        packed = expand(sample.key, encoded, sample.media, self.specs)
        if all(label == IGNORE_INDEX for label in packed.labels):
            raise UserError("no token of the conversation is supervised: it has no answer")
        if len(packed) > self.max_length:
            raise UserError(f"{len(packed)} tokens, more than data.max_length={self.max_length}")
        return packed

    def prompt(self, sample: Sample) -> PackedSample:
        """The sample up to where its last answer begins, for generation."""
        answered = sample.conversation[-1]["from"] == "gpt"
        asked = sample.conversation[:-1] if answered else sample.conversation
        return expand(sample.key, encode(asked, self.tokenizer, self.template, sample.kinds), sample.media, self.specs)

    @cached_property
    def ends_of_turn(self) -> list[int]:
        """The tokens that end an answer."""
        return ends_of_turn(self.tokenizer, self.template)

    def collate(self, samples: list[PackedSample]) -> list[Batch]:
        """Micro-batches in the given order, each closed before it would exceed the token budget."""
        return pack_rows(samples, self.token_budget)

    def deal(self, shards: list[Shard]) -> Deal:
        """Shares a global batch out so that ranks, and the rows of a rank, have nearly the same to do."""
        lengths = self.lengths(shards)

        def share_out(rows: np.ndarray, ranks: int) -> list[list[np.ndarray]]:
            costs = lengths.costs(rows)
            shares = among_ranks(costs, ranks)
            dealt = into_rows([costs[share, 0] for share in shares], self.token_budget)
            return [[rows[share[row]] for row in own] for share, own in zip(shares, dealt, strict=True)]

        return share_out

    def lengths(self, shards: list[Shard]) -> Lengths:
        """The costs of the samples of shards, known or estimated before they are read."""
        return Lengths(shards, self.specs, self._text_tokens)

    def _text_tokens(self, conversation: list[Message]) -> int:
        encoded = encode(conversation, self.tokenizer, self.template)
        return len(encoded.token_ids) - len(encoded.media)


@dataclass(frozen=True)
class CaptionPairs:
    """Prepares (medium, caption) pairs: the first medium and the first answer of a conversation."""

    tokenizer: Any
    max_length: int

    def prepare(self, sample: Sample) -> tuple[Tensor, list[int]]:
        """Pixels and the caption's token ids between BOS and EOS; raises UserError without a medium or an answer."""
        answers = [message["value"] for message in sample.conversation if message["from"] == "gpt"]
        if not sample.media or not answers:
            raise UserError("an image-caption pair needs one medium and one answer")
        bos, end = self.tokenizer.bos_token or "", self.tokenizer.eos_token_id
        if end is None:
            raise UserError("the tokenizer has no end-of-sequence token, with which a caption ends")
        ids = self.tokenizer(bos + answers[0], add_special_tokens=False)["input_ids"]
        return sample.media[0].pixels, [*ids[: self.max_length - 1], end]

    def collate(self, pairs: list[tuple[Tensor, list[int]]]) -> list[CaptionBatch]:
        """One batch: contrastive learning compares all pairs with each other."""
        longest = max(len(ids) for _, ids in pairs)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for _, ids in pairs])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in pairs])
        return [CaptionBatch(torch.stack([pixels for pixels, _ in pairs]), ids, mask)]

    def deal(self, shards: list[Shard]) -> Deal:
        """Every n-th sample to a rank, all of them together: each is compared with the others."""
        return every_nth
