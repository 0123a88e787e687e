"""How much of each source an epoch holds: all of it once, so many times over, or a share of the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllava.data.address import shown
from vllava.errors import UserError

FORM = "data.mixture={NAME: TIMES, NAME: {repeats: TIMES}, NAME: {weight: SHARE}}"


@dataclass(frozen=True)
class Source:
    """A folder of shards, named for a modality."""

    modality: str
    folder: str


@dataclass(frozen=True)
class Portion:
    """What an epoch holds of a source: so many times all its samples, or a weight, its share of the epoch."""

    repeats: Fraction = Fraction(1)
    weight: Fraction | None = None


def portions(mixture: Mapping[str, Any] | None, sources: Sequence[Source]) -> list[Portion]:
    """The portion of each source as `mixture` says; raises UserError for a name that is none, or means several.

    A name is a modality, which means all its sources, or a folder, or the end of one: `mine` is `s3://bucket/mine`.
    """
    found = [Portion()] * len(sources)
    named: dict[int, str] = {}
    for name, said in (mixture or {}).items():
        portion = _portion(str(name), said)
        for number in _named(str(name), sources):
            if number in named:
                raise UserError(
                    f"data.mixture speaks of {shown(sources[number].folder)} twice, as {shown(named[number])!r} and as "
                    f"{shown(str(name))!r}."
                )
            named[number] = str(name)
            found[number] = portion
    return found


def _named(name: str, sources: Sequence[Source]) -> list[int]:
    if of_kind := [number for number, source in enumerate(sources) if source.modality == name]:
        return of_kind
    wanted = shown(name).removesuffix("?…").rstrip("/")
    folders = [shown(source.folder).removesuffix("?…").rstrip("/") for source in sources]
    matches = [n for n, folder in enumerate(folders) if folder == wanted]
    matches = matches or [n for n, folder in enumerate(folders) if folder.endswith(f"/{wanted}")]
    if len(matches) != 1:
        what = "no source of this run" if not matches else f"{len(matches)} sources of this run"
        known = ", ".join(dict.fromkeys([*(s.modality for s in sources), *folders]))
        raise UserError(f"data.mixture names {shown(name)!r}, which is {what}. There are: {known}. The form is {FORM}.")
    return matches


def _portion(name: str, said: Any) -> Portion:
    given = said if isinstance(said, Mapping) else {"repeats": said}
    if len(given) != 1 or not set(given) <= {"repeats", "weight"}:
        raise UserError(f"data.mixture says {said!r} of {name!r}: the form is {FORM}.")
    [(what, value)] = given.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise UserError(f"data.mixture says {what} {value!r} of {name!r}: a number from 0.")
    exact = Fraction(str(value))
    return Portion(repeats=exact) if what == "repeats" else Portion(weight=exact)


def draws(shares: Sequence[Portion], sizes: Sequence[int]) -> list[int]:
    """How many samples of each source an epoch holds, from the sources' sizes.

    Sources without a weight give their repeats, and weights are shares of the whole epoch: what is left of 1 is theirs.
    Where all have one, weights are relative, and an epoch is as long as the sources are together. Raises UserError
    where weights leave no room for the other sources, or nothing is left.
    """
    fixed = sum(round(s.repeats * size) for s, size in zip(shares, sizes, strict=True) if s.weight is None)
    weights = sum((s.weight for s in shares if s.weight is not None), Fraction(0))
    if fixed and weights >= 1:
        raise UserError(
            f"The weights of data.mixture add up to {float(weights):g}, and leave no room for the sources without one: "
            "they are shares of an epoch, below 1 together, unless all sources have one."
        )
    whole = fixed / (1 - weights) if fixed else sum(size for s, size in zip(shares, sizes, strict=True) if s.weight)
    unit = Fraction(whole) if fixed else Fraction(whole) / (weights or 1)
    taken = [
        round(s.repeats * size) if s.weight is None else (round(s.weight * unit) if size else 0)
        for s, size in zip(shares, sizes, strict=True)
    ]
    if not sum(taken):
        raise UserError("data.mixture leaves nothing of any source.")
    return taken
