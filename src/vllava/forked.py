"""train.py in processes forked from one that has imported everything: half of a short run's time is imports.

The server that is forked from does nothing else, so that neither threads nor a GPU are in the way. It is started with
the first run, and ends with the process that started it and the last run. A run is asked to stop when the process that
started it ends, however that happens.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from vllava.stops import SIGNALS, die_with_parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vllava.run"])


class Forked:
    """`python SCRIPT ARGUMENTS`, with what `stops.attend` asks of a process.

    log: to which it adds what it prints, None: where this process prints; errors: the same of stderr, None: as log.
    """

    def __init__(
        self, script: Path, arguments: Sequence[str], log: Path | None = None, errors: Path | None = None
    ) -> None:
        # joblib's method is one of which a process that joblib did not start knows nothing.
        if multiprocessing.get_start_method() == "loky":
            multiprocessing.set_start_method("forkserver", force=True)
        self._process = _context.Process(target=_run, args=(str(script), [*arguments], log, errors or log))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for good in the server, if this starts it:
        try:  # what is sent to a whole group of processes is for the runs
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self.pid = self._process.pid or 0

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode or 0


def _run(script: str, arguments: list[str], log: Path | None, errors: Path | None) -> None:
    die_with_parent()  # the server
    threading.Thread(target=_stop_with_starter, name="starter", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process of its own
    for stream, path in ((1, log), (2, errors)):
        if path is not None:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(handle, stream)
            os.close(handle)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _stop_with_starter() -> None:
    starter = multiprocessing.parent_process()
    if starter is not None:
        starter.join()
        os.kill(os.getpid(), signal.SIGTERM)
