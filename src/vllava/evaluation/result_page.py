"""The page of a result: figures beside what they are to be compared with, and samples to look through, in one file."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from vllava.data.writing import appearing
from vllava.evaluation.results import Result, counted, judged_by
from vllava.evaluation.statistics import Score

PAGE = "report.html"
STATES = ("right", "wrong", "broken", "unjudged", "unscored")  # unscored: nobody knows the truth
SHOWN = 200  # samples on a page
_SPECIAL = 40  # of these, broken ones at most; unjudged ones, as many
_PICTURE_BYTES = 24 << 20  # of a page
_LETTERS = 4000  # of each text
_CHANCE = "chance"  # the metric that is drawn beside the others


def chosen(states: Sequence[str], most: int = SHOWN) -> list[int]:
    """Which samples a page shows, by their number: broken and unjudged ones first, the others evenly spread."""
    special = [[n for n, state in enumerate(states) if state == kind] for kind in ("broken", "unjudged")]
    found = [number for kind in special for number in _spread(kind, _SPECIAL)][:most]
    others = [number for number, state in enumerate(states) if state not in ("broken", "unjudged")]
    return sorted(found + _spread(others, most - len(found)))


def thumbnail(picture: Image.Image, height: int = 112) -> str:
    """A picture as a small JPEG in a data: URI."""
    small = picture.convert("RGB")
    small.thumbnail((4 * height, height))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_result_page(folder: str | Path, result: Result, samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write report.html into a folder; returns its path.

    samples: of each its id, group, question, answer (None where nobody answered), truth, state (one of STATES), words
    (of the judge, or why it is broken) and pictures (data: URIs). What they say is strangers' text, shown as such.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(figure=_figure, text=_text, truth=_truth)
    source = Path(__file__).with_name("result_page.html").read_text(encoding="utf-8")
    script = source.partition("<script>")[2].partition("</script>")[0]
    page = environment.from_string(source).render(
        result=result,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        counts=counted(result),
        bars=[_bar(result, score) for score in _whole(result)],
        tables=_tables(result),
        facts=_facts(result),
        samples=_within(samples, _PICTURE_BYTES),
        states={"all": len(samples), **_states(samples)},
    )
    path = Path(folder) / PAGE
    with appearing(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _states(samples: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many samples are in each state; unscored only where there are any."""
    found = {state: sum(sample["state"] == state for sample in samples) for state in STATES}
    return {state: count for state, count in found.items() if count or state != "unscored"}


def _spread(numbers: list[int], most: int) -> list[int]:
    """Up to so many of them, evenly spread."""
    if len(numbers) <= most:
        return numbers
    return [numbers[place * len(numbers) // most] for place in range(most)]


def _whole(result: Result) -> list[Score]:
    """The scores of the whole benchmark, the headline first."""
    found = [score for score in result.scores if not score.group and score.metric != _CHANCE]
    return sorted(found, key=lambda score: not score.headline)


def _bar(result: Result, score: Score) -> dict[str, Any]:
    """A score as a bar: everything in percent of the axis. marks: what it is compared with."""
    blind = next((s for s in result.blind if (s.metric, s.group) == (score.metric, score.group)), None)
    chance = result.score(_CHANCE, score.group) if score.headline else None
    marks = {
        "blind": blind.value if blind else math.nan,
        "chance": chance.value if chance else math.nan,
        "paper": result.paper.get(score.metric, math.nan) if not score.group else math.nan,
    }
    known = {name: value for name, value in marks.items() if not math.isnan(value)}
    most = max([0.0, *(v for v in (score.value, score.high, *known.values()) if not math.isnan(v))])
    axis = next((end for end in (score.scale, 5.0, 10.0) if end >= most), most)

    def place(value: float) -> float | None:
        return None if math.isnan(value) else round(100 * max(0.0, value) / axis, 2)

    return {
        "score": score,
        "axis": axis,
        "value": place(score.value),
        "low": place(score.low),
        "high": place(score.high),
        "known": known,
        "marks": {name: place(value) for name, value in known.items()},
    }


def _tables(result: Result) -> dict[str, Any]:
    """Kind of group -> the names of metrics, and a row for each group: its name, its bar, its scores, n."""
    parts: dict[str, dict[str, list[Score]]] = {}
    for score in result.scores:
        if score.group and score.metric != _CHANCE:
            kind, _, name = score.group.rpartition("/")
            parts.setdefault(kind, {}).setdefault(name, []).append(score)
    tables = {}
    for kind, groups in parts.items():
        metrics = list(dict.fromkeys(score.metric for found in groups.values() for score in found))
        rows = []
        for name, found in groups.items():
            by_metric = {score.metric: score for score in found}
            shown = next((score for score in found if score.headline), found[0])
            cells = [by_metric.get(metric) for metric in metrics]
            rows.append({"name": name, "bar": _bar(result, shown), "cells": cells, "n": shown.n})
        tables[kind] = {"metrics": metrics, "rows": rows}
    return tables


def _facts(result: Result) -> dict[str, dict[str, Any]]:
    """What stands at the foot of the page: how it was asked, by whom it was judged, with what."""
    facts = {"asked": asdict(result.asking), "model": asdict(result.checkpoint), "data": asdict(result.data)}
    if result.judge is not None:
        judge = {**asdict(result.judge), "judge": judged_by(result.judge)}
        facts["judged"] = {**judge, **{f"prompt {name}": digest for name, digest in judge.pop("prompts").items()}}
    facts["run"] = {"date": result.date, "device": result.device, "seconds": result.seconds}
    facts["versions"] = dict(result.versions)
    return {title: {k: v for k, v in rows.items() if v not in (None, "", [], {})} for title, rows in facts.items()}


def _within(samples: Sequence[Mapping[str, Any]], most: int) -> list[dict[str, Any]]:
    """The samples with as many of their pictures as fit; those of which some are left out say so."""
    shown, left = [], most
    for sample in samples:
        pictures = [uri for uri in sample.get("pictures") or () if str(uri).startswith("data:image/")]
        size = sum(map(len, pictures))
        shown.append({**sample, "pictures": pictures if size <= left else [], "cut": size > left})
        left -= size if size <= left else 0
    return shown


def _figure(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _text(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} … ({len(text):,} characters)"


def _truth(value: Any) -> str:
    """A truth in a line: several answers with how many gave each."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return ", ".join(one if times == 1 else f"{one} ({times})" for one, times in Counter(value).items())
    return json.dumps(value, ensure_ascii=False, default=str)
