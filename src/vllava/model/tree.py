"""A model as a tree of its parts: what trains, what is frozen, how large each is and how it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Part:
    """A module, or as many alike in a row: its name, its kind and what it holds, the parts below it included."""

    name: str
    kind: str
    parameters: int
    trained: int
    types: tuple[str, ...]
    parts: tuple[Part, ...]

    @property
    def form(self) -> Any:
        """What is equal where two parts differ in nothing but their names."""
        return self.kind, self.parameters, self.trained, self.types, tuple((p.name, p.form) for p in self.parts)


def tree(model: nn.Module, depth: int | None = None) -> str:
    """The model as text, a line for each part down to `depth` (None: all), parts alike in a row as `24 x`.

    A weight that two parts share (tied embeddings) is counted in both, and once above them.
    """
    root = part("", model)
    rows = list(_rows(root, depth))
    wide = max(len(label) for label, _ in rows)
    lines = [f"{'':{wide}}  {'parameters':>14}  trained  kept as"]
    lines += [f"{label:{wide}}  {one.parameters:>14,}  {_share(one):>7}  {', '.join(one.types)}" for label, one in rows]
    return "\n".join(line.rstrip() for line in lines)


def part(name: str, module: nn.Module) -> Part:
    """A module and, below it, those that hold parameters."""
    weights = list(module.parameters())
    below = [part(child_name, child) for child_name, child in module.named_children()]
    types = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in weights)
    own = sum(p.numel() for p in module.parameters(recurse=False))
    parts = [one for one in below if one.parameters]
    if own and parts:  # beside its parts, or the lines below would not add up to this one
        parts.append(part("(own)", _Own(module)))
    return Part(
        name,
        type(module).__name__,
        sum(p.numel() for p in weights),
        sum(p.numel() for p in weights if p.requires_grad),
        tuple(types),
        tuple(parts),
    )


class _Own(nn.Module):
    """The parameters that a module holds itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def _rows(one: Part, depth: int | None, margin: str | None = None) -> Iterator[tuple[str, Part]]:
    """Each part below one with its label; the one itself first where there is no margin yet."""
    if margin is None:
        yield one.kind, one
    if depth == 0:
        return
    folded = _folded(one.parts)
    for number, (names, each) in enumerate(folded):
        last = number == len(folded) - 1
        name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}: {len(names)} x"
        kind = "" if each.kind == "_Own" else f" {each.kind}"
        yield f"{margin or ''}{'└─' if last else '├─'} {name}{kind}", each
        below = None if depth is None else depth - 1
        yield from _rows(each, below, f"{margin or ''}{'   ' if last else '│  '}")


def _folded(parts: tuple[Part, ...]) -> list[tuple[list[str], Part]]:
    """Parts alike in a row as one, with all their names."""
    folded: list[tuple[list[str], Part]] = []
    for one in parts:
        if folded and one.name.isdigit() and one.form == folded[-1][1].form:
            folded[-1][0].append(one.name)
        else:
            folded.append(([one.name], one))
    return folded


def _share(one: Part) -> str:
    if one.trained in (0, one.parameters):
        return "all" if one.trained else "frozen"
    return f"{one.trained / one.parameters:.1%}"
