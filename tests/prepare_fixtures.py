"""Small data sets on disk, as users have them, and what came of them."""

import hashlib
import json
import os
import tarfile
from pathlib import Path

from shard_fixtures import jpeg, mp4, talk

from data_prep.annotations import Dataset
from data_prep.executors import LocalProcesses
from data_prep.media import MediaSettings
from data_prep.prepare import Preparation, prepare

ROOT = Path(__file__).parents[1]


def row(number, kind="text", name=None):
    """A row in LLaVA's format."""
    placeholder = None if kind == "text" else f"<{kind}>"
    row = {"id": f"row-{number}", "conversations": talk(f"What is number {number}?", "a circle", placeholder)}
    return row if name is None else {**row, kind: name}


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def write_media(folder, **files):
    """Files by name with two underscores for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)


def many(folder, rows=40):
    """A data set of texts, pictures, clips and rows that are rejected."""
    folder.mkdir(parents=True)
    for shade in range(4):
        (folder / f"{shade}.jpg").write_bytes(jpeg(60 * shade))
    (folder / "clip.mp4").write_bytes(mp4(frames=8))
    kinds = [("text", None), ("image", "0.jpg"), ("image", "missing.jpg"), ("image", "3.jpg"), ("video", "clip.mp4")]
    write_rows(folder, [row(number, *kinds[number % len(kinds)]) for number in range(rows)])


def preparation(root, check="decode", rows_per_shard=4, held_out=0.0, **media):
    return Preparation(Dataset("mine", root, ("rows.json",)), MediaSettings(check, **media), rows_per_shard, held_out)


def prepared(root, out, processes=1, **settings):
    """What `prepare` returns."""
    return prepare(preparation(root, **settings), out, LocalProcesses(processes), shown=False)


def contents(folder):
    """The checksum of each file that a preparation leaves."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".prepare.lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder):
    """The members of each sample in a folder's shards."""
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def rejects(folder):
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
