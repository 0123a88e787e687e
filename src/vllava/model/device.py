"""What the machine can do."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def best_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What the best device is called."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def computes_in_bf16() -> bool:
    """Whether the device has bfloat16 arithmetic, rather than an emulation of it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast() -> AbstractContextManager:
    """bfloat16 for matrix products where the device has it; does nothing elsewhere."""
    return torch.autocast(best_device().type, torch.bfloat16, enabled=computes_in_bf16())
