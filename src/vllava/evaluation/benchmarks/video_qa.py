"""Questions about videos with short answers, which a judge compares: MSVD-QA, MSRVTT-QA, TGIF-QA, ActivityNet-QA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.benchmarks.video_files import Videos
from vllava.evaluation.files import Record, checked, read_records, unique, warn
from vllava.evaluation.places import find_place
from vllava.evaluation.published import cluster
from vllava.evaluation.questions import Answer, FileMedium, Medium, Question, Request, Verdict, question, requests_about
from vllava.evaluation.tables import read_table

_NEEDED = {"question": ("question",), "answer": ("answer",)}
_MORE = {
    "question_id": ("question_id", "id"),
    "type": ("type", "question_type"),
    "video_name": ("video_name", "video_id"),
    "video": ("video",),
    "identity": ("video_name", "video_id"),
}

METRICS = (
    Metric("accuracy", ("right",), headline=True),  # unjudged and broken: wrong
    Metric("score", ("score", "scored"), ratio, 1.0, headline=True),  # 0 to 5; unjudged and broken: 0
    Metric("accuracy_judged", ("right", "judged"), ratio),  # the original's, which leaves the others out
    Metric("score_judged", ("score", "score_judged"), ratio, 1.0),
    Metric("unjudged", ("unjudged",)),  # % of questions
)


def _slots(question: Question) -> dict[str, str]:
    return {"question": question.prompt, "answer": question.truth}


@dataclass
class VideoQA(Benchmark):
    """Accuracy and mean score by a judge; by an exact match accuracy alone, for that gives no scores.

    folder: in the original's eval/. videos: folders with the videos, below that, and below a data set's; the first that
    has one counts. prefixes: that file names may have and names in the questions lack. types: names for the numbers in
    "type". The judge's score is kept as it is, where the original cuts 4.8 to 4.
    """

    folder: str = ""
    videos: Sequence[str] = ("videos",)
    prefixes: Sequence[str] = ("",)
    types: Sequence[str] = ()

    metrics: tuple[Metric, ...] = field(default=METRICS, init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, self.folder, "test_q.json")
        videos = Videos(place.folder, self.videos, self.prefixes)
        return checked(
            self, self._from_tables(place.folder, videos) if place.tables else self._from_files(place.folder, videos)
        )

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        return requests_about(answers, "video_qa", _slots)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        judged = [verdict.values for verdict in verdicts.values() if verdict.values is not None]
        scores = not judged or any("score" in values for values in judged)  # an exact match gives none
        return [_row(answer, verdicts.get(answer.question.id), scores) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The original's lines; the answer to a question that could not be asked is empty, not left out."""
        lines = [
            {
                "id": answer.question.id,
                "question": answer.question.prompt,
                "answer": answer.question.truth,
                "pred": answer.text or "",
            }
            for answer in answers
        ]
        return {"merge.jsonl": lines}

    def _from_files(self, folder: Path, videos: Videos) -> list[Question]:
        asked, answered = read_records(folder / "test_q.json"), read_records(folder / "test_a.json")
        paired = self._paired(asked, answered)
        return [
            self._question(record.text("question_id"), record, videos.find(record.text("video_name", "video")), answer)
            for record, answer in zip(asked, paired, strict=True)
        ]

    def _paired(self, asked: Sequence[Record], answered: Sequence[Record]) -> Sequence[Record]:
        """The answers in the order of their questions."""
        if not answered or not any("question_id" in record for record in answered):
            if len(asked) != len(answered):
                raise UserError(
                    f"{len(asked):,} questions and {len(answered):,} answers below {self.root}: without question_id "
                    "only their places say which answer is whose, and one of the two files lacks some."
                )
            warn(self, "test_a.json has no question_id: answers are joined to questions by their places")
            return answered
        unique((record.text("question_id") for record in answered), answered[0].path)
        by_id = {record.text("question_id"): record for record in answered}
        for record in asked:
            if record.text("question_id") not in by_id:
                raise UserError(f"{record.where}: {answered[0].path} has no answer to {record.text('question_id')!r}.")
        if len(by_id) > len(asked):
            warn(self, f"test_a.json answers {len(by_id) - len(asked):,} questions that test_q.json does not ask")
        return [by_id[record.text("question_id")] for record in asked]

    def _from_tables(self, folder: Path, videos: Videos) -> list[Question]:
        found, seen = [], dict[str, int]()
        configurations = (self.name, self.name.replace("_", ""), f"sharegptvideo_{self.name.replace('_', '')}")
        for record in read_table(folder, _NEEDED, _MORE, ("test",), configurations):
            name, medium = _video(record, videos)
            seen[name] = seen.get(name, -1) + 1
            id = record.text("question_id") if record.get("question_id") is not None else f"{name}_{seen[name]}"
            found.append(self._question(id, record, medium, record))
        return found

    def _question(self, id: str, asked: Record, video: Medium, answered: Record) -> Question:
        kind = answered.get("type", asked.get("type"))
        if kind is not None and str(kind).isdigit() and int(kind) < len(self.types):
            kind = self.types[int(kind)]
        about = {} if kind is None else {"type": str(kind)}
        return question(id, asked.text("question"), video, truth=answered.text("answer"), **about)


def _video(record: Record, videos: Videos) -> tuple[str, Medium]:
    """The name and the place of a row's video: in the row, or in a file of a name that the row tells."""
    medium = record.get("video")
    if isinstance(medium, FileMedium):  # a name after all
        name = medium.path.relative_to(record.path.parent).as_posix()
        return name, videos.find(name)
    name = record.text("video_name", "question_id") if medium is not None else record.text("video_name")
    return name, medium if medium is not None else videos.find(name)


def _row(answer: Answer, verdict: Verdict | None, scores: bool) -> Row:
    values = (verdict and verdict.values) or {}
    judged = answer.text is not None and bool(values)
    row = {
        "right": float(judged and values["pred"] == "yes"),
        "judged": float(judged),
        "unjudged": float(answer.text is not None and not judged),
    }
    if scores:
        row |= {"scored": 1.0, "score_judged": float(judged), "score": float(values.get("score", 0.0)) * judged}
    kind = answer.question.about.get("type")
    return Row(cluster(answer.question), row, (f"type/{kind}",) if kind is not None else ())
