"""The result of a benchmark: what was found, of what, how, and with what."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllava.checks import NotNegative, Whole
from vllava.evaluation.benchmark import Benchmark, Row
from vllava.evaluation.questions import Answer, Question, Verdict
from vllava.evaluation.statistics import Draws, Score, measured

_COUNTS = ("requests", "judged", "unjudged")
_USAGE = ("attempts", "replies", "structured_replies", "tokens", "cost", "costs", "seconds")
_PACKAGES = ("vllava", "torch", "transformers", "tokenizers", "numpy", "scipy", "av", "pillow", "openai")


@dataclass(frozen=True)
class Counts:
    """expected: the questions there are, of which each is answered or broken. published: how many there should be.

    broken: their image or video cannot be read, so that nobody was asked. judged and unjudged: a judge's replies.
    """

    expected: Whole
    answered: Whole
    broken: Whole
    published: Whole | None = None
    judged: Whole = 0
    unjudged: Whole = 0


@dataclass(frozen=True)
class Asking:
    """How a model was asked. frames: of a video, None where there are none."""

    template: str
    max_new_tokens: Whole
    frames: Whole | None = None
    frame_sampling: str | None = None
    image_fit: str | None = None
    precision: str | None = None


@dataclass(frozen=True)
class Judge:
    """Who judged. snapshots: the models that an endpoint says it answered with. prompts: name -> SHA-256.

    settings: what else decides a reply; usage: what it took. Figures compare where all but usage is the same.
    """

    name: str  # openai, local, exact
    model: str | None = None
    snapshots: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """What was asked. origin: where the weights come from. temporal_attention: of its video encoder, if it has one."""

    path: str
    sha256: str
    origin: str = "vllava"  # or original, port
    temporal_attention: bool | None = None


@dataclass(frozen=True)
class Data:
    """What was asked about: see `fingerprint`."""

    root: str
    sha256: str
    ids_sha256: str


@dataclass(frozen=True)
class Result:
    """All that is known of one model on one benchmark.

    blind: the scores of the same model without the media, where that was asked for. n: the rows that are scored.
    paper: metric -> the figure of the paper's Video-LLaVA-7B. counting: what becomes of "broken" and "unjudged" ones,
    where they do not count as wrong ("are left out"). date: ISO 8601.
    """

    benchmark: str
    split: str
    n: Whole
    counts: Counts
    scores: list[Score]
    asking: Asking
    checkpoint: Model
    data: Data
    judge: Judge | None = None
    blind: list[Score] = field(default_factory=list)
    paper: dict[str, float] = field(default_factory=dict)
    counting: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    date: str = ""
    seconds: NotNegative = 0.0

    def score(self, metric: str, group: str = "") -> Score | None:
        """The score of that name, if there is one."""
        return next((one for one in self.scores if (one.metric, one.group) == (metric, group)), None)


def result_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    rows: Sequence[Row],
    *,
    asking: Asking,
    checkpoint: Model,
    verdicts: Mapping[str, Verdict] | None = None,
    judge: Judge | None = None,
    blind_rows: Sequence[Row] | None = None,
    device: str = "",
    date: str = "",
    seconds: float = 0.0,
    split: str = "",
    warnings: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Result, Draws]:
    """The result of a benchmark whose answers have become rows, and the resamples that its intervals come from.

    warnings: beside those of the benchmark itself. split: if the benchmark does not say it.
    """
    scores, draws = measured(rows, benchmark.metrics, seed=seed)
    blind = measured(blind_rows, benchmark.metrics, seed=seed)[0] if blind_rows is not None else []
    judged = [verdict.values is not None for verdict in (verdicts or {}).values()]
    answered = sum(answer.text is not None for answer in answers)
    found = Result(
        benchmark=benchmark.name,
        split=split or str(getattr(benchmark, "split", "") or ""),
        n=len(rows),
        counts=Counts(
            len(questions), answered, len(questions) - answered, benchmark.expected, sum(judged), judged.count(False)
        ),
        scores=scores,
        asking=asking,
        checkpoint=checkpoint,
        data=Data(benchmark.root, *fingerprint(questions)),
        judge=judge,
        blind=blind,
        paper={name: float(value) for name, value in benchmark.paper.items()},
        counting=dict(benchmark.counting),
        warnings=[*benchmark.warnings, *warnings],
        versions=versions(),
        device=device,
        date=date,
        seconds=round(seconds, 1),
    )
    return found, draws


def fingerprint(questions: Sequence[Question]) -> tuple[str, str]:
    """Two hashes by which two people see whether they asked the same: of ids, words, kinds of media and truths; of ids.

    The order of questions does not matter, nor where media lie; what is in the media is not looked at.
    """
    everything, ids = hashlib.sha256(), hashlib.sha256()
    for question in sorted(questions, key=lambda one: one.id):
        turns = [[turn["from"], turn["value"]] for turn in question.conversation]
        kinds = [medium.kind for medium in question.media]
        said = json.dumps([question.id, turns, kinds, question.truth], sort_keys=True)
        everything.update(said.encode() + b"\n")
        ids.update(json.dumps(question.id).encode() + b"\n")
    return everything.hexdigest(), ids.hexdigest()


def versions() -> dict[str, str]:
    """The versions of what decides a result; of a package that is not installed, none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def counted(result: Result) -> list[str]:
    """In words: how many questions there are, what became of them, and how those count that were not answered."""
    counts = result.counts
    lines = [f"{counts.expected:,} questions, {counts.answered:,} answered, {counts.broken:,} broken."]
    if counts.published is not None and counts.published != counts.expected:
        lines.append(f"{counts.published:,} were published: this is not the whole benchmark, or another version of it.")
    if counts.broken:
        lines.append(
            f"Broken: the image or video cannot be read, so nobody was asked. They {count_as(result, 'broken')}."
        )
    if result.judge is not None and counts.judged + counts.unjudged:
        lines.append(f"Answers judged: {counts.judged:,}; unjudged: {counts.unjudged:,}.")
    if counts.unjudged:
        fate = count_as(result, "unjudged")
        lines.append(f"Unjudged: the judge gave no reply that can be read, after several tries. They {fate}.")
    return lines


def count_as(result: Result, what: str) -> str:
    """What becomes of the broken or the unjudged in the figures."""
    return result.counting.get(what, "count as wrong, with a score of 0")


def judge_of(about: Mapping[str, Any]) -> Judge:
    """The judge, from what it says of itself: `Judged.about`."""
    own = ("name", "model", "snapshots", "prompts")
    usage = {name: about[name] for name in _USAGE if name in about}
    settings = {name: value for name, value in about.items() if name not in (*own, *_COUNTS, *_USAGE)}
    model = about.get("model")
    return Judge(
        str(about["name"]),
        None if model is None else str(model),
        sorted(map(str, about.get("snapshots") or ())),
        dict(about.get("prompts") or {}),
        settings,
        usage,
    )


def judged_by(judge: Judge | None) -> str:
    """Who judged, in a few words; empty where nobody did."""
    if judge is None:
        return ""
    said = ", ".join(judge.snapshots) or judge.model
    return judge.name if not said else f"{judge.name}: {said}"


def logged_figures(result: Result) -> dict[str, float]:
    """What a logger keeps of a result: its figures with their intervals, those of its parts, and its counts."""
    found: dict[str, float] = {}
    for score in result.scores:
        name = f"{score.group}/{score.metric}" if score.group else score.metric
        found[name] = score.value
        if not score.group:
            found |= {f"{name}/low": score.low, f"{name}/high": score.high}
    counts = {name: value for name, value in asdict(result.counts).items() if value is not None}
    return {name: value for name, value in found.items() if not math.isnan(value)} | counts


def logged_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The samples of a result's page as a logger's table has them: each with the same columns, all of text."""
    columns = ("id", "group", "question", "answer", "truth", "state", "words")
    return [
        {"pictures": list(sample["pictures"])}
        | {name: "" if sample[name] is None else str(sample[name]) for name in columns}
        for sample in samples
    ]
