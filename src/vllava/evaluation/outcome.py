"""What an evaluation leaves in its run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vllava.data.samples import SampleDecoder
from vllava.data.writing import write_json
from vllava.errors import UserError
from vllava.evaluation import answers as old
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.benchmarks.held_out import HeldOut, in_words, sample_of
from vllava.evaluation.figures import Asked, figures, table
from vllava.evaluation.questions import Answer, Verdict
from vllava.evaluation.report import KINDS, MATCH, sample_rows, write_report

log = logging.getLogger(__name__)

METRICS = "metrics.json"


def write_held_out(
    benchmark: HeldOut,
    seen: Sequence[Answer],
    unseen: Sequence[Answer],
    folder: Path,
    checkpoint: str,
    decode: SampleDecoder,
    shown: int,
    curves: dict[str, Path],
) -> dict:
    """Write metrics.json, answers.jsonl and report.html, and print a table."""
    found, blind = ([in_words(answer) for answer in answers] for answers in (seen, unseen))
    asked: Asked = {}
    for number, (answer, plain) in enumerate(zip(seen, found, strict=True)):
        part = asked.setdefault(plain.medium, {}).setdefault(answer.question.about["source"], ([], []))
        part[0].append(plain)
        part[1].extend(blind[number : number + 1])
    metrics = figures(asked, benchmark.groups)
    answers = [plain for parts in asked.values() for with_it, _ in parts.values() for plain in with_it]
    (folder / "answers.jsonl").write_text("".join(json.dumps(_line(plain)) + "\n" for plain in answers))
    rows = [row for kind in KINDS for row in _shown(kind, seen, found, decode, shown)]
    write_report(folder, f"Evaluation of {checkpoint}", metrics, rows, curves)
    print(table(metrics))
    if any(plain.scored and not plain.options for plain in answers):
        print(f"Where a record names no options to guess among, there is no chance. {MATCH}")
    if unscored := sum(not plain.scored for plain in answers):
        print(f"{unscored} of {len(answers)} questions have no true answer: asked, not scored; see answers.jsonl")
    return metrics


def _line(plain: old.Answer) -> dict[str, Any]:
    line = {**asdict(plain), "correct": plain.correct if plain.scored else None}
    return line if plain.broken else {key: value for key, value in line.items() if key != "broken"}


def _shown(
    kind: str, seen: Sequence[Answer], found: Sequence[old.Answer], decode: SampleDecoder, most: int
) -> list[dict[str, Any]]:
    """What the report shows of the first answers about a medium; their samples are decoded once more."""
    chosen = [(a, plain) for a, plain in zip(seen, found, strict=True) if plain.medium == kind and not plain.broken]
    rows = []
    for answer, plain in chosen[:most]:
        rows += sample_rows([sample_of(answer.question, decode)], [plain])
    return rows


def write_scores(
    benchmark: Benchmark, seen: Sequence[Answer], unseen: Sequence[Answer], folder: Path, judge: Any, replies: Path
) -> dict:
    """The figures of a benchmark by the parts of it, beside those of the blind where all was asked so too.

    Metric -> part ("" is the whole) -> value, None where it is not defined. replies: the folder of what judges said.
    """
    metrics: dict[str, Any] = {
        "benchmark": benchmark.name,
        "questions": {"expected": len(seen), "broken": sum(answer.text is None for answer in seen)},
    }
    for name, answers in (("scores", seen), ("blind", unseen)):
        requests = benchmark.requests(answers)
        verdicts: dict[str, Verdict] = {}
        if requests and judge is not None:
            judged = judge.judge(requests, replies)
            verdicts = judged.verdicts
            for warning in judged.warnings:
                log.warning("%s: %s", benchmark.name, warning)
        if requests and not verdicts:
            print(
                f"{benchmark.name}: its answers are for a judge, and nobody judged them: predictions alone", flush=True
            )
        elif answers:
            metrics[name] = scores(benchmark.rows(answers, verdicts), benchmark.metrics)
    for metric in benchmark.metrics:
        shown = (metrics.get(name, {}).get(metric.name, {}).get("") for name in ("scores", "blind"))
        value, blind = ("-" if one is None else f"{one:.2f}" for one in shown)
        print(f"{benchmark.name:24}{metric.name:24}{value:>10}{'   blind ' + blind if unseen else ''}")
    return metrics


def scores(rows: Sequence[Row], metrics: Sequence[Metric]) -> dict[str, dict[str, float | None]]:
    parts = dict.fromkeys(["", *(group for row in rows for group in row.groups)])
    found: dict[str, dict[str, float | None]] = {}
    for metric in metrics:
        for part in parts:
            own = [row for row in rows if not part or part in row.groups]
            values = [[row.values.get(column, 0.0) for row in own] or [np.nan] for column in metric.columns]
            value = float(metric.of(*map(np.mean, values))) * metric.scale
            found.setdefault(metric.name, {})[part] = None if np.isnan(value) else round(value, 4)
    return found


def write_exports(benchmark: Benchmark, answers: Sequence[Answer], folder: Path) -> None:
    """Write the published and the upload formats to exports/."""
    for name, content in benchmark.exports(answers).items():
        path = folder / "exports" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            raise UserError(f"{benchmark.name} exports {name}, which is neither .json nor .jsonl nor bytes.")


def keep(metrics: dict, folder: Path) -> dict:
    """Write metrics.json."""
    write_json(folder / METRICS, metrics)
    return metrics
