"""What a judge replied, read with tolerance: models write JSON, Python, prose, and things between."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"\{[^{}]*\}")
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_WORDS = {"true": "yes", "false": "no"}  # where a choice is between yes and no


@dataclass(frozen=True)
class Field:
    """A field of a reply: one of several words, or a number from `least` to `most`.

    A number outside is taken for the nearest one inside, or refused where it would mean another scale (`refuses`).
    whole: a whole number is asked for; a fraction that comes nevertheless is kept, not cut.
    """

    name: str
    one_of: tuple[str, ...] = ()
    least: float = 0.0
    most: float = 0.0
    whole: bool = False
    refuses: bool = False

    def __str__(self) -> str:
        """What it may be, for a judge to read."""
        if self.one_of:
            return "one of " + ", ".join(f'"{word}"' for word in self.one_of)
        return f"a {'whole ' if self.whole else ''}number from {self.least:g} to {self.most:g}"

    @property
    def schema(self) -> dict[str, Any]:
        if self.one_of:
            return {"type": "string", "enum": list(self.one_of)}
        return {"type": "integer" if self.whole else "number", "description": str(self)}

    @property
    def pattern(self) -> re.Pattern[str]:
        """Where a text says what it is: the name, a colon or an equals sign, the value; quotes as they come."""
        value = (
            "|".join(map(re.escape, (*self.one_of, *_WORDS))) + r"\b" if self.one_of else _NUMBER + r"(?![\w%/]|\.\d)"
        )
        return re.compile(rf"\b{re.escape(self.name)}\W{{0,3}}\s*[:=]\s*[\"'*]*({value})", re.IGNORECASE)

    def value(self, given: object) -> str | float | None:
        """What a reply means by this field; None where it means nothing."""
        return self._word(given) if self.one_of else self._number(given)

    def _word(self, given: object) -> str | None:
        first = re.match(r"\W*(\w+)", str(given).lower())
        word = first[1] if first else ""
        word = _WORDS.get(word, word) if {"yes", "no"} <= set(self.one_of) else word
        return word if word in self.one_of else None

    def _number(self, given: object) -> float | None:
        if isinstance(given, bool):
            return None
        try:
            number = float(given)  # type: ignore[arg-type]  # whatever it is
        except (TypeError, ValueError, OverflowError):
            return None
        inside = self.least <= number <= self.most
        if not math.isfinite(number) or (self.refuses and not inside):
            return None
        return min(max(number, self.least), self.most)


def parsed(reply: str, fields: Sequence[Field], numbers: bool = False) -> dict[str, str | float] | None:
    """The fields of a reply; None where it does not have all of them.

    What a model thinks aloud before `</think>` is not its reply. numbers: the first line begins with one for each
    field. Else the first {…} with all fields counts, as JSON or as Python, a doubled quote for a single one; without
    any, what the text says of each field ("score: 4"), or a reply that is nothing but the numbers.
    """
    text = reply.rpartition("</think>")[2].strip()
    if numbers:
        return _numbers(text, fields, strict=False)
    for block in _BLOCK.findall(text):
        if (found := _fields(_literal(block), fields)) is not None:
            return found
    return _said(text, fields) or _numbers(text, fields, strict=True)


def _fields(block: object, fields: Sequence[Field]) -> dict[str, str | float] | None:
    if not isinstance(block, dict):
        return None
    given = {str(key).strip().lower(): value for key, value in block.items()}
    return _complete({field.name: field.value(given.get(field.name)) for field in fields})


def _complete(found: dict[str, str | float | None]) -> dict[str, str | float] | None:
    kept = {name: value for name, value in found.items() if value is not None}
    return kept if len(kept) == len(found) else None


def _literal(block: str) -> object:
    for text in (block, re.sub(r"''|\"\"", lambda quotes: quotes[0][0], block)):
        for read in (json.loads, ast.literal_eval):
            try:
                return read(text)
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                continue
    return None


def _said(text: str, fields: Sequence[Field]) -> dict[str, str | float] | None:
    """What prose says of each field; nothing where it says two things of one."""
    found: dict[str, str | float | None] = {}
    for field in fields:
        values = {field.value(value) for value in field.pattern.findall(text)}
        found[field.name] = values.pop() if len(values) == 1 else None
    return _complete(found)


def _numbers(text: str, fields: Sequence[Field], strict: bool) -> dict[str, str | float] | None:
    """A number for each field, in their order, at the beginning of the first line; strict: and nothing else at all."""
    if any(field.one_of for field in fields) or not text:
        return None
    words = (text if strict else text.splitlines()[0]).replace(",", " ").split()
    if len(words) < len(fields) or (strict and len(words) > len(fields)):
        return None
    return _complete({field.name: field.value(word) for field, word in zip(fields, words, strict=False)})
