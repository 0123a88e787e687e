"""MM-Vet: open questions about images that need several capabilities at once; a judge says how much is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.files import Record, checked, image_file, read_by_id, read_jsonl, unique
from vllava.evaluation.places import find_place
from vllava.evaluation.published import cluster, predictions
from vllava.evaluation.questions import Answer, Question, Request, Verdict, question, requests_about
from vllava.evaluation.tables import read_table

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

_FILE = "mm-vet.json"
_PROMPTS = "llava-mm-vet.jsonl"
_COLUMNS = {
    "question_id": ("question_id", "id"),
    "question": ("question",),
    "answer": ("answer",),
    "capability": ("capability", "capabilities"),
    "image": ("image",),
}
METRICS = (
    Metric("total", ("score",), headline=True),  # unjudged and broken: 0
    Metric("total_judged", ("score", "judged"), ratio),
    Metric("unjudged", ("unjudged",)),  # % of questions
)


def _slots(question: Question) -> dict[str, str]:
    return {"question": question.about["asked"], "answer": question.truth}


@dataclass
class MMVet(Benchmark):
    """Mean score times 100, also for each capability and each set of them. One run of the judge, as in the original."""

    metrics: tuple[Metric, ...] = field(default=METRICS, init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, "mm-vet", _FILE)
        return checked(self, _from_tables(place.folder) if place.tables else _from_files(place.folder))

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        return requests_about(answers, "mm_vet", _slots)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer, verdicts.get(answer.question.id)) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The original's lines, and what the official grader takes: a text for every question, empty for the broken."""
        return {**predictions(answers), _FILE: {answer.question.id: answer.text or "" for answer in answers}}


def _from_files(folder: Path) -> list[Question]:
    """The questions of mm-vet.json; asked as the prepared file says, if there is one."""
    records = {_id(id): record for id, record in read_by_id(folder / _FILE).items()}
    if not (folder / _PROMPTS).is_file():
        return [_question(id, folder, record, record.text("question"), _number(id)) for id, record in records.items()]
    lines = read_jsonl(folder / _PROMPTS)
    unique((_id(line.text("question_id")) for line in lines), folder / _PROMPTS)
    prompts = {_id(line.text("question_id")): line for line in lines}
    for here, there, name in ((records, prompts, _PROMPTS), (prompts, records, _FILE)):
        if lost := [id for id in here if id not in there]:
            raise UserError(f"{here[lost[0]].where}: {folder / name} has nothing for {lost[0]}.")
    return [_question(id, folder, records[id], line.text("text"), line["question_id"]) for id, line in prompts.items()]


def _question(id: str, folder: Path, official: Record, prompt: str, number: Any) -> Question:
    return _made(id, official, prompt, image_file(folder / "images", official.text("imagename")), number)


def _from_tables(folder: Path) -> list[Question]:
    records = read_table(folder, _COLUMNS)
    ids = [_id(record.text("question_id")) for record in records]
    return [
        _made(id, record, record.text("question"), record.need("image"), _number(id))
        for id, record in zip(ids, records, strict=True)
    ]


def _made(id: str, official: Record, prompt: str, image: Any, number: Any) -> Question:
    truth = official.text("answer").replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")  # as the judge reads it
    about = {"asked": official.text("question"), "capabilities": _capabilities(official), "question_id": number}
    return question(id, prompt, image, truth=truth, **about)


def _id(text: str) -> str:
    """v1_7, also for 7."""
    return f"v1_{text.removeprefix('v1_')}"


def _number(id: str) -> int | str:
    number = id.removeprefix("v1_")
    return int(number) if number.isdigit() else number


def _capabilities(record: Record) -> tuple[str, ...]:
    """Those that a question needs, in MM-Vet's order, from a list or from names with commas between."""
    given = record.need("capability")
    names = {str(name).strip() for name in (given.split(",") if isinstance(given, str) else given)}
    if not names or (odd := names - set(CAPABILITIES)):
        told = ", ".join(sorted(odd)) if names else "none"
        raise UserError(f"{record.where}: the capabilities are {', '.join(CAPABILITIES)}, here stands {told}.")
    return tuple(name for name in CAPABILITIES if name in names)


def _row(answer: Answer, verdict: Verdict | None) -> Row:
    judged = answer.text is not None and verdict is not None and verdict.values is not None
    score = float(verdict.values["score"]) if judged and verdict and verdict.values else 0.0
    values = {"score": score, "judged": float(judged), "unjudged": float(answer.text is not None and not judged)}
    names = answer.question.about["capabilities"]
    return Row(cluster(answer.question), values, (*(f"capability/{name}" for name in names), f"set/{'_'.join(names)}"))
