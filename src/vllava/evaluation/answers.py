"""Ask a model the questions of held-out samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vllava.conversation import without_media
from vllava.data.media import Preprocess
from vllava.data.packing import ConversationPacker, pack
from vllava.data.samples import Medium, Sample, SampleDecoder
from vllava.data.shards import ShardReader, read_manifest
from vllava.errors import UserError
from vllava.model.device import autocast
from vllava.model.video_llava import VideoLlava


@dataclass(frozen=True)
class Answer:
    """One question about one sample, the true answer and the model's."""

    key: str
    medium: str  # image | video | text
    type: str
    question: str
    truth: str
    answer: str
    options: tuple[str, ...] = ()

    @property
    def correct(self) -> bool:
        """Exact match after lower-casing and stripping spaces and a final full stop."""
        return normalise(self.answer) == normalise(self.truth)

    @property
    def chance(self) -> float:
        """The accuracy of a guess among the answers that fit the question."""
        return 1 / len(self.options) if self.options else 0.0


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(text.lower().strip().rstrip(".").split())


def read_samples(folder: str | Path, decoder: SampleDecoder, remedy: str, limit: int | None = None) -> Iterator[Sample]:
    """The samples of a folder of shards in their order; a broken one raises, for an evaluation leaves none out."""
    shards = read_manifest(folder, remedy)
    reader = ShardReader(shards, capacity=1)
    places = [(s, i) for s, shard in enumerate(shards) for i in range(shard.samples)]
    for shard, index in places[:limit]:
        key, members = reader.read(shard, index)
        try:
            yield decoder(key, members)
        except UserError as error:
            raise UserError(f"{shards[shard].path}:{key}: {error}. An evaluation leaves no sample out.") from error


@torch.no_grad()
def encoded(model: VideoLlava, medium: Medium) -> Medium:
    """A medium as its encoder sees it, for several questions about it."""
    device = next(model.parameters()).device
    with autocast():
        return Medium(medium.kind, model.encoders[medium.kind](medium.pixels[None].to(device))[0].cpu())


def ask(
    model: VideoLlava, packer: ConversationPacker, samples: Sequence[Sample], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """The model's answers to the last human turn of each sample, in one batch."""
    batch = pack([packer.prompt(sample) for sample in samples])
    device = next(model.parameters()).device
    with autocast():
        generated = model.generate(batch.to(device), max_new_tokens, ends=packer.ends_of_turn, **sampling)
    return [packer.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generated]


def answer_all(
    model: VideoLlava,
    packer: ConversationPacker,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
) -> list[Answer]:
    """Ask about every sample; `blind` takes the media and their placeholders away, to see what the words give away."""
    answers = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        asked = [replace(s, conversation=without_media(s.conversation), media=[]) if blind else s for s in chunk]
        texts = ask(model, packer, asked, max_new_tokens)
        answers += [_answer(sample, text) for sample, text in zip(chunk, texts, strict=True)]
    return answers


def _answer(sample: Sample, text: str) -> Answer:
    question = sample.record.get("question", {})
    return Answer(
        key=sample.key,
        medium=sample.media[0].kind if sample.media else "text",
        type=question.get("type", "question"),
        question=without_media(sample.conversation)[-2]["value"],
        truth=sample.conversation[-1]["value"],
        answer=text,
        options=tuple(question.get("options", ())),
    )


def pictures(sample: Sample, preprocess: Preprocess, frames: int = 8) -> list[Image.Image]:
    """What the model saw of a sample: its images, and `frames` frames of its videos."""
    shown = []
    for medium in sample.media:
        stack = medium.pixels if medium.kind == "video" else medium.pixels[None]
        chosen = np.linspace(0, len(stack) - 1, min(frames, len(stack))).astype(int)
        shown += [_picture(stack[i], preprocess) for i in chosen]
    return shown


def _picture(pixels: Tensor, preprocess: Preprocess) -> Image.Image:
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return Image.fromarray(((pixels * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def data_uri(picture: Image.Image) -> str:
    """A picture as a data: URI, for a self-contained page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
