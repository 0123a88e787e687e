"""The one exception for mistakes a user can mend, and the boundary at which a stranger's file is read."""

from __future__ import annotations

import difflib
import logging
import resource
import signal
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

log = logging.getLogger(__name__)


class UserError(Exception):
    """What is wrong, where, and what to do. Entry points print it as one paragraph, without a traceback, and exit 1."""

    @property
    def paragraph(self) -> str:
        """The message alone, also where a data worker has wrapped it in its traceback."""
        return str(self).rsplit("UserError: ", 1)[-1].strip()


def stop(error: UserError) -> NoReturn:
    """End a command with the error's paragraph and exit status 1; its traceback goes to the log, if there is one."""
    log.info("%s", error.paragraph, exc_info=error)
    sys.exit(f"error: {error.paragraph}")


@contextmanager
def stopping_at_mistakes(*wrappers: type[Exception]) -> Iterator[None]:
    """End a command at a UserError, also at one that an exception of `wrappers` was raised from."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error if isinstance(error, (UserError, *wrappers)) else None
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        stop(cause)


def require_known(where: str, keys: Iterable[object], known: Collection[str]) -> None:
    """Raises UserError for the first of `keys` that is not among the known ones, with the nearest of them."""
    for key in sorted(set(map(str, keys)) - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}."
        raise UserError(f"Unknown key {key!r} in {where}: {hint}")


@contextmanager
def reading(what: object, remedy: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes a UserError: `WHAT cannot be read (REASON). REMEDY`.

    For the reading of files that we did not write: libraries raise whatever they like at a damaged or hostile one. A
    UserError from inside, which says more, passes as it is. The cause stays attached, for the log.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MemoryError and RecursionError among them
        raise UserError(f"{what} cannot be read ({reason(error)}). {remedy}".rstrip()) from error


def reason(error: BaseException) -> str:
    """An error in one short line: the first line of its message, or its name where there is no message."""
    line = next(iter(str(error).strip().splitlines()), "")
    if not line or isinstance(error, (KeyError, UnicodeError)):  # whose message alone says nothing, or too much
        line = f"{type(error).__name__}{': ' + line if line else ''}"
    return line if len(line) <= 300 else f"{line[:297]}…"


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raises UserError with the message if what is inside takes longer: for Python code that a stranger wrote.

    Only in a process's main thread, where alone a signal can interrupt; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise UserError(message)

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def memory_limit(extra: int, message: str) -> Iterator[None]:
    """Raises UserError with the message if what is inside takes so many bytes more than the process has.

    The limit is all threads': use it before there are any that allocate much. Without one where a system has none.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + extra
        if limits[0] == resource.RLIM_INFINITY or most < limits[0]:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    except MemoryError as error:
        raise UserError(message) from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
