"""What samples cost in floating-point operations, and how many of them a GPU can do: for plans and for runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vllava.batch import IGNORE_INDEX, MEDIA_KINDS, Batch
from vllava.model.encoders import ClipEncoder, Encoder, MaeEncoder
from vllava.model.languagebind import TemporalLayer
from vllava.model.video_llava import VideoLlava

# Dense peak of the tensor cores in TFLOP/s, of bfloat16 with sums in float32; the first part of a name that fits.
# The makers' data sheets and architecture papers; where these give figures with sparsity alone, the half of them.
# V100 and T4 have no bfloat16: theirs is that of float16.
PEAKS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500),  # NVIDIA GB300 NVL72: 180 PFLOP/s dense of 72
    ("GB200", 2500),  # NVIDIA GB200 NVL72: 180 PFLOP/s dense of 72
    ("B300", 2250),  # NVIDIA HGX B300: 18 PFLOP/s dense of 8
    ("B200", 2250),  # NVIDIA HGX B200: 18 PFLOP/s dense of 8
    ("B100", 1750),  # NVIDIA HGX B100: 14 PFLOP/s dense of 8
    ("GH200", 989),  # NVIDIA GH200 data sheet: as H100 SXM
    ("H200 NVL", 835),  # NVIDIA H200 data sheet
    ("H200", 989),
    ("H100 PCIe", 756),  # NVIDIA H100 data sheet: PCIe, NVL and SXM differ
    ("H100 NVL", 835),
    ("H100", 989),
    ("H800 PCIe", 756),  # as H100, with slower links
    ("H800", 989),
    ("H20", 148),  # NVIDIA H20 data sheet
    ("A100", 312),  # NVIDIA A100 data sheet: SXM and PCIe alike
    ("A800", 312),
    ("A30", 165),  # NVIDIA A30 data sheet
    ("A40", 149.7),  # NVIDIA A40 data sheet
    ("A10G", 70),  # Amazon's variant, NVIDIA A10G
    ("A10", 125),  # NVIDIA A10 data sheet
    ("L40S", 362),  # NVIDIA L40S data sheet
    ("L40", 181),  # NVIDIA L40 data sheet
    ("L4", 121),  # NVIDIA L4 data sheet
    ("RTX 6000 Ada", 364.2),  # NVIDIA Ada architecture paper (professional), table of the RTX 6000
    ("RTX A6000", 154.8),  # NVIDIA Ampere GA102 architecture paper
    ("RTX 5090", 209.5),  # NVIDIA RTX Blackwell architecture paper
    ("RTX 4090", 165.2),  # NVIDIA Ada architecture paper
    ("RTX 4080", 97.5),
    ("RTX 3090 Ti", 80),  # NVIDIA Ampere GA102 architecture paper
    ("RTX 3090", 71),
    ("V100-PCIE", 112),  # NVIDIA V100 data sheet
    ("V100", 125),
    ("T4", 65),  # NVIDIA T4 data sheet
)


def peak(device: str) -> float | None:
    """The dense bf16 peak in TFLOP/s of a device by the name that CUDA gives it; None where it is not known.

    Names are compared word by word: "L4" is no "L40S". A part of a card (MIG), or a variant with fewer units or lower
    clocks, is not the card.
    """
    words = f" {device.replace('-', ' ').lower()} "
    if any(f" {variant} " in words for variant in ("mig", "laptop", "max q", "super", "d")):
        return None
    return next((value for name, value in PEAKS if f" {name.replace('-', ' ').lower()} " in words), None)


def transformer_flops(parameters: float, layers: int, width: int, tokens: float, squares: float, causal: bool) -> float:
    """One forward pass: 2 FLOPs for each weight and token, and 4 for each pair of tokens, width and layer.

    squares: the sum of each sample's tokens squared; half of the pairs are left out where attention is causal.
    """
    return 2 * parameters * tokens + 4 * layers * width * squares * (0.5 if causal else 1)


def vision_flops(parameters: float, depth: int, width: int, patches: int, frames: int = 1, temporal: bool = False):
    """The forward pass of one image, or of a video's frames, which may attend to each other at each place."""
    tokens = patches + 1
    each = transformer_flops(parameters, depth, width, tokens, tokens**2, causal=False)
    if temporal:
        each += depth * 4 * frames * width * tokens  # scores and sums over the frames
    return frames * each


def encoder_flops(encoder: Encoder) -> float:
    """What one medium costs an encoder; of one of another kind than ours, the products with its weights alone."""
    size, spec = weights(encoder), encoder.spec
    if isinstance(encoder, ClipEncoder):
        layers: Any = encoder.tower.encoder.layers
        patches = spec.tokens // spec.frames - 1 if encoder.video else spec.tokens
        temporal = len(layers) > 0 and isinstance(layers[0], TemporalLayer)
        return vision_flops(size, len(layers), encoder.hidden_size, patches, spec.frames, temporal)
    if isinstance(encoder, MaeEncoder):
        return vision_flops(size, encoder.vit.config.num_hidden_layers, encoder.hidden_size, spec.tokens)
    return 2 * size * spec.tokens


def weights(module: nn.Module, but: tuple[Any, ...] = (), named: str = "") -> int:
    """The weights of a module, each once, without those of the modules `but`; `named`: those with it in their name.

    A linear layer's matrix counts with its sizes, for a quantised one has fewer numbers than weights.
    """
    total = 0
    for name, part in module.named_modules():
        if any(part is other for other in but) or named not in name:
            continue
        own = {key: p.numel() for key, p in part._parameters.items() if p is not None}
        if isinstance(part, nn.Linear):
            own["weight"] = part.in_features * part.out_features
        total += sum(own.values())
    return total


@dataclass(frozen=True)
class Costs:
    """What training on samples costs, forward and backward, without recomputation."""

    body: float  # weights of the LLM but its embeddings and its head
    layers: int
    width: int
    head: float
    projector: float
    adapters: float
    trained: float  # the share of the LLM's weights that are trained, adapters apart
    media: Mapping[str, float]  # FLOPs to encode one medium

    def flops(
        self, tokens: float, squares: float, visual: float, supervised: float, media: Mapping[str, float]
    ) -> float:
        """Of samples with so many tokens in all, visual ones among them, and so many media to encode.

        A trained weight costs a forward and two backward products; a frozen one, through which gradients pass, one
        less. The head is computed at supervised tokens.
        """
        llm = transformer_flops(self.body, self.layers, self.width, tokens, squares, causal=True)
        llm += 2 * self.head * supervised
        encoded = sum(self.media[kind] * count for kind, count in media.items())
        return encoded + (2 + self.trained) * llm + 3 * 2 * (self.projector * visual + self.adapters * tokens)

    def of(self, batch: Batch) -> float:
        """Of a packed row, padding none; media that come as features have been encoded before."""
        lengths = batch.cu_seqlens.diff().double()
        encoded = {kind: float(len(stack)) for kind, stack in _media(batch) if stack.ndim > 3 and kind in self.media}
        visual = len(batch.image_slots) + len(batch.video_slots)
        supervised = int((batch.labels != IGNORE_INDEX).sum())
        return self.flops(float(lengths.sum()), float(lengths.square().sum()), visual, supervised, encoded)


def _media(batch: Batch) -> list[tuple[str, Any]]:
    return list(zip(MEDIA_KINDS, (batch.images, batch.videos), strict=True))


def costs(llm: Any, projector: nn.Module, media: Mapping[str, float], trained: float, adapters: float = 0) -> Costs:
    """The costs of a language model, as it is or on the meta device, with what its encoders' media cost."""
    head = llm.get_output_embeddings()
    ends = (llm.get_input_embeddings(), head)
    config = llm.config.get_text_config()
    width = config.hidden_size
    body = weights(llm, but=ends) - weights(llm, named="lora_")
    return Costs(
        body, config.num_hidden_layers, width, config.vocab_size * width, weights(projector), adapters, trained, media
    )


def costs_of(model: VideoLlava) -> Costs:
    """The costs of a model with what is trained of it now."""
    free = sum(p.numel() for name, p in model.llm.named_parameters() if p.requires_grad and "lora_" not in name)
    total = sum(p.numel() for name, p in model.llm.named_parameters() if "lora_" not in name)
    media = {kind: encoder_flops(model.encoder(kind)) for kind in model.encoders}
    return costs(model.llm, model.projector, media, free / max(total, 1), weights(model.llm, named="lora_"))
