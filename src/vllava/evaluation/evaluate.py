"""Evaluate a checkpoint on a benchmark: questions, answers, verdicts, figures."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import lightning as L

from vllava.checks import Count, NotNegative, OneOf, Whole
from vllava.data.build import FEATURES, DecoderName, Template, conversation_packer, sample_decoder
from vllava.data.datamodule import Workers
from vllava.data.patience import Remote
from vllava.errors import UserError
from vllava.evaluation import generate, results
from vllava.evaluation.benchmark import Benchmark
from vllava.evaluation.benchmarks.held_out import HeldOut
from vllava.evaluation.blocks import blind
from vllava.evaluation.outcome import Asked, Tell, figures_of, keep, write_exports, write_held_out, write_result_of
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import Answer, Question
from vllava.features import FeatureWriter
from vllava.folders import sha256_of
from vllava.model.checkpoint import LLM, PROJECTOR, Description, load
from vllava.model.device import computes_in_bf16
from vllava.model.files import Checkpoint
from vllava.model.finding import Folders

log = logging.getLogger(__name__)

REPLIES = "judge-replies"  # in a folder of runs: what judges said, for all of them


def evaluate(
    checkpoint: str,
    sources: dict[str, dict[str, str]] | None,
    run_dir: str,
    remedy: str | None = None,
    batch_size: Count = 64,
    max_new_tokens: Count | None = None,
    decoder: DecoderName = "auto",
    num_frames: Count | None = None,
    template: Template | None = None,
    shown: Whole = 8,
    plots: dict[str, str] | None = None,
    cache: Remote | dict[str, Any] | None = None,
    features: Annotated[str, OneOf(FEATURES)] = "online",
    features_gigabytes: NotNegative | None = None,
    search: Folders = (),
    workers: Workers = -1,
    runs: str | None = None,
    benchmark: Benchmark | None = None,
    judge: Callable[[], Any] | None = None,
    trainer: L.Trainer | None = None,
    tell: Tell | None = None,
) -> dict:
    """Ask a checkpoint every question of a benchmark, have the answers judged and scored, and write what was found.

    benchmark: by default held-out samples, in `sources`: medium -> name -> folder of shards; remedy: what a user
    without those should do; cache: how those on servers are read; features: "online", or "cache" for reading what the
    encoders made of their media once, see vllava.features; features_gigabytes: that this may take.
    judge: makes who decides about open answers, see evaluation/judges, where the benchmark needs one. trainer: on
    which devices the questions are answered, by default on one; every process of it has to call this, and all but the
    first return no figures. max_new_tokens: of an answer, and template: of the prompt, if not as the benchmark has
    them; num_frames: of a video, if not as in training.
    `shown` questions of each medium, and the loss curves `plots` (name -> PNG file), go into the report.
    search: folders to look into for what the checkpoint does not hold itself. runs: a folder of runs, of which one in
    which the same was asked has the answers already. tell: who is given the result, and samples to show.
    Raises UserError for a missing checkpoint, for files of the benchmark that are not what they should be, and for a
    judge that cannot be asked, before the first question is.
    """
    started = time.time()
    if benchmark is None:
        benchmark = HeldOut("held_out", "", sources=sources or {}, remedy=remedy or "", cache=cache, blind=True)
    model, tokenizer, description = load(checkpoint, num_frames, search)
    decode = sample_decoder(model.specs, description.image_fit, decoder, description.frame_sampling)
    packer = conversation_packer(model.specs, tokenizer, **description.prompt(template or benchmark.template))
    if isinstance(benchmark, HeldOut):
        benchmark.restrict(model.specs)
        if features == "cache":
            writer = FeatureWriter(model, decode, description.encoders, computes_in_bf16(), generate.workers(workers))
            benchmark.use_features(writer, features_gigabytes)
    questions = benchmark.questions()
    first = trainer is None or trainer.is_global_zero
    for warning in benchmark.warnings if first else []:
        log.warning("%s: %s", benchmark.name, warning)
    require_questions(benchmark, questions, list(model.specs))
    asking = generate.Asking(model, packer, decode, max_new_tokens or benchmark.max_new_tokens, batch_size, workers)
    requests = benchmark.requests([Answer(question, "?") for question in questions])
    judging = judge() if judge is not None and requests else None
    if judging is not None:
        judging.require(requests)
    parts = fingerprint(Path(checkpoint), description)
    how = {
        "benchmark": benchmark.name,
        "checkpoint": parts,
        "template": template or benchmark.template or description.template,
        "max_new_tokens": asking.max_new_tokens,
        "frames": {kind: spec.frames for kind, spec in model.specs.items()},
        "decoder": decoder,
    }
    folder = Path(run_dir)
    seen = _answers(asking, questions, folder, "predictions", how, trainer, runs)
    unseen: list[Answer] = []
    if benchmark.blind:
        without = _answers(asking, [blind(question) for question in questions], folder, "blind", how, trainer, runs)
        unseen = [replace(one, question=question) for one, question in zip(without, questions, strict=True)]
    if not first:
        return {}
    say_broken(benchmark, seen)
    write_exports(benchmark, seen, folder)
    frames = max((spec.frames for kind, spec in model.specs.items() if kind == "video"), default=None)
    said = results.Asking(
        str(how["template"]),
        asking.max_new_tokens,
        frames,
        description.frame_sampling,
        description.image_fit,
        "bf16" if computes_in_bf16() else "fp32",
    )
    asked = Asked(benchmark, seen, unseen, said, model_of(checkpoint, description, parts), decode)
    seconds = round(time.time() - started, 1)
    result = write_result_of(asked, folder, judging, Path(runs or run_dir) / REPLIES, seconds, tell)
    if isinstance(benchmark, HeldOut):
        curves = {name: Path(path) for name, path in (plots or {}).items()}
        metrics = write_held_out(benchmark, seen, unseen, folder, checkpoint, decode, shown, curves)
    else:
        metrics = {"benchmark": benchmark.name, "scores": figures_of(result)}
    return keep({**metrics, "seconds": seconds}, folder)


def model_of(path: str, description: Description, parts: Mapping[str, str]) -> results.Model:
    """What was asked, as a result names it."""
    video = description.encoders.get("video")
    plain = video is not None and video.get("temporal") is False  # what the port alone has
    origin = "port" if plain else "original" if description.origin else "vllava"
    whole = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return results.Model(path, whole, origin, None if video is None else not plain)


def _answers(
    asking: generate.Asking,
    questions: Sequence[Question],
    folder: Path,
    name: str,
    how: Mapping[str, Any],
    trainer: L.Trainer | None,
    runs: str | None,
) -> list[Answer]:
    """The answers to all questions, of this run or of another one that asked the same."""
    asked = {**how, "questions": len(questions), "sha256": digest(questions)}
    predictions = Predictions(folder, name, asked)
    ids = [question.id for question in questions]
    first = trainer is None or trainer.is_global_zero
    if runs and first and (other := predictions.take(Path(runs), ids)):
        print(f"answers taken from {other}, where the same was asked", flush=True)
    bar = "blind" if name == "blind" else str(how["benchmark"])
    return generate.answer(asking, questions, predictions, trainer, bar)


def require_questions(benchmark: Benchmark, questions: Sequence[Question], taken: Sequence[str]) -> None:
    """Raises UserError for no questions, for an id that comes twice, and for media that the model does not take.

    Held-out samples may mix media: there, those that the model does not take are broken.
    """
    if not questions:
        raise UserError(f"The benchmark {benchmark.name} has no questions.")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f"The benchmark {benchmark.name} has two questions with the id {question.id!r}.")
        seen.add(question.id)
    kinds = {medium.kind for question in questions for medium in question.media}
    if not isinstance(benchmark, HeldOut) and (lacking := sorted(kinds - set(taken))):
        raise UserError(
            f"{benchmark.name} asks about media of the kind {', '.join(lacking)}; the model takes "
            f"{', '.join(taken) or 'text alone'}."
        )


def say_broken(benchmark: Benchmark, answers: Sequence[Answer]) -> None:
    """Warn of questions that could not be asked, with how many and the first of them."""
    broken = [answer for answer in answers if answer.text is None]
    if broken:
        first = "; ".join(f"{answer.question.id}: {answer.broken}" for answer in broken[:3])
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        log.warning(
            "%s: %d of %d questions could not be asked and count as wrong: %s%s",
            *(benchmark.name, len(broken), len(answers), first, more),
        )


def digest(questions: Sequence[Question]) -> str:
    """The hash of what is asked: ids, prompts, and which media are shown."""
    found = hashlib.sha256()
    for question in questions:
        media = [(medium.kind, medium.key) for medium in question.media]
        found.update(json.dumps([question.id, question.conversation, media]).encode() + b"\n")
    return found.hexdigest()


def fingerprint(folder: Path, description: Description) -> dict[str, str]:
    """The hashes of a checkpoint's parts."""
    found = dict(description.sha256)
    if "llm" not in found and (folder / LLM).is_dir():
        found["llm"] = Checkpoint(folder / LLM).sha256  # not recorded by earlier versions
    if (folder / PROJECTOR).is_file():
        found["projector"] = sha256_of(folder / PROJECTOR)
    return found
