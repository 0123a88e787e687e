"""Put visual tokens where their placeholders stand."""

from __future__ import annotations

from torch import Tensor

from vllava.errors import UserError


def splice(embeddings: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """Replace the rows of `embeddings` [T, D] at `slots` [N * P] by `features` [N, P, D], in order.

    Raises UserError if the slots kept free and the visual tokens produced differ in number.
    """
    flat = features.flatten(0, 1).to(embeddings.dtype)
    if len(flat) != len(slots):
        raise UserError(
            f"The batch keeps {len(slots)} slots for visual tokens and the encoder gives {len(flat)}: "
            "the data was packed for another encoder. Build it with the specs of this model."
        )
    return embeddings.index_copy(0, slots, flat)
