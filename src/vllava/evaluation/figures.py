"""The figures of held-out questions: accuracy by medium, source and question type, beside blind and chance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from vllava.evaluation.answers import Answer
from vllava.evaluation.report import KINDS

Sources = dict[str, dict[str, tuple[list[Answer], list[Answer]]]]  # medium -> source -> (with the medium, blind)
Groups = Mapping[str, Sequence[str]]  # name -> types of questions
NONE: Groups = MappingProxyType({})


def figures(asked: Sources, groups: Groups = NONE) -> dict:
    """The summary of each medium, of its sources and of its question types and groups of them."""
    metrics: dict = {}
    by_type: dict[str, dict] = {}
    for medium in (kind for kind in KINDS if kind in asked):
        parts = asked[medium]
        found = [answer for part, _ in parts.values() for answer in part]
        blind = [answer for _, part in parts.values() for answer in part]
        by_source = {name: summary(*part) for name, part in parts.items()}
        metrics[medium] = {**summary(found, blind), "by_source": by_source}
        by_type |= {f"{medium}/{kind}": value for kind, value in types(found, blind, groups).items()}
    return {**metrics, "by_type": by_type}


def summary(found: Sequence[Answer], blind: Sequence[Answer]) -> dict:
    """Accuracy with and without the media, chance, and the number of questions n: of those that have a true answer.

    How many have none is said where there are any, and how many could not be asked; where no question has one, there
    are no figures but None. Nothing is blind where nobody asked so, and there is no chance where no question names
    options to guess among.
    """
    scored = [answer for answer in found if answer.scored]

    def share(values: Iterable[float]) -> float | None:
        return round(sum(values) / len(scored), 4) if scored else None

    figures = {
        "accuracy": share(a.correct for a in scored),
        "blind": share(a.correct for a in blind) if blind else None,
        "chance": share(a.chance for a in scored) if any(a.options for a in scored) else None,
        "n": len(scored),
    }
    counts = {"unscored": len(found) - len(scored), "broken": sum(bool(answer.broken) for answer in found)}
    return {**figures, **{name: count for name, count in counts.items() if count}}


def types(found: Sequence[Answer], blind: Sequence[Answer], groups: Groups = NONE) -> dict[str, dict]:
    """The summary of each question type, and of each group of types together; blind: empty where nobody asked so."""
    listed = {kind: [kind] for kind in dict.fromkeys(answer.type for answer in found)} | dict(groups)
    chosen = {name: [n for n, answer in enumerate(found) if answer.type in kinds] for name, kinds in listed.items()}
    return {
        name: summary([found[n] for n in numbers], [blind[n] for n in numbers] if blind else [])
        for name, numbers in chosen.items()
        if numbers
    }


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
