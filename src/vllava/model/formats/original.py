"""The layout of the original code (videollava, on transformers 4.31)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from vllava.errors import UserError
from vllava.folders import replacing
from vllava.model.build import load_tokenizer
from vllava.model.files import Checkpoint, write_tensors
from vllava.model.formats.original_tokenizer import write_original_tokenizer
from vllava.model.formats.parts import Parts, Tower, checked, tower_config, under
from vllava.model.formats.processor import image_settings

_PREFIX = {kind: f"model.{kind}_tower.{kind}_tower." for kind in ("image", "video")}
_PROJECTOR = "model.mm_projector."
# The names by which the original's builder knows its towers, and what else it takes for one of images: a plain CLIP.
_TOWERS = {"image": "LanguageBind_Image", "video": "LanguageBind_Video_merge"}
_CLIP = ("openai", "laion")

# What a config.json of the original may say of what we have; another value is refused by name.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": (None, "llava", "llava_llama", "llama"),
    "mm_projector_type": (None, "mlp2x_gelu"),
    "mm_vision_select_feature": (None, "patch"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "mm_patch_merge_type": (None, "flat"),
    "image_aspect_ratio": (None, "pad", "square"),
    "pretraining_tp": (None, 1),
    "rope_theta": (None, 10000),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
}
# Settings of the original that may have any value: of its training, or read here.
_ANY = ("mm_hidden_size", "mm_image_tower", "mm_video_tower", "mm_vision_select_layer")
_LEARNING = ("_lr", "_mlp_adapter", "_weight_decay")

_LLAMA_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings"),
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_original(folder: Path, towers: dict[str, str] | None = None) -> Parts:
    """An original Video-LLaVA checkpoint.

    Its config.json names the towers (mm_image_tower, mm_video_tower) but does not describe them: their own config.json
    is read from a folder of that name in the checkpoint, from where they say, or from the folders or hub ids in
    `towers` (medium -> path), and their weights too if the checkpoint does not hold them.

    Raises UserError that names every setting which this project does not have.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    checkpoint.require(
        isinstance(config, dict) and "mm_hidden_size" in config,
        "is no original Video-LLaVA: its config.json has no mm_hidden_size",
    )
    _require_known(checkpoint, config)
    tensors = {name: value for name, value in checkpoint.tensors().items() if not name.endswith("rotary_emb.inv_freq")}
    found = {}
    for kind, prefix in _PREFIX.items():
        source = (towers or {}).get(kind) or config.get(f"mm_{kind}_tower")
        if source is None:
            continue
        beside = checkpoint.folder / Path(source).name  # as our own export has them
        named = bool((towers or {}).get(kind))
        described = Checkpoint(source if named or not (beside / "config.json").is_file() else beside)
        weights = under(tensors, prefix) or under(described.tensors(), "vision_model.")
        found[kind] = Tower(tower_config(described), weights)
    settings = {name: value for name, value in config.items() if name.startswith(("mm_", "tune_", "image_", "use_mm"))}
    taken = (*_PREFIX.values(), _PROJECTOR)
    parts = Parts(
        _llama_config(checkpoint, config),
        {name: value for name, value in tensors.items() if not name.startswith(taken)},
        under(tensors, _PROJECTOR),
        found,
        load_tokenizer(str(checkpoint.folder)),
        config.get("mm_vision_select_layer", -2),
        {"architectures": config.get("architectures"), "model_type": config.get("model_type"), **settings},
        "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
    )
    return checked(parts, checkpoint.folder)


def _require_known(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Raises UserError that names the settings which change what the model computes and which we do not have."""
    strange = {name: config[name] for name, known in _ONLY.items() if config.get(name) not in known}
    for name, value in config.items():
        if name.startswith("mm_") and name not in (*_ONLY, *_ANY) and not name.endswith(_LEARNING) and value:
            strange[name] = value  # towers of other media, resamplers, and what later code has added
    if not isinstance(config.get("mm_vision_select_layer", -2), int):
        strange["mm_vision_select_layer"] = config["mm_vision_select_layer"]
    rope = config.get("rope_scaling")
    if rope is not None and _rope(rope) is None:
        strange["rope_scaling"] = rope
    said = "; ".join(f"{name}={str(value)[:60]}" for name, value in strange.items())
    checkpoint.require(not strange, f"has settings that this project does not have: {said}")


def _rope(given: Any) -> dict[str, Any] | None:
    """A rope_scaling of transformers 4.31; None for one of another kind."""
    if not isinstance(given, dict) or given.get("type", given.get("rope_type")) not in ("linear", "dynamic"):
        return None
    factor = given.get("factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or factor <= 1:
        return None
    return {"type": given.get("type", given.get("rope_type")), "factor": float(factor)}


def _llama_config(checkpoint: Checkpoint, config: dict[str, Any]) -> LlamaConfig:
    given = {name: config[name] for name in _LLAMA_SETTINGS if config.get(name) is not None}
    given |= {name: config[name] for name in _TOKEN_IDS if name in config}
    if config.get("rope_scaling"):
        given["rope_parameters"] = {"rope_theta": 10000.0, **(_rope(config["rope_scaling"]) or {})}
        given["rope_parameters"]["rope_type"] = given["rope_parameters"].pop("type")
    heads, size = given.get("num_attention_heads"), given.get("hidden_size")
    good = isinstance(heads, int) and isinstance(size, int) and heads > 0 and size > 0 and size % heads == 0
    checkpoint.require(good, f"has a hidden_size of {size!r} for {heads!r} attention heads")
    return LlamaConfig(**given)


def write_original(parts: Parts, folder: Path, overwrite: bool = False) -> list[str]:
    """The original's layout, its towers in folders of their own, and a README.md that says how it is opened.

    Returns what the original code cannot do with it. Raises UserError where it computes another model.
    """
    config = _original_config(parts)
    with replacing(folder, overwrite) as unfinished:
        tensors = dict(parts.llm) | {f"{_PROJECTOR}{name}": value for name, value in parts.projector.items()}
        for kind, prefix in _PREFIX.items():
            config[f"mm_{kind}_tower"] = _tower_name(parts, kind, folder)
            if kind in parts.towers:
                tower = parts.towers[kind]
                tensors |= {f"{prefix}{name}": value for name, value in tower.tensors.items()}
                _write_tower(tower, kind, unfinished / _TOWERS[kind])
        (unfinished / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_tensors(tensors, unfinished)
        notes = write_original_tokenizer(parts.tokenizer, unfinished)
        (unfinished / "README.md").write_text(_readme(config, notes))
    return notes


def _original_config(parts: Parts) -> dict[str, Any]:
    """The settings in the form of transformers 4.31, the towers' names aside."""
    llm = parts.llm_config
    if llm.model_type != "llama":
        raise UserError(f"The original holds a Llama; this model has a {llm.model_type}.")
    rope = dict(llm.rope_parameters or {})
    scaling = _rope(rope)
    strange = {
        "rope_parameters": rope if rope.get("rope_type", "default") != "default" and scaling is None else None,
        "rope_theta": rope.get("rope_theta") if rope.get("rope_theta", 10000) != 10000 else None,
        "attention_bias": getattr(llm, "attention_bias", False),
        "mlp_bias": getattr(llm, "mlp_bias", False),
        "head_dim": llm.head_dim if llm.head_dim not in (None, llm.hidden_size // llm.num_attention_heads) else None,
    }
    if said := "; ".join(f"{name}={value}" for name, value in strange.items() if value):
        raise UserError(
            f"The Llama of the original, that of transformers 4.31, has no {said}: it would compute another."
        )
    fit = parts.settings.get("image_aspect_ratio")
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,  # the original's builder adds tokens where it is not said
        "use_mm_proj": True,
        **{name: value for name, value in parts.settings.items() if value is not None},
        **{name: getattr(llm, name) for name in (*_LLAMA_SETTINGS, *_TOKEN_IDS)},
        **({"rope_scaling": scaling} if scaling else {}),
        "image_aspect_ratio": "pad" if parts.image_fit == "pad" else (fit if fit not in (None, "pad") else "square"),
        "model_type": "llava",
        "mm_hidden_size": parts.projector["0.weight"].shape[1],
        "mm_vision_select_layer": parts.feature_layer,
        "pretraining_tp": 1,
        "use_cache": True,
        "torch_dtype": str(parts.llm["model.embed_tokens.weight"].dtype).removeprefix("torch."),
        "transformers_version": "4.31.0",
    }


def _tower_name(parts: Parts, kind: str, folder: Path) -> str | None:
    """What the original's builder makes this tower from: the hub id that it had, or the folder in the export.

    A folder of images is opened as a plain CLIP there, which for LanguageBind-Image is the same computation.
    """
    if kind not in parts.towers:
        return None
    name = parts.settings.get(f"mm_{kind}_tower")
    if not isinstance(name, str) or len(Path(name).parts) != 2 or Path(name).exists():
        return str(folder.resolve() / _TOWERS[kind])
    if name.endswith(_TOWERS[kind]) or (kind == "image" and name.startswith(_CLIP)):
        return name
    return str(folder.resolve() / _TOWERS[kind])


def _write_tower(tower: Tower, kind: str, folder: Path) -> None:
    """A tower's weights and settings: a CLIP for images, a LanguageBindVideo for videos."""
    folder.mkdir()
    vision = {
        **tower.config,
        "model_type": "clip_vision_model",
        "projection_dim": 8,
        "lora_r": 0,
        "force_patch_dropout": 0.0,
        "video_decode_backend": "decord",
    }
    # Their classes have a text tower too, which the original never asks: a small one, without weights.
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {
        "architectures": ["CLIPModel" if kind == "image" else "LanguageBindVideo"],
        "model_type": "clip" if kind == "image" else "LanguageBindVideo",
        "projection_dim": 8,
        "vision_config": vision,
        "text_config": {"model_type": "clip_text_model", "vocab_size": 8, **text},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tensors({f"vision_model.{name}": value for name, value in tower.tensors.items()}, folder)
    if kind == "image":
        settings = {"image_processor_type": "CLIPImageProcessor", **image_settings(tower.config["image_size"])}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _readme(config: dict[str, Any], notes: list[str]) -> str:
    towers = {kind: config[f"mm_{kind}_tower"] for kind in _TOWERS if config[f"mm_{kind}_tower"]}
    named = "\n".join(f"- `mm_{kind}_tower`: `{name}`" for kind, name in towers.items())
    limits = "".join(f"\n- {note}" for note in notes)
    return (
        "# Video-LLaVA, in the layout of the original code\n\n"
        "Exported by vllava for `videollava` (transformers 4.31). `load_pretrained_model(FOLDER, None, NAME)` opens it "
        "where NAME has `llava` in it.\n\n"
        "The original takes its towers from where config.json says, not from this checkpoint's own weights:\n\n"
        f"{named}\n\n"
        f"The towers of this model are in `{'`, `'.join(_TOWERS[kind] for kind in towers)}` beside this file. Where a "
        "name above is a folder, it has to be changed when the folder moves. A video tower's name must end in "
        "`LanguageBind_Video_merge`. An image tower's name that is an existing path is opened as a plain CLIP: the "
        "same computation as LanguageBind-Image, with the pixels of CLIP's image processor.\n"
        + (f"\nWhat the original cannot do with this folder:\n{limits}\n" if notes else "")
    )
