"""Copies of remote shards on this machine, shared by all its processes: each is fetched once, whole and verified."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from filelock import FileLock, Timeout

from vllava.data.address import RemotePath
from vllava.data.patience import RemoteUserError
from vllava.data.remote import ELSEWHERE, Store
from vllava.errors import UserError, reason

POLL = 0.1  # seconds between two looks at what others do


class ShardCache:
    """A folder of copies, of `most` bytes together; those used longest ago make room for new ones.

    A copy is written beside, verified, and then renamed, so that what has its name is whole. Other processes wait for
    the one that fetches a file. A file that is open stays readable when its copy makes room.
    """

    def __init__(self, folder: Path, most: int, store: Store) -> None:
        self.folder, self.most, self.store = folder, most, store

    def open(self, path: RemotePath, size: int | None = None, sha256: str | None = None) -> BinaryIO:
        """A copy of a file, open for reading; size, sha256: what its manifest lists.

        Without a checksum the server is asked for the file's state, which then stands for what it holds. Raises
        UserError where the file cannot be had, is not as listed, or there is no room for it.
        """
        if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256 := sha256.lower()):
            raise UserError(
                f"The checksum {sha256[:80]!r} that is listed for {path} is not a SHA-256 in hexadecimal digits."
            )
        key, size = self._key(path, size, sha256)
        try:
            copy = self.folder / f"{key}.copy"
            if file := _existing(copy, size):
                return file
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with self._turn(key):
                return _existing(copy, size) or self._fetched(path, size, sha256, copy)
        except (OSError, NotImplementedError) as error:
            raise UserError(
                f"The cache of shards {self.folder} cannot be used ({reason(error)}). {ELSEWHERE}"
            ) from error

    def _key(self, path: RemotePath, size: int | None, sha256: str | None) -> tuple[str, int]:
        """What a copy is called by, and its size: by its content, so that any address of the same file finds it."""
        if size is not None and sha256 is not None:
            return f"{sha256}-{size}", size
        state = self.store.state(path)
        if size is None:
            size = state.size
        if size is None:
            raise RemoteUserError(
                f"Neither the manifest nor the server says how many bytes {path} has, so that a cut would not show. "
                'List its "bytes" and its "sha256" in the manifest.'
            )
        if state.size is not None and state.size != size:
            raise RemoteUserError(
                f"{path} has {state.size} bytes, its manifest lists {size}: one of the two was replaced, or the file "
                "is still being written. Make the shard or its manifest again."
            )
        if sha256 is not None:
            return f"{sha256}-{size}", size
        known = json.dumps([path.identity, size, state.mark])
        return hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest(), size

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """Waits while another process fetches the file, as long as that one makes progress.

        The lock ends with its process. Some files share one, so that there are few. Where its holder stands still the
        file is fetched without it, which costs the transfer and harms nothing.
        """
        lock = FileLock(self.folder / "locks" / f"{hashlib.sha256(key.encode()).hexdigest()[:3]}.lock")
        settings = self.store.settings
        patience = 2 * settings.seconds * (settings.retries + 1)
        seen, until = self._written(), time.monotonic() + patience
        while True:
            try:
                lock.acquire(timeout=min(1.0, patience), poll_interval=POLL)
                break
            except Timeout:
                if (now := self._written()) != seen:
                    seen, until = now, time.monotonic() + patience
                if time.monotonic() > until:
                    break
        try:
            yield
        finally:
            lock.release()

    def _written(self) -> list[tuple[str, int]]:
        """When each unfinished file was last written to."""
        return sorted((part.name, found.st_mtime_ns) for part, found in _files(self.folder, ".part"))

    def _fetched(self, path: RemotePath, size: int, sha256: str | None, copy: Path) -> BinaryIO:
        part = copy.with_name(f"{uuid4().hex}.part")
        try:
            with self._reserved(part, size, path) as file:
                self.store.download(path, size, sha256, file)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(part, 0o444)
                result = open(part, "rb")  # noqa: SIM115
                os.replace(part, copy)  # others see it from now on, and may remove it
            return result
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _reserved(self, part: Path, size: int, path: RemotePath) -> Iterator[BinaryIO]:
        """An unfinished file that takes its whole size from the beginning, so that others reckon with it."""
        if size > self.most:
            raise UserError(
                f"{path} has {size:,} bytes, and data.cache.gigabytes={self.most / 1e9:g} is less. Allow more, or 0 to "
                "read samples one at a time, or make smaller shards."
            )
        settings = self.store.settings
        until = time.monotonic() + 2 * settings.seconds * (settings.retries + 1)
        while True:
            with FileLock(self.folder / "locks" / "room.lock", timeout=settings.seconds):  # held for moments
                if self._make_room(size):
                    file = open(part, "xb")  # noqa: SIM115
                    fcntl.flock(file, fcntl.LOCK_EX)  # ends with this process: an unfinished file without is nobody's
                    file.truncate(size)
                    break
            if time.monotonic() > until:
                raise UserError(
                    f"There is no room for {path}: {self.folder} is full of files that others are fetching. Allow "
                    f"more, data.cache.gigabytes={self.most / 1e9:g} is too few for all of this machine's processes."
                )
            time.sleep(POLL)
        with file:
            yield file

    def _make_room(self, size: int) -> bool:
        """Remove what crashed processes left, and the copies used longest ago; whether there is room then."""
        for part, _ in _files(self.folder, ".part"):
            with suppress(OSError), open(part, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
        parts = _files(self.folder, ".part")  # first: one that becomes a copy now is counted twice, not overlooked
        copies = sorted(_files(self.folder, ".copy"), key=lambda one: one[1].st_mtime_ns)
        taken = sum(found.st_size for _, found in (*copies, *parts))
        for copy, found in copies:
            if taken + size <= self.most:
                break
            copy.unlink(missing_ok=True)
            taken -= found.st_size
        return taken + size <= self.most


def _existing(copy: Path, size: int) -> BinaryIO | None:
    """A copy, which is marked as just used; None if there is none that is whole."""
    try:
        file = open(copy, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:  # somebody cut it
        file.close()
        copy.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # of another user's
        os.utime(file.fileno())
    return file


def _files(folder: Path, suffix: str) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.glob(f"*{suffix}"):
        with suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found
