"""What a task trains, and how it optimises it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from vllava.checks import NotNegative, OneOf, Positive, Share, ShareBelowOne, Whole
from vllava.errors import UserError

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a task optimises: AdamW with cosine decay (paper, Table 7 and section 4.1.3).

    schedule: of the learning rate after its warm-up; a constant one does not depend on how many steps are planned, so a
    run may be given more of them later. warmup_steps: in place of warmup_ratio, which is a share of the planned ones.
    """

    lr: Positive
    lr_of: dict[str, Positive] = field(default_factory=dict)  # of what `trained` names, where it is another
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"
    warmup_ratio: Share = 0.03
    warmup_steps: Whole | None = None
    weight_decay: NotNegative = 0.0
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    clip_norm: Positive = 1.0

    def scheduler(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The learning rate of each of a run's planned steps."""
        warmup = int(steps * self.warmup_ratio) if self.warmup_steps is None else self.warmup_steps
        if self.schedule == "constant":
            return get_constant_schedule_with_warmup(optimizer, warmup)
        return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def freeze_all_but(model: nn.Module, trained: list[str]) -> dict[str, int]:
    """Freeze every parameter except those of the named submodules (or parameters); returns the count of each.

    A name may be a pattern: `llm.*.lora_*` are the LLM's adapters. This is the only place that decides what a stage
    trains. Raises UserError for a name the model lacks.
    """
    model.requires_grad_(False)
    counts = {}
    for name in trained:
        chosen = [parameter for full, parameter in model.named_parameters() if _is_of(full, name)]
        if not chosen:
            names = ", ".join(dict.fromkeys(full.split(".")[0] for full, _ in model.named_parameters()))
            raise UserError(f"task.trained names {name!r}, which the model does not have; it has: {names}.")
        for parameter in chosen:
            parameter.requires_grad_(True)
        counts[name] = sum(p.numel() for p in chosen)
    return counts


def _is_of(parameter: str, name: str) -> bool:
    """Whether a parameter is, or belongs to, what a name or pattern says."""
    return fnmatchcase(parameter, name) or fnmatchcase(parameter, f"{name}.*")


def parameter_groups(model: nn.Module, recipe: Recipe, trained: dict[str, int]) -> list[dict[str, Any]]:
    """The trained parameters by learning rate, each group with the names of the parts that have it."""
    rates = recipe.lr_of
    if unknown := sorted(set(rates) - set(trained)):
        raise UserError(f"task.recipe.lr_of names {unknown}; task.trained names {sorted(trained)}.")
    groups: dict[float, list] = {}
    names: dict[float, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((part for part in rates if _is_of(name, part)), None)
            rate = recipe.lr if part is None else rates[part]
            groups.setdefault(rate, []).append(parameter)
            part = part or next(part for part in trained if _is_of(name, part))
            if part not in names.setdefault(rate, []):
                names[rate].append(part)
    return [{"params": parameters, "lr": rate, "name": "+".join(names[rate])} for rate, parameters in groups.items()]
