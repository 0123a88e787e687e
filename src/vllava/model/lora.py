"""Low-rank adapters on the LLM (LoRA), by `peft`: the original's cheaper second stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllava.checks import Count, ShareBelowOne
from vllava.errors import UserError
from vllava.model.mapped import put_in_place, spooled


@dataclass(frozen=True)
class Lora:
    """Adapters on every linear layer of the LLM but its head, as in the original's `finetune_lora.sh`."""

    r: Count = 128
    alpha: Count = 256
    dropout: ShareBelowOne = 0.05


def add_lora(llm: nn.Module, settings: Lora) -> Any:
    """The LLM with fresh adapters, which start as no change at all; raises UserError if `peft` is missing."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("LoRA needs the package peft: pip install 'vllava[lora]'.") from error
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(llm, config)  # type: ignore[arg-type]


@torch.no_grad()
def merged(llm: Any, folder: Path | None = None) -> Any:
    """The LLM with its adapters, if it has any, added into its weights.

    With `folder` the sums lie in a file on its disk, mapped, and one weight at a time is in memory.
    """
    if not hasattr(llm, "merge_and_unload"):
        return llm
    adapted = {name: module for name, module in llm.named_modules() if hasattr(module, "get_delta_weight")}
    whole = all(module.base_layer.weight.dtype == torch.float32 for module in adapted.values())
    if folder is None or not whole:  # `peft` knows how to add to quantised ones
        return llm.merge_and_unload()
    sums = ((f"{name}.base_layer.weight", _with_adapters(module)) for name, module in adapted.items())
    put_in_place(llm, spooled(sums, folder))
    return llm.unload()


def _with_adapters(module: Any) -> Tensor:
    weight = module.base_layer.weight
    for name in module.active_adapters:
        weight = weight + module.get_delta_weight(name)
    return weight
