"""Weights that nothing trains, in the precision in which they are used."""

from __future__ import annotations

import torch
from torch import nn

from vllava.model.video_llava import VideoLlava


@torch.no_grad()
def halve_frozen(model: VideoLlava, llm: bool = True) -> None:
    """Keep the matrices of parts that nothing trains in bfloat16; `llm=False` leaves the LLM as it is.

    Mixed precision would round them so at every use: the results are the same to the bit, the memory is half, and
    nothing is cast any more. For a run that computes in bfloat16 and does not save these parts.
    """
    parts = [*model.encoders.values(), *([model.llm] if llm else [])]
    for part in parts:
        if any(parameter.requires_grad for parameter in part.parameters()):
            continue
        looked_up = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}  # may be tied to the head
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) not in looked_up:
                module.to(torch.bfloat16)
