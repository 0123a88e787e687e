"""Evaluate a checkpoint on held-out questions: accuracy by medium and question type, beside blind and chance."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllava.checks import Count, Whole
from vllava.data.build import DecoderName, Template, conversation_packer, sample_decoder
from vllava.data.patience import Remote
from vllava.errors import UserError
from vllava.evaluation.answers import Answer, answer_all, check_rows, read_samples
from vllava.evaluation.report import KINDS, MATCH, sample_rows, write_report
from vllava.model.checkpoint import load
from vllava.model.device import best_device
from vllava.model.finding import Folders

TEMPORAL_TYPES = ("direction", "mover", "order", "change", "events")  # what one frame cannot answer


def evaluate(
    checkpoint: str,
    sources: dict[str, dict[str, str]],
    run_dir: str,
    remedy: str,
    batch_size: Count = 64,
    max_new_tokens: Count = 16,
    decoder: DecoderName = "auto",
    num_frames: Count | None = None,
    template: Template | None = None,
    shown: Whole = 8,
    plots: dict[str, str] | None = None,
    cache: Remote | dict[str, Any] | None = None,
    search: Folders = (),
) -> dict:
    """Answer every question of every source whose medium the model takes; write metrics, answers and a report.

    sources: medium -> name -> folder of shards; sources of media that the model does not take are passed over. A sample
    counts with the medium it has, wherever its folder stands; the headline figures are over all sources together.
    num_frames: of a video, and template: of the prompt, if not as in training. `shown` samples of each medium, and the
    loss curves `plots` (name -> PNG file), go into the report. cache: how shards on servers are read.
    search: folders to look into for what the checkpoint does not hold itself.
    Writes metrics.json, answers.jsonl and report.html to `run_dir`, and prints a table. Raises UserError for a
    missing checkpoint or shards, and for a sample that cannot be asked; of odd questions before the first is asked.
    A question without a true answer is asked and not scored.
    """
    started = time.time()
    if unknown := sorted(set(sources) - set(KINDS)):
        raise UserError(f"evaluation.sources names {', '.join(unknown)}; there are: {', '.join(KINDS)}.")
    model, tokenizer, description = load(checkpoint, num_frames, search)
    model.to(best_device())
    decode = sample_decoder(model.specs, description.image_fit, decoder, description.frame_sampling)
    packer = conversation_packer(model.specs, tokenizer, **description.prompt(template))
    media = [kind for kind in sources if kind in model.specs or kind == "text"]
    if not media:
        taken = ", ".join(model.specs)
        raise UserError(f"evaluation.sources names {', '.join(sources)} alone; the model takes {taken}.")
    places = dict.fromkeys((name, folder) for medium in media for name, folder in sources[medium].items())
    remote = Remote.of(cache)
    for _, folder in places:
        check_rows(folder, remedy, remote)
    asked: dict[str, dict[str, tuple[list[Answer], list[Answer]]]] = {}  # medium -> source -> (with it, blind)
    rows: dict[str, list] = {kind: [] for kind in KINDS}
    for name, folder in places:
        samples = list(read_samples(folder, decode, remedy, packer=packer, remote=remote))
        found = answer_all(model, packer, samples, batch_size, max_new_tokens)
        blind = answer_all(model, packer, samples, batch_size, max_new_tokens, blind=True)
        for sample, answer, without in zip(samples, found, blind, strict=True):
            part = asked.setdefault(answer.medium, {}).setdefault(name, ([], []))
            part[0].append(answer)
            part[1].append(without)
            if len(rows[answer.medium]) < shown:
                rows[answer.medium] += sample_rows([sample], [answer])
    metrics = figures(asked)
    metrics["seconds"] = round(time.time() - started, 1)
    answers = [answer for parts in asked.values() for found, _ in parts.values() for answer in found]
    run_folder = Path(run_dir)
    (run_folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (run_folder / "answers.jsonl").write_text(
        "".join(json.dumps({**asdict(a), "correct": a.correct if a.scored else None}) + "\n" for a in answers)
    )
    curves = {name: Path(path) for name, path in (plots or {}).items()}
    shown_rows = [row for kind in KINDS for row in rows[kind]]
    write_report(run_folder, f"Evaluation of {checkpoint}", metrics, shown_rows, curves)
    print(table(metrics))
    if any(a.scored and not a.options for a in answers):
        print(f"Where a record names no options to guess among, there is no chance. {MATCH}")
    if unscored := sum(not a.scored for a in answers):
        print(f"{unscored} of {len(answers)} questions have no true answer: asked, not scored; see answers.jsonl")
    return metrics


def figures(asked: dict[str, dict[str, tuple[list[Answer], list[Answer]]]]) -> dict:
    """The summary of each medium, of its sources and of its question types, from medium -> source -> (found, blind)."""
    metrics: dict = {}
    by_type: dict[str, dict] = {}
    for medium in (kind for kind in KINDS if kind in asked):
        parts = asked[medium]
        found = [answer for part, _ in parts.values() for answer in part]
        blind = [answer for _, part in parts.values() for answer in part]
        by_source = {name: summary(*part) for name, part in parts.items()}
        metrics[medium] = {**summary(found, blind), "by_source": by_source}
        by_type |= {f"{medium}/{kind}": value for kind, value in types(found, blind).items()}
    return {**metrics, "by_type": by_type}


def summary(found: Sequence[Answer], blind: Sequence[Answer]) -> dict:
    """Accuracy with and without the media, chance, and the number of questions n: of those that have a true answer.

    How many have none is said where there are any; where no question has one, there are no figures but None. There is
    no chance where no question names options to guess among.
    """
    scored = [answer for answer in found if answer.scored]

    def share(values: Iterable[float]) -> float | None:
        return round(sum(values) / len(scored), 4) if scored else None

    figures = {
        "accuracy": share(a.correct for a in scored),
        "blind": share(a.correct for a in blind),
        "chance": share(a.chance for a in scored) if any(a.options for a in scored) else None,
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
    names = [name for medium in KINDS for name in metrics.get(medium, {}).get("by_source", {})]
    width = max([28, *(len(f"  of these, {name} ") for name in names)])
    lines = [f"{'':{width}}{'accuracy':>10}{'blind':>8}{'chance':>8}{'n':>6}"]

    def add(name: str, row: dict) -> None:
        accuracy, blind, chance = ("-" if row[c] is None else f"{row[c]:.3f}" for c in ("accuracy", "blind", "chance"))
        lines.append(f"{name:{width}}{accuracy:>10}{blind:>8}{chance:>8}{row['n']:>6}")

    for medium in KINDS:
        if medium in metrics:
            add(medium.upper(), metrics[medium])
            for name, part in metrics[medium]["by_source"].items():
                add(f"  of these, {name}", part)
            for kind, row in metrics["by_type"].items():
                if kind.startswith(f"{medium}/"):
                    add(f"  {kind.split('/', 1)[1]}", row)
    return "\n".join(lines)
