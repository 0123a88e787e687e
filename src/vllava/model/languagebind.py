"""LanguageBind: a CLIP whose vision layers can attend over frames before they attend within a frame.

`transformers` has CLIP, and we use its parts; it does not have the temporal attention of
LanguageBind-Video, which this file adds. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPVisionEmbeddings

from vllava.pixels import normalised


class TemporalLayer(CLIPEncoderLayer):
    """A CLIP layer that first attends over the frames at each token position (LanguageBind's `add_time_attn`).

    The frame axis has its own layer norm, attention and residual; the temporal embedding is added in every
    layer, and not for a single frame.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.frames = config.num_frames
        self.temporal_embedding = nn.Parameter(torch.empty(1, config.num_frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        nn.init.normal_(self.temporal_embedding, std=config.hidden_size**-0.5)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """hidden_states [N * F, 1 + P, E], the frames of a video next to each other."""
        tokens = hidden_states.shape[1]
        over_time = hidden_states.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(0, 1)  # [N * (1 + P), F, E]
        if self.frames > 1:
            over_time = over_time + self.temporal_embedding
        attended, _ = self.temporal_attn(self.temporal_layer_norm1(over_time))
        over_time = over_time + attended
        hidden_states = over_time.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)
        return super().forward(hidden_states, attention_mask, **kwargs)


def vision_layer(config: CLIPVisionConfig) -> CLIPEncoderLayer:
    """One layer of a vision tower, as its config says."""
    return TemporalLayer(config) if getattr(config, "add_time_attn", False) else CLIPEncoderLayer(config)


class VisionTower(nn.Module):
    """The vision tower up to a chosen hidden state; layers after it do not exist.

    `feature_layer` counts hidden states as `transformers` does: 0 is taken after the pre-layer-norm, -1 is
    the last layer's output, -2 (the paper's choice, Table 7) the one before. No post-layer-norm.
    """

    def __init__(self, config: CLIPVisionConfig, feature_layer: int = -1) -> None:
        super().__init__()
        self.depth = feature_layer if feature_layer >= 0 else config.num_hidden_layers + 1 + feature_layer
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([vision_layer(config) for _ in range(self.depth)])

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] (frames of a video next to each other) to hidden states [N, 1 + P, E]."""
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for layer in cast(nn.ModuleList, self.encoder.layers):
            hidden = layer(hidden, None)
        return hidden


class LanguageBind(CLIPModel):
    """Vision and text towers with a shared embedding space: for training and judging encoders.

    With `vision_config.add_time_attn` the vision tower takes videos; a video's embedding is the mean over
    its frames.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        vision = config.vision_config
        vision._attn_implementation = self.vision_model.config._attn_implementation
        if getattr(vision, "add_time_attn", False):
            self.vision_model.encoder.layers = nn.ModuleList(
                [TemporalLayer(vision) for _ in range(vision.num_hidden_layers)]
            )
            self.post_init()

    def embed_media(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] or videos [N, F, 3, H, W], uint8 or normalised, to unit vectors [N, D]."""
        frames = pixels.shape[1] if pixels.dim() == 5 else 1
        pooled = self.vision_model(normalised(pixels.flatten(0, -4))).pooler_output
        embedded = self.visual_projection(pooled.unflatten(0, (-1, frames)).mean(1))
        return nn.functional.normalize(embedded.float(), dim=-1)

    def embed_text(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Captions [N, L] to unit vectors [N, D]."""
        pooled = self.text_model(input_ids=token_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(self.text_projection(pooled).float(), dim=-1)
