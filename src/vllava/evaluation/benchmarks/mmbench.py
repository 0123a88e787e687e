"""MMBench: a question is right where it is under every order of its options, each of which is a row of the file."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.benchmark import Benchmark, Metric, Row, ratio
from vllava.evaluation.files import Record, TsvMedium, checked, tsv_rows, warn
from vllava.evaluation.normalise import mmbench_letter
from vllava.evaluation.places import find_place
from vllava.evaluation.published import LETTER, cluster, lettered, predictions
from vllava.evaluation.questions import Answer, Question, Verdict, question
from vllava.evaluation.tables import TableMedium, read_table

LETTERS = "ABCDE"
SHIFT = 1_000_000  # the index of a row is that of its question and a multiple of this
RELEASED_LATER = {"dev": 4329, "test": 6666}  # rows of the data set, and of the file, of 2023-10

_LEFT_OUT = {"hint", "category", "source", "image", "comment", "l2-category"}  # of the file to upload
_COLUMNS = {name: (name,) for name in ("index", "question", "A", "B", "image")}
_MORE = {name: (name,) for name in ("C", "D", "E", "hint", "answer", "category", "l2-category")}


@dataclass
class MMBench(Benchmark):
    """accuracy: circular, every row of a question right; vanilla_accuracy: its first row; split: dev or test.

    A question of which not every row was asked, as part of a selection, does not count for the first, nor one whose
    first row was not for the second.
    """

    split: str = "dev"
    metrics: tuple[Metric, ...] = field(
        default=(
            Metric("accuracy", ("circular", "complete"), ratio, headline=True),
            Metric("vanilla_accuracy", ("vanilla", "first"), ratio),
            Metric("unparsed", ("unparsed", "rows"), ratio),
        ),
        init=False,
    )

    def __post_init__(self) -> None:
        if self.split not in RELEASED_LATER:
            raise UserError(f"benchmark.split={self.split!r} is not known; there are: {', '.join(RELEASED_LATER)}.")
        if self.split == "test":
            self.paper = {}  # the paper's figure is of dev

    def questions(self) -> list[Question]:
        pattern = f"[mM][mM][bB]ench_{''.join(f'[{c}{c.upper()}]' for c in self.split)}*.tsv"
        place = find_place(self.root, "mmbench", pattern, (f"en/{self.split}-*.parquet",))
        records = self._from_tables(place.folder) if place.tables else [*_from_file(_file(place.folder, self.split))]
        orders = Counter(_index(record) % SHIFT for record in records)
        found = [_question(record, orders) for record in records]
        unknown = sum(question.truth is None for question in found)
        if unknown:
            warn(
                self, f"{unknown:,} rows have no answer, so there are no figures: a file with answers is in VLMEvalKit"
            )
            self.metrics = ()
        return checked(self, found, RELEASED_LATER[self.split])

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        by_question: dict[int, list[Answer]] = {}
        for answer in answers:
            by_question.setdefault(int(answer.question.id) % SHIFT, []).append(answer)
        return [_row(base, group) for base, group in by_question.items()] if self.metrics else []

    def exports(self, answers: Sequence[Answer]) -> dict[str, Any]:
        lines = predictions(answers, lambda question: question.prompt.removesuffix(LETTER))
        asked = [answer.question for answer in answers if answer.text is not None]
        merged = [_line(line, one) for line, one in zip(lines["merge.jsonl"], asked, strict=True)]
        return {"merge.jsonl": merged, "mmbench_upload.xlsx": _upload(answers)}

    def _from_tables(self, folder: Path) -> list[Record]:
        records = read_table(folder, _COLUMNS, _MORE, (self.split,), ("en",))
        for record in records:
            if record.path.parent.name in ("cn", "cc"):
                raise UserError(
                    f"{record.path} holds MMBench in Chinese; this benchmark asks in English: its folder en."
                )
            if isinstance(medium := record.need("image"), TableMedium):
                record["image"] = replace(medium, identity=str(_index(record) % SHIFT))
        return records


def _file(folder: Path, split: str) -> Path:
    """The English file of a split: of several, the one that the paper was evaluated on."""
    name = re.compile(rf"mmbench_{split}(_en)?(_v11)?(_\d+)?\.tsv", re.IGNORECASE)
    found = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
    paper = [path for path in found if path.name == f"mmbench_{split}_20230712.tsv"]
    if len(paper or found) != 1:
        names = ", ".join(path.name for path in found) or "no English one"
        raise UserError(f"{folder}: one file mmbench_{split}_….tsv is needed; there are {names}.")
    return (paper or found)[0]


def _from_file(path: Path) -> Iterator[Record]:
    """The rows with their image still in the file; an image that only names another row's index is that one's."""
    by_index: dict[str, TsvMedium] = {}
    for record, start, size in tsv_rows(path):
        index, cell = record.text("index"), record.text("image")
        if cell.isdigit() and len(cell) < 16:
            if cell not in by_index:
                raise UserError(f"{record.where}: the image is that of the row {cell}, which is not before it.")
            by_index[index] = by_index[cell]
        else:
            key = hashlib.sha256(cell.encode()).hexdigest()
            by_index[index] = TsvMedium("image", path, start, size, list(record).index("image"), key)
        record["image"] = by_index[index]
        yield record


def _index(record: Record) -> int:
    try:
        return int(float(record.text("index")))  # pandas writes 12.0 where a column had gaps
    except (ValueError, OverflowError) as error:
        raise UserError(f"{record.where}: the index {record['index']!r} is no number.") from error


def _question(record: Record, orders: Mapping[int, int]) -> Question:
    """A row as the published runner asks it: hint, question, and the options up to the first that is missing.

    An empty cell and "nan" are missing; "None" is a hint that is missing, but an option, unlike there.
    """
    options: dict[str, str] = {}
    for letter in LETTERS:
        if _missing(record.get(letter)):
            break
        options[letter] = str(record[letter])
    hint = record.get("hint")
    text = record.text("question") if _missing(hint, "none") else f"{hint}\n{record.text('question')}"
    truth = None if _missing(record.get("answer")) else str(record["answer"]).strip()
    if truth is not None and truth not in tuple(LETTERS):
        raise UserError(f"{record.where}: the answer {truth!r} is none of the letters {LETTERS}.")
    index = _index(record)
    by_name = {name.lower(): value for name, value in record.items()}
    groups = [f"{name}/{by_name[name]}" for name in ("category", "l2-category") if by_name.get(name)]
    return question(
        str(index),
        text + lettered(list(options.values())) + LETTER,
        record["image"],
        truth=truth,
        question_id=index,
        options=options,
        orders=orders[index % SHIFT],
        groups=groups,
        upload={name: value for name, value in record.items() if name.lower() not in _LEFT_OUT} | {"index": index},
    )


def _missing(value: object, *also: str) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", *also)


def _row(base: int, answers: Sequence[Answer]) -> Row:
    said = [None if a.text is None else mmbench_letter(a.text, a.question.about["options"]) for a in answers]
    right = [letter is not None and letter == a.question.truth for letter, a in zip(said, answers, strict=True)]
    first = [r for r, answer in zip(right, answers, strict=True) if int(answer.question.id) == base]
    unparsed = sum(letter is None and a.text is not None for letter, a in zip(said, answers, strict=True))
    complete = len(answers) == answers[0].question.about["orders"]
    values = {
        "circular": float(complete and all(right)),
        "complete": float(complete),
        "vanilla": float(any(first)),
        "first": float(len(first)),
        "unparsed": float(unparsed),
        "rows": float(len(answers)),
    }
    return Row(cluster(answers[0].question), values, tuple(answers[0].question.about["groups"]))


def _line(line: Mapping[str, Any], asked: Question) -> dict[str, Any]:
    """A line with what MMBench's runner adds to it, where it does."""
    options = asked.about["options"]
    begins = {"question_id": line["question_id"], "round_id": 0, "prompt": line["prompt"], "text": line["text"]}
    begins |= {"options": list(options.values()), "option_char": list(options)}
    return {**begins, **{name: value for name, value in line.items() if name not in begins}}


def _upload(answers: Sequence[Answer]) -> bytes:
    """The table as its server took it: without what it left out, the prediction in the seventh column."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise UserError("The file to upload to MMBench needs openpyxl: pip install 'vllava[benchmarks]'.") from error
    book = Workbook()
    sheet = book.active
    rows = [answer.question.about["upload"] for answer in answers]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.insert(6, "prediction")
    table: list[list[Any]] = [names]
    for row, answer in zip(rows, answers, strict=True):
        table.append([(answer.text or "") if name == "prediction" else row.get(name) for name in names])
    for number, cells in enumerate(table, 1):
        for column, value in enumerate(cells, 1):
            cell = sheet.cell(number, column)
            cell.value = ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"  # also what begins as a formula does
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()
