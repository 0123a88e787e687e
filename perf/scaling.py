"""How the cost of a step grows with the batch, the frames and the vocabulary, and what a second process brings."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import lightning as L
import torch
from torch.utils.data import DataLoader

from perf.contenders import (
    MIXTURES,
    TRAINED,
    Geometry,
    Loop,
    Mixture,
    bare_trainer,
    build,
    draw,
    packed,
    padded,
    repeated,
    train_only,
)
from perf.timing import exponent, take_turns, timed
from vllava.batch import Step
from vllava.training.stage import Stage
from vllava.training.task import Recipe

HEADER = "seconds of a step of stage 2; exponent p of cost = c * size^p"
SIZES = {"batch": [4, 8, 16, 32], "frames": [4, 8, 16, 32], "vocabulary": [2_000, 8_000, 32_000, 128_000]}
STEPS = 6  # of a run with one or two processes


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows for each size and contender, with the fitted exponent; then rows for one and two processes."""
    rows = []
    for what, sizes in SIZES.items():
        costs: dict[str, list[float]] = {"ours": [], "port": []}
        for size in sizes:
            timing = take_turns(_contenders(what, size, bf16), repeats)
            for who, found in costs.items():
                found.append(timing.median(who))
        for who, found in costs.items():
            seconds = {f"size {number}": cost for number, cost in enumerate(found, 1)}
            rows.append({"grows": f"{what} {sizes}", "who": who, **seconds, "exponent": exponent(sizes, found)})
    return rows + _processes()


def _contenders(what: str, size: int, bf16: bool) -> dict:
    geometry = Geometry(**({what: size} if what != "batch" else {}))
    mixture = Mixture({"video": 4}, {"video": 150}, 0.5)
    if what == "batch":
        mixture = Mixture({"image": size * 3 // 4, "video": size // 4}, MIXTURES["stage2"].text_tokens, 0.5)
    model, port = build(geometry)
    samples = draw(model, mixture)
    rows, inputs = packed(samples), padded(port, samples)
    ours = Loop(model.train(), train_only(model, TRAINED["stage2"]), bf16)
    theirs = Loop(port.train(), train_only(port, TRAINED["stage2"]), bf16)
    return {"ours": timed(lambda: ours.packed_step(rows)), "port": timed(lambda: theirs.padded_step(inputs))}


def _processes() -> list[dict]:
    """Samples/s of the same global batch in one process and in two, one thread each."""
    rows = []
    for count in (1, 2):
        done = subprocess.run([sys.executable, "-m", "perf.scaling", str(count)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rate = json.loads(done.stdout.splitlines()[-1])
        rows.append({"grows": f"processes: {count}", "who": "ours", "samples/s": rate})
    rows[1]["speed-up"] = rows[1]["samples/s"] / rows[0]["samples/s"]
    return rows


class _Shares(L.LightningDataModule):
    """The same global batch at every step, shared out among the processes."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps

    def train_dataloader(self) -> DataLoader:
        rank = self.trainer.global_rank if self.trainer else 0
        return repeated(self.steps[rank], STEPS)


class _Clock(L.Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero:
            seconds = (self.ends[-1] - self.ends[0]) / (STEPS - 1)
            print(json.dumps(MIXTURES["stage2"].samples / seconds), flush=True)


def measure(processes: int) -> None:
    """Print the samples/s of this many processes."""
    torch.set_num_threads(1)
    model, _ = build(Geometry())
    samples = draw(model, MIXTURES["stage2"])
    shares = [samples[rank::processes] for rank in range(processes)]
    strategy = "ddp_spawn" if processes > 1 else "auto"
    trainer = bare_trainer([_Clock()], devices=processes, strategy=strategy, use_distributed_sampler=False)
    steps = [Step(packed(share), samples=len(share)) for share in shares]
    trainer.fit(Stage(model, ["projector", "llm"], Recipe(lr=1e-5)), _Shares(steps))


if __name__ == "__main__":
    measure(int(sys.argv[1]))
