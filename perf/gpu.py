"""The paper's size on one GPU, random weights: useful tokens per second, the share of the peak they use, memory."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

from perf.contenders import Loop, Mixture, draw, packed, train_only
from perf.timing import take_turns, timed
from vllava.batch import MediumSpec
from vllava.model.attention import PACKED
from vllava.model.encoders import Encoder
from vllava.model.flops import peak as peak_of
from vllava.model.languagebind import VisionTower
from vllava.model.lora import Lora, add_lora
from vllava.model.precision import halve_frozen
from vllava.model.video_llava import VideoLlava
from vllava.plan import PUBLISHED, Plan, configured, make

HEADER = (
    "Vicuna-7B and LanguageBind geometry, random weights, packed micro-batches of 8,192 tokens, bf16; MFU: FLOPs of "
    "`vllava.plan`, recomputation not counted, as a share of the card's dense bf16 peak"
)
STAGES = ("stage1", "stage2_lora")
TOKEN_BUDGET = 8192


@dataclass(frozen=True)
class Size:
    """What is measured: the LLM, and the towers of both media."""

    llm: LlamaConfig
    image: CLIPVisionConfig
    video: CLIPVisionConfig


def paper() -> Size:
    return Size(*(PUBLISHED[name] for name in (
        "lmsys/vicuna-7b-v1.5",
        "LanguageBind/LanguageBind_Image",
        "LanguageBind/LanguageBind_Video_merge",
    )))  # fmt: skip


class RandomTower(Encoder):
    """A vision tower of no checkpoint."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        nn.Module.__init__(self)
        config._attn_implementation = PACKED
        self.video = config.add_time_attn
        patches = (config.image_size // config.patch_size) ** 2
        frames = config.num_frames
        self.spec = MediumSpec(config.image_size, frames * (1 + patches) if self.video else patches, frames)
        self.hidden_size = config.hidden_size
        self.tower = VisionTower(config, feature_layer=-2)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.video:
            return self.tower(pixels.flatten(0, 1)).unflatten(0, (-1, self.spec.frames)).flatten(1, 2)
        return self.tower(pixels)[:, 1:]


def build(size: Size, stage: str, device: torch.device, checkpointing: bool) -> tuple[VideoLlava, list[nn.Parameter]]:
    """The model on the device, ready to train what the stage trains."""
    with device:
        llm = AutoModelForCausalLM.from_config(size.llm, attn_implementation=PACKED, dtype=torch.float32)
        if checkpointing:
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        if stage == "stage2_lora":
            llm = add_lora(llm, Lora())
        model = VideoLlava(llm, RandomTower(size.image), RandomTower(size.video))
    trained = train_only(model, ["projector", "lora_"])
    halve_frozen(model)
    return model.to(device).train(), trained


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows for both stages, with gradient checkpointing and without; empty where there is no GPU."""
    if not torch.cuda.is_available():
        print("\nThere is no CUDA GPU here: nothing was measured.")
        return []
    rows = []
    for stage in STAGES:
        plan = make(configured([f"+experiment={stage}", "model=video_llava_7b"]), 1)
        for checkpointing in (False, True):
            rows.append(measure(paper(), stage, plan, torch.device("cuda"), checkpointing, repeats))
            torch.cuda.empty_cache()
    return rows


def mixture(plan: Plan, supervised: float, samples: int) -> Mixture:
    """Images and videos as the plan's data has them."""
    share = plan.samples["image"] / (plan.samples["image"] + plan.samples["video"])
    images = round(samples * share)
    counts = {"image": images, "video": samples - images}
    return Mixture(counts, {kind: int(plan.text_tokens[kind]) for kind in counts}, supervised)


def measure(
    size: Size, stage: str, plan: Plan, device: torch.device, checkpointing: bool, repeats: int, samples: int = 32
) -> dict:
    """The row of one stage; out of memory is a result too."""
    row = {"stage": stage, "checkpointing": checkpointing, "device": _name(device)}
    try:
        model, trained = build(size, stage, device, checkpointing)
        drawn = mixture(plan, 0.3 if stage == "stage1" else 0.5, samples)
        batches = [b.to(device) for b in packed(draw(model, drawn, scale=1.0), TOKEN_BUDGET)]
        loop = Loop(model, trained, bf16=True)

        def step() -> None:
            loop.packed_step(batches)
            if device.type == "cuda":
                torch.cuda.synchronize()

        seconds = take_turns({stage: timed(step)}, repeats).seconds[stage]
    except torch.OutOfMemoryError:
        return {**row, "result": "out of memory"}
    tokens = sum(len(batch.token_ids) for batch in batches)
    flops = sum(plan.flops[kind] * count for kind, count in drawn.counts.items())
    peak = _peak(device)
    return {
        **row,
        "samples/s": samples / median(seconds),
        "useful tokens/s": tokens / median(seconds),
        "MFU": flops / median(seconds) / (peak * 1e12) if peak else None,
        "peak memory, GB": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak(device: torch.device) -> float | None:
    """The card's dense bf16 peak in TFLOP/s, if it is one we know."""
    return peak_of(_name(device))
