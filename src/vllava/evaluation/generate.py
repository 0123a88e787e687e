"""Answers to any number of questions: on all devices, with bounded memory, and from where a stopped run ended."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from vllava.batch import IGNORE_INDEX
from vllava.data.packing import ConversationPacker, PackedSample
from vllava.data.samples import Medium, SampleDecoder
from vllava.evaluation.answers import said, said_after
from vllava.evaluation.blocks import Blocks, Loader, Prepared, blocks
from vllava.evaluation.predictions import Line, Predictions
from vllava.evaluation.questions import Answer, Question
from vllava.model.device import autocast, best_device
from vllava.model.video_llava import VideoLlava, context_of

_WORKERS = 8  # that decode, at most, where nobody says how many
Numbered = tuple[int, PackedSample, list[int]]  # (number of the question, prompt, numbers of its media)
_SELDOM = 30.0  # seconds between two lines of the progress in a file


@dataclass(frozen=True)
class Asking:
    """A model, and how it is asked. workers: processes of each device that read and decode media; -1: cores - 1."""

    model: VideoLlava
    packer: ConversationPacker
    decode: SampleDecoder
    max_new_tokens: int
    batch_size: int = 64
    workers: int = -1


def one_device() -> L.Trainer:
    """A Trainer for this process alone."""
    return L.Trainer(
        accelerator=best_device().type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def answer(
    asking: Asking,
    questions: Sequence[Question],
    predictions: Predictions,
    trainer: L.Trainer | None = None,
    bar: str | None = None,
) -> list[Answer]:
    """An answer to every question, in their order; greedy. What `predictions` has already is not asked again.

    trainer: says on which devices, each with the whole model; every process of it has to call this, and gets all
    answers. After each block, a batch of Lightning's, its answers are on disk. bar: what the progress is called on the
    screen, if it is shown.
    """
    ids = [question.id for question in questions]
    trainer = trainer or one_device()
    # One process of several cannot know what the others have seen of the files: they go through it together.
    if trainer.world_size > 1 or not predictions.file.is_file() or not set(ids) <= predictions.read().keys():
        work = _Work(asking, questions, predictions, bar)
        trainer.predict(work, datamodule=work.share, return_predictions=False)
        trainer.strategy.barrier("answered")
        if trainer.is_global_zero:
            predictions.finish(ids)
        trainer.strategy.barrier("finished")
    lines = predictions.read()
    return [_answer(question, lines[question.id]) for question in questions]


def _answer(question: Question, line: Line) -> Answer:
    return Answer(question, line.get("answer"), line.get("broken", ""))


class _Work(L.LightningModule):
    """What a process does with a block: media through their encoders, prompts through the language model, to disk."""

    def __init__(
        self,
        asking: Asking,
        questions: Sequence[Question],
        predictions: Predictions,
        bar: str | None,
    ) -> None:
        super().__init__()
        self.model, self.asking, self.bar = asking.model, asking, bar
        self.questions, self.predictions = questions, predictions
        self.share = _Share(self)
        self.progress: tqdm | None = None

    def predict_step(self, prepared: Prepared) -> int:
        said = dict(answered(self.asking, prepared))
        lines = [{"id": self.questions[number].id, "answer": text} for number, text in said.items()]
        lines += [{"id": self.questions[number].id, "broken": why} for number, why in prepared.broken.items()]
        self.predictions.append(self.global_rank, lines)
        if self.progress is not None:
            self.progress.update(len(lines))
        return len(lines)

    def show_progress(self, done: int, mine: int, ranks: int) -> None:
        if self.bar and not self.global_rank:
            others = f" (of process 1 of {ranks})" if ranks > 1 else ""
            shown = sys.stderr.isatty()
            self.progress = tqdm(
                desc=f"{self.bar}{others}",
                total=mine,
                unit=" questions",
                mininterval=0.1 if shown else _SELDOM,
                postfix=f"{done:,} had answers before" if done else None,
                dynamic_ncols=shown,
            )

    def on_predict_end(self) -> None:
        if self.progress is not None:
            self.progress.close()


class _Share(L.LightningDataModule):
    """The blocks that a process has to do: those that are not done are dealt out in turn."""

    def __init__(self, work: _Work) -> None:
        super().__init__()
        self.work = [work]  # in a list, for neither is a part of the other

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # what goes through an encoder or the language model together is moved together

    def predict_dataloader(self) -> Loader:
        work, trainer = self.work[0], self.trainer
        assert trainer is not None
        asking, questions = work.asking, work.questions
        model = asking.model
        cut = blocks(questions, model.specs, asking.batch_size)
        rank, ranks = trainer.global_rank, trainer.world_size
        left: list[int] = []
        if rank == 0:  # what the others see on a network's disk may be older
            work.predictions.prepare()
            said = work.predictions.read()
            left = [number for number, block in enumerate(cut) if any(questions[n].id not in said for n in block)]
        left = trainer.strategy.broadcast(left)
        mine = left[rank::ranks]
        of_left = [sum(len(cut[number]) for number in numbers) for numbers in (left, mine)]
        work.show_progress(len(questions) - of_left[0], of_left[1], ranks)
        context = context_of(model.llm.config)
        return Loader(Blocks(questions, cut, asking.decode, asking.packer, context), mine, workers(asking.workers))


def workers(asked: int) -> int:
    """How many processes decode: as many as asked for, or one less than there are cores."""
    return asked if asked >= 0 else min(max(len(os.sched_getaffinity(0)) - 1, 1), _WORKERS)


@torch.no_grad()
def answered(asking: Asking, prepared: Prepared) -> Iterator[tuple[int, str]]:
    """(number of the question, answer) of each prompt of a block."""
    features = encoded(asking, prepared.media)
    for batch, longest in micro_batches(asking, prepared.prompts):
        texts = _after_stems(asking, batch, features, longest)
        if texts is None:
            prompts = [replace(prompt, media=[features[medium] for medium in media]) for _, prompt, media in batch]
            texts = said(asking.model, asking.packer, prompts, longest)
        yield from zip((number for number, _, _ in batch), texts, strict=True)


def _after_stems(
    asking: Asking, batch: Sequence[Numbered], features: Sequence[Medium], longest: int
) -> list[str] | None:
    """The answers to prompts that begin alike, up to their one medium: each medium goes through the model once for all.

    None where prompts begin otherwise, or no two show the same medium: then there is nothing to share.
    """
    shown = [media[0] if len(media) == 1 else None for _, _, media in batch]
    ends = [1 + max((n for n, id in enumerate(prompt.token_ids) if id < 0), default=-1) for _, prompt, _ in batch]
    stems = {tuple(prompt.token_ids[:end]) for (_, prompt, _), end in zip(batch, ends, strict=True)}
    numbers = [number for number in dict.fromkeys(shown) if number is not None]
    if None in shown or len(stems) > 1 or len(numbers) == len(batch):
        return None
    stem, end = list(stems.pop()), ends[0]
    shared = [PackedSample("", stem, [IGNORE_INDEX] * end, [features[number]]) for number in numbers]
    rest = [PackedSample("", prompt.token_ids[end:], prompt.labels[end:], []) for _, prompt, _ in batch]
    of = [numbers.index(number) for number in shown if number is not None]
    return said_after(asking.model, asking.packer, shared, rest, of, longest)


def micro_batches(asking: Asking, prompts: Sequence[Numbered]) -> Iterator[tuple[list[Numbered], int]]:
    """Prompts that go through the model together, the longest first, with how long their answers may be.

    A prompt after which the model's context is too short for the longest answer goes alone, with as much as fits.
    """
    context, most = context_of(asking.model.llm.config), asking.max_new_tokens
    rooms = [most if context is None else min(most, context - len(prompt)) for _, prompt, _ in prompts]
    whole = [prompt for prompt, room in zip(prompts, rooms, strict=True) if room == most]
    whole.sort(key=lambda one: -len(one[1]))
    for start in range(0, len(whole), asking.batch_size):
        yield whole[start : start + asking.batch_size], most
    for prompt, room in zip(prompts, rooms, strict=True):
        if room < most:
            yield [prompt], room


def encoded(asking: Asking, media: Sequence[Medium]) -> list[Medium]:
    """Media as their encoders see them, each once; what is features already stays as it is."""
    found: dict[int, Tensor] = {}
    device = next(asking.model.parameters()).device
    for kind in asking.model.specs:
        numbers = [n for n, medium in enumerate(media) if medium.kind == kind and medium.pixels.ndim > 2]
        for start in range(0, len(numbers), asking.batch_size):
            together = numbers[start : start + asking.batch_size]
            with autocast():
                pixels = torch.stack([media[number].pixels for number in together]).to(device)
                features = asking.model.features(kind, pixels)
            found |= dict(zip(together, features, strict=True))
    return [Medium(one.kind, found.get(number, one.pixels)) for number, one in enumerate(media)]
