"""Answers on disk, by the ids of their questions: written as they come, so that whoever is stopped goes on from there.

In a run's folder, for a name such as `predictions`: `predictions.json` says what was asked, of which model and how;
`predictions/part-R.jsonl` takes the answers of process R, a line each; when all are there, `predictions.jsonl` has them
in the order of the questions, and the parts go.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllava.data.writing import appearing, write_json
from vllava.errors import UserError, reading

log = logging.getLogger(__name__)

Line = dict[str, str]  # {"id", "answer"}, or {"id", "broken"} with the reason


class Predictions:
    """The answers to one asking: `asked` says what is asked of what and how, and answers to anything else are not it.

    Only the first process of a run may call what writes, but for `append`.
    """

    def __init__(self, folder: Path, name: str, asked: Mapping[str, Any]) -> None:
        self.asked = json.loads(json.dumps(asked))  # as it is read again
        self.file = folder / f"{name}.jsonl"
        self.setting = folder / f"{name}.json"
        self.parts = folder / name

    def prepare(self) -> None:
        """Make room: what answers another asking is set aside, with a warning; nothing is deleted."""
        before = _read_setting(self.setting)
        if before != self.asked:
            if any(path.exists() for path in (self.file, self.parts)):
                self._set_aside(before)
            write_json(self.setting, self.asked)
        self.parts.mkdir(exist_ok=True)

    def _set_aside(self, before: Any) -> None:
        number = next(n for n in range(1, 10**6) if not self.parts.with_name(f"{self.parts.name}.other-{n}").exists())
        aside = self.parts.with_name(f"{self.parts.name}.other-{number}")
        aside.mkdir()
        for path in (self.file, self.setting, self.parts):
            if path.exists():
                os.replace(path, aside / path.name)
        log.warning(
            "%s holds answers to something else (%s): set aside in %s", self.parts, _unlike(before, self), aside
        )

    def read(self) -> dict[str, Line]:
        """Id -> line, of all that was answered so far; nothing where it answers another asking.

        A line that was cut when its process was killed is passed over: its question is asked again.
        """
        if _read_setting(self.setting) != self.asked:
            return {}
        files = [self.file, *sorted(self.parts.glob("part-*.jsonl"))]
        return {line["id"]: line for path in files if path.is_file() for line in _lines(path)}

    def append(self, rank: int, lines: Sequence[Line]) -> None:
        """Add the answers of a block to those of a process, all in one write."""
        path = self.parts / f"part-{rank}.jsonl"
        with open(path, "ab+") as file:  # flushed when it is closed
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            cut = size and file.read(1) != b"\n"  # the line before was being written when its process was killed
            file.write(b"\n" * bool(cut) + b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def finish(self, ids: Iterable[str]) -> None:
        """Write the answers in the order of the questions; the file appears whole. The parts go then."""
        said, listed = self.read(), list(ids)
        if lost := [id for id in listed if id not in said]:
            raise UserError(f"{len(lost)} questions have no answer, the first {lost[0]!r}: start the command again.")
        with appearing(self.file) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(said[id]) + "\n" for id in listed)
        shutil.rmtree(self.parts, ignore_errors=True)

    def take(self, runs: Path, ids: Sequence[str]) -> Path | None:
        """Take the answers of another run in which the same was asked and answered; returns its folder, if any.

        Not where there are answers already.
        """
        if any(path.exists() for path in (self.file, self.setting, self.parts)):
            return None
        for depth in ("*", "*/*"):
            for setting in sorted(runs.glob(f"{depth}/{self.setting.name}")):
                other = Predictions(setting.parent, self.parts.name, self.asked)
                if other.file == self.file or not other.file.is_file() or not set(ids) <= other.read().keys():
                    continue
                write_json(self.setting, self.asked)
                with appearing(self.file) as unfinished:
                    shutil.copyfile(other.file, unfinished)
                return setting.parent
        return None


def _lines(path: Path) -> Iterator[Line]:
    with reading(path, "Delete it to have its questions asked again."), open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("id"), str) and ("answer" in line or "broken" in line):
                yield line


def _read_setting(path: Path) -> Any:
    """What was asked; None where nothing says it, or nothing that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _unlike(before: Any, now: Predictions) -> str:
    """In what two askings differ, by the names of their settings."""
    if not isinstance(before, dict):
        return "nothing says to what"
    keys = [key for key in {**before, **now.asked} if before.get(key) != now.asked.get(key)]
    return "other " + ", ".join(keys)
