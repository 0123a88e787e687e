"""Pixels as they travel, uint8, and as encoders take them: normalised, on the device that will compute with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# CLIP's normalisation, which LanguageBind keeps.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(pixels: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """uint8 pixels [..., 3, H, W] as float32, (x / 255 - mean) / std; floating point ones are normalised already."""
    if pixels.dtype != torch.uint8:
        return pixels
    centre, scale = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    # One pass over memory, then two in place.
    return pixels.float().mul_(1 / (255 * scale)).sub_(centre / scale)
