"""The states that an unfinished run goes on from: the two newest, each whole or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vllava.errors import UserError, reason

log = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"step-(\d{8,})")


class Generations:
    """States in a folder: `step-00000120`, a file or a folder, and beside it `step-00000120.json`, its record.

    A state is written under a name that ends in .part, synced and renamed; then its record is written in the same
    way: the size and the CRC-32 of each of its files. What has no record was not finished. Both raise OSError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unfinished(self, step: int) -> Path:
        """Where to write the state after `step`, for `finish`."""
        return self.folder / f"step-{step:08d}.part"

    def prepare(self) -> None:
        """Make the folder, and room in it: what was not finished is removed. One process calls it, before a save.

        The folder it lies in has to be there: where that of a run is gone, so is the disk that it was on.
        """
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.iterdir():
            if re.fullmatch(rf"{_NAME.pattern}(\.json)?\.part", path.name):
                remove(path)

    def finish(self, unfinished: Path) -> None:
        """Make a state that was written to `unfinished` the newest, and remove all but the two newest.

        Done when it would outlast a loss of power. One process calls it, when all have written.
        """
        final = unfinished.with_suffix("")
        files = _files(unfinished)
        with ThreadPoolExecutor(8) as threads:  # the work of both is done outside Python
            list(threads.map(_sync, [unfinished / name for name in files]))
            sums = list(threads.map(_crc32, [unfinished / name for name in files]))
        for folder in [unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())]:
            if folder.is_dir():
                _sync(folder)
        record = _record_of(final)
        record.unlink(missing_ok=True)  # of a damaged one, of the same step
        remove(final)
        sizes = [(unfinished / name).stat().st_size for name in files]
        listed = {
            name: {"bytes": size, "crc32": crc} for name, size, crc in zip(map(str, files), sizes, sums, strict=True)
        }
        os.rename(unfinished, final)
        _sync(self.folder)
        part = record.with_name(f"{record.name}.part")
        part.write_text(json.dumps({"version": 1, "files": listed}, indent=1) + "\n")
        _sync(part)
        os.rename(part, record)
        _sync(self.folder)
        self._prune()

    def steps(self) -> list[int]:
        """The steps of what is there, newest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name.removesuffix(".json")) for path in self.folder.iterdir())
        return sorted({int(match[1]) for match in found if match}, reverse=True)

    def newest(self) -> list[Path]:
        """The whole states, newest first, after a warning for each that is damaged; empty where a run has saved none.

        Raises UserError where all are damaged.
        """
        whole: list[Path] = []
        damaged: list[str] = []
        recorded = False
        for step in self.steps():
            path = self.folder / f"step-{step:08d}"
            if wrong := damage(path):
                damaged.append(wrong)
                recorded |= _record_of(path).exists()
                log.warning("%s: this state of the run is left out", wrong)
            else:
                whole.append(path)
        if recorded and not whole:  # without a record it is a first save that was interrupted
            raise UserError(
                f"No state of the unfinished run in {self.folder.parent} is whole: {'; '.join(damaged)}. Put back a "
                f"copy of one if there is any, or delete {self.folder} to train from the first step again."
            )
        return whole

    def kept(self) -> str:
        """A sentence on what a run would go on from; empty if there is nothing."""
        whole = (step for step in self.steps() if not damage(self.folder / f"step-{step:08d}", quick=True))
        step = next(whole, None)
        return "" if step is None else f"The state after step {step} is in {self.folder}."

    def clear(self) -> None:
        """Remove all states: the run has ended. The folder goes, unless somebody has put something into it."""
        for step in self.steps():
            path = self.folder / f"step-{step:08d}"
            _record_of(path).unlink(missing_ok=True)
            remove(path)
        if self.folder.is_dir():
            self.prepare()
        with suppress(OSError):
            self.folder.rmdir()

    def _prune(self) -> None:
        kept = 0
        for step in self.steps():
            path = self.folder / f"step-{step:08d}"
            if kept < KEPT and not damage(path, quick=True):
                kept += 1
                continue
            _record_of(path).unlink(missing_ok=True)
            remove(path)


def damage(path: Path, quick: bool = False) -> str | None:
    """What is wrong with a state, in words that name the file; None where it is whole. quick: by sizes alone."""
    record = _record_of(path)
    try:
        listed = json.loads(record.read_text())["files"]
        wanted = {Path(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{path} has no record {record.name}, as if its save had been interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{record} is damaged ({reason(error)})"
    try:
        for name, (size, _) in wanted.items():
            if (found := (path / name).stat().st_size) != size:
                return f"{path / name} is damaged (it has {found} bytes of {size})"
        with ThreadPoolExecutor(8) as threads:
            names = [] if quick else list(wanted)
            for name, crc in zip(names, threads.map(_crc32, [path / name for name in names]), strict=True):
                if crc != wanted[name][1]:
                    return f"{path / name} is damaged (its checksum is another)"
    except OSError as error:
        return f"{path} is damaged ({reason(error)})"
    return None


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _files(path: Path) -> list[Path]:
    """The files of a state, by their names below it; a state that is a file is its own only one, named `.`."""
    if not path.is_dir():
        return [Path()]
    return sorted(found.relative_to(path) for found in path.rglob("*") if found.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which some network file systems cannot sync
            raise
    finally:
        os.close(handle)


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            crc = zlib.crc32(block, crc)
    return crc


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
