"""A training step of each stage, at the paper's mixture of images and videos: ours, the port's, and ours unpacked."""

from __future__ import annotations

import argparse

from benchmarks.contenders import MIXTURES, TRAINED, Geometry, Loop, build, draw, packed, padded, train_only
from benchmarks.timing import take_turns
from vllava.data.packing import pack


def compare(geometry: Geometry, name: str, repeats: int, bf16: bool) -> dict:
    """Samples and useful tokens per second, and how many times as fast as the port in a plain padded loop."""
    model, port = build(geometry)
    mixture = MIXTURES[name]
    parts = TRAINED[name.split()[0]]
    samples = draw(model, mixture)
    rows, inputs, single = packed(samples), padded(port, samples), [pack([sample]) for sample in samples]
    ours = Loop(model.train(), train_only(model, parts), bf16)
    theirs = Loop(port.train(), train_only(port, parts), bf16)
    losses = {"ours": ours.packed_step(rows), "port, padded": theirs.padded_step(inputs)}
    timing = take_turns(
        {
            "ours": lambda: ours.packed_step(rows),
            "port, padded": lambda: theirs.padded_step(inputs),
            "ours, unpacked": lambda: ours.packed_step(single),
        },
        repeats,
    )
    tokens = sum(map(len, samples))
    return {
        "mixture": mixture.counts,
        "useful_token_share_padded": tokens / inputs["input_ids"].numel(),
        "first_loss": losses,
        "results": {
            who: {
                "seconds": timing.median(who),
                "samples_per_second": mixture.samples / timing.median(who),
                "useful_tokens_per_second": tokens / timing.median(who),
                "times_port": timing.ratio(who, "port, padded"),
            }
            for who in timing.seconds
        },
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("--patch", type=int, default=8)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("names", nargs="*", default=["stage1", "stage2"])
    o = p.parse_args()
    for n in o.names:
        print(n, compare(Geometry(patch_size=o.patch), n, 3, o.bf16))
