"""The one projector that images and videos share (paper, section 3.1.3 and appendix A.1)."""

from __future__ import annotations

from torch import nn


def projector(encoder_size: int, llm_size: int) -> nn.Sequential:
    """Linear, GELU, Linear: visual features [..., E] to the LLM's embedding space [..., D]."""
    return nn.Sequential(nn.Linear(encoder_size, llm_size), nn.GELU(), nn.Linear(llm_size, llm_size))
