"""TextVQA, val 0.5.1: ten people's answers, with the texts that a reader found in the image told in the prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.files import Record, checked, image_file, read_jsonl, read_records, warn
from vllava.evaluation.normalise import textvqa_accuracy
from vllava.evaluation.places import find_place
from vllava.evaluation.published import SHORT, cluster, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import read_table

PEOPLE = 10

_FILE = "llava_textvqa_val_v051_ocr.jsonl"
_OFFICIAL = "TextVQA_0.5.1_val.json"
_READ = "Reference OCR token: "
_OLDER = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_COLUMNS = {"question": ("question",), "question_id": ("question_id",), "image": ("image",), "answers": ("answers",)}
_MORE = {"ocr_tokens": ("ocr_tokens",), "image_id": ("image_id",), "identity": ("image_id",)}


@dataclass
class TextVQA(Benchmark):
    """The mean of what each answer is worth to the ten people."""

    metrics: tuple[Metric, ...] = field(default=(Metric("accuracy", ("accuracy",), headline=True),), init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, "textvqa", _FILE, ("*validation-*.parquet",))
        return checked(self, self._from_tables(place.folder) if place.tables else _from_files(place.folder))

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return predictions(answers)

    def _from_tables(self, folder: Path) -> list[Question]:
        warn(
            self,
            "prompts are made from the data set's columns, with its ocr_tokens; those of LLaVA's prepared file are of "
            "another reader, and the published figure depends on them",
        )
        found = []
        for record in read_table(folder, _COLUMNS, _MORE, ("validation", "val")):
            # As in the prepared file: a capital first, the line of tokens also where nothing was read.
            read = f"\n{_READ}{', '.join(map(str, record['ocr_tokens'] or ()))}" if "ocr_tokens" in record else ""
            prompt = record.text("question").capitalize() + read + SHORT
            image_id = record.get("image_id") or record["question_id"]
            found.append(_question(record, prompt, image_id, record.need("image")))
        return found


def _row(answer: Answer) -> Row:
    value = 0.0 if answer.text is None else textvqa_accuracy(answer.text, answer.question.truth)
    return Row(cluster(answer.question), {"accuracy": value})


def _question(official: Record, prompt: str, image_id: Any, image: Any) -> Question:
    answers = official.need("answers")
    if not isinstance(answers, list) or len(answers) != PEOPLE:
        raise UserError(f"{official.where}: there are not {PEOPLE} answers, as TextVQA's accuracy needs them.")
    truth = list(map(str, answers))
    # The published lines name the image, of which there are several questions.
    return question(official.text("question_id"), prompt, image, truth=truth, question_id=image_id)


def asked(prompt: str, where: str) -> str:
    """The question in a prompt of LLaVA's prepared files; raises UserError for one of another form."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if found := _OLDER.search(prompt):
            return found[1]
    elif _READ in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(_READ) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise UserError(f"{where}: no question is found in the text {prompt[:80]!r}, which has none of the known forms.")


def _from_files(folder: Path) -> list[Question]:
    path = folder / _OFFICIAL
    # A question that is asked twice about an image has answers of its own each time: they are taken in turn.
    waiting: dict[tuple[str, str], list[Record]] = {}
    for record in read_records(path, "data"):
        waiting.setdefault((record.text("image_id"), record.text("question").lower()), []).append(record)
    found = []
    for line in read_jsonl(folder / _FILE):
        key = (line.text("question_id"), asked(line.text("text"), line.where).lower())
        if not waiting.get(key):
            raise UserError(f"{line.where}: the question {key[1]!r} about the image {key[0]} is not in {path}.")
        image = image_file(folder / "train_images", line.text("image"))
        found.append(_question(waiting[key].pop(0), line["text"], line["question_id"], image))
    return found
