"""The processes of a run: when one of them ends before its time, all do, and say why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch

from vllava.errors import UserError, reason
from vllava.stops import CODES, Stopped, Stops, die_with_parent, say

PATIENCE = 5.0  # seconds in which the first process is to notice by itself that another has ended
LAUNCHER = "VLLAVA_LAUNCHER"  # in the environment of the other processes: the first one's number
_AGAIN = "Start the same command again: it goes on from what was saved."


class Ranks:
    """Watches the processes that Lightning starts for the other devices of this machine, from the first process.

    Lightning's own watch would kill all processes without a word. `ended` maps ranks to the exit codes of those that
    have ended.
    """

    def __init__(self, trainer: L.Trainer, stops: Stops) -> None:
        self.stops, self.ended = stops, dict[int, int]()
        self.over = False
        os.environ[LAUNCHER] = str(os.getpid())  # before it starts them
        launcher: Any = trainer.strategy.launcher
        if isinstance(getattr(launcher, "procs", None), list):
            started = getattr(launcher, "num_processes", 1) - 1
            threading.Thread(target=self._take_over, args=(launcher, started), daemon=True).start()

    def _take_over(self, launcher: Any, started: int) -> None:
        while len(launcher.procs) < started and not self.over:
            time.sleep(0.02)
        processes = list(launcher.procs)
        launcher.procs.clear()  # Lightning's watch has the same list, and ends when it is empty
        for rank, process in enumerate(processes, 1):
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen) -> None:
        code = process.wait()
        self.ended[rank] = code if code >= 0 else 128 - code
        if code == 0:
            return
        time.sleep(PATIENCE)
        if not self.over and not self.stops.asked:  # this process waits for the other, and would for ever
            say(f"error: {self.sentence()} {self.stops.kept} {_AGAIN}")
            os._exit(self.code())

    def sentence(self) -> str:
        """Which processes have failed, and how."""
        failed = {rank: code for rank, code in sorted(self.ended.items()) if code}
        if not failed:
            return "Another process of the run has ended, or cannot be reached any more; see what it said."
        told = [
            f"that of rank {rank} " + (f"was ended by signal {code - 128}" if code > 128 else f"failed, code {code}")
            for rank, code in failed.items()
        ]
        return f"A process of the run has ended: {', '.join(told)}. See what it said; a signal 9 may mean no memory."

    def code(self) -> int:
        """The exit code that goes with it: that of a signal to stop, if one of them had it."""
        return next((code for code in self.ended.values() if code in CODES), 1)


@contextmanager
def explaining(ranks: Ranks, stops: Stops) -> Iterator[None]:
    """What the end of another process does to this one becomes a UserError or Stopped."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        if stops.asked:
            raise Stopped(stops.asked) from error
        if explained := _explained(error, ranks, stops):
            raise explained from error
        raise
    finally:
        ranks.over = True


def end_with_launcher(job: str) -> None:
    """Have a process that Lightning or torchrun started for a device end with who started it, however that ended.

    job: Hydra's name of the job, which Lightning changes.
    """
    if job.startswith("train_ddp_process_"):
        die_with_parent(signal.SIGKILL)  # alone, without the first process, it could not even save
        if os.environ.get(LAUNCHER) not in (None, str(os.getppid())):  # it ended before it could be waited for
            sys.exit(1)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(signal.SIGTERM)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            meet_anew()


def meet_anew() -> None:
    """Have the processes that torchrun started again meet at a store of their own.

    In torchrun's own, which it keeps, lie the addresses of those that have ended: whoever reads one before it has been
    replaced waits for ever, or fails (torch 2.13).
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = torch.distributed.TCPStore(host, port, is_master=False)
    key = f"vllava/{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            kept.set(key, str(free.getsockname()[1]))
    os.environ["MASTER_PORT"] = kept.get(key).decode()  # waits for it
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def _explained(error: OSError | RuntimeError, ranks: Ranks, stops: Stops) -> UserError | None:
    if "DataLoader worker" in str(error):
        return UserError(
            f"A process that reads data was ended from outside ({reason(error)}). The usual cause is a machine without "
            f"memory to spare: ask for fewer data.workers. {stops.kept} {_AGAIN}"
        )
    if _is_of_another_process(error):
        time.sleep(0.5)  # until its exit code is known
        return UserError(f"{ranks.sentence()} {stops.kept} {_AGAIN}")
    return None


def _is_of_another_process(error: OSError | RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text
