"""What lets a logger go on where a resumed run does: no step of it is there twice, and none is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vllava.errors import reason

log = logging.getLogger(__name__)


class Continued:
    """What our loggers have in common: steps as history.jsonl has them, each once, and no harm to the training.

    A point's step is the number of optimiser steps that the run has taken. Lightning's own count is not kept when a
    run is saved before its metrics were logged, and a resumed run would write the step again under another number.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held = 0  # steps up to here are in it already
        self.trained = 0  # the last step whose training metrics it was given
        self.failed = False
        self.trainer: L.Trainer | None = None

    def cut(self, step: int) -> int:
        """Forget what is later than a step, if that can be done; returns the last step that is kept, 0 if none."""
        raise NotImplementedError

    def show(self, rows: list[dict[str, Any]], step: int | None, name: str = "") -> None:
        """Show held-out samples, at a step or at the newest; nothing where a logger has no place for them."""

    def conclude(self, figures: dict[str, float]) -> None:
        """Keep figures of a run as a whole, which has no steps or is done with them."""
        super().log_metrics(figures, 0)  # type: ignore[misc]
        super().save()  # type: ignore[misc]

    def write(self, metrics: dict[str, Any], step: int | None) -> None:
        """Write one step's metrics to where they go; a logger that fails is given up, and training goes on."""
        self.guarded(super().log_metrics, metrics, step)  # type: ignore[misc]

    def guarded(self, action: Any, *args: Any) -> None:
        if self.failed:
            return
        try:
            action(*args)
        except Exception as error:
            self.failed = True
            log.warning(
                "%s failed (%s): nothing more is logged to it. history.jsonl goes on.", self.title, reason(error)
            )
            log.info("what the logger raised", exc_info=error)

    @property
    def title(self) -> str:
        return type(self).__name__

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # a mapping
        if self.trainer is not None:
            step = self.trainer.global_step
            seen = getattr(self.trainer.lightning_module, "samples_seen", None)
            metrics = metrics if seen is None else {"samples_seen": seen, **metrics}
        if "loss" in metrics:
            self.trained = step or 0
        if step is None or step > self.held:
            self.write(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        self.guarded(super().save)  # type: ignore[misc]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.guarded(super().finalize, status)  # type: ignore[misc]

    def go_on(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Go on after a step: what is later goes, and what a kill lost comes from the rows of history.jsonl."""

        def fill() -> None:
            held = self.cut(step)
            for row in rows:
                if held < row["step"] <= step:
                    self.write({key: value for key, value in row.items() if key != "step"}, row["step"])
            self.held = max(held, step)

        self.guarded(fill)


class Follow(L.Callback):
    """Lets our loggers follow a run: they take their steps from it, and go on where a resumed one does."""

    def __init__(self, history: Path) -> None:
        self.history = history
        self.rows: list[dict[str, Any]] = []  # of it as the run before left it
        self.whole = 0  # the last step that was taken as a whole

    def setup(self, trainer: L.Trainer, task: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and trainer.loggers:
            self.rows = list(self._read())  # now: History writes the file anew when training starts
        for logger in trainer.loggers:
            if isinstance(logger, Continued):
                logger.trainer = trainer

    def on_train_start(self, trainer: Any, task: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step  # what log_every_n_steps goes by
        if not trainer.is_global_zero:
            return
        rows = [row for row in self.rows if row["step"] % trainer.log_every_n_steps == 0]
        for logger in trainer.loggers:
            if isinstance(logger, Continued):
                logger.go_on(trainer.global_step, rows)
        self.rows = []

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        self.whole = trainer.global_step

    def on_exception(self, trainer: Any, task: L.LightningModule, exception: BaseException) -> None:
        """Write the last step of a run that is stopped after it: Lightning logs a step when its callbacks are done."""
        if trainer.global_step == self.whole and self.whole % trainer.log_every_n_steps == 0:
            metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            for logger in trainer.loggers:
                if isinstance(logger, Continued) and logger.trained < self.whole:
                    logger.log_metrics(metrics)

    def _read(self) -> Iterable[dict[str, Any]]:
        """The rows of history.jsonl; a kill may have cut off its last line."""
        for line in self.history.read_text().splitlines() if self.history.is_file() else []:
            try:
                yield json.loads(line)
            except ValueError:
                continue
