"""Rows of JSON files, one in memory at a time: a list, a list inside an object, or JSON lines, plain or gzipped."""

from __future__ import annotations

import codecs
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllava.errors import UserError, reading, reason

CHUNK = 2**20  # bytes read at a time
ROW_BYTES = 2**29  # of a row, media in it included: as much as a sample may have
_DECODER = json.JSONDecoder(strict=False)  # raw tabs and line ends in texts are accepted
_BETWEEN = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")


def json_rows(path: Path, key: str = "") -> Iterator[tuple[str, Any]]:
    """(where in the file, row, whatever JSON it is, or the UserError that says why it is none) of a JSON file.

    "row 16" of a list counts from 0, "line 17" of JSON lines from 1. `key` says which list of an object is meant.
    Bytes that are not UTF-8 become halves of surrogate pairs, so that only their own row is lost. Raises UserError
    where the rest of the file cannot be read.
    """
    with reading(f"{path}", "Is it cut or damaged? Copy or download it again."), _opened(path) as file:
        head = file.read(CHUNK)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{path} is text in UTF-16. Save it as UTF-8.")
        start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        by_name = not {".jsonl", ".ndjson"}.isdisjoint(path.suffixes)
        if start == b"[":
            text = _Text(path, file)
            yield from _items(text)
            if text.peek():
                raise UserError(f"{path} goes on after its list of rows. Mend it: one file holds one list.")
        elif start and by_name:
            yield from _lines(file)
        elif start != b"{":
            raise UserError(
                f"{path} is no file of rows: it is {'empty' if not start else 'neither JSON nor Parquet nor Arrow'}."
            )
        elif key or not _begins_with_a_line(file):
            yield from _items(_find_list(_Text(path, file), key))
        else:
            yield from _lines(file)


def json_count(path: Path, key: str = "") -> int:
    """How many rows a JSON file has. Lists are parsed for it: about four seconds a gigabyte."""
    return sum(1 for _ in json_rows(path, key))


def _opened(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else open(path, "rb")  # type: ignore[return-value]


# --- JSON lines -------------------------------------------------------------------------------------------------------


def _begins_with_a_line(file: IO[bytes]) -> bool:
    """Whether the first line that is not empty is a whole JSON object; the file is left where it was."""
    before = file.tell()
    try:
        line = b""
        while not line.strip():
            line = file.readline(ROW_BYTES)
        _DECODER.decode(line.decode("utf-8", "surrogateescape").strip())
    except ValueError:
        return False
    finally:
        file.seek(before)
    return True


def _lines(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(ROW_BYTES):
        number += 1
        where = f"line {number}"
        if not line.endswith(b"\n") and len(line) == ROW_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
                pass
            yield where, UserError(f"the line is longer than {ROW_BYTES:,} bytes")
            continue
        text = line.decode("utf-8", "surrogateescape").strip().rstrip("\0")
        if not text:
            continue
        try:
            yield where, _DECODER.decode(text)
        except (ValueError, RecursionError) as error:  # no JSON; too long a number; too deep
            place = (
                f"{error.msg}, at character {error.pos}" if isinstance(error, json.JSONDecodeError) else reason(error)
            )
            yield where, UserError(f"the line is no JSON: {place}")


# --- lists ------------------------------------------------------------------------------------------------------------


class _Text:
    """The text of a file with a place in it: what lies before the place is forgotten, what lies after it read on."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._place = 0
        self._ended = False

    def peek(self, between: re.Pattern[str] = _SPACE) -> str:
        """The character at the next place that is not `between`, or '' at the end of the file."""
        while True:
            self._place = between.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Go over one character."""
        self._place += 1

    def value(self, what: str) -> Any:
        """The JSON value that begins here, and go over it. Raises UserError if there is none."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # What is cut ends at the end of what was read, give or take an escape; anything else is wrong already.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if not (cut and self._more()):
                    raise self._broken(what, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._broken(what, reason(error)) from error
            else:
                if end < len(self._text) or not self._more():  # else a number may go on
                    self._place = end
                    return value

    def _more(self) -> bool:
        """Read on; False at the end of the file. The more a value has taken, the more is read."""
        rest = self._text[self._place :]
        if self._ended or len(rest) > ROW_BYTES:
            return False
        data = self._file.read(max(CHUNK, len(rest)))
        self._ended = not data
        self._text, self._place = rest + self._decoder.decode(data, final=self._ended), 0
        return not self._ended

    def _broken(self, what: str, why: str) -> UserError:
        byte = self._file.tell() - len(self._text) + self._place
        ends = "the file ends there" if self._ended else f"near byte {byte:,}"
        return UserError(
            f"{self.path} cannot be read from {what} on ({why}; {ends}): it is cut or damaged, or was not written by a "
            "JSON library. Copy or download it again, or mend it there."
        )


def _items(text: _Text) -> Iterator[tuple[str, Any]]:
    """The items of the list that begins here. Superfluous commas are passed over."""
    text.peek()
    text.skip()
    number = 0
    while (character := text.peek(_BETWEEN)) != "]":
        if not character:
            raise UserError(
                f"{text.path} ends after row {number - 1}, before its list does: copy or download it again."
            )
        yield f"row {number}", text.value(f"row {number}")
        number += 1
    text.skip()


def _find_list(text: _Text, key: str) -> _Text:
    """The place of the list under `key` of the object that begins here; raises UserError where there is none."""
    text.peek()
    text.skip()
    keys = []
    while text.peek(_BETWEEN) == '"':
        found = text.value("its keys")
        if text.peek() != ":":
            break
        text.skip()
        opening = text.peek()
        if opening == "[" and found == key:
            return text
        if opening == "[" and not key:
            raise UserError(
                f"{text.path} is one object, and rows may be under its key {found!r}: if so, add rows={found}."
            )
        keys.append(found)
        text.value(f"its key {found!r}")
    named = ", ".join(map(repr, keys[:12])) or "none"
    raise UserError(
        f"{text.path} is one object without a list of rows{f' under {key!r}' if key else ''}; its keys: {named}."
    )
