"""POPE: is there such a thing in the image? In three settings, by how the things that are not there were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.files import Record, checked, image_file, read_jsonl, warn
from vllava.evaluation.normalise import pope_is_plain, pope_says_yes
from vllava.evaluation.places import find_place
from vllava.evaluation.published import SHORT, cluster, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import choose_tables, find_tables, read_rows

SETTINGS = ("adversarial", "popular", "random")
TODAY = 9000  # three times 3,000; at the commit that LLaVA names, random has 90 fewer

_FILE = "llava_pope_test.jsonl"
_COLUMNS = {
    "question_id": ("question_id",),
    "question": ("question",),
    "answer": ("answer", "label"),
    "image": ("image",),
}
_MORE = {"category": ("category",), "identity": ("image_source", "image_id")}
_COUNTS = ("asked", "right", "hits", "false_yes", "false_no", "yes", "unparsed")


def _mean(figure: Any) -> Any:
    """The mean of a figure over the settings that there are; it takes the means of all of _COUNTS."""

    def of(*means: np.ndarray) -> np.ndarray:
        by_setting = np.stack(means).reshape(len(SETTINGS), len(_COUNTS), *means[0].shape)
        there = by_setting[:, 0] > 0
        figures = np.stack([figure(*counts) for counts in by_setting])
        return ratio(np.where(there, figures, 0.0).sum(0), there.sum(0).astype(float))

    return of


def _share(number: int) -> Any:
    return _mean(lambda *counts: ratio(counts[number], counts[0]))


def _precision(*counts: np.ndarray) -> np.ndarray:
    return ratio(counts[2], counts[2] + counts[3])


def _recall(*counts: np.ndarray) -> np.ndarray:
    return ratio(counts[2], counts[2] + counts[4])


def _f1(*counts: np.ndarray) -> np.ndarray:
    return ratio(2 * counts[2], 2 * counts[2] + counts[3] + counts[4])


_COLUMN = tuple(f"{setting}_{count}" for setting in SETTINGS for count in _COUNTS)
METRICS = (
    Metric("accuracy", _COLUMN, _share(1), headline=True),  # the paper's; LLaVA-1.5's figure is F1
    Metric("f1", _COLUMN, _mean(_f1)),
    Metric("precision", _COLUMN, _mean(_precision)),
    Metric("recall", _COLUMN, _mean(_recall)),
    Metric("yes", _COLUMN, _share(5)),
    Metric("unparsed", _COLUMN, _share(6)),
)


@dataclass
class POPE(Benchmark):
    """Each figure is the mean of the settings'; the settings themselves are groups of rows."""

    metrics: tuple[Metric, ...] = field(default=METRICS, init=False)

    def questions(self) -> list[Question]:
        place = find_place(self.root, "pope", _FILE, tuple(f"Full/{setting}-*.parquet" for setting in SETTINGS))
        return checked(self, _from_tables(place.folder) if place.tables else self._from_files(place.folder), TODAY)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer) for answer in answers]

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return predictions(answers)

    def _from_files(self, folder: Path) -> list[Question]:
        labels = {setting: _labels(folder / "coco" / f"coco_pope_{setting}.json") for setting in SETTINGS}
        found = []
        for line in read_jsonl(folder / _FILE):
            setting, image, text = line.text("category"), line.text("image"), line.text("text")
            waiting = labels.get(setting, {}).get((image, text.removesuffix(SHORT).strip()))
            if not waiting:
                raise UserError(f"{line.where}: {text[:80]!r} about {image} has no label in {folder / 'coco'}.")
            picture = image_file(folder / "val2014", image)
            found.append(_question(line, setting, text, picture, waiting.pop(0)))
        for setting, by_question in labels.items():
            left = [record for waiting in by_question.values() for record in waiting]
            if left:
                warn(
                    self, f"{len(left):,} labels of {setting} are of no question that is asked: {left[0].where} is one"
                )
        return found


def _labels(path: Path) -> dict[tuple[str, str], list[Record]]:
    """The records of a setting by image and question; those of the same question, in their order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in read_jsonl(path):
        found.setdefault((record.text("image"), record.text("text").strip()), []).append(record)
    return found


def _from_tables(folder: Path) -> list[Question]:
    by_split = any(table.split.lower() in SETTINGS for table in find_tables(folder))
    if by_split:
        tables = choose_tables(folder, _COLUMNS, SETTINGS, ("Full",))
    else:
        tables = choose_tables(folder, {**_COLUMNS, "category": _MORE["category"]})
    found = []
    for table in tables:
        for record in read_rows(table, {**_COLUMNS, **_MORE}):
            setting = (table.split if by_split else record.text("category")).lower()
            if setting not in SETTINGS:
                raise UserError(f"{record.where}: {setting!r} is none of the settings {', '.join(SETTINGS)}.")
            text = record.text("question").strip() + SHORT
            found.append(_question(record, setting, text, record.need("image"), record))
    return found


def _question(asked: Record, setting: str, text: str, image: Any, labelled: Record) -> Question:
    label = labelled.text("label" if "label" in labelled else "answer").strip().lower()
    if label not in ("yes", "no"):
        raise UserError(f"{labelled.where}: the label {label!r} is neither yes nor no.")
    id = asked.need("question_id")  # begins anew in each setting
    return question(f"{setting}/{id}", text, image, truth=label, question_id=id, setting=setting)


def _row(answer: Answer) -> Row:
    there = answer.question.truth == "yes"
    said = None if answer.text is None else pope_says_yes(answer.text)
    right = said == there
    counts = {
        "asked": 1.0,
        "right": float(right),
        "hits": float(right and there),
        "false_yes": float(not right and not there),  # a question that could not be asked is wrong
        "false_no": float(not right and there),
        "yes": float(said is True),
        "unparsed": float(answer.text is not None and not pope_is_plain(answer.text)),
    }
    setting = answer.question.about["setting"]
    values = {f"{setting}_{name}": count for name, count in counts.items()}
    return Row(cluster(answer.question), values, (f"setting/{setting}",))
