"""New tokens per second of a batch of answers: ours against the port's `generate`, both with a KV cache."""

from __future__ import annotations

import torch

from perf.contenders import MIXTURES, Geometry, build, draw, padded
from perf.timing import take_turns, timed
from vllava.data.packing import pack

NEW_TOKENS = 32
HEADER = f"{NEW_TOKENS} new tokens for each sample of a batch, greedy"


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of tokens/s for three batches."""
    rows = []
    for name in ("stage2", "stage2 images", "stage2 videos"):
        model, port = build(Geometry())
        model.eval(), port.eval()
        samples = draw(model, MIXTURES[name])
        row, inputs = pack(samples), _left_padded(padded(port, samples))

        @torch.no_grad()
        def ours(model=model, row=row) -> list[list[int]]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model.generate(row, NEW_TOKENS, min_new_tokens=NEW_TOKENS)

        @torch.no_grad()
        def theirs(port=port, inputs=inputs) -> list[list[int]]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
                tokens = port.generate(**inputs, **lengths, do_sample=False, pad_token_id=0)
            return tokens[:, inputs["input_ids"].shape[1] :].tolist()

        same = sum(a == b for a, b in zip(ours(), theirs(), strict=True)) / len(samples)
        timing = take_turns({"ours": timed(ours), "port": timed(theirs)}, repeats)
        rows += [
            {
                "batch": name,
                "who": who,
                "tokens/s": len(samples) * NEW_TOKENS / timing.median(who),
                "ratio": timing.ratio(who, "port"),
                "the same answers": same,
            }
            for who in timing.seconds
        ]
    return rows


def _left_padded(inputs: dict) -> dict:
    """Prompts with their padding before them, as generation wants them."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    rolled = {
        name: torch.stack([row.roll(len(row) - n) for row, n in zip(inputs[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    return {**{k: v for k, v in inputs.items() if k != "labels"}, **rolled}
