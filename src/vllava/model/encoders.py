"""Frozen vision encoders behind one small interface.

An encoder maps pixels to visual tokens, [N, 3, H, W] or [N, F, 3, H, W] to [N, P, E], and says with `spec` and
`hidden_size` what it takes and gives. To add one: a class like those below, or a function that builds one, and a
config that names it under conf/encoder/image or conf/encoder/video.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import CLIPVisionConfig, ViTMAEConfig, ViTMAEModel

from vllava.batch import MEDIA_KINDS, MediumSpec
from vllava.checks import OneOf, Range
from vllava.errors import reading
from vllava.model.attention import PACKED
from vllava.model.files import Checkpoint, load_strictly, require_fit, sized, warn_of_no_numbers
from vllava.model.languagebind import VisionTower
from vllava.model.llm import judge, quiet, require_room
from vllava.pixels import normalised


class Encoder(nn.Module):
    """Pixels to visual tokens; see the module's docstring."""

    spec: MediumSpec
    hidden_size: int  # E

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.folder = checkpoint.folder
        self.sha256 = checkpoint.sha256  # a trained model refers to its encoders by this


def depth_of(feature_layer: int, layers: int) -> int:
    """The number of layers below a hidden state, counted as `transformers` does: -1 is the last layer's output."""
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def require_hidden_state(checkpoint: Checkpoint, feature_layer: int, layers: int) -> int:
    """The number of layers below a hidden state; raises UserError if the checkpoint has no such state."""
    checkpoint.require(type(feature_layer) is int, f"has no hidden state feature_layer={feature_layer!r}")
    depth = depth_of(feature_layer, layers)
    checkpoint.require(0 <= depth <= layers, f"has {layers} layers and no hidden state feature_layer={feature_layer}")
    return depth


class ClipEncoder(Encoder):
    """The vision tower of a LanguageBind or CLIP checkpoint.

    An image gives its patch tokens without CLS (256 at 224 pixels and patch 14), a video the tokens of all its
    frames with CLS (8 x 257), as in the original code. `feature_layer` -2: paper, Table 7.

    `frames` of a video default to the checkpoint's own number; for another one its temporal embeddings are
    interpolated. `temporal: false` lets a tower without temporal attention look at each frame of a video alone.
    That is not the paper's model but the port in `transformers`; without saying so, such a tower is refused.
    """

    def __init__(
        self,
        path: str,
        medium: Annotated[str, OneOf(MEDIA_KINDS)],
        feature_layer: int = -2,
        frames: Annotated[int, Range(1, MOST_FRAMES)] | None = None,
        temporal: bool = True,
    ) -> None:
        checkpoint = Checkpoint(path)
        super().__init__(checkpoint)
        self.video = medium == "video"
        config = vision_config(checkpoint)
        checkpoint.require(
            self.video or not config.add_time_attn, "has temporal attention: it is not an encoder for images"
        )
        checkpoint.require(
            config.add_time_attn or not self.video or not temporal,
            "has no temporal attention: it is not an encoder for videos",
        )
        checkpoint.require(type(temporal) is bool, f"cannot take temporal={temporal!r}: true or false")
        checkpoint.require(temporal or not config.add_time_attn, "has temporal attention: it is not for temporal=false")
        require_hidden_state(checkpoint, feature_layer, config.num_hidden_layers)
        checkpoint.require(
            frames is None or (type(frames) is int and 0 < frames <= MOST_FRAMES),
            f"cannot look at frames={frames!r} of a video: give a number from 1 to {MOST_FRAMES:,}",
        )
        later = range(depth_of(feature_layer, config.num_hidden_layers), config.num_hidden_layers)
        ignored = (*_NOT_THE_TOWER, *(f"vision_model.encoder.layers.{i}." for i in later))
        with reading(f"The settings {checkpoint.folder / 'config.json'}"), torch.device("meta"):
            expected = VisionTower(config, feature_layer)
        require_fit(expected, checkpoint, checkpoint.layout, "vision_model.", ignored)
        tensors = checkpoint.tensors()
        if self.video and frames is not None and frames != config.num_frames:
            config.num_frames = frames
            tensors = {
                name: interpolated(value, frames) if name.endswith("temporal_embedding") else value
                for name, value in tensors.items()
            }
        patches = (config.image_size // config.patch_size) ** 2
        count = config.num_frames if self.video else 1
        tokens = count * (1 + patches) if self.video else patches
        self.spec = MediumSpec(config.image_size, tokens, count, config.hidden_size)
        self.hidden_size = config.hidden_size
        self.tower = VisionTower(config, feature_layer)
        load_strictly(self.tower, checkpoint, tensors, "vision_model.", ignored)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] or videos [N, F, 3, H, W], uint8 or normalised, to [N, P, E]."""
        pixels = normalised(pixels)
        if self.video:
            return self.tower(pixels.flatten(0, 1)).unflatten(0, (-1, self.spec.frames)).flatten(1, 2)
        return self.tower(pixels)[:, 1:]


# What a checkpoint of CLIP or LanguageBind holds beside the layers of its vision tower.
_NOT_THE_TOWER = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "vision_model.post_layernorm.",
)


CLIP_SETTINGS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps"),
    *("num_channels", "image_size", "patch_size"),
)

_SIZES = tuple(name for name in CLIP_SETTINGS if name not in ("hidden_act", "layer_norm_eps"))
MOST_FRAMES = 4096  # of a video


def vision_config(checkpoint: Checkpoint) -> CLIPVisionConfig:
    """The settings of a vision tower, with `add_time_attn` and `num_frames` also where the checkpoint has neither.

    Published files list many more keys, which say nothing about the tower.
    """
    given = checkpoint.config.get("vision_config", checkpoint.config)
    where = f"config.json{'' if given is checkpoint.config else ' (vision_config)'}"
    checkpoint.require(isinstance(given, dict), f"has a {where} that is no JSON object")
    sized(checkpoint, given, tuple(key for key in _SIZES if key in given), where)
    frames, temporal = given.get("num_frames", 1), given.get("add_time_attn", False)
    checkpoint.require(
        type(frames) is int and 0 < frames <= MOST_FRAMES, f"has num_frames={str(frames)[:40]} in its {where}"
    )
    checkpoint.require(type(temporal) is bool, f"has add_time_attn={str(temporal)[:40]} in its {where}: true or false")
    with reading(f"The settings {checkpoint.folder / 'config.json'}"):
        config = CLIPVisionConfig(**{name: given[name] for name in CLIP_SETTINGS if name in given})
    checkpoint.require(config.patch_size <= config.image_size, f"has patches larger than images in its {where}")
    config.add_time_attn, config.num_frames = temporal, frames
    config._attn_implementation = PACKED
    return config


def interpolated(embedding: Tensor, frames: int) -> Tensor:
    """Temporal embeddings [1, F, E] for another number of frames; the first and the last stay what they are."""
    return interpolate(embedding.float().transpose(1, 2), frames, mode="linear", align_corners=True).transpose(1, 2)


MAE_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"),
)


class MaeEncoder(Encoder):
    """The encoder of a ViT-MAE checkpoint, nothing masked: all patch tokens in their order, without CLS."""

    def __init__(self, path: str, feature_layer: int = -2) -> None:
        checkpoint = Checkpoint(path)
        super().__init__(checkpoint)
        layers = sized(checkpoint, checkpoint.config, MAE_SIZES)["num_hidden_layers"]
        depth = require_hidden_state(checkpoint, feature_layer, layers)
        with reading(f"The settings {checkpoint.folder / 'config.json'}"), torch.device("meta"):
            config = ViTMAEConfig.from_dict({**checkpoint.config, "mask_ratio": 0.0, "num_hidden_layers": depth})
            config._attn_implementation = "sdpa"  # whatever the file says: it may name a kernel to download
            expected = ViTMAEModel(config)
        require_room(checkpoint, expected)
        tensors = checkpoint.tensors()
        with quiet(), reading(f"The encoder at {checkpoint.folder}"):
            self.vit, report = ViTMAEModel.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # we judge the report ourselves
            )
        later = tuple(f".{i}." for i in range(depth, layers))
        judge(report, f"{checkpoint.folder} does not fit ViTMAEModel", ("decoder.", *later))
        warn_of_no_numbers(self.vit, checkpoint.folder)
        self.vit.layernorm = nn.Identity()  # a hidden state before the last one has no final layer norm
        self.hidden_size = self.vit.config.hidden_size
        patches = self.vit.embeddings.patch_embeddings.num_patches
        self.spec = MediumSpec(self.vit.config.image_size, patches, width=self.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W], uint8 or normalised, to [N, P, E]."""
        # MAE shuffles patches by the rank of this noise: rising noise keeps their order.
        order = torch.arange(self.spec.tokens, device=pixels.device).expand(len(pixels), -1)
        return self.vit(normalised(pixels), noise=order).last_hidden_state[:, 1:]


def no_encoder() -> None:
    """No encoder: the model does not take this medium."""
