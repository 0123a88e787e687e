"""Cross entropy over a large vocabulary without all logits in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # supervised tokens whose logits exist at a time: 131 MB in float32 for a vocabulary of 32,000

# Kinds of LLM whose logits are what the head gives, nothing more. Others (some scale or cap theirs) compute all their
# logits at once, in their own code.
PLAIN_HEADS = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")


def chunked_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """The summed cross entropy of `head(hidden)` [N, V] with labels [N], for hidden states [N, D].

    Logits are computed for `chunk` tokens at a time, and once more in the backward pass instead of being kept.
    """
    parts = [
        checkpoint(_summed, part, head, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


def _summed(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), labels, reduction="sum")
