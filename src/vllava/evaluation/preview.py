"""Held-out samples that a model answers right after its training, for the report and the dashboard."""

from __future__ import annotations

from typing import Any

from vllava.batch import MediumSpec
from vllava.data.build import conversation_packer, sample_decoder
from vllava.evaluation.answers import answer_all, read_samples
from vllava.evaluation.report import sample_rows
from vllava.model.device import best_device


class Preview:
    """A few held-out samples, read before training starts, that the trained model answers for the report."""

    def __init__(self, sources: dict[str, str], specs: dict[str, MediumSpec], tokenizer: Any, settings: Any) -> None:
        data = settings["data"]
        self.decode = sample_decoder(specs, data["image_fit"], data["decoder"], data.get("frame_sampling", "index"))
        self.packer = conversation_packer(
            specs, tokenizer, data["template"], template_options=data.get("template_options")
        )
        remedy = "Make them with `python -m data_prep.toy eval`."
        self.samples = [
            sample
            for kind in specs
            if kind in sources
            for sample in read_samples(sources[kind], self.decode, remedy, limit=6, packer=self.packer)
        ]

    def rows(self, model: Any) -> list[dict[str, Any]]:
        """What the report and the W&B table show: pictures, question, answer, truth."""
        model = model.to(best_device()).eval()
        answers = answer_all(model, self.packer, self.samples, batch_size=len(self.samples), max_new_tokens=32)
        return sample_rows(self.samples, answers)
