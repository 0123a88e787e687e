"""The five scores of Video-ChatGPT: long answers about videos, judged for one virtue each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.benchmarks.video_files import Videos
from vllava.evaluation.files import Record, checked, read_records
from vllava.evaluation.places import find_place
from vllava.evaluation.published import cluster
from vllava.evaluation.questions import Answer, Question, Request, Verdict, question
from vllava.evaluation.tables import find_tables, read_rows

PARTS = ("generic", "temporal", "consistency")
ASPECTS = {"generic": ("correctness", "detail", "context"), "temporal": ("temporal",), "consistency": ("consistency",)}
_EXPORTS = {
    "correctness": "correctness_qa.json",
    "detail": "detail_qa.json",
    "context": "contextual_qa.json",
    "temporal": "temporal_qa.json",
    "consistency": "consistency_qa.json",
}
_FILE = "Benchmarking_QA/generic_qa.json"
_NEEDED = {"video_name": ("video_name",), "A": ("answer", "A")}
_MORE = {"Q": ("question", "Q"), "Q1": ("question_1", "Q1"), "Q2": ("question_2", "Q2")}
_NOTHING = (None, "", "None")  # what stands in a table for a question that is not there


def _metrics() -> tuple[Metric, ...]:
    every = [aspect for part in PARTS for aspect in ASPECTS[part]]
    return (
        *(Metric(one, (one, f"{one}_asked"), ratio, 1.0, headline=True) for one in every),  # unjudged and broken: 0
        *(Metric(f"{one}_judged", (one, f"{one}_judged"), ratio, 1.0) for one in every),
        Metric("unjudged", ("unjudged", "requests"), ratio),  # % of what the judge was asked
    )


@dataclass
class VideoChatGPT(Benchmark):
    """Means of scores from 0 to 5. A generic question is asked once for three of them; a pair counts as one.

    The original gives its judge the first question of a pair twice; here it sees both, as Video-ChatGPT's own code has
    it. Ids: PART/VIDEO_K, the K-th record of a video in its file, from 0; of a pair also /1 and /2.
    """

    videos: Sequence[str] = ("Test_Videos",)

    metrics: tuple[Metric, ...] = field(default_factory=_metrics, init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, "Video_5_Benchmark", _FILE)
        read = _table if place.tables else _file
        records = {part: read(place.folder, part) for part in PARTS}
        if records["generic"] == records["temporal"]:
            raise UserError(
                f"The generic and the temporal questions below {self.root} are the same: one file is wrong."
            )
        videos = Videos(place.folder, self.videos, ("", "v_"))
        return checked(self, [asked for part in PARTS for asked in _questions(part, records[part], videos)])

    def requests(self, answers: Sequence[Answer]) -> list[Request]:
        return [
            Request(f"{id}#{aspect}", aspect, _slots(part, asked))
            for part, id, asked in _cases(answers)
            if all(answer.text is not None for answer in asked)
            for aspect in ASPECTS[part]
        ]

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(part, id, asked, verdicts) for part, id, asked in _cases(answers)]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The five lists of the original; the answer to a question that could not be asked is empty, not left out."""
        found: dict[str, Any] = {_EXPORTS[aspect]: [] for part in PARTS for aspect in ASPECTS[part]}
        for part, _, asked in _cases(answers):
            preds = ("pred",) if len(asked) == 1 else ("pred1", "pred2")
            texts = {name: answer.text or "" for name, answer in zip(preds, asked, strict=True)}
            for aspect in ASPECTS[part]:
                found[_EXPORTS[aspect]].append({**asked[0].question.about["record"], **texts})
        return found


def _file(folder: Path, part: str) -> list[dict[str, Any]]:
    """The records of a file of the original, the fields that its kind has as texts, and whatever else they hold."""
    names = ("Q1", "Q2", "A") if part == "consistency" else ("Q", "A")
    records = read_records(folder / "Benchmarking_QA" / f"{part}_qa.json")
    return [{**record, **{name: record.text(name) for name in ("video_name", *names)}} for record in records]


def _table(folder: Path, part: str) -> list[dict[str, Any]]:
    """The same of a data set: of the configuration, or the split, that is called so."""
    tables = [t for t in find_tables(folder) if part in f"{t.folder}/{t.split}".lower() and t.has(_NEEDED)]
    if not tables:
        raise UserError(f"{folder} has no Parquet file of the {part} questions, with video_name, question and answer.")
    if len({table.folder for table in tables}) > 1:
        there = ", ".join(sorted({table.folder for table in tables}))
        raise UserError(
            f"{folder} has several data sets of {part} questions: {there}. Give the folder of one data set."
        )
    rows = [row for table in tables for row in read_rows(table, {**_NEEDED, **_MORE})]
    if part == "consistency":
        return _pairs(rows)
    return [{"video_name": row.text("video_name"), "Q": row.text("Q"), "A": row.text("A")} for row in rows]


def _pairs(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Pairs of questions: in one row, or the second in the next row of the same video that has no first."""
    found: list[dict[str, Any]] = []
    waiting: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name, first, second = row.text("video_name"), row.get("Q1"), row.get("Q2")
        if first not in _NOTHING:
            pair = {"video_name": name, "Q1": str(first), "Q2": "", "A": row.text("A")}
            found.append(pair)
            waiting.setdefault(name, []).append(pair)
        if second not in _NOTHING:
            if not waiting.get(name):
                raise UserError(f"{row.where}: the second question of a pair without its first.")
            waiting[name].pop(0)["Q2"] = str(second)
    alone = [pair for pairs in waiting.values() for pair in pairs]
    if alone:
        raise UserError(f"{rows[0].path}: {alone[0]['Q1']!r} about {alone[0]['video_name']} has no second question.")
    return found


def _questions(part: str, records: Sequence[Mapping[str, Any]], videos: Videos) -> list[Question]:
    found, seen = [], dict[str, int]()
    for record in records:
        name = record["video_name"]
        seen[name] = seen.get(name, -1) + 1
        id, video = f"{part}/{name}_{seen[name]}", videos.find(name)
        asked = {f"{id}/1": record["Q1"], f"{id}/2": record["Q2"]} if part == "consistency" else {id: record["Q"]}
        found += [
            question(each, text, video, truth=record["A"], part=part, record=dict(record), case=id)
            for each, text in asked.items()
        ]
    return found


def _cases(answers: Sequence[Answer]) -> list[tuple[str, str, list[Answer]]]:
    """What is judged as one: its part, its id, and its one or two answers.

    A pair of which only one question was asked, as part of a selection, is none.
    """
    cases: dict[str, list[Answer]] = {}
    for answer in answers:
        cases.setdefault(answer.question.about["case"], []).append(answer)
    found = [
        (asked[0].question.about["part"], id, sorted(asked, key=lambda a: a.question.id)) for id, asked in cases.items()
    ]
    return [case for case in found if len(case[2]) == (2 if case[0] == "consistency" else 1)]


def _slots(part: str, asked: Sequence[Answer]) -> dict[str, str]:
    texts = [(answer.question.prompt, answer.text or "") for answer in asked]
    slots = {"answer": asked[0].question.truth}
    if part != "consistency":
        return {"question": texts[0][0], "prediction": texts[0][1], **slots}
    return slots | {
        f"{name}{number}": text
        for number, pair in enumerate(texts, 1)
        for name, text in zip(("question", "prediction"), pair, strict=True)
    }


def _row(part: str, id: str, asked: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> Row:
    answered = all(answer.text is not None for answer in asked)
    values: dict[str, float] = {"unjudged": 0.0, "requests": 0.0}
    for aspect in ASPECTS[part]:
        verdict = verdicts.get(f"{id}#{aspect}")
        judged = answered and verdict is not None and verdict.values is not None
        values[aspect] = float(verdict.values["score"]) if judged and verdict and verdict.values else 0.0
        values[f"{aspect}_asked"], values[f"{aspect}_judged"] = 1.0, float(judged)
        values["requests"] += answered
        values["unjudged"] += answered and not judged
    return Row(cluster(asked[0].question), values, (f"part/{part}",))
