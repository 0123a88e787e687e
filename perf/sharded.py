"""FSDP2 with several processes: memory of each while it loads, trains, saves and exports, and how long a save holds up.

The model is an LLM of some 100 M random weights, written once in float16; processes talk by gloo, on the CPU.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch

from perf.contenders import TOKENIZER, bare_trainer, repeated
from vllava.batch import IGNORE_INDEX, Step
from vllava.data.packing import PackedSample, pack
from vllava.model.build import fresh_llm, load_llm, load_tokenizer, video_llava
from vllava.model.files import save_half
from vllava.model.mapped import with_weights
from vllava.training.stage import Stage
from vllava.training.strategies import Fsdp
from vllava.training.task import Recipe

HEADER = (
    "FSDP2 on the CPU, an LLM of 100 M weights: peak memory of the largest process in MB above the idle one, mapped "
    "files not counted, by what it does (saving: with the training beside it), and seconds "
    "that training stands still for a save"
)
PROCESSES = (2, 4)
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}
TOKENS = 32  # of a step
STEPS = 3  # before and after each save


def run(repeats: int, bf16: bool) -> list[dict]:
    """A row for each number of processes and way to save."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_half(fresh_llm(TOKENIZER, **SIZES), Path(folder) / "llm")  # type: ignore[arg-type]
        for processes in PROCESSES:
            for how in ("at once", "in background"):
                rows.append({"processes": processes, "saved": how, **_apart(folder, processes, how, repeats)})
    return rows


def _apart(folder: str, processes: int, how: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, "-m", "perf.sharded", folder, str(processes), how, str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    for path in [*Path(folder).glob("rank-*.json"), *Path(folder).glob("state-*")]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    peaks = {phase: max(rank["peaks"].get(phase, 0.0) for rank in found) for phase in found[0]["peaks"]}
    others = max(rank["peaks"]["export"] for rank in found[1:])
    return {**peaks, "export, other ranks": others, "seconds of a save": median(found[0]["saves"])}


class Memory(threading.Thread):
    """Looks at this process's memory every 20 ms, and keeps the peak of each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.idle, self.phase = self.now(), "load"
        self.peaks: dict[str, float] = {}

    @staticmethod
    def now() -> float:
        """Memory of this process that is not a mapped file's, which the system could take back, MB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:"))) / 1024

    def run(self) -> None:
        while True:
            phase, used = self.phase, self.now() - self.idle
            self.peaks[phase] = max(used, self.peaks.get(phase, 0.0))
            time.sleep(0.02)


class Saves(L.Callback):
    """Saves a few times, and keeps how long each has held up training."""

    def __init__(self, folder: Path, how: str, times: int, memory: Memory) -> None:
        self.folder, self.how, self.times, self.memory = folder, how, times, memory
        self.seconds: list[float] = []
        self.running: Any = None

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.memory.phase = "train"

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if self.running is not None and self.running.done():
            self.running.result()
            self.running = None
        if trainer.global_step % STEPS or len(self.seconds) == self.times:
            return
        if self.running is not None:
            self.running.result()
        trainer.strategy.barrier()
        path = self.folder / f"state-{trainer.global_step}"
        self.memory.phase, began = "save", time.perf_counter()
        if self.how == "at once":
            trainer.save_checkpoint(path)
        else:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self.running = trainer.strategy.save_in_background(checkpoint, path)  # type: ignore[attr-defined]
        self.seconds.append(time.perf_counter() - began)

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if self.running is not None:
            self.running.result()
        self.memory.phase = "export"


def step() -> Step:
    """A step of random tokens."""
    ids = torch.randint(100, (TOKENS,)).tolist()
    return Step([pack([PackedSample("random", ids, [IGNORE_INDEX, *ids[1:]], [])])], samples=1)


def measure(folder: Path, processes: int, how: str, repeats: int) -> None:
    """What one process does; writes what it found to a file."""
    torch.set_num_threads(1)
    memory = Memory()
    memory.start()
    model = video_llava(load_llm(str(folder / "llm"), as_stored=True))
    task = Stage(model, ["llm"], Recipe(lr=1e-5))
    saves = Saves(folder, how, repeats, memory)
    trainer = bare_trainer(
        [saves], devices=processes, strategy=Fsdp(), use_distributed_sampler=False, default_root_dir=folder
    )
    trainer.fit(task, repeated(step(), STEPS * (repeats + 1)))
    if trainer.is_global_zero:
        task.model = with_weights(  # type: ignore[assignment]
            lambda: video_llava(load_llm(str(folder / "llm"), as_stored=True)), task.trained_weights(), folder
        )
        settings = {"encoder": {}, "tokenizer": "llm", "data": {"template": "vicuna_v1", "image_fit": "crop"}}
        task.export(folder / f"checkpoint-{processes}", load_tokenizer(TOKENIZER), settings)
    time.sleep(0.1)
    found = {"peaks": dict(memory.peaks), "saves": saves.seconds}
    (folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
