"""Tables of figures, and how they are written: as text, Markdown, JSON or a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jinja2


@dataclass(frozen=True)
class Column:
    """What the figures of a column are. judge: who judged them, if anybody did: a letter that the notes explain."""

    benchmark: str
    figure: str = ""
    judge: str = ""

    @property
    def name(self) -> str:
        said = self.figure + (f" [{self.judge}]" if self.judge else "")
        return said.strip()


@dataclass(frozen=True)
class Cell:
    """A figure with its interval, if it has one. notes: their numbers in the table, from 1. digits: after the point.

    most: the largest that it can be, for a bar; 0 where none is drawn. beside: blind and chance, on the bar.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    notes: tuple[int, ...] = ()
    digits: int = 1
    most: float = 0.0
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def bar(self) -> dict[str, float]:
        """Where things are on the bar, in percent of it; nothing where none is drawn."""
        if not self.most or math.isnan(self.value):
            return {}
        places = {"value": self.value, "low": self.low, "high": self.high, **self.beside}
        known = {name: value for name, value in places.items() if not math.isnan(value)}
        return {name: round(min(max(100 * value / self.most, 0.0), 100.0), 2) for name, value in known.items()}

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-" + self.marks
        text = f"{self.value:.{self.digits}f}"
        if not math.isnan(self.low):
            text += f" ({self.low:.{self.digits}f} to {self.high:.{self.digits}f})"
        return text + self.marks

    @property
    def marks(self) -> str:
        return f" *{','.join(map(str, self.notes))}" if self.notes else ""


@dataclass(frozen=True)
class Line:
    """A model and its figures, one for each column or none. published: by others, not measured here."""

    name: str
    cells: tuple[Cell | None, ...]
    published: bool = False


@dataclass(frozen=True)
class Table:
    """Lines of figures. judges: letter -> who it is. notes: what its cells refer to by number."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    judges: dict[str, str]
    notes: tuple[str, ...] = ()


def as_text(tables: Sequence[Table], remarks: Sequence[str], width: int) -> str:
    """For a terminal: a table that is wider than it goes on below, its first column repeated."""
    found: list[str] = []
    for table in tables:
        found += [table.title, *_blocks(table, width), *_legend(table), ""]
    return "\n".join([*found, *remarks]).rstrip() + "\n"


def as_markdown(tables: Sequence[Table], remarks: Sequence[str]) -> str:
    found: list[str] = []
    for table in tables:
        heads = [f"{column.benchmark} {column.name}".strip() for column in table.columns]
        rows = [[line.name, *(str(cell) if cell else "" for cell in line.cells)] for line in table.lines]
        found += [f"## {table.title}", "", _row(["", *heads]), "|" + " --- |" * (1 + len(heads))]
        found += [_row(row) for row in rows] + [""]
        found += [f"- {line}".replace("*", "\\*") for line in _legend(table)] + [""]
    return "\n".join([*found, *(f"{remark}\n" for remark in remarks)]).rstrip() + "\n"


def as_json(tables: Sequence[Table], remarks: Sequence[str]) -> str:
    content = {"tables": [asdict(table) for table in tables], "remarks": list(remarks)}
    return json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n"


def as_html(tables: Sequence[Table], remarks: Sequence[str]) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name("layout.html").read_text(encoding="utf-8")
    legends = [_legend(table) for table in tables]
    return environment.from_string(source).render(tables=list(zip(tables, legends, strict=True)), remarks=remarks)


def _legend(table: Table) -> list[str]:
    judges = [f"[{letter}] {said}" for letter, said in table.judges.items()]
    return judges + [f"*{number} {note}" for number, note in enumerate(table.notes, 1)]


def _blocks(table: Table, width: int) -> list[str]:
    """The lines of a table, as many columns beside each other as fit."""
    names = ["", "", *(line.name for line in table.lines)]
    first = max(map(len, names)) + 2
    found: list[str] = []
    block: list[list[str]] = []
    for number, column in enumerate(table.columns):
        cells = [str(line.cells[number] or "") for line in table.lines]
        written = [column.benchmark, column.name, *cells]
        size = max(map(len, written)) + 2
        if block and first + sum(max(map(len, one)) + 2 for one in block) + size > width:
            found += [*_joined(names, first, block), ""]
            block = []
        block.append(written)
    return found + _joined(names, first, block)


def _joined(names: list[str], first: int, block: list[list[str]]) -> list[str]:
    sizes = [max(map(len, column)) + 2 for column in block]
    rows = zip(names, *block, strict=True)
    lines = [
        f"{name:{first}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes, strict=True))
        for name, *cells in rows
    ]
    return [line.rstrip() for line in lines if line.strip()]


def _row(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.split()).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*") for cell in cells)
    return "| " + " | ".join(one.replace("<", "&lt;") for one in escaped) + " |"


def _finite(value: object) -> object:
    """As JSON can hold it: null for NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
