"""The paper's training stages: next-token prediction on the answers of packed conversations."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vllava.batch import Batch, MediumSpec, idle_batch
from vllava.model.checkpoint import TOKENIZER, Description, save_trained
from vllava.model.flops import Costs, costs_of
from vllava.model.lora import merged
from vllava.model.sharding import shard
from vllava.model.video_llava import VideoLlava
from vllava.training.task import Task


class Stage(Task):
    """Stage 1 trains the projector, stage 2 the projector and the LLM (section 3.2): `trained` says which."""

    model: VideoLlava
    shares_batches = True

    def loss_sum(self, batch: Batch) -> Tensor:
        return self.model.loss_sum(batch)

    def loss_terms(self, batch: Batch) -> int:
        return batch.num_supervised

    def tokens(self, batch: Batch) -> int:
        return int(batch.cu_seqlens[-1])

    def flops(self, batch: Batch) -> float:
        return self._costs.of(batch)

    @cached_property
    def _costs(self) -> Costs:
        return costs_of(self.model)

    def idle_loss(self) -> Tensor:
        return self.model.loss_sum(idle_batch().to(self.device)) * 0

    def shard(self, mesh: Any, half: bool) -> None:
        shard(self.model, mesh, half)

    @property
    def specs(self) -> dict[str, MediumSpec]:
        return self.model.specs

    def check(self, settings: dict) -> None:
        self.model.require_context(settings["data"]["max_length"])

    def export(self, folder: Path, tokenizer: Any, settings: dict) -> None:
        llm = settings.get("model", {}).get("llm", {}).get("path", settings["tokenizer"])
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.model.llm = merged(self.model.llm, folder.parent)
        description = Description(
            encoders={kind: settings["encoder"][kind] for kind in self.model.encoders},
            llm=llm,
            template=settings["data"]["template"],
            image_fit=settings["data"]["image_fit"],
            trained=list(self.trained),
            template_options=settings["data"].get("template_options") or {},
            frame_sampling=settings["data"].get("frame_sampling", "index"),
            tokenizer="" if llm == settings["tokenizer"] else TOKENIZER,
        )
        save_trained(self.model, tokenizer, description, folder)
