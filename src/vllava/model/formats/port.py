"""The port in `transformers`, with its processor."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from vllava.errors import UserError
from vllava.folders import replacing
from vllava.model.build import load_tokenizer
from vllava.model.encoders import CLIP_SETTINGS
from vllava.model.files import Checkpoint, require_same
from vllava.model.formats.parts import Parts, Tensors, Tower, checked, under
from vllava.model.formats.processor import write_processor
from vllava.model.llm import quiet

MEDIA_TOKENS = ("<image>", "<video>")


def read_port(folder: Path) -> Parts:
    """A checkpoint of `VideoLlavaForConditionalGeneration`, of any version of `transformers`."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    checkpoint.require(config.get("model_type") == "video_llava", "is no video_llava of transformers")
    for name, ours in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "default")):
        given = config.get(name, ours)
        checkpoint.require(given == ours, f"says {name}={given!r}; only {ours!r} is done here")
    tensors = {_port_name(name): value for name, value in checkpoint.tensors().items()}
    vision = {name: config["vision_config"][name] for name in CLIP_SETTINGS if name in config["vision_config"]}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    frames = config.get("video_seq_length", 2056) // (1 + patches)
    towers = {
        kind: Tower(
            {**vision, "add_time_attn": False, "num_frames": frames if kind == "video" else 1},
            under(tensors, f"{kind}_tower."),
        )
        for kind in ("image", "video")
    }
    text = dict(config["text_config"])
    llm = {f"model.{name}": value for name, value in under(tensors, "language_model.").items()}
    llm |= {"lm_head.weight": tensors["lm_head.weight"]} if "lm_head.weight" in tensors else {}
    names = {"linear_1": "0", "linear_2": "2"}
    projector = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value
        for name, value in under(tensors, "multi_modal_projector.").items()
    }
    taken = ("image_tower.", "video_tower.", "language_model.", "multi_modal_projector.", "lm_head.weight")
    left_over = [name for name in tensors if not name.startswith(taken)]
    checkpoint.require(not left_over, f"has tensors left over: {left_over}")
    parts = Parts(
        AutoConfig.for_model(text.pop("model_type", "llama"), **text),
        llm,
        projector,
        towers,
        load_tokenizer(str(checkpoint.folder)),
        config.get("vision_feature_layer", -2),
    )
    return checked(parts, checkpoint.folder)


def _port_name(name: str) -> str:
    """A tensor's name in today's model, without its leading "model."; files of older versions have other names."""
    name = name.removeprefix("model.")
    for old, new in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "language_model."),
        ("image_tower.vision_model.", "image_tower."),
        ("video_tower.vision_model.", "video_tower."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def write_port(parts: Parts, folder: Path, drop_temporal_attention: bool = False, overwrite: bool = False) -> None:
    """What `VideoLlavaForConditionalGeneration.from_pretrained` opens, with a model card.

    Raises UserError where the port cannot hold the model: it has two towers of the same sizes and no temporal
    attention. `drop_temporal_attention` leaves that out, and the model card says so.
    """
    if set(parts.towers) != {"image", "video"}:
        raise UserError(f"The port needs an image and a video tower; this model has: {', '.join(parts.towers)}.")
    video = parts.towers["video"]
    if video.temporal and not drop_temporal_attention:
        raise UserError(
            "The video tower has temporal attention, and the port in transformers builds its video tower from a plain "
            "CLIP, which has none: exported, this model would be another one. Export to the original layout, or say "
            "--drop-temporal-attention to export without it; the model card then says what is missing."
        )
    towers = {kind: replace(tower, config=tower.sizes, tensors=_spatial(tower)) for kind, tower in parts.towers.items()}
    sizes = [tower.config for tower in towers.values()]
    if sizes[0] != sizes[1]:
        raise UserError(f"The port's towers are of the same sizes; these differ: {sizes[0]} and {sizes[1]}.")
    patches = (sizes[0]["image_size"] // sizes[0]["patch_size"]) ** 2
    parts = with_media_tokens(parts)
    image_id, video_id = parts.tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
    config = VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **sizes[0]},
        text_config=parts.llm_config.to_dict(),
        image_token_index=image_id,
        video_token_index=video_id,
        vision_feature_layer=parts.feature_layer,
        image_seq_length=patches,
        video_seq_length=video.config["num_frames"] * (1 + patches),
        tie_word_embeddings=parts.llm_config.tie_word_embeddings,
    )
    with torch.device("meta"):
        port = VideoLlavaForConditionalGeneration(config)
    names = {"0": "linear_1", "2": "linear_2"}
    tensors = {
        f"model.multi_modal_projector.{names[name.split('.')[0]]}.{name.split('.')[1]}": value
        for name, value in parts.projector.items()
    }
    tensors |= {f"model.{kind}_tower.{n}": v for kind, tower in towers.items() for n, v in tower.tensors.items()}
    tensors |= {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: value
        for name, value in parts.llm.items()
    }
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors["model.language_model.embed_tokens.weight"])
    require_same(tensors, port.state_dict(), "These parts do not fit the port")
    port.load_state_dict(tensors, assign=True)
    port.tie_weights()
    with quiet(), replacing(folder, overwrite) as unfinished:
        port.save_pretrained(unfinished)
        parts.tokenizer.save_pretrained(unfinished)
        size = sizes[0]["image_size"]
        write_processor(unfinished, size, sizes[0]["patch_size"], parts.template, bool(parts.tokenizer.bos_token))
        (unfinished / "README.md").write_text(
            _card(video.temporal, parts.image_fit == "pad", video.config["num_frames"])
        )


def _card(dropped: bool, padded: bool, frames: int) -> str:
    loss = (
        "\n**The temporal attention of the video encoder is missing.** The port in `transformers` has no place for it: "
        "its video tower sees each frame alone. Answers about videos differ from those of the model this was exported "
        "from, which is the paper's.\n"
        if dropped
        else ""
    )
    padding = (
        "\nImages were padded to a square with the mean colour in training; the processor crops them to one. Pad them "
        "before, for the same pixels.\n"
        if padded
        else ""
    )
    return (
        "# Video-LLaVA\n\nExported by vllava for `VideoLlavaForConditionalGeneration` of `transformers`.\n"
        '`AutoProcessor`, `VideoLlavaProcessor` and `pipeline("image-text-to-text")` open the folder; they need '
        f"torchvision.\n{loss}{padding}\n"
        f"A video is {frames} frames, spaced equally: give the processor that many, it takes none out.\n"
    )


def _spatial(tower: Tower) -> Tensors:
    return {name: value for name, value in tower.tensors.items() if ".temporal_" not in name}


def with_media_tokens(parts: Parts) -> Parts:
    """The parts with `<image>` and `<video>` as tokens, which the port needs; new ones get embeddings of zero."""
    missing = [token for token in MEDIA_TOKENS if token not in parts.tokenizer.get_vocab()]
    if not missing:
        return parts
    tokenizer = copy.deepcopy(parts.tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in missing])
    rows = len(tokenizer) - parts.llm["model.embed_tokens.weight"].shape[0]
    llm = dict(parts.llm)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if rows > 0 and name in llm:
            llm[name] = torch.cat([llm[name], llm[name].new_zeros(rows, llm[name].shape[1])])
    config = type(parts.llm_config).from_dict(
        {**parts.llm_config.to_dict(), "vocab_size": llm["model.embed_tokens.weight"].shape[0]}
    )
    return replace(parts, llm=llm, llm_config=config, tokenizer=tokenizer)
