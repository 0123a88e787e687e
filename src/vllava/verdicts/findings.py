"""What a study found, as numbers: figures over seeds, differences to the baseline, a verdict for each claim."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllava.errors import UserError
from vllava.verdicts.answers import FIGURES, Wanted, aligned, of_figure, of_types, share
from vllava.verdicts.figures import Figure, Sheets, left_out, parts, read_sheets, seeds_of, settings, whole
from vllava.verdicts.statistics import ALPHA, LEVEL, Gain, Spread, gain, holm
from vllava.verdicts.study_file import Claim, StudyFile

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "undecided at this size"


@dataclass(frozen=True)
class Verdict:
    """What becomes of a claim at a level. gain: None where no seed has both arms. corrected: p by Holm's method.

    by_seed: seed -> gain.
    """

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
    asked = {level: x for level, x in study.levels.items() if any(run.level == level for run in study.runs)}
    some = asked and asked != study.levels
    study = replace(study, levels=asked or study.levels)
    sheets, missing = read_sheets(study)
    if not sheets:
        said = " ".join(missing) or "It has no runs."
        raise UserError(f"{study.path} has no finished run to report on. {said}")
    remarks = [f"Of its levels the study was run at {', '.join(asked)} alone."] if some else []
    gains = {}
    for arm in (arm for arm in study.arms if arm != study.baseline):
        for level in study.levels:
            for figure in FIGURES:
                found = _gain(sheets, study.baseline, arm, level, of_figure(figure))
                if found is not None:
                    gains[arm, level, figure] = found[0]
                if found is not None and found[1]:
                    remarks.append(
                        f"{arm} and {study.baseline} were not asked all the same {figure} questions: {found[1]:,} that "
                        f"some runs lack are left out of the difference."
                    )
    lonely = [arm for arm in study.arms if len({seed for one, _, seed in sheets if one == arm}) == 1]
    if lonely:
        remarks.append(f"With one seed, nothing is known about seeds: {', '.join(lonely)}.")
    nowhere = [level for level, x in study.levels.items() if x is None]
    if nowhere and len(study.levels) > 1:
        remarks.append(f"Where on the axis it stands is not known of {', '.join(nowhere)}: in the tables alone.")
    figures = whole(study, sheets)
    within, total = left_out(figures)
    if total:
        remarks.append(
            f"Each seed left out in turn, {within} of {total} figures lie where the others expect one more seed; "
            f"{100 * LEVEL:.0f} % should."
        )
    verdicts = [one for level in study.levels for one in _verdicts(study, sheets, level)]
    verdicts.sort(key=lambda one: study.claims.index(one.claim))  # a claim's levels beside one another
    return Findings(
        study,
        figures,
        parts(study, sheets),
        {arm: rows for arm in study.arms if (rows := settings(study, sheets, arm))},
        verdicts,
        gains,
        rule(study),
        missing,
        remarks,
    )


def rule(study: StudyFile) -> str:
    """How a verdict comes about, in words."""
    tests = f"{len(study.claims)} tests made {'here' if len(study.levels) == 1 else 'at each level'}"
    return (
        f"{REPRODUCED}: the system that the claim calls better answers more of the same questions than the other, with "
        f"p < {ALPHA:g} over seeds and questions, corrected by Holm's method for the {tests}. "
        f"{NOT_REPRODUCED}: it answers fewer, with such a p. {UNDECIDED}: anything else, one seed alone among it."
    )


def _gain(sheets: Sheets, ours: str, other: str, level: str, wanted: Wanted) -> tuple[Gain, int] | None:
    """How much more an arm answers than another, with the seeds that both have; how many questions some lack."""
    seeds = _both(sheets, ours, other, level, wanted)
    if not seeds:
        return None
    mine, others = ([sheets[arm, level, seed] for seed in seeds] for arm in (ours, other))
    a, b, lacking = aligned(mine, others, wanted)
    return (gain(a, b), lacking) if a.size else None


def _both(sheets: Sheets, ours: str, other: str, level: str, wanted: Wanted) -> list[int]:
    """The seeds with which both were asked such questions."""
    shared = set(seeds_of(sheets, ours, level)) & set(seeds_of(sheets, other, level))
    return sorted(
        seed for seed in shared if all(any(map(wanted, sheets[arm, level, seed].values())) for arm in (ours, other))
    )


def _verdicts(study: StudyFile, sheets: Sheets, level: str) -> list[Verdict]:
    """The verdicts at a level, each p corrected for all that are tested there."""
    found: list[tuple[Gain | None, dict[int, float]]] = []
    for claim in study.claims:
        wanted = of_types(claim.medium, claim.types) if claim.types else of_figure(claim.medium)
        one = _gain(sheets, claim.better, claim.worse, level, wanted)
        shares = {
            seed: [share(sheets[arm, level, seed], wanted) or 0.0 for arm in (claim.better, claim.worse)]
            for seed in _both(sheets, claim.better, claim.worse, level, wanted)
        }
        found.append((one[0] if one is not None else None, {seed: a - b for seed, (a, b) in shares.items()}))
    corrected = holm([one.p if one is not None and one.seeds > 1 else math.nan for one, _ in found])
    return [
        Verdict(claim, level, one, by_seed, p, *_ruling(one, p))
        for claim, (one, by_seed), p in zip(study.claims, found, corrected, strict=True)
    ]


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
    chance = "among so many tests" if found.p < ALPHA else "by seeds and questions alone"
    return UNDECIDED, f"{said}: {chance} such a difference may come about; {most}.{_what_helps(found)}"


def _what_helps(found: Gain) -> str:
    """What would narrow the interval of an undecided gain."""
    if math.isnan(found.by_seeds):
        return ""
    more = "seeds" if found.by_seeds > 0.5 else "questions"
    return f" {100 * found.by_seeds:.0f} % of its variance is between seeds: more {more} would narrow it."
