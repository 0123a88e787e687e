"""What the runs of a study answered: right or wrong, question by question."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllava.errors import UserError, reading

ANSWERS, METRICS = "answers.jsonl", "metrics.json"
FIGURES = ("image", "video", "text", "probes")
PROBES = "probes"  # how the name of a source of probes ends; its questions count for themselves
SETTINGS = ("adversarial", "popular", "random")  # POPE's
_NUMBER = re.compile(r"-\d+$")


@dataclass(frozen=True)
class Asked:
    """A question that has a true answer, and how it was answered."""

    medium: str
    source: str
    type: str
    right: bool
    said_yes: bool
    truly_yes: bool

    @property
    def figure(self) -> str:
        """The figure that it counts in: probes, wherever they are from, else its medium."""
        return PROBES if self.source.endswith(PROBES) else self.medium


Sheet = Mapping[str, Asked]  # what identifies a question -> what became of it, of one run
Wanted = Callable[[Asked], bool]


def read_sheet(folder: Path) -> Sheet:
    """The scored questions of an evaluation's folder; raises UserError where they cannot be read."""
    path = folder / ANSWERS
    found: dict[str, Asked] = {}
    with reading(path, "Evaluate again, with rerun=true: it writes the answers anew."):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            if row["correct"] is None:
                continue
            source = _NUMBER.sub("", row["key"])
            name = f"{row['key']} {row['question']}"
            if name in found:
                raise UserError(f"{path}, line {number}: {row['key']} is asked the same twice.")
            said, truth = (str(row[one]).strip().rstrip(".").lower() == "yes" for one in ("answer", "truth"))
            found[name] = Asked(row["medium"], source, row["type"], bool(row["correct"]), said, truth)
    return found


def read_metrics(folder: Path) -> dict[str, Any]:
    """An evaluation's metrics.json; raises UserError where it cannot be read."""
    with reading(folder / METRICS, "Evaluate again, with rerun=true."):
        found = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise UserError(f"{folder / METRICS} is not an evaluation's.")
        return found


def share(sheet: Sheet, wanted: Wanted) -> float | None:
    """The share of right answers among the wanted questions, None where there are none."""
    right = [asked.right for asked in sheet.values() if wanted(asked)]
    return sum(right) / len(right) if right else None


def aligned(ours: list[Sheet], others: list[Sheet], wanted: Wanted) -> tuple[np.ndarray, np.ndarray, int]:
    """Right or wrong [seeds, questions] of both, on the questions that all of them have; how many some lack.

    The questions stand in the order of their names.
    """
    per_run = [{name for name, asked in sheet.items() if wanted(asked)} for sheet in (*ours, *others)]
    shared = sorted(set.intersection(*per_run)) if per_run else []
    lacking = len(set.union(*per_run)) - len(shared) if per_run else 0
    tables = (np.array([[sheet[name].right for name in shared] for sheet in part], float) for part in (ours, others))
    a, b = (table.reshape(len(part), len(shared)) for table, part in zip(tables, (ours, others), strict=True))
    return a, b, lacking


def of_figure(figure: str) -> Wanted:
    return lambda asked: asked.figure == figure


def of_types(medium: str, types: Sequence[str]) -> Wanted:
    """The questions about a medium of these types and their kinds: exist is also exist_popular."""
    return lambda asked: asked.medium == medium and any(f"{asked.type}_".startswith(f"{one}_") for one in types)


def pope(sheet: Sheet, setting: str) -> dict[str, float] | None:
    """Accuracy, F1 of yes and the share of yes, in percent, over the probes of a setting; None without any."""
    found = [asked for asked in sheet.values() if asked.figure == PROBES and asked.type.endswith(setting)]
    if not found:
        return None
    hits = sum(asked.said_yes and asked.truly_yes for asked in found)
    said, truly = sum(asked.said_yes for asked in found), sum(asked.truly_yes for asked in found)
    right = sum(asked.right for asked in found)
    f1 = 200 * hits / (said + truly) if said + truly else 0.0
    return {"accuracy": 100 * right / len(found), "f1": f1, "yes": 100 * said / len(found)}


def parts_of(sheets: Iterable[Sheet], what: Callable[[Asked], Any]) -> list[Any]:
    """What there is of something in any of the sheets, in the order met."""
    return list(dict.fromkeys(what(asked) for sheet in sheets for asked in sheet.values()))
