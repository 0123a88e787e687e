"""WebDataset shards on disk: the manifest, random access to single samples, and the order of an epoch."""

from __future__ import annotations

import json
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from vllava.errors import UserError


@dataclass(frozen=True)
class Shard:
    """One tar file and its number of samples."""

    path: Path
    samples: int


def read_manifest(folder: str | Path, remedy: str) -> list[Shard]:
    """The shards of a folder; raises UserError, which ends with `remedy`, where shards or manifest are missing."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"No shards at {folder}: {path} does not exist. {remedy}")
    try:
        entries = json.loads(path.read_text())["shards"]
        shards = [Shard(folder / entry["name"], int(entry["samples"])) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a shard manifest ({error!r}). {remedy}") from error
    if not any(shard.samples for shard in shards):
        raise UserError(f"{path} lists no samples. {remedy}")
    for shard in shards:
        if not shard.path.is_file():
            raise UserError(f"{shard.path} is listed in {path} but does not exist. {remedy}")
    return shards


def epoch_order(shards: list[Shard], seed: int, epoch: int, window: int) -> np.ndarray:
    """The order in which an epoch visits samples [sum of samples, 2]: rows of (shard index, index in the shard).

    Shards are shuffled, taken `window` at a time, and the samples of a window are shuffled together: every
    sample comes exactly once, a batch mixes the sources, and only `window` shards are being read at any time.
    The order depends on nothing but the arguments, so it is the same for any number of workers and ranks.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(shards))
    parts = []
    for start in range(0, len(shards), window):
        chosen = shuffled[start : start + window]
        counts = [shards[i].samples for i in chosen]
        rows = np.stack([np.repeat(chosen, counts), np.concatenate([np.arange(count) for count in counts])], axis=1)
        parts.append(rng.permutation(rows))
    return np.concatenate(parts)


class ShardReader:
    """Reads single samples out of tar shards; keeps the `capacity` shards used last open.

    Members are read by offset and never unpickled, and no shard name reaches a shell.
    """

    def __init__(self, shards: list[Shard], capacity: int) -> None:
        self.shards = shards
        self.capacity = capacity
        self._open: OrderedDict[int, tuple] = OrderedDict()

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """The key of a sample and its members by extension (what follows the key and a dot)."""
        file, samples = self._shard(shard)
        key, members = samples[index]
        content = {}
        for extension, (offset, size) in members.items():
            file.seek(offset)
            content[extension] = file.read(size)
        return key, content

    def _shard(self, shard: int) -> tuple:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = self._scan(self.shards[shard])
            if len(self._open) > self.capacity:
                self._open.popitem(last=False)[1][0].close()
        return self._open[shard]

    @staticmethod
    def _scan(shard: Shard) -> tuple:
        """Open a shard and list its samples from the tar headers alone."""
        samples: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        try:
            with tarfile.open(shard.path, "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name)
                    if member.isfile() and key is not None:
                        samples.setdefault(key, {})[extension] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{shard.path} cannot be read as a tar file ({error}). Make this shard again.") from error
        if len(samples) != shard.samples:
            raise UserError(
                f"{shard.path} holds {len(samples)} samples, its manifest says {shard.samples}. Make this shard again."
            )
        return open(shard.path, "rb"), list(samples.items())

    def __getstate__(self) -> dict:
        return {"shards": self.shards, "capacity": self.capacity, "_open": OrderedDict()}  # open files do not travel
