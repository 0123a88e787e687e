"""Figures of the runs of a study: shares of right answers over seeds, of the whole and of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllava.verdicts.answers import (
    FIGURES,
    SETTINGS,
    Asked,
    Sheet,
    Wanted,
    of_figure,
    parts_of,
    pope,
    read_metrics,
    read_sheet,
    share,
)
from vllava.verdicts.statistics import Spread, over_seeds
from vllava.verdicts.study_file import EVALUATE, FAILED, FINISHED, UNFINISHED, StudyFile, system

Sheets = Mapping[tuple[str, str, int], Sheet]  # arm, level, seed


@dataclass(frozen=True)
class Figure:
    """A share of right answers of one arm, over its seeds. by_seed: seed -> share. blind, chance: beside it."""

    arm: str
    level: str
    figure: str
    part: str  # of the figure: "" for all of it, else a type of questions or a source
    spread: Spread
    by_seed: Mapping[int, float]
    blind: float | None = None
    chance: float | None = None


def read_sheets(study: StudyFile) -> tuple[dict[tuple[str, str, int], Sheet], list[str]]:
    """The sheets of the runs that have one, and a sentence for each that has none."""
    sheets, missing = {}, []
    unfinished: dict[tuple[str, str], list[int]] = {}
    listed = {(run.arm, run.level, run.seed): run for run in study.runs}
    for run in listed.values():
        folder = run.parts.get(EVALUATE)
        if run.state == FAILED:
            missing.append(f"{run} failed: {run.error or 'it does not say why'}")
        elif run.state == UNFINISHED:
            unfinished.setdefault((run.arm, run.level), []).append(run.seed)
        elif folder is None or not folder.is_dir():
            missing.append(f"{run} is said to be {FINISHED}, but its evaluation is gone: {folder or 'no folder'}.")
        else:
            sheets[run.arm, run.level, run.seed] = read_sheet(folder)
    for (arm, level), seeds in unfinished.items():
        missing.append(f"{system(arm, level)} is not finished with {_seeds(seeds)}.")
    for arm in study.arms:
        for level in study.levels:
            if lacking := [seed for seed in study.seeds if (arm, level, seed) not in listed]:
                missing.append(f"{system(arm, level)} has no run with {_seeds(lacking)}.")
    return sheets, missing


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def seeds_of(sheets: Sheets, arm: str, level: str) -> list[int]:
    return sorted(seed for one, where, seed in sheets if (one, where) == (arm, level))


def whole(study: StudyFile, sheets: Sheets) -> list[Figure]:
    found = []
    folders = {(run.arm, run.level, run.seed): run.parts.get(EVALUATE) for run in study.runs}
    for arm in study.arms:
        for level in study.levels:
            seeds = seeds_of(sheets, arm, level)
            metrics = [read_metrics(folder) for seed in seeds if (folder := folders[arm, level, seed]) is not None]
            for figure in FIGURES:
                beside = [_beside(one, figure) for one in metrics]
                blind, chance = (_mean([one[place] for one in beside]) for place in (0, 1))
                found += _figure(sheets, arm, level, seeds, figure, "", of_figure(figure), blind, chance)
    return found


def parts(study: StudyFile, sheets: Sheets) -> list[Figure]:
    """Figures by type of question, and by source where a figure has several; at the first level that has any."""
    level = next(level for level in study.levels if any(where == level for _, where, _ in sheets))
    here = [sheet for (_, where, _), sheet in sheets.items() if where == level]
    found = []
    sources = parts_of(here, lambda asked: (asked.figure, asked.source))
    for figure, source in (one for one in sources if sum(other[0] == one[0] for other in sources) > 1):
        for arm in study.arms:
            seeds = seeds_of(sheets, arm, level)
            found += _figure(sheets, arm, level, seeds, figure, source, _has("source", figure, source))
    for figure, kind in parts_of(here, lambda asked: (asked.figure, asked.type)):
        for arm in study.arms:
            seeds = seeds_of(sheets, arm, level)
            found += _figure(sheets, arm, level, seeds, figure, kind, _has("type", figure, kind))
    return found


def _figure(
    sheets: Sheets,
    arm: str,
    level: str,
    seeds: list[int],
    figure: str,
    part: str,
    wanted: Wanted,
    blind: float | None = None,
    chance: float | None = None,
) -> list[Figure]:
    shares = {seed: share(sheets[arm, level, seed], wanted) for seed in seeds}
    by_seed = {seed: value for seed, value in shares.items() if value is not None}
    if not by_seed:
        return []
    return [Figure(arm, level, figure, part, over_seeds([*by_seed.values()]), by_seed, blind, chance)]


def left_out(figures: Iterable[Figure]) -> tuple[int, int]:
    """How many figures of a seed lie where the other seeds expect one more, and of how many; each left out in turn."""
    within, total = 0, 0
    for one in (figure for figure in figures if len(figure.by_seed) > 2):
        for seed, value in one.by_seed.items():
            others = over_seeds([other for name, other in one.by_seed.items() if name != seed])
            within += others.next_low <= value <= others.next_high
            total += 1
    return within, total


def _beside(metrics: dict, figure: str) -> tuple[float | None, float | None]:
    """The blind share and chance of a figure: over the sources of a medium that are no probes, or that are."""
    medium = metrics.get("image" if figure == "probes" else figure) or {}
    sources = medium.get("by_source") or {"": medium}
    chosen = [one for name, one in sources.items() if name.endswith("probes") == (figure == "probes") and one.get("n")]

    def mean(name: str) -> float | None:
        if not chosen or any(one.get(name) is None for one in chosen):
            return None
        return sum(one[name] * one["n"] for one in chosen) / sum(one["n"] for one in chosen)

    return mean("blind"), mean("chance")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def settings(study: StudyFile, sheets: Sheets, arm: str) -> dict[str, dict[str, Spread]]:
    level = next(iter(study.levels))
    found = {}
    for setting in SETTINGS:
        rows = [pope(sheets[arm, level, seed], setting) for seed in seeds_of(sheets, arm, level)]
        known = [row for row in rows if row is not None]
        if known:
            found[setting] = {name: over_seeds([row[name] for row in known]) for name in known[0]}
    return found


def _has(what: str, figure: str, value: Any) -> Wanted:
    """Whether a question of a figure has that type, or that source."""

    def wanted(asked: Asked) -> bool:
        return asked.figure == figure and getattr(asked, what) == value

    return wanted
