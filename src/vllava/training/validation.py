"""Held-out samples while a run trains: their loss, answers to a few of them, and the end of a run that learns no more.

Nothing of it touches the training: the weights are the same to the bit with and without it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vllava.batch import Batch
from vllava.errors import UserError
from vllava.training.task import Task

log = logging.getLogger(__name__)

TOTAL = "val_loss"  # over all held-out samples; TOTAL/NAME: of a medium or a source
ACCURACY = "val_accuracy"  # of the answers to the few that are shown, where there are any; ACCURACY/NAME: of a medium


Cell = tuple[str, str]  # (source, medium) of samples whose losses are added up together


class HeldOut(Protocol):
    """Held-out samples in packed rows. Cells and rows are the same for every number of ranks."""

    @property
    def cells(self) -> Sequence[Cell]: ...

    def share(self, rank: int, ranks: int) -> list[tuple[int, Batch]]:
        """The rows of a rank, each with the number of its cell."""


@dataclass(frozen=True)
class Watch:
    """When to look at held-out samples, and when to stop for what is seen.

    every_steps: optimiser steps from one validation to the next; the last step has one as well.
    early_stop: the name of a loss; the run ends when it has not fallen below its lowest for `patience` validations.
    """

    every_steps: int
    early_stop: str | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("every_steps", "patience"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"validation.{name}={value!r} is not a number of times: a whole number from 1 on.")


class Validation(L.Callback):
    """Computes the mean loss over the supervised tokens of held-out samples, in all, by medium and by source.

    record: takes a step's figures, for the history; show: makes what `show_rows` then gets, by all ranks together: the
    answers to a few samples.
    """

    def __init__(
        self,
        held_out: HeldOut,
        watch: Watch,
        record: Callable[[dict[str, float]], Any] = lambda figures: None,
        show: Callable[[Task], list[dict[str, Any]]] | None = None,
        show_rows: Callable[[L.Trainer, list[dict[str, Any]]], Any] = lambda trainer, rows: None,
    ) -> None:
        self.held_out, self.watch = held_out, watch
        self.record, self.show, self.show_rows = record, show, show_rows
        self.last: dict[str, float] = {}
        self.best, self.best_step, self.waited = math.inf, 0, 0
        self.stopped: str | None = None  # why the run ends early

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("last", "best", "best_step", "waited", "stopped")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, Task)
        self.rows = self.held_out.share(trainer.global_rank, trainer.world_size)
        turns = torch.tensor(len(self.rows), device=task.device)
        self.turns = int(trainer.strategy.reduce(turns, reduce_op="max"))
        self._require_loss(trainer, task)
        self.end = task.planned_steps()
        trainer.should_stop = trainer.should_stop or self.stopped is not None

    def _require_loss(self, trainer: L.Trainer, task: Task) -> None:
        """Raises UserError, on all ranks, unless there is the loss by which the run may end."""
        filled = torch.zeros(len(self.held_out.cells), device=task.device)
        filled[[cell for cell, _ in self.rows]] = 1
        summed: Any = trainer.strategy.reduce(filled, reduce_op="sum")
        names = loss_names([c for c, full in zip(self.held_out.cells, summed.tolist(), strict=True) if full])
        if self.watch.early_stop is not None and self.watch.early_stop not in names:
            raise UserError(
                f"validation.early_stop={self.watch.early_stop!r} is no loss of this run; there are: "
                f"{', '.join(names)}."
            )

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        assert isinstance(task, Task)
        step, began = trainer.global_step, time.perf_counter()
        if step % self.watch.every_steps and step != self.end:
            return
        with untouched(task):
            self.last = self.losses(trainer, task)
            answers = self.show(task) if self.show else []
        figures = {**self.last, **accuracies(answers)}
        self.record(figures)
        for name, value in self.last.items():
            # Not to the loggers by Lightning, which would repeat it in every step until the next one.
            task.log(name, torch.tensor(value, dtype=torch.float64), prog_bar=name == TOTAL, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
        if answers and trainer.is_global_zero:
            self.show_rows(trainer, answers)
        self._judge(trainer, step)
        task.seconds_aside += time.perf_counter() - began

    @torch.no_grad()
    def losses(self, trainer: L.Trainer, task: Task) -> dict[str, float]:
        """The losses of now, the same on every rank: each gives the sums of its rows, and all add them up alike."""
        sums = torch.zeros(len(self.held_out.cells), 2, dtype=torch.float64, device=task.device)
        with trainer.precision_plugin.forward_context():
            for turn in range(self.turns):  # as many on every rank: where the model is shared out, each is collective
                if turn >= len(self.rows):
                    task.idle_loss()
                    continue
                cell, batch = self.rows[turn]
                sums[cell, 0] += task.loss_sum(batch.to(task.device, non_blocking=True))
                sums[cell, 1] += task.loss_terms(batch)
        summed: Any = trainer.strategy.reduce(sums, reduce_op="sum")
        return means(self.held_out.cells, summed.cpu())

    def _judge(self, trainer: L.Trainer, step: int) -> None:
        """End the run if it learns no more; all ranks come to the same."""
        name = self.watch.early_stop
        if name is None:
            return
        if self.last[name] < self.best:
            self.best, self.best_step, self.waited = self.last[name], step, 0
            return
        self.waited += 1
        if self.waited >= self.watch.patience and step != self.end:
            self.stopped = (
                f"after step {step}: {name} has not fallen below {self.best:.4g}, of step {self.best_step}, in "
                f"{self.waited} validations (validation.early_stop)"
            )
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.warning("training ends early %s", self.stopped)

    def facts(self) -> dict[str, Any]:
        """What metrics.json says: the last losses, and why the run ended early if it did."""
        facts: dict[str, Any] = {"held_out": self.last} if self.last else {}
        return {**facts, "stopped_early": self.stopped} if self.stopped else facts


def loss_names(cells: Sequence[Cell]) -> list[str]:
    """The names of the losses: in all, by medium, by source; a source that is called as a medium is: `source NAME`."""
    media = dict.fromkeys(medium for _, medium in cells)
    sources = dict.fromkeys(source for source, _ in cells)
    return [TOTAL, *(f"{TOTAL}/{medium}" for medium in media), *(_of_source(source, media) for source in sources)]


def _of_source(source: str, media: Any) -> str:
    return f"{TOTAL}/source {source}" if source in media else f"{TOTAL}/{source}"


def means(cells: Sequence[Cell], sums: Tensor) -> dict[str, float]:
    """The mean losses by name, from each cell's summed loss and number of loss terms [cells, 2]."""
    media = dict.fromkeys(medium for _, medium in cells)
    added: dict[str, list[float]] = {name: [0.0, 0.0] for name in loss_names(cells)}
    for (source, medium), (loss, terms) in zip(cells, sums.tolist(), strict=True):
        for name in (TOTAL, f"{TOTAL}/{medium}", _of_source(source, media)):
            added[name][0] += loss
            added[name][1] += terms
    return {name: loss / terms for name, (loss, terms) in added.items() if terms}


def accuracies(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The share of right ones among the answers that have a truth, in all and by medium; nothing where none has."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        if row["correct"] is not None:
            for name in (ACCURACY, f"{ACCURACY}/{row['type'].partition(',')[0]}"):
                found.setdefault(name, []).append(row["correct"])
    return {name: sum(right) / len(right) for name, right in found.items()}


@contextmanager
def untouched(task: Task) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module's mode and the random numbers are what they were."""
    modes = [(module, module.training) for module in task.model.modules()]
    device = task.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        task.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            reshard(task.model)


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 gathered: without a backward pass it would keep the outermost weights whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
