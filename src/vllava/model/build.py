"""Models from plain settings: the functions that configurations name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from vllava.errors import UserError
from vllava.model.attention import PACKED
from vllava.model.encoders import Encoder
from vllava.model.files import Checkpoint
from vllava.model.languagebind import LanguageBind
from vllava.model.video_llava import VideoLlava


def load_tokenizer(path: str) -> Any:
    """The tokenizer saved at `path`; raises UserError if there is none, or if it is not a fast one."""
    _local_or_hub(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer at {path} ({str(error).splitlines()[0]}).") from error
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer at {path} is not a fast one: labels need its character offsets.")
    return tokenizer


def load_llm(path: str) -> nn.Module:
    """Any causal LM that `transformers` can load, in float32, with attention over packed rows."""
    _local_or_hub(path, "language model")
    try:
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation=PACKED, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"No language model at {path} ({str(error).splitlines()[0]}).") from error


def _local_or_hub(path: str, what: str) -> None:
    """Raises UserError for a folder that is not there, which `transformers` would go and look for on a hub."""
    folder = Path(path)
    if not folder.exists() and (folder.is_absolute() or Path(folder.parts[0]).exists()):
        raise UserError(f"No {what} at {path}: there is no such folder.")


def fresh_llm(tokenizer_path: str, **architecture: Any) -> nn.Module:
    """A randomly initialised Llama for the tokenizer saved at `tokenizer_path`; `architecture` as in LlamaConfig."""
    tokenizer = load_tokenizer(tokenizer_path)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(tokenizer), **ids, **architecture)
    config._attn_implementation = PACKED
    return LlamaForCausalLM(config)


def video_llava(
    llm: nn.Module, image_encoder: Encoder | None = None, video_encoder: Encoder | None = None
) -> VideoLlava:
    """Video-LLaVA from its parts, with a fresh projector."""
    return VideoLlava(llm, image_encoder, video_encoder)


def languagebind(
    vision: dict, text: dict, projection_dim: int, tokenizer_path: str, start_from: str | None = None
) -> LanguageBind:
    """A fresh LanguageBind, or one that starts from the checkpoint folder `start_from`.

    What the checkpoint lacks stays fresh: a video encoder that starts from its image encoder gets temporal
    attention whose output is zero, so it begins as the image encoder on every frame.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        vision_config=dict(vision),
        text_config={"vocab_size": len(tokenizer), **special, **text},
        projection_dim=projection_dim,
    )
    model = LanguageBind._from_config(config, attn_implementation=PACKED)
    # CLIP's own start, 0.02, drowns in the patches' contents: a small encoder then never learns where things are.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    if start_from is not None:
        missing, left_over = model.load_state_dict(Checkpoint(start_from).tensors(), strict=False)
        if left_over or any("temporal" not in name for name in missing):
            raise UserError(f"{start_from} does not fit: missing {missing}, left over {left_over}.")
        for layer in model.vision_model.encoder.layers:
            nn.init.zeros_(layer.temporal_attn.out_proj.weight)
            nn.init.normal_(layer.temporal_embedding, std=0.02)
    return model


def mae(**architecture: Any) -> ViTMAEForPreTraining:
    """A fresh masked autoencoder; `architecture` as in ViTMAEConfig."""
    return ViTMAEForPreTraining(ViTMAEConfig(**architecture))
