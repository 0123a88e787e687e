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


def write_shard(path: Path, samples: Iterable[tuple[str, dict, list[tuple[str, bytes]]]]) -> dict:
    """Write one tar shard and return its manifest entry.

    `samples` yields (key, record, media); a medium is (extension, bytes), in placeholder order. Members
    carry no time and no owner, so equal samples give equal bytes. The file appears whole or not at all.
    """
    unfinished = path.with_suffix(".part")
    kinds: Counter[str] = Counter()
    count = 0
    with webdataset.TarWriter(str(unfinished), encoder=False, mtime=0, user="vllava", group="vllava") as tar:
        for key, record, media in samples:
            members = {f"{i}.{extension}": data for i, (extension, data) in enumerate(media)}
            tar.write({"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode(), **members})
            kinds[modality(record)] += 1
            count += 1
    os.replace(unfinished, path)
    data = path.read_bytes()
    return {
        "name": path.name,
        "samples": count,
        "modalities": dict(sorted(kinds.items())),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def modality(record: dict) -> str:
    """'image', 'video', 'mixed' or 'text', by the placeholders in the record's conversation."""
    text = " ".join(message["value"] for message in record["conversations"])
    found = [kind for kind, placeholder in PLACEHOLDERS.items() if placeholder in text]
    return {0: "text", 1: found[0] if found else "text"}.get(len(found), "mixed")


def write_manifest(folder: Path, shards: list[dict], settings: dict) -> None:
    """Write the folder's manifest: its shards, and the settings of the preparation that made them."""
    text = json.dumps({"version": 1, "settings": settings, "shards": shards}, indent=1)
    unfinished = folder / (MANIFEST + ".part")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, folder / MANIFEST)
