"""How a process answers the signals that ask it to stop: SIGTERM, SIGUSR1 (SLURM's warning) and SIGINT (Ctrl-C).

It ends with exit code 128 + the signal's number (143, 138, 130), which is what a shell says of a process that a signal
ended: never with 0, so that whatever started it knows that there is more to do.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from vllava.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
CODES = {128 + number: signal.Signals(number).name for number in SIGNALS}
REPEATED = 1.0  # seconds: what comes again sooner is the same signal, sent to a group and passed on by a parent
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """The process was asked to stop, by the signal of this number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Stops:
    """Answers the signals within its block; only a process's main thread can, elsewhere it does nothing.

    A signal ends the process by `Stopped`, wherever it is; while `waits` is true, it is only noted in `asked`, and who
    set `waits` has to raise `Stopped`. What does not end within `seconds`, a call into a library that does not return
    among them, is ended hard by a thread; so it is at a second signal of the same kind. Raises UserError for `seconds`
    that are none.
    """

    def __init__(self, seconds: float) -> None:
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= 1e6:
            raise UserError(f"stop_seconds={seconds!r} is not a number of seconds, such as 120.")
        self.seconds = seconds
        self.asked = 0  # the signal's number
        self.waits = False
        self.kept = "Nothing was saved yet."  # a sentence for the user
        self._pid = os.getpid()
        self._main = False  # whether this answers signals now

    def __enter__(self) -> Stops:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            # C code writes a signal's number here at once, whatever the main thread is doing.
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._watch, name="stops", daemon=True)
            self._thread.start()
            self._previous = {number: signal.signal(number, self._answer) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._main:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._main = False
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._writer, b"\0")
            self._thread.join()
            os.close(self._reader)
            os.close(self._writer)
        if self.asked and error is None:  # noted too late, or somebody swallowed what was raised
            raise Stopped(self.asked)

    def settle(self) -> None:
        """Answer signals at once from now on; raises Stopped if there was one."""
        self.waits = False
        if self.asked:
            raise Stopped(self.asked)

    def claim(self) -> None:
        """Take the signals back from whoever has set handlers of his own within the block."""
        if self._main and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._answer)

    def _answer(self, number: int, _: Any) -> None:
        if os.getpid() != self._pid or self.asked:  # a worker that has just been forked; a repeated signal
            return
        self.asked = number
        if not self.waits:
            raise Stopped(number)

    def _watch(self) -> None:
        first: dict[int, float] = {}
        until = float("inf")
        while True:
            left = until - time.monotonic()
            if left <= 0:
                number = min(first, key=lambda one: first[one])
                self._end(number, f"did not come to an end within stop_seconds={self.seconds:g} after")
            if not select.select([self._reader], [], [], None if left == float("inf") else left)[0]:
                continue
            for number in os.read(self._reader, 512):
                now = time.monotonic()
                if number == 0:
                    return
                if number in SIGNALS and now - first.setdefault(number, now) >= REPEATED:
                    self._end(number, "was ended at once, by a second")
                if number in SIGNALS:
                    until = min(until, now + self.seconds)

    def _end(self, number: int, how: str) -> None:
        name = signal.Signals(number).name
        say(f"stopped: the run {how} {name}. {self.kept} Start the same command again to go on.")
        os._exit(128 + number)


def say(text: str) -> None:
    """Tell the user something on a line of its own, past whatever progress bar stands there."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        print(f"\n{text}", file=sys.stderr, flush=True)


class Process(Protocol):
    """What is waited for: subprocess.Popen, or what is like it."""

    def send_signal(self, number: int, /) -> None: ...

    def wait(self) -> int: ...


def attend(start: Callable[[], Process]) -> int:
    """Start a process, wait for its end and pass signals on to it; returns its exit code, 128 + n for signal n.

    Raises Stopped if there was a signal and the process ended well all the same: this one has to stop nevertheless.
    """
    processes: list[Process] = []
    seen: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        seen.append(number)
        for process in processes:
            process.send_signal(number)

    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, pass_on) for number in SIGNALS} if main else {}
    try:
        process = start()
        processes.append(process)
        for number in list(seen):  # before there was a process
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen and code == 0:
        raise Stopped(seen[0])
    return code if code >= 0 else 128 - code


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process sent a signal when the one that started it ends, however that happens. Only Linux can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
