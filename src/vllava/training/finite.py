"""Steps whose loss or gradient is not a number: the samples in them, and how many a run may leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllava.batch import Batch, Step
from vllava.errors import UserError

ACTIONS = ("stop", "skip")
IN_A_ROW = 10  # skipped steps, after which it is the weights that are bad, not a batch
SHOWN = 64  # keys in a message
HALF = 65_504  # the largest number of float16, in which checkpoints are kept


@dataclass(frozen=True)
class OnNan:
    """What is done with a step whose loss or gradient norm is NaN or infinite: `action` stop, or skip it.

    max_skipped: the share of the planned steps that may be skipped; one always may. A single batch may be bad by its
    data, and leaving out one in a hundred changes little; more of them, or IN_A_ROW one after the other, mean that the
    run itself has failed.
    """

    action: str = "stop"
    max_skipped: float = 0.01

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"task.on_nan={self.action!r} is not known; there are: {', '.join(ACTIONS)}.")
        number = isinstance(self.max_skipped, (int, float)) and not isinstance(self.max_skipped, bool)
        if not number or not 0 <= self.max_skipped <= 1:
            raise UserError(f"task.max_skipped={self.max_skipped!r} is not a share: it lies between 0 and 1.")

    def require(self, event: dict[str, Any], skipped: int, in_a_row: int, planned: int, half: bool) -> None:
        """Raises UserError unless the step may be skipped, with `skipped` in all, this one included.

        event: as `described` gives it; half: whether the run computes in float16.
        """
        allowed = max(int(self.max_skipped * planned), 1)
        if self.action == "skip" and in_a_row <= IN_A_ROW and skipped <= allowed:
            return
        if self.action == "stop":
            rule, remedy = "", "; task.on_nan=skip leaves such a step out"
        elif in_a_row > IN_A_ROW:
            rule, remedy = f" More than {IN_A_ROW} steps in a row were such: the weights are bad by now.", ""
        else:
            rule = (
                f" {skipped} steps were such, and task.max_skipped={self.max_skipped:g} allows {allowed} of {planned}."
            )
            remedy = ""
        keys = event["keys"]
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        precision = (
            f"float16 ends at {HALF:,}: trainer.precision=bf16-mixed, or 32-true where there is none; " if half else ""
        )
        raise UserError(
            f"Step {event['step']}: the loss is {event['loss']:g} and the norm of its gradient "
            f"{event['gradient_norm']:g}, so the run ends here, before this step changes any weight.{rule} "
            f"{event['what']}: {', '.join(keys[:SHOWN])}{more}. Where the loss grew before (history.jsonl), lower the "
            f"learning rate: task.recipe.lr=…; {precision}else look at these samples{remedy}."
        )


def described(step: Step, losses: Sequence[Tensor]) -> tuple[list[str], list[str]]:
    """The keys of a rank's micro-batches whose own loss is not finite, and of all its samples."""
    bad = [not math.isfinite(loss) for loss in torch.stack(list(losses)).tolist()] if losses else []
    everything = [key for batch in step.micro_batches for key in _keys(batch)]
    suspects = [key for batch, is_bad in zip(step.micro_batches, bad, strict=False) if is_bad for key in _keys(batch)]
    return [_full(key, step.keys) for key in suspects], step.keys or everything


def _keys(batch: Any) -> list[str]:
    return batch.keys if isinstance(batch, Batch) else []


def _full(key: str, places: list[str]) -> str:
    """A sample's key with the shard it lies in, where that is known."""
    return next((place for place in places if place.endswith(f":{key}")), key)


@torch.no_grad()
def require_finite(weights: dict[str, Tensor]) -> None:
    """Raises UserError where trained weights are NaN, infinite or larger than a checkpoint can hold."""
    for name, weight in weights.items():
        most = math.inf if name.startswith("projector.") else HALF  # the projector is kept in float32
        extremes = torch.stack(torch.aminmax(weight)).abs().tolist() if weight.numel() else [0.0]  # NaN if any is
        if not all(value <= most and value < math.inf for value in extremes):
            raise UserError(
                f"Training has ended, but its weights cannot be used: {name} reaches {max(extremes):g}, and a "
                f"checkpoint's numbers end at {most:,g}. Nothing was exported. Lower the learning rate: "
                "task.recipe.lr=…; history.jsonl shows where the loss grew."
            )
