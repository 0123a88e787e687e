"""VizWiz: test, which the challenge's server scores, and val, whose answers are public."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.files import Record, checked, image_file, read_jsonl, read_records
from vllava.evaluation.normalise import textvqa_accuracy, vqa_answer
from vllava.evaluation.places import find_place
from vllava.evaluation.published import SHORT, cluster, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import read_table

SUFFIX = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
_FILES = {"test": "llava_test.jsonl", "val": "val.json"}
_SPLITS = {"test": ("test",), "val": ("val", "validation")}
_COLUMNS = {"question_id": ("question_id",), "question": ("question",), "image": ("image",)}
_MORE = {"answers": ("answers",), "answer_type": ("answer_type", "category")}


@dataclass
class VizWiz(Benchmark):
    """split: test has no answers and no figures here, but the file to upload; val is scored."""

    split: str = "test"

    def __post_init__(self) -> None:
        if self.split not in _FILES:
            raise UserError(f"benchmark.split={self.split!r} is not known; there are: {', '.join(_FILES)}.")
        if self.split == "val":
            self.metrics = (Metric("accuracy", ("accuracy",), headline=True),)
            self.paper = {}  # the paper's figure is of test

    def questions(self) -> list[Question]:
        place = find_place(
            self.root, "vizwiz", _FILES[self.split], tuple(f"*{s}-*.parquet" for s in _SPLITS[self.split])
        )
        if place.tables:
            found = [self._from_table(record) for record in read_table(place.folder, _COLUMNS, _MORE, self._splits)]
        elif self.split == "val":
            found = [self._official(record, place.folder / "val") for record in read_records(place.folder / "val.json")]
        else:
            found = _prepared(place.folder)
        return checked(self, found)

    @property
    def _splits(self) -> tuple[str, ...]:
        return _SPLITS[self.split]

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer) for answer in answers] if self.metrics else []

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        upload = [
            {"image": answer.question.about["image"], "answer": vqa_answer(answer.text or "")} for answer in answers
        ]
        return {**predictions(answers), "vizwiz_upload.json": upload}

    def _from_table(self, record: Record) -> Question:
        name = f"{PurePosixPath(record.text('question_id')).stem}.jpg"
        return self._question(record, record.text("question_id"), name, record.need("image"))

    def _official(self, record: Record, images: Path) -> Question:
        name = record.text("image")
        return self._question(record, name, name, image_file(images, name))

    def _question(self, record: Record, id: str, name: str, image: Any) -> Question:
        truth = None
        if self.split == "val":
            truth = [str(answer["answer"] if isinstance(answer, dict) else answer) for answer in record.need("answers")]
        kind = record.get("answer_type")
        prompt = record.text("question").capitalize() + SUFFIX  # a capital first, as in the prepared file
        return question(id, prompt, image, truth=truth, image=name, answer_type=kind)


def _row(answer: Answer) -> Row:
    value = 0.0 if answer.text is None else textvqa_accuracy(answer.text, answer.question.truth)
    kind = answer.question.about["answer_type"]
    return Row(cluster(answer.question), {"accuracy": value}, (f"answer_type/{kind}",) if kind else ())


def _prepared(folder: Path) -> list[Question]:
    found = [
        question(
            line.text("question_id"),
            line.text("text"),
            image_file(folder / "test", line.text("image")),
            question_id=line["question_id"],
            image=line["image"],
        )
        for line in read_jsonl(folder / _FILES["test"])
    ]
    if (official := folder / "test.json").is_file():
        asked = {question.about["image"] for question in found}
        lacking = [name for record in read_records(official) if (name := record.text("image")) not in asked]
        if lacking:
            raise UserError(
                f"{folder / _FILES['test']}: {len(lacking):,} questions of {official} are not there, {lacking[0]} is "
                "one of them: an upload must have them all."
            )
    return found
