"""Weights that nothing trains, in the precision in which they are used."""

from __future__ import annotations

import torch
from torch import nn

from vllava.model.video_llava import VideoLlava


@torch.no_grad()
def halve_frozen(model: VideoLlava, llm: bool = True) -> bool:
    """Keep the matrices that nothing trains in bfloat16; `llm=False` leaves those of the LLM. Returns whether it did.

    Mixed precision would round them so at every use: the results are the same to the bit, the memory is half, and
    nothing is cast any more. For a run that computes in bfloat16; what it saves must not come from these weights.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # may be tied to the head
    kept = set() if llm else {id(parameter) for parameter in model.llm.parameters()}
    halved = False
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module.weight) not in embeddings | kept:
            # Only float32: a quantised matrix is left as it is.
            frozen = [p for p in module.parameters() if not p.requires_grad and p.dtype == torch.float32]
            for parameter in frozen:
                parameter.data = parameter.data.to(torch.bfloat16)
            halved |= bool(frozen)
    return halved
