"""Ask a model the questions of held-out samples."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vllava.conversation import without_media
from vllava.data.broken import printable, why
from vllava.data.packing import ConversationPacker, PackedSample, pack
from vllava.data.patience import Remote
from vllava.data.samples import Medium, Sample, SampleDecoder
from vllava.data.shards import ShardReader, read_manifest
from vllava.errors import UserError
from vllava.model.device import autocast
from vllava.model.video_llava import VideoLlava


@dataclass(frozen=True)
class Answer:
    """One question about one sample, the true answer if there is one, and the model's."""

    key: str
    medium: str  # image | video | text
    type: str
    question: str
    truth: str | None
    answer: str
    options: tuple[str, ...] = ()
    broken: str = ""  # why it was not asked

    @property
    def scored(self) -> bool:
        """Whether there is an answer to compare with."""
        return self.truth is not None

    @property
    def correct(self) -> bool:
        """Exact match after lower-casing and stripping spaces and a final full stop; never without a true answer."""
        return self.truth is not None and not self.broken and normalise(self.answer) == normalise(self.truth)

    @property
    def chance(self) -> float:
        """The accuracy of a guess among the answers that fit the question."""
        return 1 / len(self.options) if self.options else 0.0


def normalise(text: str) -> str:
    """The form in which answers are compared."""
    return " ".join(text.lower().strip().rstrip(".").split())


def read_samples(
    folder: str | Path,
    decoder: SampleDecoder,
    remedy: str,
    limit: int | None = None,
    packer: ConversationPacker | None = None,
    remote: Remote | None = None,
) -> Iterator[Sample]:
    """The samples of a folder of shards in their order.

    A broken one raises UserError, for an evaluation leaves none out; so does one that the packer, if there is one,
    cannot make a question of.
    """
    for place, reader, shard, index in places(folder, remedy, limit, remote):
        with named(place):
            sample = decoder(*reader.read(shard, index))
            check_question(sample.record)
            if packer is not None:
                packer.prompt(sample)
        yield sample


def places(
    folder: str | Path, remedy: str, limit: int | None = None, remote: Remote | None = None
) -> Iterator[tuple[str, ShardReader, int, int]]:
    """Of each sample of a folder the name to call it by, and where to read it."""
    shards = read_manifest(folder, remedy, remote)
    reader = ShardReader(shards, capacity=1)
    found = ((s, i) for s, shard in enumerate(shards) for i in range(shard.samples))
    for shard, index in islice(found, limit):
        yield f"{shards[shard].path}:{reader.key(shard, index)}", reader, shard, index


@contextmanager
def named(place: str) -> Iterator[None]:
    """Whatever goes wrong with a sample becomes a UserError that names it."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{place}: {why(error)}. An evaluation leaves no sample out.") from error


def check_question(record: Any) -> None:
    """Raises UserError where what a record says of its question is of an odd kind; it need not say anything."""
    question = record.get("question", {}) if isinstance(record, dict) else None
    if not isinstance(question, dict):
        raise UserError('"question" is not of the form {"type": text, "options": [text, …]}')
    options = question.get("options", [])
    if not isinstance(question.get("type", ""), str):
        raise UserError(f"the question's type is not text but {type(question['type']).__name__}")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError("the question's options are not a list of texts")


@torch.no_grad()
def encoded(model: VideoLlava, medium: Medium) -> Medium:
    """A medium as its encoder sees it, for several questions about it."""
    device = next(model.parameters()).device
    with autocast():
        return Medium(medium.kind, model.features(medium.kind, medium.pixels[None].to(device))[0].cpu())


def ask(
    model: VideoLlava, packer: ConversationPacker, samples: Sequence[Sample], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """The model's answers to the last human turn of each sample, in one batch."""
    return said(model, packer, [packer.prompt(sample) for sample in samples], max_new_tokens, **sampling)


def said(
    model: VideoLlava, packer: ConversationPacker, prompts: Sequence[PackedSample], max_new_tokens: int, **sampling: Any
) -> list[str]:
    """What the model says after each prompt, all of them in one batch."""
    batch = pack(prompts)
    device = next(model.parameters()).device
    with autocast():
        generated = model.generate(batch.to(device), max_new_tokens, ends=packer.ends_of_turn, **sampling)
    return texts(packer, generated)


def said_after(
    model: VideoLlava,
    packer: ConversationPacker,
    stems: Sequence[PackedSample],
    prompts: Sequence[PackedSample],
    of: Sequence[int],
    max_new_tokens: int,
) -> list[str] | None:
    """What the model says after each prompt, which goes on from stem `of[p]`; None where it cannot share stems."""
    device = next(model.parameters()).device
    shared, batch = pack(stems).to(device), pack(prompts).to(device)
    with autocast():
        chosen = torch.tensor(of, device=device)
        generated = model.generate_after(shared, batch, chosen, max_new_tokens, ends=packer.ends_of_turn)
    return None if generated is None else texts(packer, generated)


def texts(packer: ConversationPacker, generated: Sequence[Sequence[int]]) -> list[str]:
    """New tokens as answers."""
    return [packer.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in generated]


def answer_all(
    model: VideoLlava,
    packer: ConversationPacker,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    **sampling: Any,
) -> list[Answer]:
    """Ask about every sample."""
    answers = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        texts = ask(model, packer, chunk, max_new_tokens, **sampling)
        answers += [_answer(sample, text) for sample, text in zip(chunk, texts, strict=True)]
    return answers


def _answer(sample: Sample, text: str) -> Answer:
    question = sample.record.get("question", {})
    last = sample.conversation[-1]
    asked = [turn["value"] for turn in without_media(sample.conversation, sample.kinds) if turn["from"] == "human"]
    return Answer(
        key=sample.key,
        medium=sample.media[0].kind if sample.media else "text",
        type=printable(question.get("type", "question")),
        question=asked[-1],
        truth=last["value"] if last["from"] == "gpt" else None,  # a question without an answer is not scored
        answer=text,
        options=tuple(question.get("options", ())),
    )


def pictures(sample: Sample, frames: int = 8) -> list[Image.Image]:
    """What the model saw of a sample: its images, and `frames` frames of its videos; of features nothing."""
    shown = []
    for medium in (one for one in sample.media if one.pixels.ndim > 2):
        stack = medium.pixels if medium.kind == "video" else medium.pixels[None]
        chosen = np.linspace(0, len(stack) - 1, min(frames, len(stack))).astype(int)
        shown += [Image.fromarray(stack[i].permute(1, 2, 0).numpy()) for i in chosen]
    return shown


def data_uri(picture: Image.Image) -> str:
    """A picture as a data: URI, for a self-contained page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
