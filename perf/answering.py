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
from perf.timing import take_turns, timed
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.samples import Sample
from vllava.evaluation.answers import ask
from vllava.evaluation.generate import Asking, answer
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import FileMedium, Question, question
from vllava.model.build import load_tokenizer

EACH = 40  # questions about a video
SIZES = (50, 500)  # videos whose memory is compared
TIMED = 5  # videos of a timed turn
NEW_TOKENS = 8
HEADER = (
    f"{EACH} questions about each video, greedy, {NEW_TOKENS} new tokens at most. `loop`: one question at a time, its "
    "video decoded and encoded for it, as the original does; both ask the same questions in turns, and the ratio is "
    "the median over these. Memory: the most that the process and those that decode for it hold together, pages they "
    "share counted in parts (PSS)"
)


def run(repeats: int, bf16: bool, sizes: tuple[int, ...] = SIZES, each: int = EACH, turned: int = TIMED) -> list[dict]:
    """A row of questions/s, and one of memory for each size, in processes of their own. bf16: as the device does."""
    rows: list[dict] = [json.loads(_said("turns", turned, each, repeats)[1])]
    for videos in sizes:
        peak, _ = _said("memory", videos, each)
        row = {"videos": videos, "questions": videos * each, "memory_mb": peak}
        rows.append({**row, "memory ratio": peak / rows[1]["memory_mb"] if len(rows) > 1 else 1.0})
    return rows


def _said(*arguments: object) -> tuple[float, str]:
    """The most memory of a process of this program, in MB, and the last line that it printed."""
    command = [sys.executable, "-m", "perf.answering", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = _watched(process)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return peak, said.splitlines()[-1] if said else ""


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


def asked_model() -> Asking:
    """A model of random weights, and how it is asked."""
    torch.manual_seed(0)
    model, _ = build(Geometry())
    packer = conversation_packer(model.specs, load_tokenizer(str(TOKENIZER)))
    return Asking(model.eval(), packer, sample_decoder(model.specs), NEW_TOKENS)


def answer_all(asking: Asking, asked: list[Question]) -> None:
    """Answer the questions as an evaluation does."""
    with tempfile.TemporaryDirectory() as folder:
        answer(asking, asked, Predictions(Path(folder), "predictions", {"perf": len(asked)}))


def loop(asking: Asking, asked: list[Question]) -> None:
    """Answer the questions one at a time, each with its video read anew."""
    for one in asked:
        media = [asking.decode.video(medium.read()) for medium in one.media]
        ask(asking.model, asking.packer, [Sample(one.id, list(one.conversation), media)], NEW_TOKENS)


def turns(asking: Asking, asked: list[Question], repeats: int) -> dict:
    """How many questions a second, evaluated and in the plain loop."""
    contenders = {"ours": timed(lambda: answer_all(asking, asked)), "loop": timed(lambda: loop(asking, asked))}
    found = take_turns(contenders, repeats)
    rates = {name: len(asked) / found.median(name) for name in contenders}
    return {"questions/s": rates["ours"], "loop questions/s": rates["loop"], "ratio": found.ratio("ours", "loop")}


def main(what: str, videos: int, each: int, repeats: int = 0) -> None:
    asking = asked_model()
    spec = asking.model.specs["video"]
    with tempfile.TemporaryDirectory() as name:
        asked = asked_of(Path(name), videos, each, spec.size, spec.frames)
        if what == "memory":
            answer_all(asking, asked)
        else:
            print(json.dumps({"videos": videos, "questions": len(asked), **turns(asking, asked, repeats)}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
