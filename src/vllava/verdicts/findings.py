"""What a study found, as numbers: figures over seeds, differences to the baseline, a verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vllava.errors import UserError
from vllava.verdicts.answers import aligned, of_figure, share
from vllava.verdicts.figures import Figure, Sheets, parts, read_sheets, seeds_of, settings, whole
from vllava.verdicts.statistics import ALPHA, Gain, Spread, gain, holm
from vllava.verdicts.study_file import FIGURES, Claim, StudyFile

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided at this size"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a claim at a level. gain: None where no seed has both arms. corrected: p by Holm's method."""

    claim: Claim
    level: str
    gain: Gain | None
    by_seed: Mapping[int, float]
    corrected: float
    ruling: str
    why: str


@dataclass(frozen=True)
class Findings:
    """All that a report says. missing: a sentence for each run without figures. remarks: what else is to be known."""

    study: StudyFile
    figures: list[Figure]
    types: list[Figure]
    pope: dict[str, dict[str, dict[str, Spread]]]  # arm -> setting -> accuracy, f1 and yes, in percent
    verdicts: list[Verdict]
    gains: dict[tuple[str, str, str], Gain]  # (arm, level, figure) -> how much more the baseline answers
    rule: str
    missing: list[str]
    remarks: list[str]

    def figure(self, arm: str, level: str, figure: str) -> Figure | None:
        return next((f for f in self.figures if (f.arm, f.level, f.figure) == (arm, level, figure)), None)


def find(study: StudyFile) -> Findings:
    """Read what the runs of a study answered, and judge its claims.

    Raises UserError where no run has answered anything, or where what one left cannot be read.
    """
    sheets, missing = read_sheets(study)
    if not sheets:
        said = " ".join(missing) or "It has no runs."
        raise UserError(f"{study.path} has no finished run to report on. {said}")
    remarks: list[str] = []
    gains = {}
    for arm in (arm for arm in study.arms if arm != study.baseline):
        for level in study.levels:
            for figure in FIGURES:
                if (found := _gain(study, sheets, arm, level, figure)) is not None:
                    gains[arm, level, figure] = found[0]
                    if found[1]:
                        remarks.append(
                            f"{arm} and {study.baseline} were not asked all the same {figure} questions: "
                            f"{found[1]:,} that some runs lack are left out of the difference."
                        )
    lonely = [arm for arm in study.arms if len({seed for one, _, seed in sheets if one == arm}) == 1]
    if lonely:
        remarks.append(f"With one seed, nothing is known about seeds: {', '.join(lonely)}.")
    return Findings(
        study,
        whole(study, sheets),
        parts(study, sheets),
        {arm: rows for arm in study.arms if (rows := settings(study, sheets, arm))},
        _verdicts(study, sheets, gains),
        gains,
        rule(study),
        missing,
        remarks,
    )


def rule(study: StudyFile) -> str:
    """How a verdict comes about, in words."""
    tests = len(study.claims) * len(study.levels)
    counted = f"the {tests} that are tested here" if tests != 1 else "one test"
    return (
        f"{REPRODUCED}: {study.baseline} answers more of the same questions than the system it is compared with, with "
        f"p < {ALPHA:g} over seeds and questions, corrected for {counted} (Holm). {NOT_REPRODUCED}: it answers fewer, "
        f"with such a p. {UNDECIDED}: anything else, one seed alone among it."
    )


def _gain(study: StudyFile, sheets: Sheets, arm: str, level: str, figure: str) -> tuple[Gain, int] | None:
    """How much more the baseline answers than an arm, with the seeds that both have; how many questions some lack."""
    seeds = _both(study, sheets, arm, level, figure)
    if not seeds:
        return None
    ours, others = ([sheets[one, level, seed] for seed in seeds] for one in (study.baseline, arm))
    a, b, lacking = aligned(ours, others, of_figure(figure))
    return (gain(a, b), lacking) if a.size else None


def _both(study: StudyFile, sheets: Sheets, arm: str, level: str, figure: str) -> list[int]:
    def has(one: str, seed: int) -> bool:
        return any(asked.figure == figure for asked in sheets[one, level, seed].values())

    shared = set(seeds_of(sheets, study.baseline, level)) & set(seeds_of(sheets, arm, level))
    return sorted(seed for seed in shared if has(study.baseline, seed) and has(arm, seed))


def _verdicts(study: StudyFile, sheets: Sheets, gains: Mapping[tuple[str, str, str], Gain]) -> list[Verdict]:
    pairs = [(level, claim) for level in study.levels for claim in study.claims]
    found = [gains.get((claim.against, level, claim.figure)) for level, claim in pairs]
    corrected = holm([one.p if one is not None and one.seeds > 1 else math.nan for one in found])
    verdicts = []
    for (level, claim), one, p in zip(pairs, found, corrected, strict=True):
        by_seed = {}
        for seed in _both(study, sheets, claim.against, level, claim.figure):
            ours, others = (
                share(sheets[arm, level, seed], of_figure(claim.figure)) for arm in (study.baseline, claim.against)
            )
            by_seed[seed] = (ours or 0.0) - (others or 0.0)
        verdicts.append(Verdict(claim, level, one, by_seed, p, *_ruling(one, p)))
    return verdicts


def _ruling(found: Gain | None, corrected: float) -> tuple[str, str]:
    """The verdict, and in words what of the numbers decides it."""
    if found is None:
        return UNDECIDED, "No seed has finished with both systems."
    points = f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    if found.seeds == 1:
        return UNDECIDED, f"{points} over questions, p {found.p:.2g}; one seed says nothing about seeds."
    said = f"{points}, p {corrected:.2g} after correction"
    if corrected < ALPHA:
        return (REPRODUCED if found.value > 0 else NOT_REPRODUCED), f"{said}."
    most = f"a gain above {100 * found.high:.1f} points is unlikely" if found.high > 0 else "a gain is unlikely"
    return UNDECIDED, f"{said}: seeds and questions alone may make such a difference; {most}."
