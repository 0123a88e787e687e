"""FSDP2: the model's weights, their gradients and optimiser states shared out among devices."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from vllava.errors import UserError, reason
from vllava.model.build import layers_of
from vllava.model.mapped import put_in_place, spooled
from vllava.model.precision import training_types
from vllava.model.video_llava import VideoLlava


def shard(model: VideoLlava, mesh: Any, half: bool = False) -> None:
    """Share out each layer of the LLM, then all the rest but the encoders: frozen, they stay whole on every device.

    Each weight is cast to its type in training, see `training_types`, when its part is taken, a layer at a time: of a
    model that was read as it is stored a process never holds more than its own parts and a layer. With `half` layers
    are gathered in bfloat16, to which mixed precision would round their matrices anyway; gradients are added up in
    float32, and the rest (embeddings, head, projector) is gathered as it is kept.
    """
    types = training_types(model, half)
    names = {id(p): name for name, p in model.named_parameters()}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model.llm):
        own = {name: types[names[id(p)]] for name, p in layer.named_parameters() if names[id(p)] in types}
        fully_shard(layer, mesh=mesh, mp_policy=policy if half else MixedPrecisionPolicy())
        _cast(layer, own)
    fully_shard(model, mesh=mesh, ignored_params=set(model.encoders.parameters()))
    _cast(model, types)
    for method in ("loss_sum", "generate"):
        register_fsdp_forward_method(cast(nn.Module, model), method)


@torch.no_grad()
def _cast(module: nn.Module, types: dict[str, torch.dtype]) -> None:
    for name, parameter in list(module.named_parameters()):
        if name in types and parameter.dtype != types[name]:
            put_in_place(module, {name: parameter.detach().to(types[name])})
    module.to(next(module.parameters()).device)  # FSDP looks for its parts anew, and lets go of those before


def gathered(model: nn.Module, names: Collection[str], folder: Path, keep: bool) -> dict[str, Tensor]:
    """The whole weights of these names, gathered one after the other into a file on the disk of `folder`, and mapped.

    Every process has to call this; those that do not `keep` them get none. None holds more than one weight at a time.
    Raises UserError, in the process that keeps them, where the disk does not take them.
    """
    sharded = model.state_dict()  # parts, and not what may be gathered just now

    def each() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            weight = sharded[name]
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight

    weights = each()
    try:
        if keep:
            return spooled(weights, folder)
    except OSError as error:
        raise UserError(f"The trained weights cannot be kept on the disk of {folder} ({reason(error)}).") from error
    finally:
        for _ in weights:  # whatever happens here, the others wait for this process at each
            pass
    return {}
