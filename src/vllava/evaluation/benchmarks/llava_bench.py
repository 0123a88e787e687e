"""LLaVA-Bench in the wild: a judge grades the model's answer beside a reference that GPT-4 wrote from a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.files import Record, checked, image_file, read_jsonl, unique
from vllava.evaluation.places import find_place
from vllava.evaluation.published import cluster, predictions
from vllava.evaluation.questions import Answer, Question, Request, Verdict, question, requests_about
from vllava.evaluation.tables import read_table

LOWEST, HIGHEST = 1.0, 10.0  # of the judge's scale

_COLUMNS = {
    "question": ("question", "text"),
    "caption": ("caption",),
    "reference": ("gpt_answer", "answer"),
    "category": ("category",),
    "image": ("image",),
}
_MORE = {"question_id": ("question_id",), "identity": ("image_id",)}

METRICS = (
    Metric("relative", ("model", "reference"), ratio, headline=True),  # broken: as bad as can be; unjudged: left out
    Metric("model", ("model", "counted"), ratio, 10.0),
    Metric("reference", ("reference", "counted"), ratio, 10.0),
    Metric("relative_judged", ("model_judged", "reference_judged"), ratio),
    Metric("unjudged", ("unjudged",)),  # % of questions
)


COUNTING = {
    "broken": "count as 1 of 10, beside a reference of 10",
    "unjudged": "are left out of both means",
}


def _slots(question: Question) -> dict[str, str]:
    return {"caption": question.about["caption"], "question": question.prompt, "reference": question.truth}


@dataclass
class LlavaBench(Benchmark):
    """100 * mean score of the model / mean score of the reference, and both means times 10.

    A reply that cannot be read has no scores that could count as wrong on one side alone, so it is left out of both
    means, and `unjudged` says how often that happened (the original lets -1 into both). A question that could not be
    asked counts 1 for the model and 10 for the reference, as the worst answer would.
    """

    metrics: tuple[Metric, ...] = field(default=METRICS, init=False)
    counting: Mapping[str, str] = field(default_factory=lambda: dict(COUNTING), init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, "llava-bench-in-the-wild", "questions.jsonl")
        return checked(self, _from_tables(place.folder) if place.tables else _from_files(place.folder))

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        return requests_about(answers, "llava_bench", _slots)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer, verdicts.get(answer.question.id)) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return predictions(answers)


def _from_files(folder: Path) -> list[Question]:
    asked = read_jsonl(folder / "questions.jsonl")
    captions = _by(folder / "context.jsonl", "image")
    references = _by(folder / "answers_gpt4.jsonl", "question_id")
    found = []
    for record in asked:
        id, image = record.text("question_id"), record.text("image")
        for name, key, there in (("context", image, captions), ("answers_gpt4", id, references)):
            if key not in there:
                raise UserError(f"{record.where}: {folder / name}.jsonl has nothing for {key}.")
        picture, caption = image_file(folder / "images", image), captions[image].need("caption")
        found.append(_question(record, record.text("text"), picture, caption, references[id].text("text")))
    return found


def _by(path: Path, key: str) -> dict[str, Record]:
    records = read_jsonl(path)
    unique((record.text(key) for record in records), path)
    return {record.text(key): record for record in records}


def _from_tables(folder: Path) -> list[Question]:
    found = []
    for number, record in enumerate(read_table(folder, _COLUMNS, _MORE)):
        if record.get("question_id") is None:
            record["question_id"] = number
        text, reference = record.text("question"), record.text("reference")
        found.append(_question(record, text, record.need("image"), record.need("caption"), reference))
    return found


def _question(record: Record, text: str, image: Any, caption: Any, reference: str) -> Question:
    told = caption if isinstance(caption, str) else "\n".join(map(str, caption))
    id, category = record.need("question_id"), record.text("category")
    return question(str(id), text, image, truth=reference, caption=told, category=category, question_id=id)


def _row(answer: Answer, verdict: Verdict | None) -> Row:
    values: dict[str, float] = {"unjudged": 0.0}
    if answer.text is None:
        values |= {"model": LOWEST, "reference": HIGHEST, "counted": 1.0}
    elif verdict is None or verdict.values is None:
        values["unjudged"] = 1.0
    else:
        reference, model = float(verdict.values["first"]), float(verdict.values["second"])
        values |= {"model": model, "reference": reference, "counted": 1.0}
        values |= {"model_judged": model, "reference_judged": reference}
    return Row(cluster(answer.question), values, (f"category/{answer.question.about['category']}",))
