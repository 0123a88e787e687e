"""Encoder outputs, computed once: the same samples in the same order, with features where their media were.

Encoders are frozen and nothing is augmented, so what they give for a medium never changes. It is written beside the
shards it was made from, in FOLDER/features/KEY; the key stands for the shards, the encoders, the preprocessing and the
precision. Repeated epochs and the runs of a sweep then need neither decoder nor encoder: systems that share an encoder
share what it made. Processes that need the same features at once share the shards out among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vllava.data.broken import why
from vllava.data.datamodule import DataModule
from vllava.data.record import FEATURES
from vllava.data.samples import BROKEN, Sample, SampleDecoder
from vllava.data.shards import MANIFEST, Shard, ShardReader, read_manifest, read_sources
from vllava.data.writing import write_json, write_manifest, write_tar
from vllava.errors import UserError
from vllava.folders import sha256_of
from vllava.model.device import best_device
from vllava.model.video_llava import VideoLlava

GB = 1e9
LOCK = ".lock"  # of who encodes a shard; none is left when all are done
_PAUSE = 0.2  # seconds between two looks at a shard that another process encodes
AT_ONCE = 16  # samples whose media are encoded together
FORMAT = 2  # of what is written, or of how media are read before: another number, and all is encoded anew


def use_features(data: DataModule, model: VideoLlava, encoders: dict[str, Any], half: bool) -> None:
    """Let a data module read features instead of media, after writing those that are missing.

    encoders: their settings by medium; half: the run computes in bfloat16. Where they would take more than the data
    module allows, with all that lie beside its sources already, it reads media: a batch cannot hold both. Raises
    UserError where features cannot be written.
    """
    assert isinstance(data.decode, SampleDecoder)
    writer = FeatureWriter(model, data.decode, encoders, half, data.workers)
    folders = writer.write_all([Path(folder) for folder in data.sources], data.remedy, data.features_gigabytes)
    if folders is not None:
        data.shards = read_sources(folders, "Delete features/ there, and the next run writes them anew.")


@dataclass(frozen=True)
class FeatureWriter:
    """Encodes the media of shards with a model's encoders; `half` in bfloat16, as a run in mixed precision does."""

    model: VideoLlava
    decode: SampleDecoder
    encoders: dict[str, Any]  # settings by medium
    half: bool
    workers: int = 0

    def folder(self, source: Path, remedy: str = "") -> Path:
        """Where the features of a folder of shards belong; the folder itself if there is nothing to encode.

        Its name stands for the manifest, and for the sizes and times of the shards: one that was rewritten without its
        manifest is encoded anew. So is a copy that does not keep times.
        """
        shards = read_manifest(source, remedy)
        kinds = self._kinds(source)
        if not kinds:
            return source
        made_by = {
            "format": FORMAT,
            "manifest": sha256_of(source / MANIFEST),
            "shards": [_state(Path(str(shard.path))) for shard in shards],
            "encoders": {kind: self._identity(kind) for kind in sorted(kinds)},
            "preprocessing": asdict(self.decode.preprocess),
            "decoder": self.decode.video_decoder.identity,
            "dtype": str(self._dtype),
        }
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        return source / "features" / key

    def _kinds(self, source: Path) -> set[str]:
        """The media that the manifest's shards hold, as far as it says; otherwise all that the model takes."""
        entries = json.loads((source / MANIFEST).read_text())["shards"]
        counts = [entry.get("modalities") for entry in entries]
        said = {kind for count in counts if isinstance(count, dict) for kind in count} - {"text"}
        known = all(isinstance(count, dict) for count in counts) and said <= set(self.model.encoders)
        return said if known else set(self.model.encoders)

    def _identity(self, kind: str) -> dict[str, Any]:
        settings = {name: value for name, value in self.encoders[kind].items() if name != "path"}
        return {**settings, "spec": asdict(self.decode.specs[kind]), "sha256": self.model.encoder(kind).sha256}

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def bytes_missing(self, source: Path, remedy: str) -> int:
        """About how many bytes of features are still to be written for a folder of shards."""
        folder = self.folder(source, remedy)
        if folder == source or (folder / MANIFEST).is_file():
            return 0
        entries = json.loads((source / MANIFEST).read_text())["shards"]
        sizes = {
            kind: spec.tokens * self.model.encoder(kind).hidden_size * self._dtype.itemsize
            for kind, spec in self.decode.specs.items()
        }
        most = max(sizes.values(), default=0)  # of a sample whose media the manifest does not tell
        found = 0
        for entry in entries:
            told = entry.get("modalities")
            if isinstance(told, dict):
                found += sum(sizes.get(kind, 0) * count for kind, count in told.items())
            else:
                found += most * entry["samples"]
        return max(0, found - bytes_in(folder))

    def write_all(self, sources: Sequence[Path], remedy: str, gigabytes: float | None) -> list[Path] | None:
        """The folders of the features of these folders of shards, written where they are missing.

        None, and it is said why, where they would take more than `gigabytes` with all that lie beside them already.
        """
        held = sum(map(bytes_beside, sources))
        more = sum(self.bytes_missing(source, remedy) for source in sources)
        if gigabytes is not None and more and held + more > gigabytes * GB:
            print(
                f"Media are encoded at every step: their features ({more / GB:.3g} GB) do not fit into "
                f"data.features_gigabytes={gigabytes:g}, of which {held / GB:.3g} are taken by what lies in features/ "
                "beside the shards already. What no run needs any more can be deleted there.",
                flush=True,
            )
            return None
        return [self.write(source, remedy) for source in sources]

    def write(self, source: Path, remedy: str) -> Path:
        """Write the features of a folder of shards where they are missing; returns their folder.

        Several processes may do so at once: each takes the shards that no other has finished or is at work on. Raises
        UserError if the folder cannot be written.
        """
        folder = self.folder(source, remedy)
        if folder == source or (folder / MANIFEST).is_file():
            return folder
        shards, kinds = read_manifest(source, remedy), self._kinds(source)
        self.model.encoders.to(device_of_this_process())
        print(f"encoding the media of {source}, once, to {folder}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = self._entries(shards, folder, kinds)
            write_manifest(folder, entries, {"features_of": str(source), "encoders": self.encoders})
        except OSError as error:
            raise UserError(
                f"Features cannot be written to {folder} ({error}). Make the folder writable, or choose "
                "data.features=online."
            ) from error
        for lock in folder.glob(f"*{LOCK}"):
            lock.unlink(missing_ok=True)
        return folder

    def _entries(self, shards: list[Shard], folder: Path, kinds: set[str]) -> list[dict]:
        """The manifest entries of all shards, of which those are encoded here that no other process is at work on."""
        entries: dict[int, dict] = {}
        while len(entries) < len(shards):
            before = len(entries)
            for number, shard in enumerate(shards):
                path = folder / f"{number:05d}.tar"
                with _free(path.with_suffix(LOCK)) as free:
                    if number not in entries and free:
                        entries[number] = self._entry(shard, path, kinds)
            if len(entries) == before:
                time.sleep(_PAUSE)
        return [entries[number] for number in range(len(shards))]

    def _entry(self, shard: Shard, path: Path, kinds: set[str]) -> dict:
        """The manifest entry of one shard of features, which is written if it does not lie there whole.

        Shards of features are numbered as the manifest lists their sources, of which two in different folders may have
        one name.
        """
        kept = path.with_suffix(".json")
        try:
            entry = json.loads(kept.read_text())
            if entry["name"] == path.name and entry["bytes"] == path.stat().st_size:
                return entry
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not there, or not whole
        entry = write_tar(path, self._encoded(shard, kinds))
        write_json(kept, entry)
        return entry

    def _encoded(self, shard: Shard, kinds: set[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of a shard, their media replaced."""
        broken = 0
        loader: DataLoader = DataLoader(
            _Decoded(shard, self.decode), batch_size=AT_ONCE, collate_fn=list, num_workers=self.workers
        )
        for rows in loader:
            samples = [sample for _, _, sample in rows if isinstance(sample, Sample)]
            found = {medium.kind for sample in samples for medium in sample.media}
            if not found <= kinds:
                raise UserError(
                    f"{shard.path} holds media of kind {', '.join(sorted(found - kinds))}, which its manifest does not "
                    "list under modalities. Write the manifest again, or choose data.features=online."
                )
            features = self._features(samples)
            for key, record, sample in rows:
                if isinstance(sample, str):
                    broken += 1
                    yield key, {**record, BROKEN: sample.encode()}
                    continue
                media = {
                    f"{number}.{medium.kind}.{FEATURES}": safetensors.torch.save(
                        {"features": next(features[medium.kind])}
                    )
                    for number, medium in enumerate(sample.media)
                }
                yield key, {**record, **media}
        if broken:
            print(f"{shard.path}: {broken} of {shard.samples} samples are broken, and kept as such", flush=True)

    @torch.no_grad()
    def _features(self, samples: list[Sample]) -> dict[str, Iterator[Tensor]]:
        """By medium, the features [P, E] of all media of these samples, in order."""
        given = {}
        for kind in self.model.encoders:
            pixels = [medium.pixels for sample in samples for medium in sample.media if medium.kind == kind]
            if pixels:
                device = next(self.model.encoders.parameters()).device
                with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
                    encoded = self.model.features(kind, torch.stack(pixels).to(device))
                given[kind] = iter(encoded.to("cpu", self._dtype).contiguous().unbind())
        return given


@contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether a lock could be taken, without waiting; it is held inside. True as well where there are no locks."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except NotImplementedError:  # a network folder without them
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


def bytes_in(folder: Path) -> int:
    """The bytes of all files of a folder; 0 for one that is not there."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            found += path.stat().st_size if path.is_file() else 0
    return found


def bytes_beside(source: Path) -> int:
    """The bytes of the features beside a folder of shards, of all encoders."""
    return bytes_in(source / "features")


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


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
        key = self.reader.key(0, index)
        record: dict[str, bytes] = {}
        try:
            members = self.reader.read(0, index)[1]
            record = {"json": members["json"]} if "json" in members else {}
            return key, record, self.decode(key, members)
        except Exception as error:  # whatever is wrong with a stranger's sample
            return key, record, why(error)
