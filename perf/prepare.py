"""What `data_prep.prepare` costs beside the bare reading and writing of the same bytes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import webdataset

from data_prep.annotations import Dataset
from data_prep.executors import LocalProcesses
from data_prep.media import MediaSettings
from data_prep.prepare import Preparation, prepare
from data_prep.toy_render import encode_jpeg
from perf.data import picture, talk
from perf.timing import take_turns, timed
from vllava.data.media import decode_image

HEADER = (
    "rows/s of two processes: a line of JSON and a JPEG of 160 x 120 pixels (about 7 KB) for each row; bare: the same "
    "lines parsed, the same files read (and decoded), written by webdataset.TarWriter, and each shard's SHA-256 taken"
)
ROWS, PROCESSES, PER_SHARD = 20_000, 2, 512


def make_files(root: Path, rows: int) -> None:
    """Annotations of `rows` rows, and their pictures, a thousand in a folder."""
    files = [encode_jpeg(picture(np.random.default_rng(seed), 160, 120)) for seed in range(20)]
    with open(root / "rows.jsonl", "w") as annotations:
        for number in range(rows):
            name = f"{number // 1000:04d}/{number:07d}.jpg"
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes(files[number % len(files)])
            row = {"id": f"{number:07d}", "image": name, "conversations": talk("image")}
            annotations.write(f"{json.dumps(row)}\n")


def bare(root: Path, out: Path, check: str) -> None:
    """Each process reads every second stretch of lines."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_bare, args=(root, out, check, number)) for number in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _bare(root: Path, out: Path, check: str, mine: int) -> None:
    with open(root / "rows.jsonl", "rb") as lines:
        for number, line in enumerate(lines):
            shard, place = divmod(number, PER_SHARD)
            if shard % PROCESSES == mine:
                if place == 0:
                    tar = webdataset.TarWriter(str(out / f"{shard:05d}.tar"), encoder=False, mtime=0)
                row = json.loads(line)
                data = (root / row["image"]).read_bytes()
                if check == "decode":
                    decode_image(data)
                tar.write({"__key__": f"{number:09d}", "json": json.dumps(row).encode(), "0.jpg": data})
                if place == PER_SHARD - 1:
                    tar.close()
                    _sum(out / f"{shard:05d}.tar")


def _sum(path: Path) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)


def whole(root: Path, out: Path, check: str) -> None:
    """What a user runs."""
    shutil.rmtree(out, ignore_errors=True)
    dataset = Dataset("bench", root, ("rows.jsonl",))
    prepare(Preparation(dataset, MediaSettings(check), PER_SHARD), out, LocalProcesses(PROCESSES), shown=False)


def run(repeats: int, bf16: bool, count: int = ROWS) -> list[dict]:
    """Rows of rows/s, with and without decoding."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "files"
        root.mkdir()
        make_files(root, count)
        for check in ("none", "decode"):
            contenders = {
                "prepare": timed(partial(whole, root, Path(folder) / "prepared", check)),
                "bare": timed(partial(bare, root, Path(folder) / "bare", check)),
            }
            timing = take_turns(contenders, repeats)
            rows.append(
                {
                    "check": check,
                    "prepare, rows/s": count / timing.median("prepare"),
                    "bare, rows/s": count / timing.median("bare"),
                    "prepare's speed over bare": timing.ratio("prepare", "bare"),
                }
            )
    return rows
