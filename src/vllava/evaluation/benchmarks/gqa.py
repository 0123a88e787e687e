"""GQA, its balanced test-dev questions: the answer has to be the one word, but for case and full stops at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.files import Record, checked, image_file, read_by_id, read_jsonl, unique
from vllava.evaluation.normalise import gqa_answer
from vllava.evaluation.places import find_place
from vllava.evaluation.published import SHORT, cluster, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import read_table

_FILE = "llava_gqa_testdev_balanced.jsonl"
_OFFICIAL = "testdev_balanced_questions.json"
_WHERE = ("data", ".", "data/questions1.2", "questions1.2")  # the official archive's folder is among them
_COLUMNS = {"id": ("id",), "imageId": ("imageId",), "question": ("question",), "answer": ("answer",)}
_MORE = {"types": ("types",), "semantic": ("semantic",), "isBalanced": ("isBalanced",)}
_IMAGES = {"identity": ("id",), "image": ("image",)}
_SPLITS = ("testdev", "test-dev")


@dataclass
class GQA(Benchmark):
    """Accuracy over balanced questions. Validity and plausibility need a file that test-dev does not have."""

    metrics: tuple[Metric, ...] = field(default=(Metric("accuracy", ("accuracy",), headline=True),), init=False)

    def questions(self) -> list[Question]:
        on_hub = ("*testdev_balanced_instructions*.parquet", "*testdev_balanced_images*.parquet")
        place = find_place(self.root, "gqa", _FILE, on_hub)
        return checked(self, _from_tables(place.folder) if place.tables else _from_files(place.folder))

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer) for answer in answers if answer.question.about["balanced"]]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        converted = [
            {"questionId": answer.question.id, "prediction": gqa_answer(answer.text or "")} for answer in answers
        ]
        return {**predictions(answers), "testdev_balanced_predictions.json": converted}


def _row(answer: Answer) -> Row:
    right = answer.text is not None and gqa_answer(answer.text) == answer.question.truth
    return Row(cluster(answer.question), {"accuracy": float(right)}, tuple(answer.question.about["groups"]))


def _groups(official: Record) -> list[str]:
    """The parts that GQA's script reports: types, whether yes, no or one of a choice answers it, and lengths."""
    types, program = official.get("types") or {}, official.get("semantic") or []
    if not isinstance(types, dict) or not isinstance(program, list) or not all(isinstance(s, dict) for s in program):
        raise UserError(f"{official.where}: the types or the semantic steps are not as in the official file.")
    groups = [f"{name}/{types[name]}" for name in ("structural", "semantic", "detailed") if types.get(name)]
    if types.get("structural"):
        groups.append("open" if types["structural"] == "query" else "binary")
    if "semantic" in official:
        groups.append(f"steps/{sum(map(_counts, program))}")
    return [*groups, f"words/{len(official.text('question').split())}"]


def _counts(step: Mapping[str, Any]) -> bool:
    """Whether a step is one of reasoning: what only asks for the name or whether it is there is none."""
    told = f"{step.get('operation')}: {step.get('argument')}"
    return not any(asks in told for asks in ("exist", "query: name", "choose name"))


def _question(id: str, prompt: str, image: Any, official: Record) -> Question:
    balanced = official.get("isBalanced") is not False
    truth = official.text("answer")
    return question(id, prompt, image, truth=truth, balanced=balanced, groups=_groups(official))


def _from_files(folder: Path) -> list[Question]:
    paths = [folder / where / _OFFICIAL for where in _WHERE]
    path = next((path for path in paths if path.is_file()), paths[0])
    official = read_by_id(path)
    found = []
    for line in read_jsonl(folder / _FILE):
        id = line.text("question_id")
        if id not in official:
            raise UserError(f"{line.where}: the question {id!r} is not in {path}.")
        image = image_file(folder / "data" / "images", line.text("image"))
        found.append(_question(id, line.text("text"), image, official[id]))
    asked = {question.id for question in found}
    left_out = [id for id, record in official.items() if id not in asked and record.get("isBalanced") is not False]
    if left_out:
        count = f"{len(left_out):,} balanced questions of {path} are not"
        raise UserError(f"{folder / _FILE}: {count} there, {left_out[0]!r} is one of them: all of them count.")
    return found


def _from_tables(folder: Path) -> list[Question]:
    records = read_table(folder, _COLUMNS, _MORE, _SPLITS, ("testdev_balanced_instructions",))
    pictures = read_table(folder, _IMAGES, None, _SPLITS, ("testdev_balanced_images",))
    unique((picture.text("identity") for picture in pictures), f"{folder}, images")
    images = {picture.text("identity"): picture.need("image") for picture in pictures}
    found = []
    for record in records:
        if record.text("imageId") not in images:
            raise UserError(f"{record.where}: the image {record['imageId']!r} is in no table of images in {folder}.")
        image = images[record.text("imageId")]
        found.append(_question(record.text("id"), record.text("question") + SHORT, image, record))
    return found
