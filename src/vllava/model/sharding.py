"""FSDP2: the model's weights, their gradients and optimiser states shared out among devices."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from vllava.model.build import layers_of
from vllava.model.video_llava import VideoLlava


def shard(model: VideoLlava, mesh: Any) -> None:
    """Share out each layer of the LLM, then all the rest but the encoders: frozen, they stay whole on every device."""
    for layer in layers_of(model.llm):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=set(model.encoders.parameters()))
    for method in ("loss_sum", "generate"):
        register_fsdp_forward_method(cast(nn.Module, model), method)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a model that was shared out, on the CPU of the first process; every process has to call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
