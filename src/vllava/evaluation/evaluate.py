"""Evaluate a checkpoint on held-out questions: accuracy by medium and question type, beside blind and chance."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from vllava.batch import MEDIA_KINDS
from vllava.data.build import conversation_packer, sample_decoder
from vllava.errors import UserError
from vllava.evaluation.answers import Answer, answer_all, check_rows, read_samples
from vllava.evaluation.report import sample_rows, write_report
from vllava.model.checkpoint import load
from vllava.model.device import best_device

TEMPORAL_TYPES = ("direction", "mover", "order", "change", "events")  # what one frame cannot answer


def evaluate(
    checkpoint: str,
    sources: dict[str, dict[str, str]],
    run_dir: str,
    remedy: str,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    decoder: str = "auto",
    num_frames: int | None = None,
    template: str | None = None,
    shown: int = 8,
    plots: dict[str, str] | None = None,
) -> dict:
    """Answer every question of every source whose medium the model takes; write metrics, answers and a report.

    sources: medium -> name -> folder of shards; the headline figures are over all sources of a medium together.
    num_frames: of a video, and template: of the prompt, if not as in training. `shown` samples of each medium, and the
    loss curves `plots` (name -> PNG file), go into the report.
    Writes metrics.json, answers.jsonl and report.html to `run_dir`, and prints a table. Raises UserError for a
    missing checkpoint or shards, and for a sample that cannot be asked; of odd questions before the first is asked.
    A question without a true answer is asked and not scored.
    """
    started = time.time()
    if unknown := sorted(set(sources) - set(MEDIA_KINDS)):
        raise UserError(f"evaluation.sources names {', '.join(unknown)}; there are: {', '.join(MEDIA_KINDS)}.")
    model, tokenizer, description = load(checkpoint, num_frames)
    model.to(best_device())
    decode = sample_decoder(model.specs, description.image_fit, decoder, description.frame_sampling)
    packer = conversation_packer(model.specs, tokenizer, **description.prompt(template))
    media = [kind for kind in sources if kind in model.specs]
    for shards in (shards for medium in media for shards in sources[medium].values()):
        check_rows(shards, remedy)
    metrics: dict = {}
    answers: list[Answer] = []
    rows = []
    by_type: dict[str, dict] = {}
    for medium in media:
        seen: list[Answer] = []
        unseen: list[Answer] = []
        metrics[medium] = {}
        parts = {}
        for name, shards in sources[medium].items():
            samples = list(read_samples(shards, decode, remedy, packer=packer))
            found = answer_all(model, packer, samples, batch_size, max_new_tokens)
            blind = answer_all(model, packer, samples, batch_size, max_new_tokens, blind=True)
            parts[name] = summary(found, blind)
            if not seen:
                rows += sample_rows(samples[:shown], found[:shown])
            seen, unseen = seen + found, unseen + blind
        metrics[medium] = {**summary(seen, unseen), "by_source": parts}
        by_type |= {f"{medium}/{kind}": value for kind, value in types(seen, unseen).items()}
        answers += seen
    metrics["by_type"] = by_type
    metrics["seconds"] = round(time.time() - started, 1)
    folder = Path(run_dir)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "answers.jsonl").write_text(
        "".join(json.dumps({**asdict(a), "correct": a.correct if a.scored else None}) + "\n" for a in answers)
    )
    write_report(
        folder, f"Evaluation of {checkpoint}", metrics, rows, {name: Path(path) for name, path in (plots or {}).items()}
    )
    print(table(metrics))
    if unscored := sum(not a.scored for a in answers):
        print(f"{unscored} of {len(answers)} questions have no true answer: asked, not scored; see answers.jsonl")
    return metrics


def summary(found: Sequence[Answer], blind: Sequence[Answer]) -> dict:
    """Accuracy with and without the media, chance, and the number of questions n: of those that have a true answer.

    How many have none is said where there are any; where no question has one, there are no figures but None.
    """
    scored = [answer for answer in found if answer.scored]

    def share(values: Iterable[float]) -> float | None:
        return round(sum(values) / len(scored), 4) if scored else None

    figures = {
        "accuracy": share(a.correct for a in scored),
        "blind": share(a.correct for a in blind),
        "chance": share(a.chance for a in scored),
        "n": len(scored),
    }
    return figures if len(scored) == len(found) else {**figures, "unscored": len(found) - len(scored)}


def types(found: Sequence[Answer], blind: Sequence[Answer]) -> dict[str, dict]:
    """The summary of each question type, and of all types that need time together ("temporal")."""
    pairs = list(zip(found, blind, strict=True))
    groups = {kind: [p for p in pairs if p[0].type == kind] for kind in dict.fromkeys(a.type for a in found)}
    temporal = [p for p in pairs if p[0].type in TEMPORAL_TYPES]
    if temporal:
        groups["temporal"] = temporal
    return {kind: summary(*zip(*group, strict=True)) for kind, group in groups.items()}


def table(metrics: dict) -> str:
    """The figures as a text table, one line for each medium and question type."""
    lines = [f"{'':28}{'accuracy':>10}{'blind':>8}{'chance':>8}{'n':>6}"]

    def add(name: str, row: dict) -> None:
        accuracy, blind, chance = ("-" if row[c] is None else f"{row[c]:.3f}" for c in ("accuracy", "blind", "chance"))
        lines.append(f"{name:28}{accuracy:>10}{blind:>8}{chance:>8}{row['n']:>6}")

    for medium in ("image", "video"):
        if medium in metrics:
            add(medium.upper(), metrics[medium])
            for name, part in metrics[medium]["by_source"].items():
                add(f"  of these, {name}", part)
            for kind, row in metrics["by_type"].items():
                if kind.startswith(f"{medium}/"):
                    add(f"  {kind.split('/', 1)[1]}", row)
    return "\n".join(lines)
