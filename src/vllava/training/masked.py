"""Train a masked autoencoder: the MAE baseline, an encoder that has never seen text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ViTMAEForPreTraining

from vllava.batch import CaptionBatch, MediumSpec
from vllava.model.files import save_half
from vllava.pixels import normalised
from vllava.training.task import Task


class Masked(Task):
    """Reconstruct the masked patches of images; captions are not used."""

    model: ViTMAEForPreTraining

    def loss_sum(self, batch: CaptionBatch) -> Tensor:
        return self.model(normalised(batch.pixels)).loss * len(batch.pixels)

    def loss_terms(self, batch: CaptionBatch) -> int:
        return len(batch.pixels)

    @property
    def specs(self) -> dict[str, MediumSpec]:
        return {"image": MediumSpec(self.model.config.image_size, tokens=0)}

    def export(self, folder: Path, tokenizer: Any, settings: dict) -> None:
        save_half(self.model, folder)
