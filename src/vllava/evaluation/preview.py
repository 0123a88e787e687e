"""Held-out samples that a model answers right after its training, for the report and the dashboard."""

from __future__ import annotations

from itertools import islice
from typing import Any

from vllava.batch import MediumSpec
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.patience import Remote
from vllava.data.samples import Sample
from vllava.evaluation.answers import answer_all, read_samples
from vllava.evaluation.report import sample_rows
from vllava.model.device import best_device

SHOWN = 6  # of each modality


class Preview:
    """A few held-out samples, read before training starts, that the trained model answers for the report.

    sources: modality -> folders of shards, of which the first samples are taken; remedy: the sentence that ends a
    missing-shards error.
    """

    def __init__(
        self,
        sources: dict[str, list[str]],
        specs: dict[str, MediumSpec],
        tokenizer: Any,
        settings: Any,
        remedy: str = "",
    ) -> None:
        data = settings["data"]
        self.decode = sample_decoder(specs, data["image_fit"], data["decoder"], data.get("frame_sampling", "index"))
        self.packer = conversation_packer(
            specs, tokenizer, data["template"], template_options=data.get("template_options")
        )
        remote = Remote.of(data.get("cache"))
        self.samples: list[Sample] = []
        for kind in (*specs, "text"):
            samples = (
                sample
                for folder in sources.get(kind, [])
                for sample in read_samples(folder, self.decode, remedy, packer=self.packer, remote=remote)
            )
            self.samples += islice(samples, SHOWN)

    def rows(self, model: Any) -> list[dict[str, Any]]:
        """What the report and the W&B table show: pictures, question, answer, truth."""
        return self.answered(model.to(best_device()).eval()) if self.samples else []

    def answered(self, model: Any, **sampling: Any) -> list[dict[str, Any]]:
        """As `rows`, by a model where it is and as it is; `sampling` goes to the generation."""
        if not self.samples:
            return []
        size = len(self.samples)
        answers = answer_all(model, self.packer, self.samples, batch_size=size, max_new_tokens=32, **sampling)
        return sample_rows(self.samples, answers)
