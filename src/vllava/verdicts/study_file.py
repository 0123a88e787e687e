"""A study as its folder tells of it: study.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllava.checks import require, require_all
from vllava.errors import UserError, reading, require_known

FILE = "study.json"
FINISHED, FAILED, UNFINISHED = "finished", "failed", "unfinished"
MEDIA = ("image", "video", "text")
EVALUATE = "evaluate"  # the part of a run that answered the questions
_REMEDY = "A study writes it anew, with the claims of its configuration, when it is started again; no run is repeated."
_CLAIM: dict[str, Any] = {"says": str, "medium": str, "better": str, "worse": list[str]}
_MORE: dict[str, Any] = {"types": list[str] | None, "paper": str | None}  # that a claim may also say
_STUDY: dict[str, Any] = {
    **{"name": str, "title": str, "baseline": str, "seeds": list[int], "axis": str | None},
    **{"arms": dict[str, Any], "levels": dict[str, Any], "claims": dict[str, Any], "runs": list[dict[str, Any]]},
}
_RUN = {"arm": str, "level": str, "seed": int, "state": str, "error": str | None, "parts": dict[str, str]}


@dataclass(frozen=True)
class Claim:
    """That `better` answers more than `worse` of the held-out questions of a medium, or of some types of these alone.

    types: those of such a name, and their kinds (exist: exist_popular, …); empty for all but probes, which are a set of
    their own. paper: where the paper says it.
    """

    name: str
    says: str
    medium: str
    better: str
    worse: str
    types: tuple[str, ...] = ()
    paper: str = ""


@dataclass(frozen=True)
class Run:
    """One arm at one level with one seed. parts: experiment -> folder; error: the paragraph that it failed with."""

    arm: str
    level: str
    seed: int
    state: str
    error: str | None
    parts: dict[str, Path]

    def __str__(self) -> str:
        return f"{system(self.arm, self.level)}, seed {self.seed}"


def system(arm: str, level: str) -> str:
    """What the runs of an arm at a level are called."""
    return arm if level == "all" else f"{arm} at {level}"


@dataclass(frozen=True)
class StudyFile:
    """levels: name -> where it stands on the axis, None where it stands nowhere; one alone where there is no axis."""

    path: Path
    name: str
    title: str
    baseline: str
    seeds: list[int]
    arms: list[str]
    axis: str | None
    levels: dict[str, float | None]
    claims: list[Claim]
    runs: list[Run]

    def label(self, level: str) -> str:
        """A level's name, and where it stands where its name does not say so."""
        x = self.levels[level]
        # 0 and 1 stand for "without" and "with"
        return level if x in (None, 0, 1) or _says(level, x) else f"{level} ({x:.2g})"


def _says(level: str, x: float) -> bool:
    """Whether a level's name is where it stands, rounded."""
    try:
        return abs(float(level) - x) <= 0.01 * abs(x)
    except ValueError:
        return False


def is_study(path: str | Path) -> bool:
    """Whether a path is a study's folder, or its file."""
    return Path(path).name == FILE or (Path(path) / FILE).is_file()


def read_study(path: str | Path) -> StudyFile:
    """Read a study's folder, or its study.json; raises UserError, which names the file, where it is not whole."""
    file = Path(path) if Path(path).name == FILE else Path(path) / FILE
    with reading(file, _REMEDY):
        content = json.loads(file.read_text(encoding="utf-8"))
        try:
            return _study(file, content)
        except UserError as error:
            raise UserError(f"{file} is damaged: {error} {_REMEDY}") from error


def _study(file: Path, content: Any) -> StudyFile:
    require("it", content, dict[str, Any])
    _whole("it", content, _STUDY)
    arms = list(content["arms"])
    require_known("baseline (of the study's arms)", [content["baseline"]], arms)
    levels = {}
    for name, level in content["levels"].items():
        x = level.get("x") if isinstance(level, dict) else None
        require(f"levels.{name}.x", x, float | None)
        levels[name] = None if x is None else float(x)
    return StudyFile(
        file,
        content["name"],
        content["title"],
        content["baseline"],
        content["seeds"],
        arms,
        content["axis"],
        levels,
        [one for name, claim in content["claims"].items() for one in _claims(name, claim, arms)],
        [_run(file.parent, number, run, arms, levels) for number, run in enumerate(content["runs"])],
    )


def _claims(name: str, content: Any, arms: list[str]) -> list[Claim]:
    """A claim against each of the systems that it names."""
    where = f"claims.{name}"
    require(where, content, dict[str, Any])
    require_known(where, content, {**_CLAIM, **_MORE})
    _whole(where, content, _CLAIM)
    require_all(where, content, _MORE)
    require_known(f"{where} (of the study's arms)", [content["better"], *content["worse"]], arms)
    require_known(f"{where}.medium", [content["medium"]], MEDIA)
    types, paper = tuple(content.get("types") or ()), content.get("paper") or ""
    return [
        Claim(name, content["says"], content["medium"], content["better"], worse, types, paper)
        for worse in content["worse"]
    ]


def _run(folder: Path, number: int, content: dict[str, Any], arms: list[str], levels: dict[str, Any]) -> Run:
    where = f"runs.{number}"
    _whole(where, content, _RUN)
    require_known(f"{where}.arm", [content["arm"]], arms)
    require_known(f"{where}.level", [content["level"]], levels)
    require_known(f"{where}.state", [content["state"]], (FINISHED, FAILED, UNFINISHED))
    parts = {name: (folder / place).resolve() for name, place in content["parts"].items()}
    return Run(content["arm"], content["level"], content["seed"], content["state"], content["error"], parts)


def _whole(where: str, content: dict[str, Any], hints: dict[str, Any]) -> None:
    """Raises UserError where a key is missing, or its value is of an odd kind; what else is there does not matter."""
    if missing := [name for name in hints if name not in content]:
        raise UserError(f"{where} lacks {', '.join(missing)}.")
    require_all("" if where == "it" else where, content, hints)
