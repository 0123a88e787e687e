"""What a run saves to go on from, when it saves it, and how it stops."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vllava.errors import UserError, reason
from vllava.stops import Stopped, Stops, say
from vllava.training.generations import Generations, remove

__all__ = ["Generations", "SaveToResume"]

MEND = (
    "Make room on the disk, or mend what is wrong with the folder, and start the same command again: it goes on from "
    "what was saved."
)
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
_OF_FOLDERS = {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM}  # where they are of the run's own folder
_WRITER = re.compile("PytorchStreamWriter|inline_container")  # torch.save says so where it cannot write


class SaveToResume(L.Callback):
    """Saves what is needed to resume every few minutes, and when the run is asked to stop, after a whole step.

    All processes do what one wants: they can only save together, a signal may miss some, and clocks differ. A strategy
    that has `save_in_background(checkpoint, path) -> Future` writes while the next steps are taken. keep_last: also
    save after the last step, for a run that may be given more of them.
    """

    def __init__(
        self, generations: Generations, minutes: float, stops: Stops | None = None, keep_last: bool = False
    ) -> None:
        self.generations = generations
        self.seconds = 60 * minutes
        self.keep_last = keep_last
        self.stops = stops or Stops(120)
        self.saved_step = -1
        self.writing: Future | None = None  # this process's part
        self.finishing: Future | None = None  # on the first process, when all have written
        self.path = Path()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="finish")
        self._say_what_is_kept()

    def setup(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        # Lightning's own answers to signals would come before ours: they requeue SLURM jobs, broadcast in the middle
        # of whatever the other processes do, and end with exit code 0.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.saved_at = time.monotonic()
        if trainer.global_step:
            self.saved_step = trainer.global_step  # resumed
        self.stops.claim()
        self.stops.waits = True

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        # The last state is saved here as well: when Lightning ends an epoch that was cut short, it takes it for whole.
        last = self.keep_last and (trainer.should_stop or trainer.global_step >= task.planned_steps())
        due = last or time.monotonic() - self.saved_at >= self.seconds
        stop, due, writing = self._agreed(trainer, due)
        if self.writing and (not writing or due or stop):
            self._all_written(trainer)
        if self.finishing and (self.finishing.done() or due or stop):
            self._finished()
        if due or stop:
            self._save(trainer, background=not stop)
        if stop:
            self._stop(trainer, stop)

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        stop, _, _ = self._agreed(trainer, False)
        self._all_written(trainer)
        self._finished()
        if stop:
            self._save(trainer, background=False)
            self._stop(trainer, stop)
        self.stops.settle()  # from here on the processes go apart

    def _agreed(self, trainer: L.Trainer, due: bool) -> tuple[int, bool, bool]:
        """Over all processes: the signal to stop at, whether a save is due, whether one is being written."""
        writing = self.writing is not None and not self.writing.done()
        own = torch.tensor([self.stops.asked, due, writing], device=trainer.strategy.root_device, dtype=torch.int32)
        stop, due_, writing_ = trainer.strategy.reduce(own, reduce_op="max").tolist()
        return stop, bool(due_), bool(writing_)

    def _save(self, trainer: L.Trainer, background: bool) -> None:
        """Save the state after this step; all processes together. Raises UserError where it cannot be written."""
        self.saved_at = time.monotonic()
        if self.saved_step == trainer.global_step:
            return
        self.path = self.generations.unfinished(trainer.global_step)
        strategy: Any = trainer.strategy
        with self._explained():
            if trainer.is_global_zero:
                self.generations.prepare()
            strategy.barrier("prepared")
            if background and hasattr(strategy, "save_in_background"):
                checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
                self.writing = strategy.save_in_background(checkpoint, self.path)
                self.saved_step = trainer.global_step
                return
            trainer.save_checkpoint(self.path)  # ends with a barrier
            if trainer.is_global_zero:
                self.generations.finish(self.path)
            strategy.barrier("finished")
        self.saved_step = trainer.global_step
        self._say_what_is_kept()

    def _all_written(self, trainer: L.Trainer) -> None:
        """Wait until all processes have written their parts in the background; the first then makes it a state."""
        if self.writing is None:
            return
        with self._explained():
            self.writing.result()
            self.writing = None
            trainer.strategy.barrier("written")
            if trainer.is_global_zero:
                self.finishing = self.thread.submit(self.generations.finish, self.path)

    def _finished(self) -> None:
        if self.finishing is not None:
            with self._explained():
                self.finishing.result()
            self.finishing = None
            self._say_what_is_kept()

    def _stop(self, trainer: L.Trainer, number: int) -> None:
        stopped = Stopped(number)
        self.stops.asked = self.stops.asked or number
        if trainer.is_global_zero:
            say(f"stopped by {stopped.signal} after step {trainer.global_step}. {self.stops.kept}")
        raise stopped

    def _say_what_is_kept(self) -> None:
        self.stops.kept = self.generations.kept() or self.stops.kept

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong while a state is written becomes a UserError; the unfinished one goes: it may fill a disk."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _WRITER.search(str(error)):
                raise  # another process has ended, or a data worker
            with suppress(OSError):
                remove(self.path)
            raise UserError(f"{self.path} cannot be written ({reason(error)}). {self.stops.kept} {MEND}") from error


@contextmanager
def folder_in_use(folder: Path, stops: Stops) -> Iterator[None]:
    """What a full, lost or read-only disk does to a run becomes a UserError, wherever in the block."""
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else ""
        ours = not name or Path(name).absolute().is_relative_to(folder.absolute())
        if error.errno not in _OF_DISKS and not (error.errno in _OF_FOLDERS and name and ours):
            raise
        raise UserError(f"The run in {folder} cannot go on ({reason(error)}). {stops.kept} {MEND}") from error
