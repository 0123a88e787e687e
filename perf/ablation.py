"""What each economy is worth: a step as it is, and with one of them undone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from perf.contenders import MIXTURES, TRAINED, Geometry, Loop, build, draw, packed, train_only
from perf.timing import take_turns, timed
from vllava.batch import IGNORE_INDEX, Batch
from vllava.data.packing import PackedSample, pack
from vllava.model.build import layers_of
from vllava.model.languagebind import vision_layer
from vllava.model.precision import halve_frozen

HEADER = "how many times as fast a step is with the economy as without it; the small geometry"


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows for both stages."""
    return [row for stage in ("stage1", "stage2") for row in compare(stage, repeats, bf16)]


def compare(stage: str, repeats: int, bf16: bool) -> list[dict]:
    """The rows of one stage."""
    model, _ = build(Geometry())
    samples = draw(model, MIXTURES[stage])
    variants: dict[str, Callable[[Any, list[PackedSample]], Variant]] = {
        "packed rows, not sample by sample": _sample_by_sample,
        "logits of supervised tokens only": _all_logits,
        "encoders stop at the selected layer": _whole_encoder,
        "features from the cache": _encoded,  # what is timed is the step without encoders
        "compiled layers": _compiled,
    }
    if stage == "stage1":
        variants["no gradient of frozen weights"] = _all_gradients
    if bf16:
        variants["frozen matrices in bfloat16"] = _halved
    gained = ("features from the cache", "compiled layers", "frozen matrices in bfloat16")  # not what is done anyway
    made = {"as it is": Variant(model, packed(samples))}
    made |= {name: make(copy.deepcopy(model), samples) for name, make in variants.items()}
    steps = {name: variant.prepared(stage, bf16) for name, variant in made.items()}
    timing = take_turns({name: timed(step) for name, step in steps.items()}, repeats, warmup=2)
    rows = []
    for name in variants:
        fast, slow = (name, "as it is") if name in gained else ("as it is", name)
        rows.append({"stage": stage, "economy": name, "times as fast": timing.ratio(fast, slow)})
    return rows


@dataclass
class Variant:
    """A model, its micro-batches, and what is done to it once it is known what is frozen."""

    model: Any  # a VideoLlava
    rows: list[Batch]
    when_frozen: Callable[[Any], object] = lambda model: None

    def prepared(self, stage: str, bf16: bool) -> Callable[[], float]:
        loop = Loop(self.model.train(), train_only(self.model, TRAINED[stage]), bf16)
        self.when_frozen(self.model)
        return lambda: loop.packed_step(self.rows)


def _sample_by_sample(model: Any, samples: list[PackedSample]) -> Variant:
    return Variant(model, [pack([sample]) for sample in samples])


def _all_logits(model: Any, samples: list[PackedSample]) -> Variant:
    def loss_sum(batch: Batch) -> torch.Tensor:
        logits = model.logits(batch, torch.arange(len(batch.token_ids)))
        following = torch.cat([batch.labels[1:], batch.labels.new_full((1,), IGNORE_INDEX)])
        return cross_entropy(logits.float(), following, reduction="sum", ignore_index=IGNORE_INDEX)

    model.loss_sum = loss_sum
    return Variant(model, packed(samples))


def _whole_encoder(model: Any, samples: list[PackedSample]) -> Variant:
    for encoder in model.encoders.values():
        config = copy.deepcopy(encoder.tower.encoder.layers[0].self_attn.config)
        encoder.tower.encoder.layers.append(vision_layer(config))
    return Variant(model, packed(samples))


@torch.no_grad()
def _encoded(model: Any, samples: list[PackedSample]) -> Variant:
    rows = [
        replace(
            row,
            images=model.encoders["image"](row.images) if len(row.images) else row.images,
            videos=model.encoders["video"](row.videos) if len(row.videos) else row.videos,
        )
        for row in packed(samples)
    ]
    return Variant(model, rows)


def _compiled(model: Any, samples: list[PackedSample]) -> Variant:
    for layer in layers_of(model.llm):
        layer.compile(dynamic=True)
    return Variant(model, packed(samples))


def _all_gradients(model: Any, samples: list[PackedSample]) -> Variant:
    return Variant(model, packed(samples), lambda model: model.llm.requires_grad_(True))


def _halved(model: Any, samples: list[PackedSample]) -> Variant:
    return Variant(model, packed(samples), halve_frozen)
