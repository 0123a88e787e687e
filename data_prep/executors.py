"""Who works on the blocks: processes of this machine, or a Ray cluster; the same function for each block."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import vllava
from vllava.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2  # jobs for each worker that are handed out at a time: one to work on, one to come
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Executor(Protocol):
    """Runs a function on jobs, elsewhere; a context manager, after which nothing runs any more."""

    def __enter__(self) -> Executor: ...
    def __exit__(self, *exception: object) -> None: ...
    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """The results as they come, in any order. No more jobs are taken than are needed to keep all workers busy."""
        ...


class LocalProcesses:
    """Processes of this machine; with one, this process itself."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._others = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalProcesses:
        if self.processes > 1:
            # Forked before anything is read: they share the imported libraries, and no thread is lost.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                self._pool = ProcessPoolExecutor(self.processes, context, _begin, (os.getpid(),))
                self._pool.submit(os.getpid).result()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, exception: object = None, *_: object) -> None:
        if self._pool is None:
            return
        if exception is not None:  # their work is done anew next time
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()
        self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        if self._pool is None:
            yield from map(function, jobs)
            return
        running: set[Future[Result]] = set()
        try:
            for job in jobs:
                running.add(self._pool.submit(_work, function, job))
                if len(running) >= AHEAD * self.processes:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise UserError(
                "A worker process was killed, most likely by the system for want of memory. Nothing that was finished "
                "is lost: run the same command again, with fewer --processes if it happens again."
            ) from error


def _begin(parent: int) -> None:
    """In a worker: Ctrl-C is the main process's affair, and without it nothing is left to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    gc.freeze()  # what was imported is never garbage
    gc.disable()  # see _work
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _work(function: Callable[[Job], Result], job: Job) -> Result:
    """A job, whose garbage is collected once, when it is done: every few hundred objects would cost a tenth of it."""
    result = function(job)
    gc.collect()
    return result


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


class RayCluster:
    """The workers of a Ray cluster, which must see the same files under the same names.

    address: of a cluster, as `ray.init` takes it ("auto" for the one that this machine belongs to); without one, Ray is
    started on this machine. Where Ray runs in this process already, that is used.
    """

    def __init__(self, address: str | None = None, processes: int | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError("Ray is not installed here: pip install 'vllava[ray]'; or leave out --executor ray.")
        self.address, self.processes = address, processes
        self._started = False

    def __enter__(self) -> RayCluster:
        import ray

        if not ray.is_initialized():
            # The packages travel with the job, so that a cluster needs what they depend on alone.
            packages = [str(Path(vllava.__file__).parent), str(Path(__file__).parent)] if self.address else []
            where: dict[str, Any] = {"address": self.address} if self.address else {"num_cpus": self.processes}
            try:
                ray.init(
                    **where,
                    runtime_env={"py_modules": packages} if packages else None,
                    log_to_driver=False,
                    include_dashboard=None if self.address else False,
                )
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise UserError(f"Ray cannot be reached at {self.address or 'this machine'} ({error}).") from error
            self._started = True
        return self

    def __exit__(self, *exception: object) -> None:
        import ray

        if self._started:
            ray.shutdown()

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        import ray
        from ray.exceptions import RayError

        call: Any = ray.remote(_call)
        known = ray.put(function)
        workers = min(int(ray.cluster_resources().get("CPU", 1)), self.processes or sys.maxsize) or 1
        running: list[Any] = []
        try:
            for job in jobs:
                running.append(call.remote(known, job))
                if len(running) >= AHEAD * workers:
                    done, running = ray.wait(running)
                    yield from ray.get(done)
            while running:
                done, running = ray.wait(running)
                yield from ray.get(done)
        except UserError:  # a worker's own
            raise
        except RayError as error:
            raise UserError(
                f"Ray could not finish the work ({str(error).strip().splitlines()[-1]}). Nothing that was finished is "
                "lost: run the same command again."
            ) from error
        finally:
            for task in running:
                with suppress(RayError):
                    ray.cancel(task, force=True)


def _call(function: Callable[[Job], Result], job: Job) -> Result:
    return function(job)
