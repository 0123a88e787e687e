"""Which results belong together, and what keeps one from being compared with the paper's figure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vllava.errors import UserError
from vllava.evaluation.result_files import FILE, read_result
from vllava.evaluation.results import Judge, Result, count_as
from vllava.evaluation.statistics import Score


@dataclass(frozen=True)
class Found:
    """A result and where it lies."""

    path: Path
    result: Result


@cache
def paper() -> dict[str, Any]:
    """The paper's figures, and how its authors ask: paper.yaml."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


def find_results(paths: Sequence[str | Path]) -> list[Found]:
    """The results in files, and in folders at any depth; each once. Raises UserError where a path has none."""
    found: dict[Path, Found] = {}
    for path in map(Path, paths):
        files = sorted(path.rglob(FILE)) if path.is_dir() else [path]
        if not files or not path.exists():
            raise UserError(
                f"There is no result in {path}: a {FILE}, which an evaluation on a benchmark writes into its run's "
                f"folder (python train.py +experiment=evaluate benchmark=NAME)."
            )
        for file in files:
            found.setdefault(file.resolve(), Found(file, read_result(file)))
    return list(found.values())


def remarks_on(result: Result) -> list[str]:
    """What keeps a result from being compared with the paper's figure, but for its judge: each in a sentence."""
    counts, asked, known = result.counts, result.asking, paper()["benchmarks"].get(result.benchmark, {})
    said = []
    if counts.published is not None and counts.published != counts.expected:
        said.append(f"{counts.expected:,} questions, not the {counts.published:,} that were published.")
    if known.get("split") and result.split and result.split != known["split"]:
        said.append(f"Another split: {result.split}, not {known['split']}.")
    if counts.broken:
        said.append(f"Broken: {counts.broken:,} of {counts.expected:,}; they {count_as(result, 'broken')}.")
    if counts.unjudged:
        asked_of = counts.judged + counts.unjudged
        said.append(f"Unjudged: {counts.unjudged:,} of {asked_of:,}; they {count_as(result, 'unjudged')}.")
    if "template" in known and asked.template != known["template"]:
        said.append(f"Another prompt template: {asked.template}, not {known['template']}.")
    if asked.max_new_tokens < known.get("max_new_tokens", 0):
        said.append(f"Answers of at most {asked.max_new_tokens:,} tokens, not {known['max_new_tokens']:,}.")
    if "frames" in known and asked.frames not in (None, known["frames"]):
        said.append(f"{asked.frames} frames of a video, not {known['frames']}.")
    if "frames" in known and asked.frame_sampling not in (None, "index"):
        said.append(f"Frames chosen otherwise: evenly by {asked.frame_sampling}.")
    if "frames" in known and result.checkpoint.temporal_attention is False:
        said.append("The video encoder has no temporal attention: another model than the paper's.")
    return said + [f"A warning: {warning}" for warning in result.warnings]


def newest(found: Sequence[Found]) -> tuple[list[Found], list[str]]:
    """The results that are shown, and a sentence for each that is not."""
    kept: dict[tuple[str, ...], Found] = {}
    remarks = []
    for one in sorted(found, key=lambda one: (_whole(one.result), one.result.date)):
        key = (one.result.benchmark, way(one.result), identity(one.result.judge))
        if key in kept:
            older = kept.pop(key)
            remarks.append(
                f"{one.result.benchmark}: {one.path} is shown, of {one.result.date}, and not {older.path}, of "
                f"{older.result.date}: the same model, asked and judged the same."
            )
        kept[key] = one
    order = [one.path for one in found]
    return sorted(kept.values(), key=lambda one: order.index(one.path)), remarks


def _whole(result: Result) -> bool:
    split = paper()["benchmarks"].get(result.benchmark, {}).get("split")
    return result.counts.published in (None, result.counts.expected) and (not split or result.split in ("", split))


def identity(judge: Judge | None) -> str:
    """What must be the same for two figures to share a column; empty where nobody judged."""
    if judge is None:
        return ""
    return json.dumps([judge.name, judge.model, judge.snapshots, judge.prompts, judge.settings], sort_keys=True)


def way(result: Result) -> str:
    """A model and how it was asked: what has a line of its own."""
    known, asked = paper()["benchmarks"].get(result.benchmark, {}), result.asking
    video = "frames" in known or not known
    template = asked.template if asked.template != known.get("template") else None
    said = {
        "frames": asked.frames if video and asked.frames != known.get("frames", 8) else None,
        "sampled by": asked.frame_sampling if video and asked.frame_sampling != "index" else None,
        "template": template if known else None,
        "precision": asked.precision,
        "images": asked.image_fit,
    }
    return json.dumps([result.checkpoint.sha256, said])


def line_names(results: Sequence[Result]) -> dict[str, str]:
    """What to call each line: its run's folder, with as much of how it was asked and of its hash as tells it apart."""
    ways = {way(result): result for result in results}
    told = {one: json.loads(one) for one in ways}  # hash of the checkpoint, how it was asked
    names = {}
    for one, (sha256, said) in told.items():
        path = Path(ways[one].checkpoint.path)
        name = path.parent.name if path.name == "checkpoint" else path.name
        others = [other for digest, other in told.values() if digest == sha256]
        words = [f"{key} {said[key]}" for key in said if said[key] and any(other[key] != said[key] for other in others)]
        names[one] = ", ".join([name or sha256[:8], *words])
    shared = {name for name, times in Counter(names.values()).items() if times > 1}
    return {one: f"{name} ({told[one][0][:8]})" if name in shared else name for one, name in names.items()}


def headlines(result: Result) -> list[Score]:
    """The scores of the whole benchmark that stand in the paper's tables, if it has any."""
    return [one for one in result.scores if one.headline and not one.group]
