"""A study's figures laid out as the paper's tables and figures, beside what the paper prints. All in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vllava.evaluation.layout import Cell, Column, Line, Table
from vllava.verdicts.answers import FIGURES, SETTINGS
from vllava.verdicts.figures import Figure
from vllava.verdicts.findings import Findings
from vllava.verdicts.statistics import Gain, Spread

TITLES = {"image": "images", "video": "videos", "text": "text alone", "probes": "POPE probes"}
POPE = {"accuracy": "accuracy", "f1": "F1", "yes": "yes"}
_MEAN = "Behind a mean: its 95 % interval over seeds, for a system with more than one."
_MORE = (
    "more: the difference on the same questions, with its own 95 % interval over seeds and questions (over questions "
    "alone where there is one seed)."
)


@cache
def paper() -> dict[str, Any]:
    """The paper's ablations: paper.yaml."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


def tables_of(found: Findings) -> list[Table]:
    """All tables of a study: of all its arms, then the paper's, as far as there is anything to put into them."""
    level = next(iter(found.study.levels))
    if len(found.study.levels) > 1:
        return [by_level(found, figure) for figure in FIGURES if any(f.figure == figure for f in found.figures)]
    tables = [all_arms(found, level)]
    tables += [table for spec in paper()["tables"] if (table := of_the_paper(found, level, spec)) is not None]
    if found.pope:
        tables.append(pope(found))
    return [*tables, *(by_part(found, figure) for figure in FIGURES if any(f.figure == figure for f in found.types))]


def all_arms(found: Findings, level: str) -> Table:
    """Every arm: its mean, where a further seed is expected, blind and chance."""
    figures = [figure for figure in FIGURES if any(f.figure == figure for f in found.figures)]
    heads = ("accuracy", "a further seed", "blind", "chance")
    columns = tuple(Column(TITLES[figure], head) for figure in figures for head in heads)
    lines = []
    for arm in found.study.arms:
        cells: list[Cell | None] = []
        for figure in figures:
            cells += _all_of(found.figure(arm, level, figure))
        lines.append(Line(_with_seeds(arm, found, level), tuple(cells)))
    further = "a further seed: where one more seed of the same system is expected, 95 of 100 times."
    return Table("All systems", columns, tuple(lines), {}, (_MEAN, further))


def of_the_paper(found: Findings, level: str, spec: Mapping[str, Any]) -> Table | None:
    """One of the paper's tables or figures; None where the study has no two of its systems."""
    arms = [arm for arm in spec["arms"] if any(f.arm == arm for f in found.figures)]
    figures = [one for one in spec["figures"] if any(f.figure == one for f in found.figures)]
    if len(arms) < 2 or not figures:
        return None
    columns = [Column(TITLES[one], "this study") for one in figures]
    columns += [Column(one, "paper") for one in spec["columns"]]
    lines = []
    for arm in arms:
        mine = [_cell(one.spread) if (one := found.figure(arm, level, figure)) else None for figure in figures]
        row = spec["rows"].get(arm, [None] * len(spec["columns"]))
        lines.append(Line(f"{spec['arms'][arm]} ({arm})", (*mine, *(_printed(value) for value in row))))
    base = found.study.baseline
    for arm in (arm for arm in arms if arm != base):
        gains = [_gain_cell(found.gains.get((arm, level, figure))) for figure in figures]
        both = [spec["rows"].get(one) for one in (base, arm)]
        theirs = [_printed(a - b) for a, b in zip(*both, strict=True)] if all(both) else [None] * len(spec["columns"])
        lines.append(Line(f"{base} more than {arm}", (*gains, *theirs)))
    notes = (_MEAN, _MORE, *([spec["note"]] if "note" in spec else []))
    return Table(spec["title"], tuple(columns), tuple(lines), {}, notes)


def pope(found: Findings) -> Table:
    """The probes in POPE's settings, as the paper's Table 4, whose figures have lines of their own."""
    columns = tuple(Column(setting, POPE[name]) for setting in SETTINGS for name in POPE)
    lines = []
    for arm, rows in found.pope.items():
        cells = [_cell(rows[s][name], 1) if s in rows else None for s in SETTINGS for name in POPE]
        lines.append(Line(arm, tuple(cells)))
    for arm, settings in paper()["pope"].items():
        if arm in found.study.arms:
            lines.append(Line(f"{arm}, paper", tuple(_printed(v) for s in SETTINGS for v in settings[s]), True))
    return Table("Table 4: hallucination, in POPE's settings", columns, tuple(lines), {}, (_MEAN,))


def by_part(found: Findings, figure: str) -> Table:
    """The types of questions of a figure, and its sources, as lines; arms as columns."""
    own = [one for one in found.types if one.figure == figure]
    arms = [arm for arm in found.study.arms if any(one.arm == arm for one in own)]
    by_place = {(one.part, one.arm): one for one in own}
    lines = []
    for part in dict.fromkeys(one.part for one in own):
        cells = [_cell(one.spread) if (one := by_place.get((part, arm))) else None for arm in arms]
        lines.append(Line(part, tuple(cells)))
    columns = tuple(Column(arm) for arm in arms)
    return Table(f"By source and type: {TITLES[figure]}", columns, tuple(lines), {}, (_MEAN,))


def by_level(found: Findings, figure: str) -> Table:
    """Levels as lines, arms as columns, and how much more the baseline answers than each."""
    own = {(one.level, one.arm): one for one in found.figures if one.figure == figure}
    base = found.study.baseline
    arms = [arm for arm in found.study.arms if any(one == arm for _, one in own)]
    rivals = [arm for arm in arms if arm != base]
    columns = [*(Column(arm) for arm in arms), *(Column(f"{base} more than {arm}") for arm in rivals)]
    lines = []
    for level in found.study.levels:
        cells = [_cell(one.spread) if (one := own.get((level, arm))) else None for arm in arms]
        cells += [_gain_cell(found.gains.get((arm, level, figure))) for arm in rivals]
        lines.append(Line(found.study.label(level), tuple(cells)))
    title = f"{TITLES[figure]}, by {found.study.axis or 'level'}"
    return Table(title[0].upper() + title[1:], tuple(columns), tuple(lines), {}, (_MEAN, _MORE))


def _with_seeds(arm: str, found: Findings, level: str) -> str:
    seeds = {seed for f in found.figures if (f.arm, f.level) == (arm, level) for seed in f.by_seed}
    return f"{arm} ({len(seeds)} seed{'' if len(seeds) == 1 else 's'})"


def _all_of(figure: Figure | None) -> Sequence[Cell | None]:
    if figure is None:
        return [None] * 4
    spread = figure.spread
    further = Cell(100 * spread.mean, 100 * spread.next_low, 100 * spread.next_high) if spread.seeds > 1 else None
    beside = [None if value is None else Cell(100 * value) for value in (figure.blind, figure.chance)]
    return [_cell(spread), further, *beside]


def _cell(spread: Spread, scale: float = 100) -> Cell:
    return Cell(scale * spread.mean, scale * spread.low, scale * spread.high)


def _gain_cell(found: Gain | None) -> Cell | None:
    return None if found is None else Cell(100 * found.value, 100 * found.low, 100 * found.high)


def _printed(value: float | None) -> Cell | None:
    return None if value is None else Cell(float(value))
