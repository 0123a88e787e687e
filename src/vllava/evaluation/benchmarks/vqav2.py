"""VQAv2: test-dev, which the challenge's server scores, and val, whose answers are public."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.files import Record, checked, image_file, read_jsonl, read_records, warn
from vllava.evaluation.normalise import vqa_answer, vqav2_accuracy
from vllava.evaluation.places import Place, find_place
from vllava.evaluation.published import SHORT, cluster, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import find_tables, read_table

_FILES = {
    "test-dev": "llava_vqav2_mscoco_test-dev2015.jsonl",
    "test": "llava_vqav2_mscoco_test2015.jsonl",  # all the ids that an upload must have
    "val": "v2_OpenEnded_mscoco_val2014_questions.json",
}
_SPLITS = {"test-dev": ("testdev", "test-dev"), "test": ("test",), "val": ("validation", "val")}
_ID = {"question_id": ("question_id",)}
_COLUMNS = {**_ID, "question": ("question",), "image": ("image",)}
_MORE = {"answers": ("answers",), "answer_type": ("answer_type",), "identity": ("image_id",)}


@dataclass
class VQAv2(Benchmark):
    """split: test-dev has no answers and no figures here, but the file to upload; val is scored."""

    split: str = "test-dev"

    def __post_init__(self) -> None:
        if self.split not in ("test-dev", "val"):
            raise UserError(f"benchmark.split={self.split!r} is not known; there are: test-dev, val.")
        if self.split == "val":
            self.metrics = (Metric("accuracy", ("accuracy",), headline=True),)
            self.paper = {}  # the paper's figure is of test-dev

    def questions(self) -> list[Question]:
        place = self._place()
        if place.tables:
            found = self._from_tables(place.folder)
        elif self.split == "val":
            found = self._from_challenge(place.folder)
        else:
            lines = read_jsonl(place.folder / _FILES[self.split])
            images = place.folder / "test2015"
            found = [
                question(
                    line.text("question_id"),
                    line.text("text"),
                    image_file(images, line.text("image")),
                    question_id=_number(line),
                )
                for line in lines
            ]
        if self.split == "test-dev" and not self._has_every(place):
            warn(
                self,
                f"{place.folder} does not tell all ids of test2015: the file to upload has those of test-dev alone",
            )
        return checked(self, found)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [self._row(answer) for answer in answers] if self.metrics else []

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        lines = predictions(answers)
        return lines if self.split == "val" else {**lines, "vqav2_upload.json": self._upload(answers)}

    def _row(self, answer: Answer) -> Row:
        value = 0.0 if answer.text is None else vqav2_accuracy(vqa_answer(answer.text), answer.question.truth)
        kind = answer.question.about["answer_type"]
        groups = (f"answer_type/{kind}",) if kind else ()
        return Row(cluster(answer.question), {"accuracy": value}, groups)

    def _upload(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """All of test2015 in its order, with nothing where nothing was asked; raises UserError where test-dev lacks."""
        given = {answer.question.id: vqa_answer(answer.text or "") for answer in answers}
        place = self._place()
        asked = self._ids(place, "test-dev")
        missing = [id for id in asked if str(id) not in given]
        if missing:
            raise UserError(
                f"{len(missing):,} questions of VQAv2's test-dev have no answer, {missing[0]} is one of them: the "
                "server would count them as wrong, so no file to upload is written."
            )
        ids = dict.fromkeys((*(self._ids(place, "test") if self._has_every(place) else ()), *asked))
        return [{"question_id": id, "answer": given.get(str(id), "")} for id in ids]

    def _ids(self, place: Place, split: str) -> list[int]:
        if place.tables:
            return [_number(record) for record in read_table(place.folder, _ID, splits=_SPLITS[split])]
        return [_number(record) for record in read_jsonl(place.folder / _FILES[split])]

    def _has_every(self, place: Place) -> bool:
        if place.tables:
            return any(table.split.lower() in _SPLITS["test"] for table in find_tables(place.folder))
        return (place.folder / _FILES["test"]).is_file()

    def _place(self) -> Place:
        on_hub = ("*testdev-*.parquet", "*test-*.parquet") if self.split == "test-dev" else ("*validation-*.parquet",)
        return find_place(self.root, "vqav2", _FILES[self.split], on_hub)

    def _from_challenge(self, folder: Path) -> list[Question]:
        path = folder / "v2_mscoco_val2014_annotations.json"
        annotations = {record.text("question_id"): record for record in read_records(path, "annotations")}
        found = []
        for record in read_records(folder / _FILES["val"], "questions"):
            id = record.text("question_id")
            if id not in annotations:
                raise UserError(f"{record.where}: the question {id} has no answers in {path}.")
            image = image_file(folder / "val2014", f"COCO_val2014_{_number(record, 'image_id'):012d}.jpg")
            found.append(_scored(record, annotations[id], image))
        return found

    def _from_tables(self, folder: Path) -> list[Question]:
        records = read_table(folder, _COLUMNS, _MORE, _SPLITS[self.split])
        if self.split == "val":
            return [_scored(record, record, record.need("image")) for record in records]
        return [
            question(
                record.text("question_id"),
                record.text("question") + SHORT,
                record.need("image"),
                question_id=_number(record),
            )
            for record in records
        ]


def _scored(asked: Record, annotation: Record, image: Any) -> Question:
    answers = [str(answer["answer"] if isinstance(answer, dict) else answer) for answer in annotation.need("answers")]
    return question(
        asked.text("question_id"),
        asked.text("question") + SHORT,
        image,
        truth=answers,
        question_id=asked["question_id"],
        answer_type=annotation.get("answer_type"),
    )


def _number(record: Record, name: str = "question_id") -> int:
    id = record.text(name)
    if not id.isdecimal():
        raise UserError(f"{record.where}: {name} {id!r} is no number, as VQAv2's are.")
    return int(id)
