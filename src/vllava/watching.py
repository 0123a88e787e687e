"""What a run looks at while it trains, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from vllava.errors import UserError
from vllava.evaluation.held_out import HeldOutRows
from vllava.evaluation.preview import Preview
from vllava.model.tree import tree
from vllava.training.loggers import log_samples
from vllava.training.task import Task
from vllava.training.validation import Validation, Watch

MODEL = "model.txt"  # in a run's folder


def validation(
    settings: Any, task: Task, tokenizer: Any, preview: Preview | None, record: Callable[[dict[str, float]], Any]
) -> list[Validation]:
    """The validation that `settings`, the resolved configuration, asks for, if any; see `Validation`.

    preview: the samples to answer along the way. Raises UserError where it cannot be done.
    """
    asked = settings["validation"]
    if not asked or asked["every_steps"] is None:
        if asked and asked["early_stop"] is not None:
            raise UserError("validation.early_stop needs validations: set validation.every_steps=NUMBER.")
        return []
    if not task.shares_batches:
        raise UserError(
            f"validation.every_steps is for the stages and for language models; {type(task).__name__} is judged by "
            "`python -m vllava.evaluation.foundations`: leave it null."
        )
    watch = Watch(asked["every_steps"], asked["early_stop"], asked["patience"])
    rows = HeldOutRows(asked["sources"], task.specs, tokenizer, settings, asked["samples"], asked.get("remedy") or "")
    show = _answers(preview) if preview and asked["answers"] else None
    return [Validation(rows, watch, record, show, _show)]


def _answers(preview: Preview) -> Callable[[Task], list[dict[str, Any]]]:
    def answers(task: Task) -> list[dict[str, Any]]:
        if not task.trainer.loggers:
            return []
        # All ranks answer the same samples: where the model is shared out, none can without the others, and all have
        # to go on until the last has ended.
        together = {"synced_gpus": True} if task.sharded and task.trainer.world_size > 1 else {}
        return preview.answered(task.model, **together)

    return answers


def _show(trainer: L.Trainer, rows: list[dict[str, Any]]) -> None:
    for logger in trainer.loggers:
        log_samples(logger, rows, trainer.global_step)


@rank_zero_only
def show_model(model: nn.Module, run_dir: Path) -> None:
    """Print the model's parts with what trains of each, and write all of them to model.txt."""
    print(tree(model, depth=2), flush=True)
    (run_dir / MODEL).write_text(tree(model) + "\n", encoding="utf-8")
