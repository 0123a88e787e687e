"""Questions about videos: how many a second beside a plain loop of one at a time, and the memory that many take."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from data_prep.toy_render import encode_mp4
from perf.contenders import TOKENIZER, Geometry, build
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.samples import Sample
from vllava.evaluation.answers import ask
from vllava.evaluation.generate import Asking, answer
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import FileMedium, Question, question
from vllava.model.build import load_tokenizer

EACH = 40  # questions about a video
SIZES = (50, 500)  # videos
NEW_TOKENS = 8
LOOP = 40  # questions of the plain loop
HEADER = (
    f"{EACH} questions about each video, greedy, {NEW_TOKENS} new tokens at most; `loop`: one question at a time, its "
    f"video decoded and encoded for it, as the original does, timed over {LOOP}; memory: the most that this process "
    "and those that decode for it hold together, pages they share counted in parts (PSS)"
)


def run(repeats: int, bf16: bool, sizes: tuple[int, ...] = SIZES, each: int = EACH) -> list[dict]:
    """Rows of questions/s and of memory, each size in a process of its own. bf16: as the device computes anyway."""
    rows: list[dict] = []
    for videos in sizes:
        command = [sys.executable, "-m", "perf.answering", str(videos), str(each)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            peak = _watched(process)
            said = process.stdout.read() if process.stdout else ""
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
        found = json.loads(said.splitlines()[-1])
        rows.append({**found, "memory_mb": peak, "memory ratio": peak / rows[0]["memory_mb"] if rows else 1.0})
    return rows


def _watched(process: subprocess.Popen) -> float:
    """The most memory of a process and its children until it ends, in MB."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_pss, [process.pid, *_children(process.pid)])))
        time.sleep(0.2)
    return peak / 1024


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return [*found, *(below for child in found for below in _children(child))]


def _pss(pid: int) -> int:
    """The memory of a process in kB, of what it shares its part."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def asked_of(folder: Path, videos: int, each: int, size: int, frames: int) -> list[Question]:
    """Questions about videos of noise, which are written to a folder."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(videos):
        path = folder / f"{number}.mp4"
        path.write_bytes(encode_mp4(rng.integers(256, size=(frames, size, size, 3), dtype=np.uint8)))
        medium = FileMedium("video", path)
        found += [question(f"{number}-{i}", f"What happens {'then ' * (i % 12)}?", medium) for i in range(each)]
    return found


def main(videos: int, each: int) -> None:
    torch.manual_seed(0)
    model, _ = build(Geometry())
    model.eval()
    packer = conversation_packer(model.specs, load_tokenizer(str(TOKENIZER)))
    spec = model.specs["video"]
    asking = Asking(model, packer, sample_decoder(model.specs), NEW_TOKENS)
    with tempfile.TemporaryDirectory() as name:
        asked = asked_of(Path(name), videos, each, spec.size, spec.frames)
        began = time.perf_counter()
        answer(asking, asked, Predictions(Path(name), "predictions", {"perf": videos}))
        ours = len(asked) / (time.perf_counter() - began)
        few, began = asked[:LOOP], time.perf_counter()
        for one in few:
            media = [asking.decode.video(medium.read()) for medium in one.media]
            ask(model, packer, [Sample(one.id, list(one.conversation), media)], NEW_TOKENS)
        loop = len(few) / (time.perf_counter() - began)
    found = {"videos": videos, "questions": len(asked), "questions/s": ours, "loop questions/s": loop}
    print(json.dumps({**found, "ratio": ours / loop}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
