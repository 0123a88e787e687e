"""Weights in the precision in which they are used: what is trained in float32, what is not in no more than it takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vllava.model.files import FLOATS
from vllava.model.video_llava import VideoLlava


@torch.no_grad()
def halve_frozen(model: VideoLlava, llm: bool = True) -> bool:
    """Keep the matrices that nothing trains in bfloat16; `llm=False` leaves those of the LLM. Returns whether it did.

    Mixed precision would round them so at every use: the results are the same to the bit, the memory is half, and
    nothing is cast any more. For a run that computes in bfloat16; what it saves must not come from these weights.
    """
    kept = set() if llm else {id(parameter) for parameter in model.llm.parameters()}
    # Only float32: a quantised matrix is left as it is.
    frozen = [p for p in frozen_matrices(model) if p.dtype == torch.float32 and id(p) not in kept]
    for parameter in frozen:
        parameter.data = parameter.data.to(torch.bfloat16)
    return bool(frozen)


@torch.no_grad()
def set_precision(model: nn.Module, half: bool) -> bool:
    """Cast each weight to its type in training, see `training_types`. Returns whether any lost precision.

    One weight at a time: a model that was read as it is stored takes no more memory on the way than at the end.
    """
    lost = False
    wanted = training_types(model, half)
    for name, parameter in model.named_parameters():
        if name in wanted:
            before, parameter.data = parameter.dtype, parameter.data.to(wanted[name])
            lost |= parameter.dtype not in (before, torch.float32)
    return lost


def training_types(model: nn.Module, half: bool) -> dict[str, torch.dtype]:
    """The type of each weight in training, by its name: float32; with `half`, bfloat16 for matrices that are frozen.

    Those that are quantised are not among them.
    """
    halved = {id(p) for p in frozen_matrices(model)} if half else set()
    weights = [(name, p) for name, p in model.named_parameters() if p.dtype in FLOATS]
    return {name: torch.bfloat16 if id(p) in halved else torch.float32 for name, p in weights}


def frozen_matrices(model: nn.Module) -> list[Tensor]:
    """The parameters of linear and convolution layers that nothing trains, but for those tied to an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [p for m in model.modules() for p in _of_matrix(m) if not p.requires_grad and id(p) not in embeddings]


def _of_matrix(module: nn.Module) -> Iterable[Tensor]:
    return module.parameters(recurse=False) if isinstance(module, (nn.Linear, nn.Conv2d)) else ()
