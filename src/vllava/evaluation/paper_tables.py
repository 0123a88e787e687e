"""Results of any models laid out as the paper's tables, and beside one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllava.errors import UserError
from vllava.evaluation.comparison import Found, headlines, identity, line_names, newest, paper, remarks_on, way
from vllava.evaluation.layout import Cell, Column, Line, Table
from vllava.evaluation.result_files import read_draws
from vllava.evaluation.results import Result, judged_by
from vllava.evaluation.statistics import Score, difference

_PAPER = "paper"  # the letter of the paper's judges
_PRIVATE = "No figures here: the answers are not public; a server scores the file to upload."


def tables_of(found: Sequence[Found]) -> tuple[list[Table], list[str]]:
    """The paper's tables as far as there are results for them, a table of other benchmarks, and what else to say.

    A line is a model asked in one way. Of several results with the same model, way and judge, a whole benchmark goes
    before a part of it, then the newest is taken.
    """
    taken, remarks = newest(found)
    known = paper()["benchmarks"]
    remarks += [
        f"{one.result.benchmark}: the answers of {one.path} have not been judged (judge=none), so there are no figures."
        for one in taken
        if one.result.judge is None and known.get(one.result.benchmark, {}).get("judge")
    ]
    names = line_names([one.result for one in taken])
    tables = []
    for spec in paper()["tables"]:
        benchmarks = {column["benchmark"] for column in spec["columns"]}
        if chosen := [one.result for one in taken if one.result.benchmark in benchmarks]:
            tables.append(_Layout(chosen, names).table(spec["title"], spec["columns"], spec["rows"]))
    if others := [one.result for one in taken if one.result.benchmark not in known]:
        columns = [
            {"benchmark": name, "title": metric, "metric": metric}
            for name, metric in dict.fromkeys(
                (one.benchmark, score.metric) for one in others for score in headlines(one)
            )
        ]
        tables.append(_Layout(others, names).table("Other benchmarks", columns, {}))
    return tables, remarks


def against(found: Sequence[Found], baseline: Found) -> Table:
    """How much better results are than another one of the same benchmark, in the same resamples of the same questions.

    Raises UserError where there is none, or no figure; one that cannot be compared has a note in place of figures.
    """
    mine = baseline.result
    if not headlines(mine):
        raise UserError(f"{baseline.path} has no figures to compare with: nothing was scored, or nobody judged it.")
    rivals = [
        one for one in found if one.result.benchmark == mine.benchmark and one.path.resolve() != baseline.path.resolve()
    ]
    if not rivals:
        raise UserError(f"There is no other result of {mine.benchmark} to compare {baseline.path} with.")
    notes = _Notes()
    names = line_names([one.result for one in (*rivals, baseline)])
    lines = [Line(names[way(one.result)], _differences(one, baseline, notes)) for one in rivals]
    heads = [(f"more {score.metric}", "p") for score in headlines(mine)]
    columns = tuple(Column(_title(mine.benchmark), head) for pair in heads for head in pair)
    title = f"More than {names[way(mine)]} ({baseline.path}), on the same questions"
    return Table(title, columns, tuple(lines), {}, tuple(notes.listed))


class _Notes:
    """Notes by number, each once."""

    def __init__(self) -> None:
        self.listed: list[str] = []

    def of(self, said: Sequence[str]) -> tuple[int, ...]:
        self.listed += [one for one in said if one not in self.listed]
        return tuple(sorted(self.listed.index(one) + 1 for one in said))


@dataclass(frozen=True)
class _Slot:
    """A column of a table: what it shows, and of whom: of the paper, where its judge or nobody judged, or of us."""

    spec: Mapping[str, Any]
    letter: str  # of the judge; empty where nobody judges
    published: int | None = None  # the place in the paper's rows
    judge: str | None = None  # our judge's identity, None in a column of the paper's alone


@dataclass
class _Layout:
    """One table in the making: its results, what lines are called, the letters of judges and the notes met so far."""

    results: Sequence[Result]
    names: Mapping[str, str]
    letters: dict[str, str] = field(default_factory=dict)  # by identity
    notes: _Notes = field(default_factory=_Notes)

    def table(
        self, title: str, specs: Sequence[Mapping[str, Any]], rows: Mapping[str, Sequence[float | None]]
    ) -> Table:
        """specs: the columns as paper.yaml has them, and rows: the paper's, in the same order."""
        slots = [slot for place, spec in enumerate(specs) for slot in self._slots(place, spec)]
        columns = [Column(_title(slot.spec["benchmark"]), slot.spec.get("title", ""), slot.letter) for slot in slots]
        lines = [Line(name, tuple(_published(slot, row) for slot in slots), True) for name, row in rows.items()]
        for one in dict.fromkeys(way(result) for result in self.results):
            lines.append(Line(self.names[one], tuple(self._cell(slot, one) for slot in slots)))
        judges = {_PAPER: self._papers_judges()} if any(slot.letter == _PAPER for slot in slots) else {}
        judges |= {letter: self._judge(one) for one, letter in self.letters.items()}
        return Table(title, tuple(columns), tuple(lines), judges, tuple(self.notes.listed))

    def _slots(self, place: int, spec: Mapping[str, Any]) -> list[_Slot]:
        """The columns of a figure: one that the paper and we share where nobody judges, else one for each judge."""
        mine = dict.fromkeys(identity(one.judge) for one in self.results if one.benchmark == spec["benchmark"])
        judges = [one for one in mine if one]
        slots = []
        if paper()["benchmarks"].get(spec["benchmark"], {}).get("judge"):
            slots.append(_Slot(spec, _PAPER, place))
        elif not judges or "" in mine:
            slots.append(_Slot(spec, "", place, ""))
        for one in judges:
            letter = self.letters.setdefault(one, chr(ord("A") + len(self.letters)))
            slots.append(_Slot(spec, letter, None, one))
        return slots

    def _cell(self, slot: _Slot, line: str) -> Cell | None:
        """The figure of a line in a column, if there is a result for it."""
        wanted = (slot.spec["benchmark"], line, slot.judge)
        found = [one for one in self.results if (one.benchmark, way(one), identity(one.judge)) == wanted]
        if not found:
            return None
        score = _score(found[0], slot.spec)
        said = remarks_on(found[0]) + self._other_questions(found[0])
        if score is None:
            said.append("This judge or split has no such figure." if found[0].scores else _PRIVATE)
            return Cell(math.nan, notes=self.notes.of(said))
        most = next((end for end in (score.scale, 5.0, 10.0) if end >= score.value), 0.0)
        return Cell(
            score.value, score.low, score.high, self.notes.of(said), _digits(score), most, _beside(found[0], score)
        )

    def _other_questions(self, result: Result) -> list[str]:
        """Whether the questions are not those of the first result of the same benchmark."""
        first = next(one for one in self.results if one.benchmark == result.benchmark)
        if result.data.sha256 == first.data.sha256:
            return []
        what = "prompts or truths" if result.data.ids_sha256 == first.data.ids_sha256 else "questions"
        return [f"Other {what} in {_title(result.benchmark)} than {self.names[way(first)]} had."]

    def _papers_judges(self) -> str:
        known = [paper()["benchmarks"].get(one.benchmark, {}).get("judge") for one in self.results]
        named = " and ".join(dict.fromkeys(one for one in known if one)) or "the judge of then"
        return f"as published: {named}, as it answered then, with the prompts of then."

    def _judge(self, one: str) -> str:
        """Who a judge is, for the legend."""
        judge = next(result.judge for result in self.results if identity(result.judge) == one)
        assert judge is not None  # or it had no letter
        prompts = ", ".join(f"{name} {digest[:8]}" for name, digest in judge.prompts.items())
        settings = ", ".join(f"{name}={value}" for name, value in judge.settings.items())
        return "; ".join(part for part in (judged_by(judge), settings, prompts and f"prompts {prompts}") if part) + "."


def _beside(result: Result, score: Score) -> dict[str, float]:
    """What a figure is to be seen beside: the same without the media, and a guess, as far as they are known."""
    blind = next((one for one in result.blind if (one.metric, one.group) == (score.metric, score.group)), None)
    chance = result.score("chance", score.group) if score.headline else None
    known = {name: one.value for name, one in (("blind", blind), ("chance", chance)) if one is not None}
    return {name: value for name, value in known.items() if not math.isnan(value)}


def _published(slot: _Slot, row: Sequence[float | None]) -> Cell | None:
    value = row[slot.published] if slot.published is not None else None
    return None if value is None else Cell(float(value), digits=slot.spec.get("digits", 1))


def _score(result: Result, spec: Mapping[str, Any]) -> Score | None:
    """The figure of a column: of the whole, or of the part that has the name, be it a group or a metric."""
    first = next(iter(headlines(result)), None)
    metric = spec.get("metric") or (first.metric if first else "")
    if "part" not in spec:
        return result.score(metric)
    inside = [one for one in result.scores if one.group.rpartition("/")[2] == spec["part"] and one.metric == metric]
    return inside[0] if inside else result.score(spec["part"])


def _differences(one: Found, other: Found, notes: _Notes) -> tuple[Cell | None, ...]:
    """How much more each headline of a result is than another's, and p."""
    a, b = one.result, other.result
    scores = headlines(b)
    trouble = "" if a.data.ids_sha256 == b.data.ids_sha256 else "Other questions."
    if identity(a.judge) != identity(b.judge):
        trouble = f"Another judge: {judged_by(a.judge) or 'none'}, not {judged_by(b.judge) or 'none'}."
    cells: list[Cell | None] = []
    try:
        if not trouble:
            mine, others = read_draws(one.path), read_draws(other.path)
            changed = [] if a.data.sha256 == b.data.sha256 else ["With other prompts or truths."]
            for score in scores:
                gap = difference(mine, others, score.metric)
                cells.append(Cell(gap.value, gap.low, gap.high, notes.of(changed), _digits(score) + 1))
                cells.append(Cell(gap.p, digits=3))
    except (ValueError, KeyError):
        trouble = "Its resamples are not those of the other: other images or videos, or another version drew them."
    return (Cell(math.nan, notes=notes.of([trouble])), *[None] * (2 * len(scores) - 1)) if trouble else tuple(cells)


def _title(benchmark: str) -> str:
    return paper()["benchmarks"].get(benchmark, {}).get("title", benchmark)


def _digits(score: Score) -> int:
    return 1 if score.scale >= 100 else 2
