"""The folder of a preparation: whose it is, whether another one is at work there, what was finished before."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.blocks import HELD_OUT, STATE, TRAIN
from vllava.data.shards import MANIFEST
from vllava.data.writing import write_json
from vllava.errors import UserError, reading, reason
from vllava.folders import entries, require_replaceable

MADE_BY = "data_prep.prepare"
REJECTS = "rejects.jsonl"
LOCK = ".prepare.lock"
PATIENCE = 2.0  # seconds in which the workers of a run that was killed are gone
WHOLE = 1 << 30  # bytes of an annotation file that are hashed; of a larger one, its ends
_SETTINGS = f"{STATE}/settings.json"
_OURS = re.compile(
    rf"{re.escape(LOCK)}|{re.escape(STATE)}(/.*)?|((train|held-out)(/|$))?"
    r"(((manifest\.json|rejects\.jsonl|\d{5,}\.tar(\.index)?)(\.\w+)?(\.part)?)|features/.*)?"
)


def parts(held_out: float) -> tuple[str, ...]:
    """The folders of shards within the folder."""
    return (TRAIN, HELD_OUT) if held_out else ("",)


@contextmanager
def workplace(folder: Path, settings: dict, inputs: Iterable[Path]) -> Iterator[bool]:
    """The folder, for one preparation alone; gives whether it is finished already.

    Raises UserError for a folder that holds what no preparation of these settings made, or in which one is at work.
    """
    require_replaceable(folder, inputs=inputs, not_ours=strangers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}).") from error
    with lock:
        _acquire(lock.fileno(), folder)
        require_replaceable(folder, inputs=inputs, not_ours=strangers)
        before = known_settings(folder)
        if before is not None and (changes := differences(before, settings)):
            raise UserError(
                f"{folder} was made with other settings: {'; '.join(changes)}. Name another folder, or delete this one."
            )
        finished = all(map(_manifest, (folder / part for part in parts(settings["held_out"]))))
        if not finished:
            with _writing(folder):
                for part in parts(settings["held_out"]):
                    (folder / STATE / part).mkdir(parents=True, exist_ok=True)
                    (folder / part).mkdir(exist_ok=True)
                if before is None:
                    write_json(folder / _SETTINGS, settings)
                remove_unfinished_files(folder)
        try:
            yield finished
        finally:
            with suppress(OSError):
                remove_unfinished_files(folder)


def close(folder: Path, made_something: bool = True) -> None:
    """Remove what is known of the blocks, when nothing is left to do; and what else we wrote, if that was nothing."""
    shutil.rmtree(folder / STATE, ignore_errors=True)
    if not made_something:
        for part in (TRAIN, HELD_OUT):
            with suppress(OSError):
                (folder / part).rmdir()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}).") from error


def _acquire(lock: int, folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # a network's disk that knows no locks
                return None
            if time.monotonic() > until:
                raise UserError(
                    f"Another preparation is at work in {folder}. Wait for it, or name another folder."
                ) from error
            time.sleep(0.1)


def strangers(folder: Path) -> list[str]:
    """What in a folder no preparation made, by name; all of it where nothing says that one was at work there."""
    names = entries(folder)
    if known_settings(folder) is None:
        return [name for name in names if name != LOCK and name.split("/")[0] != STATE]
    return [name for name in names if not _OURS.fullmatch(name)]


def remove_unfinished_files(folder: Path) -> None:
    """Remove what a killed process had begun to write."""
    for part in ("", TRAIN, HELD_OUT, *(f"{STATE}/{part}" for part in ("", TRAIN, HELD_OUT))):
        for path in (folder / part).glob("*.part"):
            path.unlink(missing_ok=True)


# --- settings ---------------------------------------------------------------------------------------------------------


def known_settings(folder: Path) -> dict | None:
    """The settings of the preparation that made a folder, finished or not; None where there was none."""
    for part in ("", TRAIN):
        if (manifest := _manifest(folder / part)) is not None:
            return manifest["settings"]
    with suppress(OSError, ValueError, AttributeError):
        settings = json.loads((folder / _SETTINGS).read_bytes())
        return settings if settings.get("made_by") == MADE_BY else None
    return None


def _manifest(folder: Path) -> dict | None:
    """The manifest of a finished preparation."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return manifest if manifest["settings"]["made_by"] == MADE_BY else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def differences(before: dict, now: dict) -> list[str]:
    """What of the settings differs, each with both values; files of annotations count by their contents alone."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in (*new, *(key for key in old if key not in new)) if key.split(".")[0] in now]
    return [
        f"{key}: {old.get(key, 'nothing')} before, {new.get(key, 'nothing')} now"
        for key in keys
        if old.get(key) != new.get(key) and not key.endswith(".changed")
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, (dict, list, tuple)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in _flat(item, f"{name}.{key}" if name else str(key)).items()}
    return {name: json.dumps(value, ensure_ascii=False)}


def fingerprints(files: Sequence[Path], known: Sequence[dict]) -> list[dict]:
    """Of each annotation file its name, size, time of change (ns) and SHA-256: taken as known where the rest is."""
    return [_fingerprint(file, known) for file in files]


def _fingerprint(file: Path, known: Sequence[dict]) -> dict:
    with reading(file):
        found = file.stat()
        said = {"file": str(file), "bytes": found.st_size, "changed": found.st_mtime_ns}
        for one in known:
            if {key: one.get(key) for key in said} == said:
                return dict(one)
        digest = hashlib.sha256()
        with open(file, "rb") as opened:
            for start, size in _stretches(found.st_size):
                opened.seek(start)
                while size and (piece := opened.read(min(size, 1 << 20))):
                    digest.update(piece)
                    size -= len(piece)
        return {**said, "sha256" if found.st_size <= WHOLE else "sha256_of_ends": digest.hexdigest()}


def _stretches(size: int) -> list[tuple[int, int]]:
    """Start and length of what is hashed of a file."""
    end = 1 << 26
    return [(0, size)] if size <= WHOLE else [(0, end), (size - end, end)]


def described(path: Any) -> Any:
    """Settings as JSON has them."""
    return json.loads(json.dumps(path, default=os.fspath))
