"""The replies that were paid for: a line each in a file that is only ever added to, found by what was asked."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllava.errors import UserError, reading, reason

FILE = "replies.jsonl"
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Reply:
    """What a judge said, the snapshot of its model that said so, and the tokens that it took, where it tells them."""

    text: str
    snapshot: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    structured: bool = False  # whether the endpoint was held to the schema


def key_of(asked: Mapping[str, Any]) -> str:
    """The key of a request: the SHA-256 of all that can decide the reply."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Store:
    """Replies by key in FOLDER/replies.jsonl. Raises UserError where that cannot be read or written.

    A line is written whole, at once and before anything else happens, so a kill loses none; it reaches the disk within
    a second of others. Lines that are cut are passed over: their requests are asked again. Several processes may add to
    one file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self._replies = _read(self.path)
        self._file: int | None = None
        self._synced = 0.0

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def __len__(self) -> int:
        return len(self._replies)

    def open(self) -> None:
        """Make ready to add, before anything is asked that could then not be kept."""
        if self._file is not None:
            return
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a kill cut the last line
                os.write(self._file, b"\n")

    def hold(self, key: str, reply: Reply) -> None:
        """Know a reply as long as this object is: one that cost nothing, or says nothing."""
        self._replies[key] = reply

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply; an empty one is only held."""
        self.hold(key, reply)
        if not reply.text.strip():
            return
        self.open()
        line = (json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n").encode(errors="replace")
        with _writing(self.path):
            assert self._file is not None
            while line:
                line = line[os.write(self._file, line) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            with _writing(self.path):
                os.fsync(self._file)
            os.close(self._file)
            self._file = None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The judge's replies cannot be kept in {path} ({reason(error)}). Nothing is asked that is not kept: make "
            "room there, or name another folder."
        ) from error


def _read(path: Path) -> dict[str, Reply]:
    if not path.exists():
        return {}
    replies = {}
    with reading(f"The judge's earlier replies in {path}"), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                given = json.loads(line)
                key, reply = given.pop("key"), Reply(**given)
                if isinstance(key, str) and isinstance(reply.text, str) and isinstance(reply.snapshot, str):
                    replies[key] = reply
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
    return replies
