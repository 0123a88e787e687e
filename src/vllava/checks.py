"""What values a setting may have: types from the signatures of what is configured, ranges written beside them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from vllava.errors import UserError

MISSING = "???"  # what OmegaConf writes for a value that is still to be given
_NUMBERS = {int: "a whole number", float: "a number"}
_CONTAINERS = {list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; `above` and `below` leave the ends out."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        left = value > self.least if self.above else value >= self.least
        return left and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        left = "" if self.least == -math.inf else f" {'above' if self.above else 'from'} {self.least:,}"
        right = "" if self.most == math.inf else f" to {'below ' if self.below else ''}{self.most:,}"
        return left + right


@dataclass(frozen=True, eq=False)
class OneOf:
    """The names that there are, now: a list that grows is asked when a value is checked."""

    names: Collection[str]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


# Types for signatures: `global_batch: Count` says what the number may be, to readers and to `require`.
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelowOne = Annotated[float, Range(0, 1, below=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def require(where: str, value: Any, hint: Any) -> None:
    """Raises UserError, which names the key, what it is and what is possible, unless a value is of a type.

    hint: as in a signature, `Annotated` with a Range or OneOf where not all values of a type are possible. Types that
    say nothing about a plain value (classes of models, callables) take any node that has a `_target_`. "???" passes:
    what is missing is another's to say.
    """
    if found := _problem(where, value, hint):
        raise UserError(found)


def require_all(where: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """`require` for each of the values that has a hint."""
    for key, value in values.items():
        if key in hints:
            require(f"{where}.{key}" if where else key, value, hints[key])


def hints_of(target: Any) -> dict[str, Any]:
    """The types of a callable's parameters, with what is annotated."""
    return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)


def _problem(where: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value, as a message; None if nothing is."""
    hint = hint.__value__ if hasattr(hint, "__value__") else hint
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, (str, typing.TypeVar)) or (isinstance(value, str) and value == MISSING):
        return None
    if origin is Annotated:
        return _problem_of_annotated(where, value, hint)
    if origin in (Union, types.UnionType):
        kinds = typing.get_args(hint)
        said = [one for one in kinds if dataclasses.is_dataclass(one)] if isinstance(value, Mapping) else []
        found = {one: _problem(where, value, one) for one in said or kinds}  # a dataclass says more than a mapping
        if None in found.values():
            return None
        near = [message for one, message in found.items() if type(value) is _plain(one) and message]
        return near[0] if len(near) == 1 else _message(where, value, hint)
    if origin is Literal:
        fits = any(type(one) is type(value) and one == value for one in typing.get_args(hint))
        return None if fits else _message(where, value, hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _problem_of_dataclass(where, value, hint)
    plain = _plain(hint)
    if plain is None:
        return _message(where, value, hint) if _is_plain(value) else None
    if type(value) is not plain and not (plain is float and type(value) is int):
        return _message(where, value, hint)
    if isinstance(value, float) and not math.isfinite(value):
        return _message(where, value, hint)
    return _problem_inside(where, value, hint)


def _problem_of_annotated(where: str, value: Any, hint: Any) -> str | None:
    base, *limits = typing.get_args(hint)
    if _problem(where, value, base):
        return _message(where, value, hint)
    for limit in limits:
        holds = limit.holds(value) if isinstance(limit, Range) else value in limit.names
        if not holds:
            return _message(where, value, hint)
    return None


def _problem_of_dataclass(where: str, value: Any, hint: Any) -> str | None:
    if isinstance(value, hint):
        return None
    if not isinstance(value, Mapping):
        return _message(where, value, hint)
    hints = typing.get_type_hints(hint, include_extras=True)
    for field in dataclasses.fields(hint):
        bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if bare and field.name not in value:
            return f"{where}.{field.name} is missing: {possible(hints[field.name])}."
    problems = (_problem(f"{where}.{key}", one, hints[key]) for key, one in value.items() if key in hints)
    return next((problem for problem in problems if problem), None)


def _problem_inside(where: str, value: Any, hint: Any) -> str | None:
    """What is wrong with the items of a list or mapping."""
    inner = typing.get_args(hint)
    if isinstance(value, list) and typing.get_origin(hint) is tuple and Ellipsis not in inner:
        if len(value) != len(inner):
            return _message(where, value, hint)
        items = [(f"{where}[{number}]", *pair) for number, pair in enumerate(zip(value, inner, strict=True))]
    elif isinstance(value, list) and inner:
        items = [(f"{where}[{number}]", item, inner[0]) for number, item in enumerate(value)]
    elif isinstance(value, Mapping) and len(inner) == 2:
        items = [(f"{where}.{key}", item, inner[1]) for key, item in value.items()]
    else:
        return None
    return next((problem for item in items if (problem := _problem(*item))), None)


def _plain(hint: Any) -> type | None:
    """The type that a value of a configuration has where a hint is wanted; None for what is made of a node."""
    origin = typing.get_origin(hint)
    kind = _plain(typing.get_args(hint)[0]) if origin is Annotated else origin or hint
    if kind is None or kind is type(None):
        return type(None)
    if kind in (bool, int, float, str):
        return kind
    if kind in (Path, os.PathLike):
        return str
    if kind in (list, tuple) or (isinstance(kind, type) and kind in (Sequence, Collection)):
        return list
    if kind in (dict, Mapping) or dataclasses.is_dataclass(kind):
        return dict
    return None


def _is_plain(value: Any) -> bool:
    """Whether nothing can be made of a value: it is no node, nor a list of them, nor an object already."""
    return value is None or isinstance(value, (bool, int, float, str))


def _message(where: str, value: Any, hint: Any) -> str:
    text = f"{where} is {_what(value, hint)}, but must be {possible(hint)}."
    kinds = _kinds(hint)
    if str in kinds and type(value) in (int, float, bool) and not where.endswith("]"):
        text += f""" Quotes make a text of it: '{where}="{written(value)}"'"""
    if int in kinds and isinstance(value, float) and math.isfinite(value) and value == int(value):
        text += f" Write {int(value)}."
    if list in kinds and isinstance(value, str):
        text += f" Write {where}=[{value}]."
    return text


def _kinds(hint: Any) -> list[type | None]:
    """The plain types of a type, of each part of a union; none of a choice of names."""
    if typing.get_origin(hint) is Annotated and isinstance(typing.get_args(hint)[1], OneOf):
        return []
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return [kind for one in typing.get_args(hint) for kind in _kinds(one)] if union else [_plain(hint)]


def _what(value: Any, hint: Any) -> str:
    """A value, with the word for its type where that is what is wrong. Contents of mappings may be secret."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, str):
        shown = value if len(value) <= 60 else f"{value[:57]}…"
        return repr(shown) if _plain(hint) is str or str in _kinds(hint) else f"the text {shown!r}"
    if isinstance(value, list):
        shown = written(value)
        return shown if len(shown) <= 60 and not any(isinstance(v, Mapping) for v in value) else "a list"
    return written(value)


def written(value: Any) -> str:
    """A value as a configuration writes it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def possible(hint: Any) -> str:
    """What values a type has, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        base, *limits = inner
        if isinstance(limits[0], OneOf):
            return str(limits[0])
        return possible(base) + "".join(map(str, limits))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(possible, inner)))
    if origin is Literal:
        return f"one of {', '.join(map(written, inner))}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    kind = _plain(hint)
    if kind is list and inner and origin is tuple and Ellipsis not in inner:
        parts = list(dict.fromkeys(map(possible, inner)))
        return f"a list of {len(inner)}: each {parts[0]}" if len(parts) == 1 else f"a list of {' and '.join(parts)}"
    if kind is list and inner and inner[0] is not Any:
        return f"a list, each of it {possible(inner[0])}"
    named: dict[Any, str] = {type(None): "null", bool: "true or false", str: "a text", None: "a node with a _target_"}
    return {**named, **_NUMBERS, **_CONTAINERS}[kind]
