"""What would waste a run, each in a sentence with what to do; the worst first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllava.inspection.batches import ShownBatch
from vllava.inspection.statistics import SourceStatistics, Survey
from vllava.inspection.texts import Texts
from vllava.training.broken import BrokenLimit

UNKNOWN = 0.01  # of the text tokens may be unknown
SPELT = 0.25  # of the letters may be spelt one by one; tokenizers that know a language spell about one in twenty
SUPERVISED = 0.01  # of the text tokens must be supervised
DUPLICATES = 0.2  # of the samples may be there already
STEPS = 10  # of the optimiser that a run must have


@dataclass(frozen=True)
class Finding:
    """What is wrong and what to do. `waste`: the share of a run that is lost to it; a note loses nothing."""

    text: str
    waste: float = 0.0
    note: bool = False


@dataclass(frozen=True)
class Run:
    """What is known of a run before it starts. `misfit`: why its samples do not fit the LLM, if they do not."""

    survey: Survey
    texts: Sequence[Texts]  # of each source
    batches: Sequence[ShownBatch]
    global_batch: int
    epochs: int | None  # None: without end
    max_steps: int  # -1: no limit
    max_broken_share: float
    misfit: str | None = None

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the run; None without end."""
        of_epochs = None if self.epochs is None else self.epochs * -(-self.survey.drawn // self.global_batch)
        known = [steps for steps in (of_epochs, self.max_steps) if steps is not None and steps >= 0]
        return min(known, default=None)

    @property
    def limit(self) -> BrokenLimit:
        """The limit at which training stops."""
        return BrokenLimit(self.max_broken_share, self.survey.drawn * (self.epochs or 1))


def findings(run: Run) -> list[Finding]:
    """All findings: what would waste a run, the worst first, then notes."""
    found = [finding for check in CHECKS for finding in check(run)]
    return sorted(found, key=lambda finding: (finding.note, -finding.waste))


# --- what cannot be trained on ----------------------------------------------------------------------------------------


def _misfit(run: Run) -> Iterator[Finding]:
    if run.misfit:
        yield Finding(run.misfit, waste=1)


def _unfit(run: Run) -> Iterator[Finding]:
    rule = _exceeded(run, [source.unfit.total() for source in run.survey.sources])
    for source in run.survey.sources:
        for kind, count in source.unfit.items():
            left_out = "are left out" if rule is None else f"cannot be trained on, and {rule}"
            yield Finding(
                f"{_of(count, source)} hold a medium of kind {kind}, for which the model has no encoder, and {left_out}"
                f": choose one (encoder/{kind}=languagebind), or leave the folder out (data.modalities, or "
                f"data.sources.{source.modality}).",
                waste=count * source.times / max(run.survey.drawn, 1),
                note=rule is None,
            )


def _broken(run: Run) -> Iterator[Finding]:
    count = [source.broken.total for source in run.survey.sources]
    if rule := _exceeded(run, count):
        worst = max(run.survey.sources, key=lambda source: source.broken.total)
        number, reason, where = worst.broken.rows[0]
        yield Finding(
            f"{_share(run, count):.1%} of an epoch's samples are broken, most of them ({worst.broken.total:,}) in "
            f"{worst.folder}, and {rule}: mend them or make the shards again (`python -m data_prep.prepare`). Most "
            f"frequent ({number:,} times): {where}: {reason}",
            waste=_share(run, count),
        )


def _too_long(run: Run) -> Iterator[Finding]:
    count = [source.too_long for source in run.survey.sources]
    if rule := _exceeded(run, count):
        worst = max(run.survey.sources, key=lambda source: source.too_long)
        longest = max(int(source.column("tokens").max(initial=0)) for source in run.survey.sources)
        yield Finding(
            f"{_share(run, count):.1%} of an epoch's samples have more tokens than data.max_length="
            f"{worst.max_length:,} (the longest about {longest:,}), most of them ({worst.too_long:,}) in "
            f"{worst.folder}, and would be left out, and {rule}: raise data.max_length as far as the LLM's context "
            "allows, take fewer frames (data.num_frames), or split the conversations when you prepare them.",
            waste=_share(run, count),
        )


def _all_together(run: Run) -> Iterator[Finding]:
    """Where each kind alone is within the limit, and all are not."""
    parts = [
        [source.broken.total for source in run.survey.sources],
        [source.too_long for source in run.survey.sources],
        [source.unfit.total() for source in run.survey.sources],
    ]
    count = [sum(numbers) for numbers in zip(*parts, strict=True)]
    if (rule := _exceeded(run, count)) and not any(_exceeded(run, part) for part in parts):
        yield Finding(
            f"{_share(run, count):.1%} of an epoch's samples are broken or too long, and {rule}: mend or remove them.",
            waste=_share(run, count),
        )


def _shown_broken(run: Run) -> Iterator[Finding]:
    left_out = [sample for batch in run.batches for sample in batch.broken]
    seen = len(left_out) + sum(len(batch.samples) for batch in run.batches)
    broken = [sample for sample in left_out if not _is_counted(run, sample.broken or "")]
    if broken and (rule := run.limit.exceeded(len(broken), seen)):
        yield Finding(
            f"{len(broken)} of the first {seen} samples are broken, and {rule}: mend or remove them. The first: "
            f"{broken[0].key}: {broken[0].broken}",
            waste=len(broken) / seen,
        )


def _is_counted(run: Run, reason: str) -> bool:
    """Whether the indexes tell how many samples have such a fault: those checks know better than the first batches."""
    if any(reason in source.broken for source in run.survey.sources):
        return True
    return "data.max_length=" in reason or reason.startswith("the model has no encoder")


def _not_encoded(run: Run) -> Iterator[Finding]:
    for source, texts in zip(run.survey.sources, run.texts, strict=True):
        count = texts.broken.total
        if count and run.limit.exceeded(count, texts.conversations):
            _, reason, where = texts.broken.rows[0]
            yield Finding(
                f"{count} of {texts.conversations} conversations of {source.folder} cannot be written as data.template "
                f"says: choose another template, or mend them. The most frequent reason: {where}: {reason}",
                waste=count / texts.conversations,
            )


# --- what is not worth training on ------------------------------------------------------------------------------------


def _unknown(run: Run) -> Iterator[Finding]:
    for source, texts in zip(run.survey.sources, run.texts, strict=True):
        words = ", ".join(word for word, _ in texts.words.most_common(6))
        remedy = f"Such words: {words}. Choose an LLM whose tokenizer knows them (foundations.llm, tokenizer)."
        if texts.share("unknown") > UNKNOWN:
            yield Finding(
                f"{texts.share('unknown'):.0%} of the text tokens of {source.folder} are unknown to the tokenizer: the "
                f"model cannot read them. {remedy}",
                waste=texts.share("unknown"),
            )
        elif (share := texts.share("spelt", of="letters")) > SPELT:
            yield Finding(
                f"{share:.0%} of the letters of {source.folder} are spelt one by one, for the tokenizer does not know "
                f"the words: the LLM has not learned to read them. {remedy}",
                waste=share,
            )


def _unsupervised(run: Run) -> Iterator[Finding]:
    for source, texts in zip(run.survey.sources, run.texts, strict=True):
        if texts.tokens and texts.share("supervised") < SUPERVISED:
            yield Finding(
                f"{texts.share('supervised'):.2%} of the text tokens of {source.folder} are supervised, so hardly "
                "anything is learned from it: look at the answers (turns from gpt) and at data.template.",
                waste=source.drawn / max(run.survey.drawn, 1),
            )


def _duplicates(run: Run) -> Iterator[Finding]:
    repeats = run.survey.samples
    if repeats.share > DUPLICATES:
        times, keys = repeats.examples[0]
        yield Finding(
            f"{repeats.share:.0%} of the samples repeat another one, its conversation and its media ({times:,} times: "
            f"{', '.join(keys)}{', …' if times > len(keys) else ''}): remove them from the annotations, or name each "
            "folder of them once in data.sources.",
            waste=repeats.share,
        )


def _few_steps(run: Run) -> Iterator[Finding]:
    if run.steps is not None and run.steps < STEPS:
        yield Finding(
            f"The run has {run.steps} optimiser step{'' if run.steps == 1 else 's'} ({run.survey.drawn:,} samples of "
            f"an epoch, {run.global_batch} to a step), too few to learn from: lower data.global_batch, or take more "
            "epochs (trainer.max_epochs).",
            waste=1 - run.steps / STEPS,
        )


# --- notes ------------------------------------------------------------------------------------------------------------


def _notes(run: Run) -> Iterator[Finding]:
    for number, source in enumerate(run.survey.sources):
        for count, what in ((source.broken.total, "broken"), (source.too_long, "longer than data.max_length")):
            alone = [count if n == number else 0 for n in range(len(run.survey.sources))]
            if count and not _exceeded(run, alone):
                yield Finding(f"{_of(count, source)} are {what} and will be left out.", note=True)
        if source.unindexed:
            yield Finding(
                f"{source.unindexed:,} shards of {source.folder} have no index, so the sizes of their media are "
                f"unknown, and duplicates among them are not found: python -m data_prep.index {source.folder}",
                note=True,
            )
        if rejected := source.rejects.total:
            share = rejected / (rejected + source.samples)
            yield Finding(
                f"{rejected:,} rows ({share:.1%}) were rejected when {source.folder} was prepared: see below, and "
                "rejects.jsonl there.",
                note=True,
            )
        if source.samples and not source.drawn:
            yield Finding(f"data.mixture takes nothing of {source.folder} in an epoch.", note=True)


CHECKS = (
    *(_misfit, _unfit, _broken, _too_long, _all_together, _shown_broken, _not_encoded),
    *(_unknown, _unsupervised, _duplicates, _few_steps, _notes),
)


# --- shares of an epoch -----------------------------------------------------------------------------------------------


def _share(run: Run, count: Sequence[int]) -> float:
    """The share of an epoch that so many samples of each source are."""
    drawn = sum(number * source.times for number, source in zip(count, run.survey.sources, strict=True))
    return drawn / max(run.survey.drawn, 1)


def _exceeded(run: Run, count: Sequence[int]) -> str | None:
    """Why training would stop, in words, with so many bad samples of each source in an epoch."""
    planned = run.limit.planned or 0
    return run.limit.exceeded(round(_share(run, count) * planned), planned)


def _of(count: int, source: SourceStatistics) -> str:
    return f"{count:,} of {source.samples:,} samples of {source.folder}"


def plain(found: Sequence[Finding]) -> str:
    """The findings as text for a terminal."""
    errors = [finding for finding in found if not finding.note]
    lines: list[Any] = [f"{len(errors)} finding{'' if len(errors) == 1 else 's'} would waste this run" if errors else
                        "nothing found that would waste this run"]  # fmt: skip
    lines += [f"{'note' if finding.note else 'problem'}: {finding.text}" for finding in found]
    return "\n".join(lines)
