"""ScienceQA: the letter of an option, with an image or without; the published figure is of those with one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.files import Record, checked, image_file, read_by_id, read_json, read_records, warn
from vllava.evaluation.normalise import scienceqa_letter
from vllava.evaluation.places import find_place
from vllava.evaluation.published import LETTER, cluster, lettered, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import read_table

LETTERS = "ABCDE"
WITH_IMAGE = 2017  # of the 4,241 test questions: all there are in the data set's ScienceQA-IMG

_FILE = "llava_test_CQM-A.json"
_COLUMNS = {"question": ("question",), "choices": ("choices",), "answer": ("answer",), "hint": ("hint",)}
_MORE = {"image": ("image",), "id": ("id", "question_id"), "subject": ("subject",), "grade": ("grade",)}


@dataclass
class ScienceQA(Benchmark):
    """accuracy: over questions with an image; all_accuracy: over all that are asked."""

    metrics: tuple[Metric, ...] = field(
        default=(
            Metric("accuracy", ("right_with_image", "with_image"), ratio, headline=True),
            Metric("all_accuracy", ("right",)),
            Metric("unparsed", ("unparsed",)),
        ),
        init=False,
    )

    def questions(self) -> list[Question]:
        place = find_place(self.root, "scienceqa", _FILE, ("ScienceQA-IMG/test-*.parquet",))
        return checked(self, (self._from_tables if place.tables else self._from_files)(place.folder), WITH_IMAGE)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return predictions(answers, lambda question: question.conversation[-1]["value"])  # with its placeholder

    def _from_files(self, folder: Path) -> list[Question]:
        path = folder / "problems.json"
        problems = read_by_id(path)
        found = []
        for record in read_records(folder / _FILE):
            id = record.text("id")
            if id not in problems:
                raise UserError(f"{record.where}: the problem {id!r} is not in {path}.")
            image = record.get("image")
            media = [image_file(folder / "images" / "test", str(image))] if image else []
            text = _human(record).replace("<image>", "").strip()
            found.append(_question(id, text, media, problems[id]))
        if (splits := folder / "pid_splits.json").is_file():
            self._compare(found, splits)
        return found

    def _compare(self, found: Sequence[Question], path: Path) -> None:
        """Warns of questions of the test split that are not asked: the published script counts them as wrong."""
        splits = read_json(path)
        asked = {question.id for question in found}
        test = splits.get("test", []) if isinstance(splits, dict) else []
        lacking = [str(id) for id in test if str(id) not in asked]
        if lacking:
            warn(self, f"{len(lacking):,} questions of {path}'s test split are not asked, {lacking[0]} is one of them")

    def _from_tables(self, folder: Path) -> list[Question]:
        warn(
            self,
            "prompts are made from the data set's columns (context, question, options A. …); LLaVA's prepared file may "
            "word them otherwise",
        )
        found = []
        for number, record in enumerate(read_table(folder, _COLUMNS, _MORE, ("test",), ("ScienceQA-IMG",))):
            hint = f"Context: {record['hint']}\n" if record["hint"] else ""
            text = hint + record.text("question") + lettered(record.need("choices"))
            media = [record["image"]] if record.get("image") else []
            found.append(_question(str(record.get("id") or number), text, media, record))
        return found


def _question(id: str, text: str, media: Sequence[Any], problem: Record) -> Question:
    choices, right = problem.need("choices"), problem.need("answer")
    if not isinstance(choices, list) or not isinstance(right, int) or not 0 <= right < min(len(choices), len(LETTERS)):
        raise UserError(f"{problem.where}: the answer {right!r} is none of the choices' numbers.")
    groups = [f"{name}/{problem[name]}" for name in ("subject", "grade") if problem.get(name)]
    about = {"question_id": id, "options": len(choices), "groups": groups}
    # By the problem, not by what was asked with an image: an answer that is missing counts there too.
    return question(id, text + LETTER, *media, truth=LETTERS[right], with_image=bool(problem.get("image")), **about)


def _row(answer: Answer) -> Row:
    about = answer.question.about
    letter = None if answer.text is None else scienceqa_letter(answer.text)
    right = float(letter == answer.question.truth)
    with_image = float(about["with_image"])
    unparsed = float(answer.text is not None and letter is None)
    values = {"right": right, "with_image": with_image, "right_with_image": right * with_image, "unparsed": unparsed}
    return Row(cluster(answer.question), values, tuple(about["groups"]))


def _human(record: Record) -> str:
    """What is asked in the first turn."""
    turns = record.need("conversations")
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict) or not isinstance(first.get("value"), str):
        raise UserError(f"{record.where}: the conversation does not begin with a text.")
    return first["value"]
