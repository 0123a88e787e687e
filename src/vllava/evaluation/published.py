"""What the published evaluations of images share: what is said after a question, and the lines of their predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from vllava.evaluation.questions import Answer, Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def lettered(options: Sequence[str]) -> str:
    """Options as they follow a question, each on a line of its own: A. …"""
    return "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))


def cluster(question: Question) -> str:
    """What the question's row is drawn with: the other questions about its first medium."""
    return question.media[0].key if question.media else f"question {question.id}"


def _asked(question: Question) -> str:
    return question.prompt


def predictions(
    answers: Sequence[Answer], prompt: Callable[[Question], str] = _asked, model_id: str = ""
) -> dict[str, Any]:
    """merge.jsonl as the original's runners write it; questions that could not be asked have no line.

    prompt: what is told of the question's text. answer_id is made from the question and the answer: the same again.
    """
    return {
        "merge.jsonl": [
            {
                "question_id": answer.question.about.get("question_id", answer.question.id),
                "prompt": prompt(answer.question),
                "text": answer.text,
                "answer_id": hashlib.sha256(f"{answer.question.id}\0{answer.text}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "metadata": {},
            }
            for answer in answers
            if answer.text is not None
        ]
    }
