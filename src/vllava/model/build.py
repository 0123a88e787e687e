"""Models from plain settings: the functions that configurations name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from vllava.checks import Count, Positive, ShareBelowOne
from vllava.errors import UserError, reading
from vllava.model.attention import PACKED
from vllava.model.encoders import Encoder
from vllava.model.files import Checkpoint, require_same
from vllava.model.languagebind import LanguageBind, TemporalLayer
from vllava.model.llm import read_llm
from vllava.model.lora import Lora, add_lora
from vllava.model.tokenizer import load_tokenizer
from vllava.model.video_llava import VideoLlava

_TEMPORAL = ".temporal_"  # in the names of what only a video encoder has


def load_llm(
    path: str,
    gradient_checkpointing: bool = False,
    four_bit: bool = False,
    compile_layers: bool = False,
    as_stored: bool = False,
) -> nn.Module:
    """Any causal LM that `transformers` can load, in float32, with attention over packed rows.

    `gradient_checkpointing` keeps only each layer's input for the backward pass; `four_bit` quantises the weights to
    NF4 (QLoRA), which needs a GPU and bitsandbytes; `compile_layers` lets torch.compile have each layer; `as_stored`
    leaves the weights in their files, for one who will cast them, see `set_precision`. Raises UserError for a
    checkpoint that is damaged, or is not wholly one of a causal LM, see `read_llm`.
    """
    _local_or_hub(path, "language model")
    settings: dict[str, Any] = {"quantization_config": _nf4()} if four_bit else {}
    checkpoint = Checkpoint(path)
    llm = read_llm(checkpoint, path, as_stored and not four_bit, **settings)
    # A projector belongs to the LLM it was trained with, which is known by this, as encoders are.
    llm.folder, llm.sha256 = checkpoint.folder, checkpoint.sha256
    if gradient_checkpointing:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    if compile_layers:
        for layer in layers_of(llm):
            layer.compile(dynamic=True)
    return llm


def as_stored(settings: dict) -> dict[str, Any]:
    """What to add to the settings of a model for its LLM to be read as it is stored, where `load_llm` reads it."""
    llm = settings.get("llm")
    reads = isinstance(llm, dict) and llm.get("_target_") == f"{load_llm.__module__}.{load_llm.__name__}"
    return {"llm": {"as_stored": True}} if reads else {}


def layers_of(llm: Any) -> nn.ModuleList:
    """The transformer layers of a causal LM."""
    depth = llm.config.get_text_config().num_hidden_layers
    [layers] = [m for m in llm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return layers


def _nf4() -> BitsAndBytesConfig:
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("model.llm.four_bit=true needs a CUDA GPU and bitsandbytes (pip install bitsandbytes).")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _local_or_hub(path: str, what: str) -> None:
    """Raises UserError for a folder that is not there, which `transformers` would go and look for on a hub."""
    with reading(f"The {what} at {path[:200]}"):
        folder = Path(path)
        if not folder.exists() and (folder.is_absolute() or Path(folder.parts[0]).exists()):
            raise UserError(f"No {what} at {path}: there is no such folder.")


def fresh_llm(
    tokenizer_path: str,
    hidden_size: Count,
    intermediate_size: Count,
    num_hidden_layers: Count,
    num_attention_heads: Count,
    num_key_value_heads: Count | None = None,
    max_position_embeddings: Count = 4096,
    tie_word_embeddings: bool = False,
    initializer_range: Positive = 0.02,
    start_from: str | None = None,
) -> nn.Module:
    """A Llama for the tokenizer saved at `tokenizer_path`, random or with the weights of the folder `start_from`.

    The other settings are those of LlamaConfig. Tokens that were added to the tokenizer as phrases start as the sum of
    their words, see `compose_phrases`.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads or num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        **_special_ids(tokenizer),
    )
    config._attn_implementation = PACKED
    llm = LlamaForCausalLM(config)
    compose_phrases(llm.get_input_embeddings(), tokenizer)
    if start_from is not None:
        tensors = load_llm(start_from).state_dict()
        require_same(tensors, llm.state_dict(), f"The LLM at {start_from} is not of the sizes asked for")
        llm.load_state_dict(tensors)
    return llm


@torch.no_grad()
def compose_phrases(embeddings: nn.Embedding, tokenizer: Any) -> None:
    """Let each phrase among the added tokens start as the sum of its words' embeddings, scaled to the size of one.

    A phrase is an added token that is not special, such as `small red circle`; without it the tokenizer would
    write several tokens. Starting from a random vector instead, a small model takes several times the steps to
    find out what the phrases have in common.
    """
    backend = tokenizer.backend_tokenizer
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            continue
        pieces = backend.pre_tokenizer.pre_tokenize_str(f" {token.content}")
        words = [word.id for text, _ in pieces for word in backend.model.tokenize(text)]
        embeddings.weight[index] = embeddings.weight[words].sum(0) / len(words) ** 0.5


def _special_ids(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def video_llava(
    llm: nn.Module,
    image_encoder: Encoder | None = None,
    video_encoder: Encoder | None = None,
    lora: Lora | None = None,
) -> VideoLlava:
    """Video-LLaVA from its parts, with a fresh projector; `lora` puts adapters on the LLM."""
    if lora is not None:
        llm = add_lora(llm, lora if isinstance(lora, Lora) else Lora(**lora))
    return VideoLlava(llm, image_encoder, video_encoder)


@dataclass(frozen=True)
class _Tower:
    """What both towers' settings have in common; names as in `transformers`."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    hidden_act: str


@dataclass(frozen=True)
class VisionSettings(_Tower):
    """A vision tower; `add_time_attn` and `num_frames` make it one for videos."""

    image_size: Count
    patch_size: Count
    add_time_attn: bool = False
    num_frames: Count = 1


@dataclass(frozen=True)
class TextSettings(_Tower):
    """A text tower."""

    max_position_embeddings: Count


def languagebind(
    vision: VisionSettings,
    text: TextSettings,
    projection_dim: Count,
    tokenizer_path: str,
    start_from: str | None = None,
    fresh: Sequence[str] = (),
) -> LanguageBind:
    """A fresh LanguageBind, or one that starts from the checkpoint folder `start_from`, but for its modules in `fresh`.

    A video encoder that starts from its image encoder, or afresh, gets temporal attention whose output is zero: it
    begins as an image encoder on every frame, but for a small embedding of the frame's number. One that starts from a
    video encoder takes that of the checkpoint.

    Raises UserError where the checkpoint is of other sizes, or `fresh` names no module.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    config = CLIPConfig(
        vision_config=_plain(VisionSettings, vision),
        text_config={"vocab_size": len(tokenizer), **_special_ids(tokenizer), **_plain(TextSettings, text)},
        projection_dim=projection_dim,
    )
    model = LanguageBind._from_config(config, attn_implementation=PACKED)
    # CLIP's own start, 0.02, drowns in the patches' contents: a small encoder then never learns where things are.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.3)
    if start_from is not None:
        _start(model, start_from, fresh)
    return model


def _start(model: LanguageBind, start_from: str, fresh: Sequence[str]) -> None:
    """Give the model the checkpoint's tensors, but for those of its modules in `fresh`."""
    modules = dict(model.named_children())
    if unknown := [name for name in fresh if name not in modules]:
        raise UserError(
            f"model.fresh names {unknown[0]!r}, which the model does not have; it has: {', '.join(modules)}."
        )
    tensors = Checkpoint(start_from).tensors()
    temporal = any(_TEMPORAL in name for name in tensors)
    own = {name: value for name, value in model.state_dict().items() if temporal or _TEMPORAL not in name}
    require_same(tensors, own, f"{start_from} does not fit")
    taken = {name: value for name, value in tensors.items() if name.partition(".")[0] not in fresh}
    model.load_state_dict(taken, strict=False)
    if not any(_TEMPORAL in name for name in taken):
        for layer in model.vision_model.encoder.layers:
            if isinstance(layer, TemporalLayer):
                nn.init.zeros_(layer.temporal_attn.out_proj.weight)
                nn.init.normal_(layer.temporal_embedding, std=0.02)


def _plain(kind: Any, settings: Any) -> dict[str, Any]:
    """Settings, given as a mapping or as the dataclass, with their defaults."""
    return asdict(settings if isinstance(settings, kind) else kind(**settings))


def mae(
    hidden_size: Count,
    intermediate_size: Count,
    num_hidden_layers: Count,
    num_attention_heads: Count,
    image_size: Count,
    patch_size: Count,
    decoder_hidden_size: Count,
    decoder_intermediate_size: Count,
    decoder_num_hidden_layers: Count,
    decoder_num_attention_heads: Count,
    mask_ratio: ShareBelowOne = 0.75,
    norm_pix_loss: bool = True,
) -> ViTMAEForPreTraining:
    """A fresh masked autoencoder; settings as in ViTMAEConfig."""
    return ViTMAEForPreTraining(ViTMAEConfig(**locals()))
