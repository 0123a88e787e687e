"""Checkpoints along the way: whole folders, as the one at the end, that can be asked and evaluated."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vllava.errors import UserError, reason, require_known
from vllava.folders import RECORD, entries, require_replaceable
from vllava.model.mapped import with_weights
from vllava.training.task import Task

log = logging.getLogger(__name__)

BEST = "best.json"  # beside the folders: which is the best one so far, and why
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.unfinished-.+")


@dataclass(frozen=True)
class Checkpoints:
    """Which checkpoints a run writes while it trains, and which it keeps."""

    every_steps: int | None = None  # None: only the one at the end
    keep_last: int = 1
    keep_best: str | None = None  # a metric; the smaller the better, but for one whose name says accuracy

    def __post_init__(self) -> None:
        for name, least, empty in (("every_steps", 1, True), ("keep_last", 0, False)):
            value = getattr(self, name)
            if (value is not None or not empty) and (type(value) is not int or value < least):
                null = " or null" if empty else ""
                raise UserError(f"checkpoint.{name}={value!r}: give a whole number from {least}{null}.")
        if self.keep_best is not None and (not isinstance(self.keep_best, str) or not self.keep_best):
            raise UserError(f"checkpoint.keep_best={self.keep_best!r}: give the name of a metric, such as val_loss.")
        if self.every_steps is None and self.keep_best is not None:
            raise UserError(f"checkpoint.keep_best={self.keep_best} needs checkpoint.every_steps: when to write one.")
        if self.every_steps and not self.keep_last and not self.keep_best:
            raise UserError(
                "checkpoint.keep_last=0 keeps no checkpoint at all; name what is best: checkpoint.keep_best"
            )

    @classmethod
    def of(cls, settings: Any) -> Checkpoints:
        """From the block `checkpoint` of a configuration; raises UserError for a key nobody reads, a wrong value."""
        given = settings or {}
        if not isinstance(given, dict):
            raise UserError(f"checkpoint={settings!r}: give its keys, such as checkpoint.every_steps=500.")
        require_known("checkpoint", set(given), {field.name for field in fields(cls)})
        return cls(**given)

    @property
    def larger_is_better(self) -> bool:
        return any(word in str(self.keep_best).lower() for word in ("accuracy", "score", "f1"))


class Durable(L.Callback):
    """Writes a checkpoint folder every so many steps to `folder`/step-00000500 and deletes those not to be kept.

    Put it after what logs the metrics. build: makes the model as it was before the run; tokenizer, settings: as for
    `Task.export`.
    """

    def __init__(
        self, folder: Path, which: Checkpoints, build: Callable[[], nn.Module], tokenizer: Any, settings: dict
    ) -> None:
        self.folder = folder
        self.which = which
        self.build = build
        self.tokenizer = tokenizer
        self.settings = settings

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero and self.folder.is_dir():
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):  # a run was killed while it wrote this
                    shutil.rmtree(path, ignore_errors=True)

    def on_train_batch_end(self, trainer: L.Trainer, task: Task, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if not self.which.every_steps or step % self.which.every_steps:
            return
        failed = None
        try:
            weights = task.whole_weights()
            if trainer.is_global_zero:
                self.folder.mkdir(exist_ok=True)
                self._write(task, weights, step)
                if self.which.keep_best:
                    self._judge(step, trainer.callback_metrics)
                self._prune()
        except UserError as error:
            failed = str(error)
        except OSError as error:
            failed = f"{self.folder} cannot be written ({reason(error)})."
        if failed := trainer.strategy.broadcast(failed):  # all stop, or none
            raise UserError(failed)

    def _write(self, task: Task, weights: dict[str, Tensor], step: int) -> None:
        path = self.folder / f"step-{step:08d}"
        try:
            require_replaceable(path)  # the run may have been here before
        except UserError as error:  # no reason to stop it now
            log.warning("no checkpoint of step %d: %s", step, error)
            return
        with torch.random.fork_rng():
            model = with_weights(self.build, weights, self.folder)
        with task.lent(model):
            task.export(path, self.tokenizer, self.settings)

    def _judge(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Write down that this step is the best one, if it is, by the metric as it was measured last."""
        metric = self.which.keep_best
        value = metrics.get(str(metric))
        if value is None or not value.isfinite():
            others = ", ".join(sorted(metrics))
            what = f"is not measured (there are: {others})" if value is None else f"is {value:.3g}"
            log.warning("the checkpoint of step %d cannot be the best one: %s %s", step, metric, what)
            return
        best, found = self.best(), float(value)
        sign = -1 if self.which.larger_is_better else 1
        if best is not None and best["step"] != step and sign * found >= sign * best["value"]:
            return
        note = {"metric": metric, "value": found, "step": step, "checkpoint": f"step-{step:08d}"}
        unfinished = self.folder / f"{BEST}.part"
        unfinished.write_text(json.dumps(note, indent=1) + "\n")
        os.replace(unfinished, self.folder / BEST)

    def best(self) -> dict[str, Any] | None:
        """What is written about the best checkpoint so far, if it is there and best by the same metric."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((self.folder / BEST).read_text())
            if found["metric"] == self.which.keep_best and (self.folder / found["checkpoint"]).is_dir():
                return {**found, "value": float(found["value"]), "step": int(found["step"])}
        return None

    def _prune(self) -> None:
        """Delete all but the newest ones and the best; what somebody has added to a folder is left, with the folder."""
        steps = sorted(path for path in self.folder.iterdir() if _STEP.fullmatch(path.name) and path.is_dir())
        best = (self.best() or {}).get("checkpoint")
        for path in steps[: len(steps) - self.which.keep_last]:
            if path.name != best and not _added(path):
                shutil.rmtree(path)


def _added(folder: Path) -> list[str]:
    """What lies in a folder that its record does not list; the contents are not read again."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        listed = json.loads((folder / RECORD).read_bytes())["files"]
        return [name for name in entries(folder) if name not in listed and name != RECORD]
    return [RECORD]
