"""One remote file, read from any place on: over HTTP, and through any other file system of fsspec.

Every answer has a time limit of its own, which holds whatever a server or a library does.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

T = TypeVar("T")
BLOCK = 1 << 16  # what a file system may read ahead


class RefusedError(Exception):
    """What trying again would not change."""


@dataclass(frozen=True)
class State:
    """What a server says of a file: its size, and a mark that changes with what it holds. None: it does not say."""

    size: int | None
    mark: str | None


class Stream(Protocol):
    """A file that is being read."""

    state: State
    position: int  # where reading begins: 0 where the server cannot begin elsewhere

    def read(self, size: int, seconds: float, arrived: list[bytes]) -> None:
        """Append the next `size` bytes to `arrived`, fewer at the end; what came before an error is there as well."""

    def close(self) -> None: ...


def within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns or raises; TimeoutError after so many seconds.

    The call has a thread of its own, which is left behind when it takes longer: a library's own limits may be absent,
    or not hold for all it does.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # raised again by who waits
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise _late(seconds) from None
    if error is not None:
        raise error
    return value


def _late(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer within {seconds:.3g} s")


class HttpStream:
    """The answer to one GET, for the bytes from `start` to `end`, or to the file's end.

    Asks for the bytes as they are, uncompressed. A server that knows no ranges sends the whole file: position is 0.
    """

    def __init__(self, fs: Any, url: str, start: int, end: int | None, seconds: float) -> None:
        self.fs, self.state, self.position = fs, State(None, None), start
        self._response: Any = None
        self._wait(seconds, self._open, url, start, end)

    def _wait(self, seconds: float, work: Callable[..., Any], *args: Any) -> None:
        try:
            sync(self.fs.loop, work, *args, timeout=seconds)
        except (FSTimeoutError, TimeoutError):
            self.close()
            raise _late(seconds) from None

    async def _open(self, url: str, start: int, end: int | None) -> None:
        import aiohttp

        session = await self.fs.set_session()
        options = {**self.fs.kwargs, "timeout": aiohttp.ClientTimeout(total=None)}  # ours is around it
        span = f"bytes={start}-{'' if end is None else end - 1}"
        options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", "Range": span}
        self._response = response = await session.get(self.fs.encode_url(url), **options)
        headers, status = response.headers, response.status
        if status in (404, 410):
            raise FileNotFoundError(f"the server has no such file, {status}")
        if status in (401, 403):
            raise PermissionError(f"the server allows no access, {status} {response.reason or ''}".rstrip())
        total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
        size = int(total[2]) if total and total[2] != "*" else None
        if status == 416:  # there is nothing from `start` on
            response.close()
            self._response = None
        elif status == 206:
            if total is None or total[1] != str(start):
                raise OSError(f"the server sent other bytes than {span}")
        elif status == 200:
            self.position = 0
            size = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None
        else:
            response.raise_for_status()
            raise OSError(f"the server answered {status}")
        if headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise RefusedError(f"the server sends it compressed, as {headers['Content-Encoding']}, and not as it is")
        self.state = State(size, headers.get("ETag") or headers.get("Last-Modified"))

    def read(self, size: int, seconds: float, arrived: list[bytes]) -> None:
        self._wait(seconds, self._take, size, arrived)

    async def _take(self, wanted: int, arrived: list[bytes]) -> None:
        while wanted and self._response and (block := await self._response.content.read(wanted)):
            arrived.append(block)
            wanted -= len(block)

    def close(self) -> None:
        """Give the connection up; one whose answer was read to its end has been given back before."""
        if self._response is not None:
            with suppress(RuntimeError):  # the loop has ended
                self.fs.loop.call_soon_threadsafe(self._response.close)
            self._response = None


class FileStream:
    """A file of any other file system; where `end` is given its state is not asked for."""

    def __init__(self, fs: Any, path: str, start: int, end: int | None, seconds: float) -> None:
        self.fs, self.path, self.position = fs, path, start
        self.state = State(None, None) if end is not None else within(seconds, self._state)
        self._file: Any = None

    def _state(self) -> State:
        self.fs.invalidate_cache()
        info = self.fs.info(self.path)
        if info.get("type") == "directory":
            raise IsADirectoryError("it is a folder")
        marks = (
            "ETag",
            "etag",
            "md5Hash",
            "generation",
            "blob_id",
            "LastModified",
            "last_modified",
            "mtime",
            "updated",
        )
        mark = next((str(info[name]) for name in marks if info.get(name)), None)
        return State(info["size"] if isinstance(info.get("size"), int) else None, mark)

    def read(self, size: int, seconds: float, arrived: list[bytes]) -> None:
        data = within(seconds, lambda: self._range(self.position, size))
        self.position += len(data)
        arrived.append(data)

    def _range(self, start: int, size: int) -> bytes:
        if self.fs.async_impl:  # one request
            return self.fs.cat_file(self.path, start=start, end=start + size)
        if self._file is None:
            self._file = self.fs.open(self.path, "rb", block_size=BLOCK)
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        if self._file is not None:
            with suppress(Exception):
                self._file.close()
