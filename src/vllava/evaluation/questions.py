"""What a benchmark asks, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vllava.conversation import Message
from vllava.errors import reading


class Medium(Protocol):
    """An image or a video of a question, still where it lies. Goes to a data worker by pickle, so it is small."""

    @property
    def kind(self) -> str:
        """image or video."""
        ...

    @property
    def key(self) -> str:
        """The same for the same medium, within a benchmark: it is decoded and encoded once for all its questions."""
        ...

    def read(self) -> bytes:
        """The file's bytes; raises UserError where they cannot be had."""
        ...


@dataclass(frozen=True)
class FileMedium:
    """An image or a video in a file of its own."""

    kind: str
    path: Path

    @property
    def key(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        with reading(self.path):
            return self.path.read_bytes()


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    id: unique in the benchmark, the published one where there is one. conversation: the turns that the model is shown,
    the last of them the human's, with a placeholder for each medium. truth: what the answer is scored against, in the
    benchmark's own form; None where nobody knows it. about: what else is needed to score, to group and to show it.
    """

    id: str
    conversation: tuple[Message, ...]
    media: tuple[Medium, ...] = ()
    truth: Any = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """What is asked, without the placeholders of the media before it."""
        text = self.conversation[-1]["value"]
        for medium in self.media:
            text = text.removeprefix(f"<{medium.kind}>\n")
        return text


def question(id: str, prompt: str, *media: Medium, truth: Any = None, **about: Any) -> Question:
    """A question of one turn, its media before the text, each on a line of its own as in training."""
    shown = "".join(f"<{medium.kind}>\n" for medium in media)
    return Question(id, ({"from": "human", "value": shown + prompt},), media, truth, about)


@dataclass(frozen=True)
class Answer:
    """What a model said to a question; None, and why, where it could not be asked: its medium is broken or missing."""

    question: Question
    text: str | None
    broken: str = ""


@dataclass(frozen=True)
class Request:
    """One thing that a judge is asked about an answer.

    id: unique in the benchmark. prompt: the name of the judge's prompt, a file of conf/judge/prompts. slots: what is
    filled into it.
    """

    id: str
    prompt: str
    slots: Mapping[str, str]


def requests_about(
    answers: Sequence[Answer], prompt: str, slots: Callable[[Question], Mapping[str, str]]
) -> list[Request]:
    """A request about each question that was answered: what `slots` gives for it, and the answer as the prediction."""
    return [
        Request(answer.question.id, prompt, {**slots(answer.question), "prediction": answer.text})
        for answer in answers
        if answer.text is not None
    ]


@dataclass(frozen=True)
class Verdict:
    """What a judge found: the fields that its prompt asks for; None, and what it said instead, where it is unjudged."""

    id: str
    values: Mapping[str, float | str] | None
    reply: str = ""
