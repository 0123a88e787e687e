"""Learning curves of a study's arms, over their seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllava.verdicts.study_file import FINISHED, StudyFile

HISTORY, LOSS = "history.jsonl", "loss"
HELD_OUT = {"val_loss": "held-out loss", "val_accuracy": "held-out accuracy"}  # and of a medium or a source: NAME/PART
POINTS = 60  # of a curve of the loss of every step


@dataclass(frozen=True)
class Curve:
    """A metric of one arm in one part of its runs: the mean of its seeds, and the lowest and highest of them.

    x: samples seen [points]; the others [points].
    """

    part: str
    metric: str
    arm: str
    seeds: int
    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curves_of(study: StudyFile, level: str) -> tuple[list[Curve], list[str]]:
    """The curves of all stages that the runs at a level kept a history of; a sentence for each that has none."""
    found, remarks = [], []
    runs = [run for run in study.runs if run.level == level and run.state == FINISHED]
    for part in dict.fromkeys(part for run in runs for part in run.parts if part.startswith("stage")):
        rows = {(run.arm, run.seed): history(run.parts[part] / HISTORY) for run in runs if part in run.parts}
        lost = [f"{arm}, seed {seed}" for (arm, seed), one in rows.items() if not one]
        if lost:
            remarks.append(f"No history of {part}, and so no learning curve: {'; '.join(lost)}.")
        metrics = dict.fromkeys(name for one in rows.values() for row in one for name in row if _drawn(name))
        told: list[list[Curve]] = []
        for metric in metrics:
            curves = _of_arms(part, metric, study.arms, rows)
            if not any(_same(curves, others) for others in told):  # a medium's only source tells what the medium does
                told.append(curves)
        found += [one for curves in told for one in curves]
    return found, remarks


def _of_arms(
    part: str, metric: str, arms: Sequence[str], rows: Mapping[tuple[str, int], Sequence[dict[str, Any]]]
) -> list[Curve]:
    """The curve of a metric of each arm that has one. rows: (arm, seed) -> a history."""
    found = []
    for arm in arms:
        per_seed = [series for (a, _), one in rows.items() if a == arm and len(series := _series(one, metric))]
        if per_seed:
            found.append(_curve(part, metric, arm, per_seed))
    return found


def _same(curves: Sequence[Curve], others: Sequence[Curve]) -> bool:
    """Whether two metrics have the same curves, of the same arms."""
    return [one.arm for one in curves] == [one.arm for one in others] and all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        for one, other in zip(curves, others, strict=True)
        for name in ("x", "mean", "low", "high")
    )


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history, up to one that a kill cut off; none where there is no such file."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _drawn(name: str) -> bool:
    return name == LOSS or name.partition("/")[0] in HELD_OUT


def _series(rows: Sequence[dict[str, Any]], metric: str) -> np.ndarray:
    """(samples seen, value) of the rows that have it [rows, 2]; the loss of every step in means of some steps."""
    points = [(row.get("samples_seen", row["step"]), row[metric]) for row in rows if row.get(metric) is not None]
    found = np.array(points, float).reshape(-1, 2)
    if metric == LOSS and len(found) > POINTS:
        found = np.array([part.mean(axis=0) for part in np.array_split(found, POINTS)])
    return found


def _curve(part: str, metric: str, arm: str, per_seed: Sequence[np.ndarray]) -> Curve:
    """Seeds side by side at the places of the longest; a shorter one counts as far as it goes."""
    x = max(per_seed, key=len)[:, 0]
    values = np.array([np.interp(x, one[:, 0], one[:, 1], right=np.nan) for one in per_seed])
    values[:, 0] = [one[0, 1] for one in per_seed]
    return Curve(part, metric, arm, len(per_seed), x, *(f(values, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax)))
