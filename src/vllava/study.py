"""A study: several systems with several seeds, and what became of each run. `conf/study/` says which.

A study's folder holds `runs/`, a record of each of its runs, written by that run alone, `levels/`, where on the axis a
level was measured to stand, and `study.json`, which gathers them: after every run, and when a study starts and ends.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from vllava.checks import Seed, require, require_all
from vllava.data.writing import write_json
from vllava.errors import UserError, reading, require_known
from vllava.folders import safe_name

STUDY = "study.json"
ALL = "all"  # the level of a study that has one alone
FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"
_CHECKPOINT_OF = re.compile(r"@(\w+)")  # in an override: the checkpoint of a run of `before`
_VARIANT = {"overrides": list[str], "chain": list[str] | None, "x": float | str | None}
_HINTS: dict[str, Any] = {
    **{"name": str, "title": str, "baseline": str, "axis": str | None},
    "measure": dict[str, Any] | None,
    **{"seeds": list[int], "chain": list[str], "overrides": list[str], "before": dict[str, list[str]]},
    **dict.fromkeys(("arms", "levels", "claims"), dict[str, Any]),
}
OWN = ("experiment", "run_dir", "chain", "projector", "rerun", "evaluation.checkpoint")  # that a study sets itself


@dataclass(frozen=True)
class Variant:
    """What one arm, or one level, changes: overrides as on the command line, another chain of experiments.

    x: where a level stands on the study's axis; or what the study measures to find out, a path or @NAME of `before`.
    """

    overrides: list[str] = field(default_factory=list)
    chain: list[str] | None = None
    x: float | str | None = None

    @classmethod
    def of(cls, where: str, given: Any) -> Variant:
        settings = given if isinstance(given, Mapping) else {"overrides": given or []}
        require_known(where, set(settings), {"overrides", "chain", "x"})
        require_all(where, settings, _VARIANT)
        return cls(**settings)


@dataclass(frozen=True)
class Cell:
    """One run of a study: an arm, at a level, with a seed."""

    arm: str
    level: str
    seed: int

    @property
    def name(self) -> str:
        level = "" if self.level == ALL else f"-{self.level}"
        return safe_name(f"{self.arm}{level}-s{self.seed}")


@dataclass(frozen=True)
class Study:
    """A study's settings.

    arms: name -> what is other in this system; levels: the same, crossed with the arms; axis: what levels differ in;
    overrides: of all runs; chain: the experiments of a run, one after the other; before: name -> overrides of a run
    that is made first, whose checkpoint arms and levels call @NAME; measure: a function, as Hydra instantiates it, that
    makes a number of a level's x where that is a path; claims: for the report.
    """

    name: str
    baseline: str
    seeds: list[int]
    chain: list[str]
    arms: dict[str, Variant]
    levels: dict[str, Variant]
    claims: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    before: dict[str, list[str]] = field(default_factory=dict)
    title: str = ""
    axis: str | None = None
    measure: dict[str, Any] | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Study:
        """The study of a resolved configuration; raises UserError for a mistake in it."""
        require_known("study", set(settings), set(_HINTS))
        require_all("study", settings, _HINTS)
        named = {
            group: {str(name): Variant.of(f"study.{group}.{name}", given) for name, given in settings[group].items()}
            for group in ("arms", "levels")
        }
        study = cls(**{**settings, **named, "levels": named["levels"] or {ALL: Variant()}})
        require_known("study.baseline", [study.baseline], study.arms)
        if not study.chain:
            raise UserError("study.chain is empty: name the experiments of a run, such as [stage1, stage2, evaluate].")
        for name, level in study.levels.items():
            if isinstance(level.x, str) and not study.measure:
                raise UserError(
                    f"study.levels.{name}.x is {level.x!r}, but study.measure does not say how to measure it."
                )
        return study

    def cell(self, arm: Any, level: Any, seed: Any) -> Cell:
        """A run of the study by its names; raises UserError for one that is not known."""
        require_known("arm (of the study's arms)", [arm], self.arms)
        require_known("level (of the study's levels)", [level], self.levels)
        require("seed", seed, Seed)
        return Cell(str(arm), str(level), seed)

    def chain_of(self, cell: Cell) -> list[str]:
        """The experiments of a run."""
        return self.levels[cell.level].chain or self.arms[cell.arm].chain or self.chain

    def overrides_of(self, cell: Cell, given: Sequence[str] = ()) -> list[str]:
        """The overrides of a run: the study's, then its level's, its arm's, and those of the command line.

        Of several for one key the last holds: an arm can take back what a level says.
        """
        variants = [*self.levels[cell.level].overrides, *self.arms[cell.arm].overrides]
        last = {key_of(one): one for one in [*self.overrides, *variants, f"seed={cell.seed}", *given]}
        return [*last.values()]

    def needed(self, overrides: Sequence[str]) -> list[str]:
        """The runs of `before` whose checkpoints these overrides name."""
        named = dict.fromkeys(name for one in overrides for name in names_in(one.partition("=")[2]))
        require_known("study.before", named, self.before)
        return [*named]


def key_of(override: str) -> str:
    """The key of an override, whether it adds, removes or changes."""
    return override.lstrip("+~").partition("=")[0]


def names_in(value: str) -> list[str]:
    """The runs of `before` that a value calls @NAME."""
    return _CHECKPOINT_OF.findall(value)


def with_checkpoint(value: str, made: Mapping[str, Path]) -> str:
    """A value with the folders of checkpoints in place of @NAME."""
    return _CHECKPOINT_OF.sub(lambda found: str(made[found[1]] / "checkpoint"), value)


def with_checkpoints(overrides: Sequence[str], made: Mapping[str, Path]) -> list[str]:
    """Overrides with the folders of checkpoints in place of @NAME."""
    split = [one.partition("=") for one in overrides]
    return [f"{key}{equals}{with_checkpoint(value, made)}" for key, equals, value in split]


# --- what became of the runs ------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a run; `study.json` lists one for each.

    overrides: its own, in full; parts: experiment -> folder of a finished run, relative to the study's folder;
    error: the paragraph that a failed one ended with; seconds: that it took, parts found finished not counted.
    """

    arm: str
    level: str
    seed: int
    state: str = UNFINISHED
    error: str | None = None
    parts: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ended: str | None = None

    @property
    def cell(self) -> Cell:
        return Cell(self.arm, self.level, self.seed)

    def end(self, state: str, error: str | None = None) -> None:
        self.state, self.error, self.ended = state, error, time.strftime("%Y-%m-%d %H:%M")


def record_of(folder: Path, cell: Cell) -> Path:
    """The record of a run in a study's folder."""
    return folder / "runs" / f"{cell.name}.json"


def keep(folder: Path, outcome: Outcome) -> None:
    """Write down what became of a run, as far as it has come."""
    path = record_of(folder, outcome.cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(outcome))


def outcomes(folder: Path) -> dict[Cell, Outcome]:
    """What became of the runs that a study's folder has a record of."""
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        with reading(path, "Delete it, and the run is looked for again."):
            one = Outcome(**json.loads(path.read_text()))
            found[one.cell] = one
    return found


def place_of(folder: Path, level: str, x: float | str | None) -> float | None:
    """Where a level stands on the axis of the study in a folder, None where it was not measured yet."""
    path = measured_in(folder, level)
    if not isinstance(x, str):
        return x
    if not path.is_file():
        return None
    with reading(path, "Delete it, and it is measured again."):
        found = json.loads(path.read_text())
        return found["x"] if found["of"] == x else None


def measured_in(folder: Path, level: str) -> Path:
    """The record of where a level was measured to stand."""
    return folder / "levels" / f"{safe_name(level)}.json"


def listed_in(folder: Path) -> list[Cell]:
    """The runs that a study's folder lists."""
    with reading(folder / STUDY, "Start the study again, which writes it anew."):
        return [Cell(one["arm"], one["level"], one["seed"]) for one in json.loads((folder / STUDY).read_text())["runs"]]


def gather(folder: Path, study: Study, given: Sequence[str], cells: Sequence[Cell]) -> list[Outcome]:
    """Write `study.json`: these runs, and those of earlier starts that belong to the same study; returns them.

    A record that was made with other overrides is another run's, and is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / f".{STUDY}.lock"):
        known = outcomes(folder)
        wanted = [*cells, *(cell for cell in known if cell.arm in study.arms and cell.level in study.levels)]
        listed = []
        for cell in dict.fromkeys(wanted):
            overrides = study.overrides_of(cell, given)
            found = known.get(cell)
            if found is not None and found.overrides == overrides:
                listed.append(found)
            elif cell in cells:
                listed.append(Outcome(cell.arm, cell.level, cell.seed, overrides=overrides))
        order = {arm: number for number, arm in enumerate(study.arms)}
        listed.sort(key=lambda one: (order[one.arm], [*study.levels].index(one.level), one.seed))
        content = {**asdict(study), "seeds": sorted({one.seed for one in listed}), "given": list(given)}
        for name, level in content["levels"].items():
            level["x"] = place_of(folder, name, level["x"])
        write_json(folder / STUDY, {**content, "runs": [asdict(one) for one in listed]})
    return listed


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside, no other process holds this lock; without effect on a network folder that has none."""
    lock = FileLock(path)
    with suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def relative(folder: Path, study: Path) -> str:
    """A run's folder as `study.json` names it: from the study's own, so that both may move together."""
    return Path(os.path.relpath(folder, study)).as_posix()
