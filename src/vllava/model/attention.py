"""Attention over a packed row, registered with `transformers` for every model under the name "packed".

Called with `cu_seq_lens_q` (a packed row, [1, heads, T, d]) each segment attends causally to itself alone;
called without, it is `transformers`' own SDPA attention with the mask it was given (encoders, generation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [B, heads, T, d], key and value [B, key heads, T, d] to [B, T, heads, d]; B is 1 for a packed row."""
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # torch's CPU attention is slower in bfloat16 than in float32, its backward nine times: leave autocast here.
        dtype = value.dtype
        with torch.autocast("cpu", enabled=False):
            out, _ = packed_attention(
                module, query.float(), key.float(), value.float(), attention_mask, cu_seq_lens_q, scaling, **kwargs
            )
        return out.to(dtype), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    segments = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(segments, 2).transpose(1, 2), None


def packed_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """No mask for a packed row (it comes without one); otherwise the mask SDPA needs."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
