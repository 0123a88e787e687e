"""Write samples into WebDataset tar shards with a manifest beside them. The format: data_prep/README.md."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import webdataset

MANIFEST = "manifest.json"
PLACEHOLDERS = {"image": "<image>", "video": "<video>"}


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict:
    """Write one shard from (key, members by extension) and return its manifest entry.

    Members carry no time and no owner, so equal samples give equal bytes. The file appears whole or not at all.
    """
    unfinished = path.with_suffix(f".{os.getpid()}.part")  # several processes may write the same shard
    kinds: Counter[str] = Counter()
    with webdataset.TarWriter(str(unfinished), encoder=False, mtime=0, user="vllava", group="vllava") as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
            kinds[_modality(members)] += 1
    os.replace(unfinished, path)
    return {
        "name": path.name,
        "samples": sum(kinds.values()),
        "modalities": dict(sorted(kinds.items())),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }


def sha256_of(path: Path) -> str:
    """The checksum of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def modality(record: dict) -> str:
    """'image', 'video', 'mixed' or 'text', by the placeholders in the record's conversation."""
    text = " ".join(message["value"] for message in record["conversations"])
    found = [kind for kind, placeholder in PLACEHOLDERS.items() if placeholder in text]
    return {0: "text", 1: found[0] if found else "text"}.get(len(found), "mixed")


def _modality(members: dict[str, bytes]) -> str:
    try:
        return modality(json.loads(members["json"]))
    except (KeyError, TypeError, ValueError):
        return "unreadable"


def write_manifest(folder: Path, shards: list[dict], settings: dict) -> None:
    """Write the folder's manifest: its shards, and the settings of the preparation that made them."""
    write_json(folder / MANIFEST, {"version": 1, "settings": settings, "shards": shards})


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that appears whole or not at all."""
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)
