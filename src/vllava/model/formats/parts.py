"""A Video-LLaVA taken apart, as every format is read and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CLIPVisionConfig, PreTrainedConfig

from vllava.errors import UserError
from vllava.model.encoders import CLIP_SETTINGS, vision_config
from vllava.model.files import Checkpoint, require_same
from vllava.model.languagebind import VisionTower

Tensors = dict[str, Tensor]


@dataclass
class Tower:
    """A whole vision tower: settings as in CLIP's `vision_config`, tensors named as in CLIP's vision model."""

    config: dict[str, Any]
    tensors: Tensors

    @property
    def temporal(self) -> bool:
        return bool(self.config.get("add_time_attn"))

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings that CLIP knows."""
        return {name: value for name, value in self.config.items() if name in CLIP_SETTINGS}


@dataclass
class Parts:
    """A Video-LLaVA taken apart."""

    llm_config: PreTrainedConfig
    llm: Tensors  # named as in the causal LM of `transformers`
    projector: Tensors  # 0.weight, 0.bias, 2.weight, 2.bias
    towers: dict[str, Tower]  # by medium
    tokenizer: Any
    feature_layer: int = -2
    settings: dict[str, Any] = field(default_factory=dict)  # what else an original checkpoint's config.json says
    image_fit: str = "pad"
    template: str = "vicuna_v1"


def under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def tower_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the vision tower in a checkpoint of CLIP or LanguageBind."""
    config = vision_config(checkpoint)
    return {name: getattr(config, name) for name in (*CLIP_SETTINGS, "add_time_attn", "num_frames")}


def checked(parts: Parts, folder: Path) -> Parts:
    """The parts, if each has exactly the tensors that its settings ask for; else UserError that lists them."""
    if type(parts.feature_layer) is not int:
        raise UserError(f"{folder} takes features of layer {parts.feature_layer!r}, which is no number.")
    layers = parts.llm_config.num_hidden_layers
    if not isinstance(layers, int) or layers > len(parts.llm):  # nothing of that size is to be built
        raise UserError(f"The language model in {folder} has {len(parts.llm)} tensors: too few for {layers} layers.")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(parts.llm_config, attn_implementation="eager", trust_remote_code=False)
    wanted = dict(llm.state_dict())
    if parts.llm_config.tie_word_embeddings and "lm_head.weight" not in parts.llm:
        wanted.pop("lm_head.weight", None)
    require_same(parts.llm, wanted, f"The language model in {folder} is not what its config.json says")
    for kind, tower in parts.towers.items():
        _check_tower(tower, f"The {kind} tower in {folder}")
    width = next((tower.config["hidden_size"] for tower in parts.towers.values()), 0)
    size = parts.llm_config.hidden_size
    shapes = {"0.weight": (size, width), "0.bias": (size,), "2.weight": (size, size), "2.bias": (size,)}
    require_same(
        parts.projector,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        f"The projector in {folder} does not fit",
    )
    return parts


def _check_tower(tower: Tower, name: str) -> None:
    tower.tensors.pop("embeddings.position_ids", None)  # a constant that older versions saved
    layers = tower.config["num_hidden_layers"]
    if layers > len(tower.tensors):
        raise UserError(f"{name} has {len(tower.tensors)} tensors: too few for {layers} layers.")
    config = CLIPVisionConfig(**tower.sizes)
    config.add_time_attn, config.num_frames = tower.temporal, tower.config.get("num_frames", 1)
    with torch.device("meta"):
        expected = VisionTower(config, feature_layer=-1)
        last = torch.nn.LayerNorm(tower.config["hidden_size"])
    shapes = {**expected.state_dict(), **{f"post_layernorm.{n}": v for n, v in last.state_dict().items()}}
    require_same(tower.tensors, shapes, f"{name} is not what its settings say")
