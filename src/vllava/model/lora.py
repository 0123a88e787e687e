"""Low-rank adapters on the LLM (LoRA), by `peft`: the original's cheaper second stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from vllava.checks import Count, ShareBelowOne
from vllava.errors import UserError


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


def merged(llm: Any) -> Any:
    """The LLM with its adapters, if it has any, added into its weights."""
    return llm.merge_and_unload() if hasattr(llm, "merge_and_unload") else llm
