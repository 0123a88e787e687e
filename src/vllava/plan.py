"""What a training run will need, before it starts: `python -m vllava.plan +experiment=stage1 model=video_llava_7b`.

The model is built on the meta device, without weights: parameters are counted, the rest is arithmetic, which is shown.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, PreTrainedConfig, ViTMAEConfig

from vllava.batch import MEDIA_KINDS, MediumSpec
from vllava.checks import Count, NotNegative, Positive, Range, Share, Whole, require_all
from vllava.commands import Parser, number
from vllava.config import composed
from vllava.data.patience import Remote
from vllava.data.shards import read_sources
from vllava.errors import UserError, stop
from vllava.model.encoders import depth_of, vision_config
from vllava.model.files import Checkpoint
from vllava.model.flops import costs as flops_of
from vllava.model.flops import peak, vision_flops
from vllava.model.languagebind import VisionTower
from vllava.model.projector import projector
from vllava.model.video_llava import context_of

# Settings of public checkpoints, so that a plan downloads nothing.
_VIT_L = {
    **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "image_size": 224,
}
PUBLISHED: dict[str, PreTrainedConfig] = {
    "lmsys/vicuna-7b-v1.5": LlamaConfig(max_position_embeddings=4096),
    "LanguageBind/LanguageBind_Image": CLIPVisionConfig(**_VIT_L, patch_size=14, add_time_attn=False, num_frames=1),
    "LanguageBind/LanguageBind_Video_merge": CLIPVisionConfig(
        **_VIT_L, patch_size=14, add_time_attn=True, num_frames=8
    ),
    "openai/clip-vit-large-patch14": CLIPVisionConfig(**_VIT_L, patch_size=14, add_time_attn=False, num_frames=1),
    "facebook/vit-mae-large": ViTMAEConfig(**_VIT_L, patch_size=16),
}
_CARDS = {  # memory in GB, and a name by which the card's peak is known
    "a100-40g": (40, "A100"),
    "a100-80g": (80, "A100"),
    "h100-80g": (80, "H100"),
    "h200-141g": (141, "H200"),
    "l40s-48g": (48, "L40S"),
    "rtx4090-24g": (24, "RTX 4090"),
}
GPUS = {card: (memory, peak(name) or 0) for card, (memory, name) in _CARDS.items()}  # GB, dense bf16 TFLOP/s
GB = 1e9
_RECIPE = {"samples": dict[str, Whole], "text_tokens": dict[str, NotNegative], "supervised_share": Share}  # in recipes


@dataclass(frozen=True)
class Encoder:
    """One vision tower up to the selected layer: its size, and what one medium costs."""

    parameters: int
    width: int
    tokens: int  # of one medium, as the LLM sees them
    flops: float  # to encode one medium
    spec: MediumSpec


@dataclass(frozen=True)
class Plan:
    """The figures; see `text` for how they come about."""

    parameters: dict[str, int]
    trained: tuple[str, ...]
    tokens: dict[str, int]  # visual tokens of one medium
    samples: dict[str, int]  # of an epoch, by modality
    text_tokens: dict[str, float]  # of a sample, by modality
    flops: dict[str, float]  # of a sample, by modality: what the model needs, without recomputation
    memory: dict[str, float]  # bytes of one device, by kind
    host_memory: float  # bytes per device's share in the machine's memory

    @property
    def epoch_flops(self) -> float:
        return sum(self.flops[kind] * count for kind, count in self.samples.items())

    @property
    def epoch_tokens(self) -> float:
        return sum(n * (self.tokens.get(k, 0) + self.text_tokens[k]) for k, n in self.samples.items())

    def hours(self, gpus: int, tflops: float, utilisation: float) -> float:
        return self.epoch_flops / (gpus * tflops * 1e12 * utilisation) / 3600


def config_at(path: str) -> PreTrainedConfig:
    """A model's settings: of a public checkpoint from the list above, else from its folder or the hub."""
    if path in PUBLISHED and not Path(path).exists():
        return PUBLISHED[path]
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"No settings of a model at {path} ({str(error).splitlines()[0]}).") from error


def plan_encoder(settings: dict[str, Any], kind: str) -> Encoder:
    """The plan of an encoder from its configuration."""
    path = settings["path"]
    layer = settings.get("feature_layer", -2)
    known = path in PUBLISHED and not Path(path).exists()
    if settings["_target_"].endswith("MaeEncoder"):
        mae = config_at(path)
        patches = (mae.image_size // mae.patch_size) ** 2
        width, inner, depth = mae.hidden_size, mae.intermediate_size, depth_of(layer, mae.num_hidden_layers)
        each = 4 * width * (width + 1) + 2 * width * inner + inner + width + 4 * width  # attention, MLP, layer norms
        embeddings = 3 * mae.patch_size**2 * width + width + (patches + 1) * width + width
        flops = vision_flops(each * depth + embeddings, depth, width, patches)
        return Encoder(each * depth + embeddings, width, patches, flops, MediumSpec(mae.image_size, patches, 1, width))
    config: Any = PUBLISHED[path] if known else vision_config(Checkpoint(path))
    frames = (settings.get("frames") or config.num_frames) if kind == "video" else 1
    with torch.device("meta"):
        tower = VisionTower(config, layer)
    size = sum(p.numel() for p in tower.parameters())
    patches = (config.image_size // config.patch_size) ** 2
    flops = vision_flops(
        size, tower.depth, config.hidden_size, patches, frames, temporal=getattr(config, "add_time_attn", False)
    )
    tokens = frames * (patches + 1) if kind == "video" else patches
    spec = MediumSpec(config.image_size, tokens, frames, config.hidden_size)
    return Encoder(size, config.hidden_size, tokens, flops, spec)


def plan_encoders(settings: dict[str, Any]) -> dict[str, Encoder]:
    """The encoders of a resolved configuration, by medium."""
    return {
        kind: plan_encoder(settings["encoder"][kind], kind)
        for kind in MEDIA_KINDS
        if not settings["encoder"][kind]["_target_"].endswith("no_encoder")
    }


def context(settings: dict[str, Any]) -> int | None:
    """The tokens that the LLM of a resolved configuration can look at, if there is a limit."""
    llm = settings["model"]["llm"]
    return context_of(config_at(llm["path"])) if "path" in llm else llm.get("max_position_embeddings")


def make(settings: dict[str, Any], gpus: int) -> Plan:
    """The plan of a resolved configuration."""
    recipe = _recipe(settings)
    encoders = plan_encoders(settings)
    config: Any = config_at(settings["foundations"]["llm"])
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    width = config.hidden_size
    parameters = {f"{kind} encoder": encoder.parameters for kind, encoder in encoders.items()}
    features = next(encoder.width for encoder in encoders.values())
    connector = projector(features, width)
    parameters["projector"] = sum(p.numel() for p in connector.parameters())
    parameters["llm"] = sum(p.numel() for p in llm.parameters())
    trained = ["projector"] if "projector" in settings["task"]["trained"] else []
    lora = settings["model"].get("lora")
    if lora:
        parameters["adapters"] = lora["r"] * sum(
            m.in_features + m.out_features
            for name, m in llm.named_modules()
            if isinstance(m, torch.nn.Linear) and name != "lm_head"
        )
        trained.append("adapters")
    elif "llm" in settings["task"]["trained"]:
        trained.append("llm")

    data = settings["data"]
    samples = {k: n for k, n in recipe["samples"].items() if k in data["modalities"] and k in data["sources"]}
    if not samples:
        named = ", ".join(data["sources"])
        raise UserError(f"The recipe says nothing of how many samples of {named} there are: count them with --shards.")
    for kind in set(samples) - set(recipe["text_tokens"]):
        stage = settings["experiment"].removesuffix("_lora")
        raise UserError(
            f"The recipe says nothing of the tokens that the text of a sample of {kind} has. Give their mean: "
            f"+recipes.{stage}.text_tokens.{kind}=NUMBER"
        )
    media = {kind: encoder.flops for kind, encoder in encoders.items()}
    costs = flops_of(llm, connector, media, float("llm" in trained), parameters.get("adapters", 0))
    flops = {}
    for kind in samples:
        visual, text = (encoders[kind].tokens if kind in encoders else 0), recipe["text_tokens"][kind]
        supervised = text * recipe["supervised_share"]
        encoded = {kind: 1} if kind in encoders else {}
        flops[kind] = costs.flops(visual + text, (visual + text) ** 2, visual, supervised, encoded)
    memory, host = _memory(settings, parameters, trained, config, gpus, costs.body / costs.layers)
    return Plan(
        parameters,
        tuple(trained),
        {kind: encoder.tokens for kind, encoder in encoders.items()},
        samples,
        {kind: recipe["text_tokens"][kind] for kind in samples},
        flops,
        memory,
        host,
    )


def _memory(
    settings: dict[str, Any], parameters: dict[str, int], trained: list[str], llm: Any, gpus: int, layer: float
) -> tuple[dict[str, float], float]:
    """Bytes of one device by kind, and bytes in the machine's memory, for the trainer that is configured."""
    strategy = settings["trainer"]["strategy"]
    target = strategy["_target_"].rsplit(".", 1)[1] if isinstance(strategy, dict) else str(strategy)
    total, learnt = sum(parameters.values()), sum(parameters[name] for name in trained)
    states = 8.0 * learnt  # AdamW: two float32 numbers for each trained weight
    host = 0.0
    if target == "DeepSpeed":  # weights in bf16, a float32 copy of the trained ones with the optimiser
        weights, gradients, optimizer = 2.0 * total, 2.0 * learnt / gpus, (states + 4.0 * learnt) / gpus
        if strategy.get("offload_optimizer"):
            optimizer, host = 0.0, optimizer
    elif target == "Fsdp":  # all but the encoders is shared out; one layer at a time is gathered
        encoders = sum(size for name, size in parameters.items() if name.endswith("encoder"))
        frozen = total - encoders - learnt  # kept in bf16, as the encoders are
        weights = 2.0 * encoders + (4.0 * learnt + 2.0 * frozen) / gpus + 2 * 2.0 * layer
        gradients, optimizer = 4.0 * learnt / gpus, states / gpus
    else:
        # Frozen weights are kept in bf16; of trained ones autocast makes a copy.
        weights, gradients, optimizer = 2.0 * (total - learnt) + 6.0 * learnt, 4.0 * learnt, states
    tokens, width, inner = settings["data"]["token_budget"], llm.hidden_size, llm.intermediate_size
    each = 2.0 * tokens * (8 * width + 4 * inner)  # what one layer keeps for its backward pass, in bf16
    if settings["model"]["llm"].get("gradient_checkpointing"):
        activations = 2.0 * tokens * width * llm.num_hidden_layers + each
    else:
        activations = each * llm.num_hidden_layers
    kinds = {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations}
    return kinds, host


def text(plan: Plan, settings: dict[str, Any], gpu: str, gpus: int, utilisation: float) -> str:
    """The plan as a page of text, with its arithmetic."""
    memory, tflops = GPUS[gpu]
    lines = [f"{settings['experiment']} ({settings['ablation']}), {gpus} x {gpu}", "", "parameters"]
    for name, size in plan.parameters.items():
        lines.append(f"  {name:16}{size:>16,}  {'trained' if name in plan.trained else 'frozen'}")
    lines += ["", "one sample        visual + text tokens        TFLOP      samples of an epoch"]
    for kind, count in plan.samples.items():
        visual, words = plan.tokens.get(kind, 0), plan.text_tokens[kind]
        lines.append(f"  {kind:16}{visual:>9,} + {words:<12g}{plan.flops[kind] / 1e12:>12.3f}{count:>25,}")
    through = 3 if "llm" in plan.trained else 2
    lines += [
        "",
        f"  Per token an LLM weight costs 2 FLOP forward and {2 * (through - 1)} backward: "
        + ("4 = 2 for the token's gradient, 2 for the weight's." if through == 3 else "only the token's gradient; "
           "the weight is frozen."),
        "  Added: attention, the encoders' forward pass, the projector, the head at supervised tokens.",
        "",
        f"epoch: {plan.epoch_tokens:.3g} tokens, {plan.epoch_flops:.3g} FLOP = "
        + " + ".join(f"{plan.flops[k] * n:.2g} ({k})" for k, n in plan.samples.items()),
        f"  {plan.hours(gpus, tflops, utilisation):.3g} hours at {utilisation:.0%} of {gpus} x {tflops} TFLOP/s",
        "",
        "memory of one device, GB (activations: an estimate)",
    ]  # fmt: skip
    lines += [f"  {kind:16}{size / GB:>10.2f}" for kind, size in plan.memory.items()]
    needed = sum(plan.memory.values()) / GB
    verdict = "fits" if needed < 0.92 * memory else "does not fit"
    lines.append(f"  {'together':16}{needed:>10.2f}  {verdict} {gpu} ({memory} GB, 8 % kept free)")
    if plan.host_memory:
        lines.append(f"  {'on the host':16}{plan.host_memory / GB:>10.2f}  per device")
    return "\n".join(lines)


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the stage that a configuration trains, with adapters or without; empty if it trains none."""
    return settings.get("recipes", {}).get(settings["experiment"].removesuffix("_lora"), {})


def counted(data: dict[str, Any]) -> dict[str, int]:
    """The samples of each modality in a configuration's shards; raises UserError where there are none."""
    return {
        kind: sum(shard.samples for shard in read_sources(folders, data["remedy"], Remote.of(data.get("cache"))))
        for kind, folders in data["sources"].items()
        if kind in data["modalities"]
    }


def configured(overrides: list[str]) -> dict[str, Any]:
    """The resolved configuration of a command line; raises UserError for a mistake in it."""
    settings: Any = OmegaConf.to_container(composed(overrides), resolve=True)
    if "samples" not in _recipe(settings):
        raise UserError(f"A plan is for a stage; {settings['experiment']} is none, or its recipe names no samples.")
    recipe = _recipe(settings)
    require_all(f"recipes.{settings['experiment'].removesuffix('_lora')}", recipe, _RECIPE)
    return settings


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.plan",
        "What a training run will need, before it starts: parameters, tokens, memory and time. Nothing is downloaded.",
        "+experiment=stage1 model=video_llava_7b trainer=zero2 --gpu h100-80g --gpus 8",
    )
    parser.add_argument(
        "overrides", nargs="+", metavar="key=value", help="as for train.py: +experiment=stage1 model=video_llava_7b …"
    )
    parser.add_argument("--gpu", choices=GPUS, default="a100-80g", help="their kind (default: %(default)s)")
    parser.add_argument("--gpus", type=number(Count), default=8, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument(
        "--utilisation",
        type=number(Annotated[float, Range(0, 1, above=True)]),
        default=0.5,
        metavar="SHARE",
        help="of the peak that the run reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--shards", action="store_true", help="count the samples in data.sources, instead of taking the recipe's"
    )
    parser.add_argument(
        "--rate", type=number(Positive), metavar="N", help="of a study: samples a second that a stage trains here"
    )
    parser.add_argument("--json", action="store_true", help="the figures as JSON")
    options = parser.parse_intermixed_args(arguments)
    from vllava import study_plan  # which plans stages as this module does

    try:
        if study_plan.is_study(options.overrides):
            device = options.gpu, options.gpus, options.utilisation
            planned = study_plan.rows(study_plan.swept(options.overrides), options.rate, device)
            rows = [{**vars(row), "hours": row.hours} for row in planned[2]]
            print(json.dumps(rows, indent=1) if options.json else study_plan.text(*planned))
            return 0
        settings = configured(options.overrides)
        if options.shards:
            _recipe(settings)["samples"] = counted(settings["data"])
        plan = make(settings, options.gpus)
    except UserError as error:
        stop(error)
    if options.json:
        print(json.dumps({**vars(plan), "epoch_flops": plan.epoch_flops, "epoch_tokens": plan.epoch_tokens}, indent=1))
    else:
        print(text(plan, settings, options.gpu, options.gpus, options.utilisation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
