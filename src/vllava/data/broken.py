"""Why a sample is broken: a line that is safe to show, and the traceback where the reason was not foreseen."""

from __future__ import annotations

import re
import traceback

from vllava.errors import UserError, reason

LINE = 1000  # characters of a reason at most; a message may quote what a record holds
TRACE = 4000  # of a traceback's end

# What a terminal may take for more than text, and what cannot be encoded.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, limit: int = LINE) -> str:
    """Text of a stranger in one line: what a terminal might obey is written as an escape."""
    line = _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode(), text[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def why(error: Exception) -> str:
    """The reason in words: a UserError's own, else what went wrong and that nobody foresaw it."""
    return printable(
        str(error) if isinstance(error, UserError) else f"unexpected {type(error).__name__}: {reason(error)}"
    )


def trace(error: Exception) -> str:
    """The traceback, if something unforeseen is behind the error; else an empty text."""
    if isinstance(error, UserError) and error.__cause__ is None:
        return ""
    text = "".join(traceback.format_exception(error))[-TRACE:]
    return text.encode("utf-8", "backslashreplace").decode()
