"""What loading a large global batch takes: memory of the main process and its workers, memory they share, samples/s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from perf.contenders import TOKENIZER
from perf.data import SPECS, Kinds
from vllava.data.build import conversation_data
from vllava.model.build import load_tokenizer

HEADER = (
    "the paper's geometry (224 pixels, 8 frames, 2056 tokens a video, rows of 8192 tokens), videos as prepared frames, "
    "one rank, two workers; peaks in MB of proportional set size, sampled every 50 ms"
)
WORKERS = 2
STEPS = 3
BATCHES = (32, 256)  # samples a rank: the paper's stage 1 on eight GPUs, and on one


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of peaks and samples/s for a small and a large share of a global batch."""
    rows = []
    for batch in BATCHES:
        turns = [_apart(batch) for _ in range(max(1, min(repeats, 3)))]
        rows.append({"samples a rank": batch, **{name: median(turn[name] for turn in turns) for name in turns[0]}})
    return rows


def _apart(batch: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "perf.loader", str(batch)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class _Peaks(threading.Thread):
    """Watches the memory of this process, its children and /dev/shm."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.main = self.worker = self.shared = 0.0
        self._before = _shared()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.05):
            self.main = max(self.main, _pss(os.getpid()))
            self.worker = max([self.worker, *map(_pss, _children())])
            self.shared = max(self.shared, _shared() - self._before)

    def stop(self) -> None:
        self._done.set()
        self.join()


def _pss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def _shared() -> float:
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize / 2**20


def measure(batch: int) -> dict[str, float]:
    """Peaks and speed of some steps, their contents dropped one after the other."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "videos"
        Kinds().write("prepared frames", folder, samples=batch * STEPS)
        tokenizer = load_tokenizer(TOKENIZER)
        data = conversation_data(SPECS, tokenizer, {"video": [str(folder)]}, ["video"], batch, seed=0, workers=WORKERS)
        peaks = _Peaks()
        peaks.start()
        started, samples = time.perf_counter(), 0
        for step in data.train_dataloader():
            assert not step.broken, step.broken
            samples += step.samples
        seconds = time.perf_counter() - started
        peaks.stop()
    return {
        "main process": peaks.main,
        "a worker": peaks.worker,
        "shared memory": peaks.shared,
        "samples/s": samples / seconds,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
