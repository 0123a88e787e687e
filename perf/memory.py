"""Peak memory of a training step of each stage, ours and the port's, each in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from perf.contenders import MIXTURES, TRAINED, Geometry, Loop, Mixture, build, draw, packed, padded, train_only

HEADER = "peak resident memory of a process that makes two steps, MB"
POINTS = {  # what differs from the stage's mixture and the small geometry
    "stage1": ("stage1", 1, {}),
    "stage2": ("stage2", 1, {}),
    "stage1, batch x 2": ("stage1", 2, {}),
    "stage2, batch x 4": ("stage2", 4, {}),
    "stage2, 16 frames": ("stage2", 1, {"frames": 16}),
    "stage2, 32,000 words": ("stage2", 1, {"vocabulary": 32_000}),
    "images alone": ("stage2 images", 1, {}),
    "videos alone": ("stage1 videos", 1, {}),
}


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of peak memory at several points."""
    rows = []
    for name in POINTS:
        ours, port = (_apart(name, who, bf16) for who in ("ours", "port"))
        rows.append({"point": name, "ours": ours, "port": port, "share of the port's": ours / port})
    return rows


def _apart(name: str, who: str, bf16: bool) -> float:
    command = [sys.executable, "-m", "perf.memory", name, who, *(["bf16"] if bf16 else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, who: str, bf16: bool) -> float:
    """Peak memory of this process after two steps, MB."""
    stage, times, changes = POINTS[name]
    mixture = MIXTURES[stage]
    larger = Mixture({k: n * times for k, n in mixture.counts.items()}, mixture.text_tokens, mixture.supervised)
    model, port = build(Geometry(**changes))
    samples = draw(model, larger)
    parts = TRAINED[stage.split()[0]]
    if who == "ours":
        del port
        loop, batch = Loop(model.train(), train_only(model, parts), bf16), packed(samples)
        for _ in range(2):
            loop.packed_step(batch)
    else:
        del model
        loop, inputs = Loop(port.train(), train_only(port, parts), bf16), padded(port, samples)
        for _ in range(2):
            loop.padded_step(inputs)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], "bf16" in sys.argv)))
