"""What an evaluation leaves in its run's folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllava.data.samples import Medium, Sample, SampleDecoder
from vllava.data.writing import write_json
from vllava.errors import UserError
from vllava.evaluation import answers as old
from vllava.evaluation.answers import pictures
from vllava.evaluation.benchmark import Benchmark
from vllava.evaluation.benchmarks.held_out import HeldOut, in_words, sample_of
from vllava.evaluation.blocks import decoded
from vllava.evaluation.figures import Sources, figures, table
from vllava.evaluation.judges.asking import Judged
from vllava.evaluation.questions import Answer, Verdict
from vllava.evaluation.report import KINDS, MATCH, sample_rows, write_report
from vllava.evaluation.result_files import write_result
from vllava.evaluation.result_page import chosen, thumbnail, write_result_page
from vllava.evaluation.results import Asking, Model, Result, counted, judge_of, result_of
from vllava.model.device import device_name

log = logging.getLogger(__name__)

METRICS = "metrics.json"
Tell = Callable[[Result, list[dict[str, Any]]], object]


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
    asked: Sources = {}
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


@dataclass(frozen=True)
class Asked:
    """All that was asked of a checkpoint, and what it answered: with the media and, if that was wanted, without."""

    benchmark: Benchmark
    seen: Sequence[Answer]
    unseen: Sequence[Answer]
    asking: Asking
    checkpoint: Model
    decode: SampleDecoder


def write_result_of(
    asked: Asked, folder: Path, judge: Any, replies: Path, seconds: float, tell: Tell | None = None
) -> Result | None:
    """Have the answers judged and scored, and write result.json; None where nobody judges what needs a judge.

    For whatever is no held-out sample, report.html too. replies: the folder of what judges said. tell: who is given the
    result and some samples.
    """
    benchmark = asked.benchmark
    judged = [_judged(benchmark, answers, judge, replies) for answers in (asked.seen, asked.unseen)]
    if judged[0] is None:
        print(f"{benchmark.name}: nobody judged its answers, so there are no figures: predictions alone", flush=True)
        return None
    verdicts = judged[0].verdicts
    result, draws = result_of(
        benchmark,
        [answer.question for answer in asked.seen],
        asked.seen,
        benchmark.rows(asked.seen, verdicts),
        asking=asked.asking,
        checkpoint=asked.checkpoint,
        verdicts=verdicts,
        judge=judge_of(judged[0].about) if judged[0].about else None,
        blind_rows=benchmark.rows(asked.unseen, judged[1].verdicts) if asked.unseen and judged[1] else None,
        device=device_name(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        seconds=seconds,
        warnings=judged[0].warnings,
    )
    for warning in judged[0].warnings:
        log.warning("%s: %s", benchmark.name, warning)
    write_result(folder, result, draws)
    has_own_page = isinstance(benchmark, HeldOut)
    shown = samples(asked, verdicts) if tell or not has_own_page else []
    if not has_own_page:
        write_result_page(folder, result, shown)
        print(lines(result))
    if tell:
        tell(result, shown)
    return result


def _judged(benchmark: Benchmark, answers: Sequence[Answer], judge: Any, replies: Path) -> Judged | None:
    """What the judge found, about nothing where it is not asked; None where it has to be and finds nothing."""
    requests = benchmark.requests(answers)
    if not requests:
        return Judged({}, {})
    found = judge.judge(requests, replies) if judge is not None else None
    return found if found is not None and found.verdicts else None


def samples(asked: Asked, verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """What the page shows of some of the questions; their media are decoded once more."""
    judged = [[verdicts.get(one.id) for one in asked.benchmark.requests([answer])] for answer in asked.seen]
    states = [_state(asked.benchmark, *pair, verdicts) for pair in zip(asked.seen, judged, strict=True)]
    return [_sample(asked, asked.seen[n], states[n], judged[n]) for n in chosen(states)]


def _state(
    benchmark: Benchmark, answer: Answer, judged: Sequence[Verdict | None], verdicts: Mapping[str, Verdict]
) -> str:
    """Whether an answer is right, as far as one answer can be: by the headline, where that is a share of them."""
    if answer.text is None:
        return "broken"
    if any(verdict is None or verdict.values is None for verdict in judged):
        return "unjudged"
    rows = benchmark.rows([answer], verdicts)
    metric = next((one for one in benchmark.metrics if one.headline and one.scale == 100.0), None)
    if not rows or metric is None:
        return "unscored"
    means = (np.array([np.mean([row.values.get(column, 0.0) for row in rows])]) for column in metric.columns)
    value = float(metric.of(*means)[0])
    return "unscored" if np.isnan(value) else "right" if value >= 0.5 else "wrong"


def _sample(asked: Asked, answer: Answer, state: str, judged: Sequence[Verdict | None]) -> dict[str, Any]:
    question = answer.question
    words = "; ".join(verdict.reply for verdict in judged if verdict is not None and verdict.reply)
    media = [] if state == "broken" else [decoded(medium, asked.decode) for medium in question.media]
    shown = Sample(question.id, list(question.conversation), [one for one in media if isinstance(one, Medium)])
    return {
        "id": question.id,
        "group": str(question.about.get("category") or question.about.get("type") or ""),
        "question": question.prompt,
        "answer": answer.text,
        "truth": question.truth,
        "state": state,
        "words": answer.broken or words,
        "pictures": [thumbnail(picture) for picture in pictures(shown, frames=4)],
    }


def lines(result: Result) -> str:
    """The figures of the whole benchmark as a text table, with their intervals and beside those of the blind."""
    blind = {score.metric: score.value for score in result.blind if not score.group}
    found = [f"{result.benchmark:28}{'':>8}{'95 %':>18}{'blind' if blind else '':>9}"]
    for score in result.scores:
        if not score.group:
            spread = f"{_text(score.low)} to {_text(score.high)}"
            beside = _text(blind[score.metric]) if score.metric in blind else ""
            found.append(f"  {score.metric:26}{_text(score.value):>8}{spread:>18}{beside:>9}")
    return "\n".join([*found, *counted(result)])


def _text(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def figures_of(result: Result | None) -> dict[str, Any]:
    """The figures for metrics.json: metric -> part ("" is the whole) -> value, None where it is not defined."""
    found: dict[str, Any] = {}
    for score in result.scores if result else []:
        found.setdefault(score.metric, {})[score.group] = None if np.isnan(score.value) else round(score.value, 4)
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
