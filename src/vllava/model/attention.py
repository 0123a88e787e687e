"""Attention over a packed row, registered with `transformers` for every model under the name "packed".

Called with `cu_seq_lens_q` (a packed row, [1, heads, T, d]) each segment attends causally to itself alone;
called without, it is `transformers`' own SDPA attention with the mask it was given (encoders, generation).

A packed row takes one flash-attention call for all segments on CUDA in half precision, and one call for each segment
elsewhere: on CPUs that is as fast as any batched form (docs/performance.md).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllava.errors import UserError

try:
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
    HAS_FLASH = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch's first versions had less
except ImportError:
    HAS_FLASH = False

PACKED = "packed"


@torch.compiler.disable  # the number of segments differs from row to row, and each would be compiled anew
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, None]:
    """query [B, heads, T, d], key and value [B, key heads, T, d] to [B, T, heads, d]; B is 1 for a packed row.

    `cu_seq_lens_q` [S + 1] int32 says where segments begin, `max_length_q` how long the longest is. With a
    `sliding_window` a token sees itself and the `sliding_window - 1` before it. Raises UserError for what LLMs ask of
    their attention beyond that.
    """
    for extra in ("softcap", "s_aux"):
        if kwargs.get(extra) is not None:
            raise UserError(f"This LLM's attention wants {extra!r}, which packed rows do not have. Choose another LLM.")
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # torch's CPU attention is slower in bfloat16 than in float32, its backward nine times: leave autocast here.
        dtype = value.dtype
        query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):
            out, _ = packed_attention(
                *(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q),
                *(scaling, sliding_window, dropout),
                **kwargs,
            )
        return out.to(dtype), None
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    half = query.dtype in (torch.float16, torch.bfloat16)
    if HAS_FLASH and query.is_cuda and half and not dropout:
        return flash(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return by_segment(query, key, value, cu_seq_lens_q, scaling, sliding_window, dropout), None


def by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    window: int | None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each segment of a row, one call for each; shapes as in `packed_attention`."""
    lengths = cu_seqlens.diff().tolist()
    settings: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    segments = [
        scaled_dot_product_attention(q, k, v, **_causal(q, window), **settings)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(segments, 2).transpose(1, 2)


def _causal(query: Tensor, window: int | None) -> dict[str, Any]:
    """What tells SDPA who sees whom in one segment."""
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": True}
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return {"attn_mask": seen}


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """The same, in one call for all segments; CUDA and half precision only."""
    longest = longest or int(cu_seqlens.diff().max())
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    out = varlen_attn(
        *(query, key, value, cu_seqlens, cu_seqlens, longest, longest),
        window_size=(window - 1 if window else -1, 0),  # -1: all that came before
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unsqueeze(0)


def packed_mask(*args, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """No mask for a packed row (it comes without one); otherwise the mask SDPA needs."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
