"""Weights that lie in a file and are mapped: they take page cache, which the system can take back, and no memory."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_ALIGNED = 64  # bytes at which each tensor begins
_SHORT = (torch.float16, torch.bfloat16)


def spooled(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """The tensors, drawn one after the other and kept in a nameless file in `folder`, on its disk.

    Nothing of the file is left when the tensors are gone, nor when the process is killed. To write to such a tensor
    changes it in this process's memory alone.
    """
    places: dict[str, tuple[int, Tensor]] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        for name, tensor in tensors:
            file.write(bytes(-file.tell() % _ALIGNED))
            places[name] = file.tell(), tensor.to("meta")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if file.tell() else mmap.mmap(-1, 1)
    # Each has a storage of its own: what looks for weights that are tied takes those of one storage for the same.
    return {name: _at(whole, start, like) for name, (start, like) in places.items()}


def _at(whole: mmap.mmap, start: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty_like(like, device="cpu")
    return torch.frombuffer(whole, dtype=like.dtype, count=like.numel(), offset=start).view(like.shape)


def put_in_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let a model's parameters of these names be these very tensors, not copies; weights that are tied stay so.

    Raises KeyError for a name that the model does not have.
    """
    own = dict(model.named_parameters())
    new = {id(own[name]): nn.Parameter(value, own[name].requires_grad) for name, value in tensors.items()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])


def with_weights(build: Callable[[], nn.Module], weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
    """The model that `build` makes, with these weights in place of its own, to be written or asked.

    Where any of its LLM's are among them, the other weights of the LLM are in float32 too, whatever `build` reads
    them as: what has to be cast for that, or lies on another device, lies in a file on the disk of `folder`, mapped.
    """
    model = build()
    if any(weight.device.type != "cpu" for weight in weights.values()):
        weights = spooled(weights.items(), folder)
    put_in_place(model, weights)
    if any(name.startswith("llm.") for name in weights):
        rest = [(name, p) for name, p in model.named_parameters() if name.startswith("llm.") and p.dtype in _SHORT]
        put_in_place(model, spooled(((name, p.float()) for name, p in rest), folder))
    return model
