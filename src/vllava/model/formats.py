"""Other people's checkpoints: the original Video-LLaVA's layout and that of the port in `transformers`.

Every format is read into, and written from, the same four parts: the LLM, the projector and two vision towers. A
tensor is never converted, so reading what was written gives the same bits. `python -m vllava.convert` is the command.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from vllava.errors import UserError
from vllava.folders import replacing
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import (
    LLM,
    PROJECTOR,
    Description,
    read_description,
    read_projector,
    write_description,
)
from vllava.model.encoders import CLIP_SETTINGS, vision_config
from vllava.model.files import Checkpoint, require_same, write_tensors
from vllava.model.languagebind import VisionTower
from vllava.model.llm import read_config

Tensors = dict[str, Tensor]
MEDIA_TOKENS = ("<image>", "<video>")


@dataclass
class Tower:
    """A whole vision tower: settings as in CLIP's `vision_config`, tensors named as in CLIP's vision model."""

    config: dict[str, Any]
    tensors: Tensors

    @property
    def temporal(self) -> bool:
        return bool(self.config.get("add_time_attn"))


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


# --- ours -------------------------------------------------------------------------------------------------------------


def read_ours(folder: Path) -> Parts:
    """The parts of one of our checkpoint folders, whole towers included."""
    description = read_description(folder)
    llm_folder = folder / LLM if description.llm == LLM else Path(description.llm)
    towers, layers = {}, set()
    for kind, settings in description.encoders.items():
        if settings.get("_target_") != "vllava.model.encoders.ClipEncoder":
            raise UserError(f"{folder}: the {kind} encoder is a {settings.get('_target_')}; other formats know CLIP's.")
        tower = Checkpoint(settings["path"])
        towers[kind] = Tower(_tower_config(tower), _under(tower.tensors(), "vision_model."))
        if settings.get("frames") and towers[kind].temporal:
            towers[kind].config["num_frames"] = settings["frames"]
        layers.add(settings.get("feature_layer", -2))
    if len(layers) != 1:
        raise UserError(f"{folder}: the encoders' feature layers differ ({sorted(layers)}); other formats know one.")
    llm = Checkpoint(llm_folder)
    parts = Parts(
        read_config(llm, str(llm.folder)),
        llm.tensors(),
        read_projector(folder / PROJECTOR),
        towers,
        load_tokenizer(str(llm.folder)),
        layers.pop(),
        description.origin,
    )
    return _checked(parts, folder)


def write_ours(
    parts: Parts, folder: Path, template: str = "vicuna_v1", image_fit: str = "pad", overwrite: bool = False
) -> None:
    """One of our checkpoint folders that holds every part, the frozen towers too."""
    with replacing(folder, overwrite) as unfinished:
        encoders = {}
        for kind, tower in parts.towers.items():
            name = f"{kind}_encoder"
            (unfinished / name).mkdir()
            (unfinished / name / "config.json").write_text(json.dumps({"vision_config": tower.config}, indent=1) + "\n")
            write_tensors({f"vision_model.{n}": v for n, v in tower.tensors.items()}, unfinished / name)
            encoders[kind] = {
                "_target_": "vllava.model.encoders.ClipEncoder",
                "path": name,
                "medium": kind,
                "feature_layer": parts.feature_layer,
            }
            if kind == "video" and not tower.temporal:
                encoders[kind] |= {"temporal": False, "frames": tower.config["num_frames"]}
        write_tensors(parts.projector, unfinished, PROJECTOR)
        _write_llm(parts, unfinished / LLM)
        trained = ["projector", "llm"]
        description = Description(encoders, LLM, template, image_fit, trained, origin=parts.settings)
        for kind in encoders:
            description.sha256[kind] = Checkpoint(unfinished / f"{kind}_encoder").sha256
        write_description(description, unfinished)


def _write_llm(parts: Parts, folder: Path) -> None:
    folder.mkdir()
    parts.llm_config.save_pretrained(folder)
    write_tensors(parts.llm, folder)
    parts.tokenizer.save_pretrained(folder)


# --- the original -----------------------------------------------------------------------------------------------------

_ORIGINAL_TOWERS = {kind: f"model.{kind}_tower.{kind}_tower." for kind in ("image", "video")}
_ORIGINAL_PROJECTOR = "model.mm_projector."


def read_original(folder: Path, towers: dict[str, str] | None = None) -> Parts:
    """An original Video-LLaVA checkpoint.

    Its config.json names the towers (mm_image_tower, mm_video_tower) but does not describe them: their own config.json
    is read from there, or from the folders or hub ids in `towers` (medium -> path), and their weights too if the
    checkpoint does not hold them.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    checkpoint.require("mm_hidden_size" in config, "is no original Video-LLaVA: its config.json has no mm_hidden_size")
    checkpoint.require(
        config.get("mm_projector_type", "mlp2x_gelu") == "mlp2x_gelu",
        f"has a projector of type {config.get('mm_projector_type')!r}; ours is the paper's, mlp2x_gelu",
    )
    tensors = {name: value for name, value in checkpoint.tensors().items() if not name.endswith("rotary_emb.inv_freq")}
    found = {}
    for kind, prefix in _ORIGINAL_TOWERS.items():
        source = (towers or {}).get(kind) or config.get(f"mm_{kind}_tower")
        if source is None:
            continue
        described = Checkpoint(source)
        weights = _under(tensors, prefix) or _under(described.tensors(), "vision_model.")
        found[kind] = Tower(_tower_config(described), weights)
    settings = {name: value for name, value in config.items() if name.startswith(("mm_", "tune_", "image_", "use_mm"))}
    taken = (*_ORIGINAL_TOWERS.values(), _ORIGINAL_PROJECTOR)
    parts = Parts(
        LlamaConfig(**{name: config[name] for name in _LLAMA_SETTINGS if config.get(name) is not None}),
        {name: value for name, value in tensors.items() if not name.startswith(taken)},
        _under(tensors, _ORIGINAL_PROJECTOR),
        found,
        load_tokenizer(str(checkpoint.folder)),
        config.get("mm_vision_select_layer", -2),
        {"architectures": config.get("architectures"), "model_type": config.get("model_type"), **settings},
    )
    return _checked(parts, checkpoint.folder)


_LLAMA_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings"),
    *(
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ),
)


def write_original(parts: Parts, folder: Path, overwrite: bool = False) -> None:
    """The original's layout; its towers' settings go to folders beside the weights, where its config.json points."""
    if parts.llm_config.model_type != "llama":
        raise UserError(f"The original holds a Llama; this model has a {parts.llm_config.model_type}.")
    with replacing(folder, overwrite) as unfinished:
        config = {
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "patch",
            **{name: value for name, value in parts.settings.items() if value is not None},
            **{name: getattr(parts.llm_config, name, None) for name in _LLAMA_SETTINGS},
            "model_type": parts.settings.get("model_type") or "llava",
            "mm_hidden_size": parts.projector["0.weight"].shape[1],
            "mm_vision_select_layer": parts.feature_layer,
        }
        tensors = dict(parts.llm)
        tensors |= {f"{_ORIGINAL_PROJECTOR}{name}": value for name, value in parts.projector.items()}
        for kind, prefix in _ORIGINAL_TOWERS.items():
            config.setdefault(f"mm_{kind}_tower", None)
            if kind not in parts.towers:
                config[f"mm_{kind}_tower"] = None
                continue
            tower = parts.towers[kind]
            tensors |= {f"{prefix}{name}": value for name, value in tower.tensors.items()}
            described = f"{kind}_tower"
            (unfinished / described).mkdir()
            (unfinished / described / "config.json").write_text(json.dumps({"vision_config": tower.config}) + "\n")
            write_tensors({f"vision_model.{n}": v for n, v in tower.tensors.items()}, unfinished / described)
            config[f"mm_{kind}_tower"] = str(folder / described)
        (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_tensors(tensors, unfinished)
        parts.tokenizer.save_pretrained(unfinished)


# --- the port in transformers -----------------------------------------------------------------------------------------


def read_port(folder: Path) -> Parts:
    """A checkpoint of `VideoLlavaForConditionalGeneration`, of any version of `transformers`."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    checkpoint.require(config.get("model_type") == "video_llava", "is no video_llava of transformers")
    tensors = {_port_name(name): value for name, value in checkpoint.tensors().items()}
    vision = {name: config["vision_config"][name] for name in CLIP_SETTINGS if name in config["vision_config"]}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    frames = config.get("video_seq_length", 2056) // (1 + patches)
    towers = {
        kind: Tower(
            {**vision, "add_time_attn": False, "num_frames": frames if kind == "video" else 1},
            _under(tensors, f"{kind}_tower."),
        )
        for kind in ("image", "video")
    }
    text = dict(config["text_config"])
    llm = {f"model.{name}": value for name, value in _under(tensors, "language_model.").items()}
    llm |= {"lm_head.weight": tensors["lm_head.weight"]} if "lm_head.weight" in tensors else {}
    names = {"linear_1": "0", "linear_2": "2"}
    projector = {
        f"{names[name.split('.')[0]]}.{name.split('.')[1]}": value
        for name, value in _under(tensors, "multi_modal_projector.").items()
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
    return _checked(parts, checkpoint.folder)


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
    from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

    if set(parts.towers) != {"image", "video"}:
        raise UserError(f"The port needs an image and a video tower; this model has: {', '.join(parts.towers)}.")
    video = parts.towers["video"]
    if video.temporal and not drop_temporal_attention:
        raise UserError(
            "The video tower has temporal attention, and the port in transformers builds its video tower from a plain "
            "CLIP, which has none: exported, this model would be another one. Export to the original layout, or say "
            "--drop-temporal-attention to export without it; the model card then says what is missing."
        )
    towers = {
        kind: replace(tower, config=_sizes(tower), tensors=_spatial(tower)) for kind, tower in parts.towers.items()
    }
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
    with replacing(folder, overwrite) as unfinished:
        port.save_pretrained(unfinished)
        parts.tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(_card(video.temporal))


def _card(dropped: bool) -> str:
    loss = (
        "\n**The temporal attention of the video encoder is missing.** The port in `transformers` has no place for it: "
        "its video tower sees each frame alone. Answers about videos differ from those of the model this was exported "
        "from, which is the paper's.\n"
        if dropped
        else ""
    )
    return f"# Video-LLaVA\n\nExported by vllava for `VideoLlavaForConditionalGeneration` of `transformers`.\n{loss}"


def _sizes(tower: Tower) -> dict[str, Any]:
    return {name: value for name, value in tower.config.items() if name in CLIP_SETTINGS}


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


# --- what they share --------------------------------------------------------------------------------------------------


def _under(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _tower_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = vision_config(checkpoint)
    return {name: getattr(config, name) for name in (*CLIP_SETTINGS, "add_time_attn", "num_frames")}


def _checked(parts: Parts, folder: Path) -> Parts:
    """The parts, if each has exactly the tensors that its settings ask for."""
    if type(parts.feature_layer) is not int:
        raise UserError(f"{folder} takes features of layer {parts.feature_layer!r}, which is no number.")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(parts.llm_config, attn_implementation="eager", trust_remote_code=False)
    wanted = dict(llm.state_dict())
    if parts.llm_config.tie_word_embeddings and "lm_head.weight" not in parts.llm:
        wanted.pop("lm_head.weight", None)
    require_same(parts.llm, wanted, f"The language model in {folder} is not what its config.json says")
    for kind, tower in parts.towers.items():
        tower.tensors.pop("embeddings.position_ids", None)  # a constant that older versions saved
        with torch.device("meta"):
            expected = VisionTower(config_of(tower), feature_layer=-1)
            last = torch.nn.LayerNorm(tower.config["hidden_size"])
        shapes = {**expected.state_dict(), **{f"post_layernorm.{n}": v for n, v in last.state_dict().items()}}
        require_same(tower.tensors, shapes, f"The {kind} tower in {folder} is not what its settings say")
    width = next((tower.config["hidden_size"] for tower in parts.towers.values()), 0)
    size = parts.llm_config.hidden_size
    shapes = {"0.weight": (size, width), "0.bias": (size,), "2.weight": (size, size), "2.bias": (size,)}
    require_same(
        parts.projector,
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        f"The projector in {folder} does not fit",
    )
    return parts


def config_of(tower: Tower) -> Any:
    """The tower's settings as an object."""
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(**_sizes(tower))
    config.add_time_attn, config.num_frames = tower.temporal, tower.config.get("num_frames", 1)
    return config
