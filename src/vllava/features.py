"""Encoder outputs, computed once: the same samples in the same order, with features where their media were.

Encoders are frozen and nothing is augmented, so what they give for a medium never changes. It is written beside the
shards it was made from, in FOLDER/features/KEY; the key stands for the shards, the encoders, the preprocessing and the
precision. Repeated epochs and the runs of a sweep then need neither decoder nor encoder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vllava.data.datamodule import DataModule
from vllava.data.samples import BROKEN, FEATURES, Sample, SampleDecoder
from vllava.data.shards import Shard, ShardReader, read_manifest
from vllava.data.writing import MANIFEST, sha256_of, write_json, write_manifest, write_tar
from vllava.errors import UserError
from vllava.model.device import best_device
from vllava.model.video_llava import VideoLlava

AT_ONCE = 16  # samples whose media are encoded together


def use_features(data: DataModule, model: VideoLlava, encoders: dict[str, Any], half: bool) -> None:
    """Let a data module read features instead of media, after writing those that are missing.

    encoders: their settings by medium; half: the run computes in bfloat16. Raises UserError where features cannot
    be written.
    """
    assert isinstance(data.decode, SampleDecoder)
    writer = FeatureWriter(model, data.decode, encoders, half, data.workers)
    data.shards = [
        shard
        for folder in data.sources
        for shard in read_manifest(writer.write(Path(folder), data.remedy), data.remedy)
    ]


@dataclass(frozen=True)
class FeatureWriter:
    """Encodes the media of shards with a model's encoders; `half` in bfloat16, as a run in mixed precision does."""

    model: VideoLlava
    decode: SampleDecoder
    encoders: dict[str, Any]  # settings by medium
    half: bool
    workers: int = 0

    def folder(self, source: Path) -> Path:
        """Where the features of a folder of shards belong; the folder itself if there is nothing to encode."""
        manifest = json.loads((source / MANIFEST).read_text())
        held = {kind for shard in manifest["shards"] for kind in shard.get("modalities", {"mixed": 1})}
        if held <= {"text"}:
            return source
        kinds = held if held <= set(self.model.encoders) else set(self.model.encoders)
        made_by = {
            "shards": sha256_of(source / MANIFEST),
            "encoders": {kind: self._identity(kind) for kind in sorted(kinds)},
            "preprocessing": asdict(self.decode.preprocess),
            "decoder": type(self.decode.video_decoder).__name__,
            "dtype": str(self._dtype),
        }
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        return source / "features" / key

    def _identity(self, kind: str) -> dict[str, Any]:
        settings = {name: value for name, value in self.encoders[kind].items() if name != "path"}
        return {**settings, "sha256": self.model.encoder(kind).sha256}

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def write(self, source: Path, remedy: str) -> Path:
        """Write the features of a folder of shards where they are missing; returns their folder.

        Several processes may do so at once: each skips the shards that another one has finished. Raises UserError
        if the folder cannot be written.
        """
        folder = self.folder(source)
        if folder == source or (folder / MANIFEST).is_file():
            return folder
        shards = read_manifest(source, remedy)
        self.model.encoders.to(device_of_this_process())
        print(f"encoding the media of {source}, once, to {folder}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = [self._entry(shard, folder) for shard in shards]
            write_manifest(folder, entries, {"features_of": str(source), "encoders": self.encoders})
        except OSError as error:
            raise UserError(
                f"Features cannot be written to {folder} ({error}). Make the folder writable, or choose "
                "data.features=online."
            ) from error
        return folder

    def _entry(self, shard: Shard, folder: Path) -> dict:
        """The manifest entry of one shard of features, which is written if it does not exist."""
        path = folder / shard.path.name
        entry = path.with_suffix(".json")
        if not entry.is_file():
            write_json(entry, write_tar(path, self._encoded(shard)))
        return json.loads(entry.read_text())

    def _encoded(self, shard: Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a shard, their media replaced."""
        loader: DataLoader = DataLoader(
            _Decoded(shard, self.decode), batch_size=AT_ONCE, collate_fn=list, num_workers=self.workers
        )
        for rows in loader:
            features = self._features([sample for _, _, sample in rows if isinstance(sample, Sample)])
            for key, record, sample in rows:
                if isinstance(sample, str):
                    yield key, {**record, BROKEN: sample.encode()}
                    continue
                media = {
                    f"{number}.{medium.kind}{FEATURES}": safetensors.torch.save(
                        {"features": next(features[medium.kind])}
                    )
                    for number, medium in enumerate(sample.media)
                }
                yield key, {**record, **media}

    @torch.no_grad()
    def _features(self, samples: list[Sample]) -> dict[str, Iterator[Tensor]]:
        """By medium, the features [P, E] of all media of these samples, in order."""
        given = {}
        for kind in self.model.encoders:
            pixels = [medium.pixels for sample in samples for medium in sample.media if medium.kind == kind]
            if pixels:
                device = next(self.model.encoders.parameters()).device
                with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
                    encoded = self.model.encoders[kind](torch.stack(pixels).to(device))
                given[kind] = iter(encoded.to("cpu", self._dtype).contiguous().unbind())
        return given


def device_of_this_process() -> torch.device:
    """A GPU of its own for each process of a machine, where there are any."""
    device = best_device()
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0))) if device.type == "cuda" else device


class _Decoded(Dataset):
    """The samples of one shard: key, record, and the decoded sample or the reason why there is none."""

    def __init__(self, shard: Shard, decode: SampleDecoder) -> None:
        self.reader = ShardReader([shard], capacity=1)
        self.decode = decode

    def __len__(self) -> int:
        return self.reader.shards[0].samples

    def __getitem__(self, index: int) -> tuple[str, dict[str, bytes], Sample | str]:
        key, members = self.reader.read(0, index)
        record = {"json": members["json"]} if "json" in members else {}
        try:
            return key, record, self.decode(key, members)
        except UserError as error:
            return key, record, str(error)
