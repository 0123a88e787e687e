"""The files of a result: result.json, and draws.json beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from vllava.checks import require, require_all
from vllava.data.writing import appearing
from vllava.errors import UserError, reading, require_known
from vllava.evaluation.results import Asking, Counts, Data, Judge, Model, Result
from vllava.evaluation.statistics import Draws, Score

VERSION = 1  # of the file's fields: raised when one is added, dropped or means something else
FILE = "result.json"
DRAWS = "draws.json"  # beside it: the resamples, for comparing two models
_PARTS = {"counts": Counts, "asking": Asking, "checkpoint": Model, "data": Data, "judge": Judge}
_SECRET = re.compile(r"(^|[_-])(api_?key|key|secret|password|token|authorization)$", re.I)
_REMEDY = "Evaluate again to have it written anew; predictions that are there already are used."


def write_result(folder: str | Path, result: Result, draws: Draws | None = None) -> Path:
    """Write result.json, and draws.json beside it, each whole or not at all; returns the path of the first."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    if draws is not None:
        stored = {name: [_short(one) for one in drawn.tolist()] for name, drawn in draws.resampled.items()}
        values = {name: _json(value) for name, value in draws.values.items()}
        with appearing(place / DRAWS) as part:
            part.write_text(json.dumps({"clusters": draws.clusters, "values": values, "resampled": stored}) + "\n")
    content = {"version": VERSION, **_json(asdict(result))}
    if result.judge is not None:
        content["judge"]["settings"] = without_secrets(result.judge.settings)
    with appearing(place / FILE) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return place / FILE


def read_result(path: str | Path) -> Result:
    """Read a result; raises UserError, which names the file, unless it is one that this version knows, and whole."""
    with reading(path, _REMEDY):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "version" not in content or "benchmark" not in content:
            raise UserError(f"{path} is not a result of an evaluation: it has no version and benchmark. {_REMEDY}")
        if (version := content.pop("version")) != VERSION:
            raise UserError(
                f"{path} is a result of version {version!r}; this vllava reads version {VERSION}. Read it with the "
                f"vllava that wrote it, or evaluate again with this one."
            )
        try:
            return _result(content)
        except UserError as error:
            raise UserError(f"{path} is damaged: {error} {_REMEDY}") from error


def read_draws(path: str | Path) -> Draws:
    """The resamples beside a result; raises UserError where there are none."""
    beside = Path(path).with_name(DRAWS)
    with reading(beside, "Two models are compared by it. " + _REMEDY):
        content = json.loads(beside.read_text())
        drawn = {name: np.array(values, float) for name, values in content["resampled"].items()}
        values = {name: math.nan if value is None else float(value) for name, value in content["values"].items()}
        return Draws(str(content["clusters"]), values, drawn)


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they may be written: without keys and the like, and without names and queries in addresses."""
    return {name: _public(value) for name, value in settings.items() if not _SECRET.search(name)}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return value


def _result(content: dict[str, Any]) -> Result:
    """A result from its JSON; raises UserError for what is missing, unknown or of an odd kind."""
    hints = {
        **get_type_hints(Result, include_extras=True),
        "scores": list[dict[str, Any]],
        "blind": list[dict[str, Any]],
    }
    require_known("it", content, hints)
    if missing := [one.name for one in fields(Result) if one.name not in content]:
        raise UserError(f"{', '.join(missing)} is missing.")
    require_all("", content, hints)
    for name, kind in _PARTS.items():
        if content[name] is not None:
            require_known(name, content[name], get_type_hints(kind, include_extras=True))
            content[name] = kind(**content[name])
    counts = content["counts"]
    if counts.answered + counts.broken != counts.expected:
        raise UserError("counts.answered and counts.broken are not counts.expected together.")
    return Result(**{**content, **{name: [_score(name, one) for one in content[name]] for name in ("scores", "blind")}})


def _score(where: str, content: dict[str, Any]) -> Score:
    hints = {
        name: float | None if hint is float else hint
        for name, hint in get_type_hints(Score, include_extras=True).items()
    }
    require_known(where, content, hints)
    for name in hints:
        if name not in content:
            raise UserError(f"{where} has an entry without {name}.")
        require(f"{where}.{name}", content[name], hints[name])
    return Score(**{name: math.nan if value is None else value for name, value in content.items()})  # type: ignore[arg-type]


def _json(value: Any) -> Any:
    """As JSON can hold it: None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _json(one) for name, one in value.items()}
    return [_json(one) for one in value] if isinstance(value, (list, tuple)) else value


def _short(value: float) -> float | None:
    """A resample as it is stored: ten digits are more than it is worth."""
    return float(f"{value:.10g}") if math.isfinite(value) else None
