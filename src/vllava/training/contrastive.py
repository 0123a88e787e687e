"""Align an encoder with text, as LanguageBind and CLIP do: a symmetric contrastive loss over the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vllava.batch import CaptionBatch, MediumSpec
from vllava.model.files import save_half
from vllava.model.languagebind import LanguageBind
from vllava.training.task import Task


class Contrastive(Task):
    """Every medium picks its caption among all captions of the batch, and every caption its medium."""

    model: LanguageBind

    def loss_sum(self, batch: CaptionBatch) -> Tensor:
        media = self.model.embed_media(batch.pixels)
        text = self.model.embed_text(batch.token_ids, batch.attention_mask)
        logits = self.model.logit_scale.exp().clamp(max=100) * media @ text.T
        target = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, target, reduction="sum") + cross_entropy(logits.T, target, reduction="sum")) / 2

    def loss_terms(self, batch: CaptionBatch) -> int:
        return len(batch.pixels)

    @property
    def specs(self) -> dict[str, MediumSpec]:
        vision = self.model.config.vision_config
        if getattr(vision, "add_time_attn", False):
            return {"video": MediumSpec(vision.image_size, tokens=0, frames=vision.num_frames)}
        return {"image": MediumSpec(vision.image_size, tokens=0)}

    def export(self, folder: Path, tokenizer: Any, settings: dict) -> None:
        save_half(self.model, folder)
