"""The data stream: shards in, one rank's share of each global batch out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vllava.batch import Step
from vllava.data.broken import trace, why
from vllava.data.order import epoch_order
from vllava.data.samples import Sample
from vllava.data.shards import Shard, ShardReader, read_sources
from vllava.errors import UserError

Decoder = Callable[[str, dict[str, bytes]], Sample]  # a key and its members by extension, to a sample


class Assembler(Protocol):
    """How samples become batches: `prepare` one sample (in a worker), `collate` what was prepared."""

    def prepare(self, sample: Sample) -> Any: ...

    def collate(self, samples: list) -> list: ...


class ShardDataset(Dataset):
    """Maps a list of (shard, index) rows to a Step; a broken sample is reported in it, never replaced.

    Whatever goes wrong with one sample makes it a broken one. A shard that cannot be read as a whole raises UserError:
    it is more than one sample, and nobody knows which.
    """

    def __init__(self, shards: list[Shard], decode: Decoder, assembler: Assembler, open_shards: int) -> None:
        self.reader = ShardReader(shards, open_shards)
        self.decode = decode
        self.assembler = assembler

    def __getitem__(self, rows: np.ndarray) -> Step:
        prepared = []
        step = Step([], samples=len(rows))
        for shard, index in rows.tolist():
            key = f"{self.reader.shards[shard].path}:{self.reader.key(shard, index)}"
            try:
                sample = self.decode(*self.reader.read(shard, index))
                prepared.append(self.assembler.prepare(sample))
                step.dropped_turns += sample.dropped_turns
            except Exception as error:  # of a stranger's sample: memory and recursion errors among them
                step.broken.append((key, why(error)))
                if text := trace(error):
                    step.tracebacks[key] = text
        if prepared:
            step.micro_batches = self.assembler.collate(prepared)
        return step


class GlobalBatchSampler(Sampler):
    """Yields this rank's rows of each global batch of an epoch, from where `position`, (epoch, batch), says.

    The last batch of an epoch is smaller when the samples do not fill it: none is dropped, none repeated.
    """

    def __init__(self, shards: list[Shard], batch: int, seed: int, window: int, rank: int = 0, ranks: int = 1) -> None:
        self.shards, self.batch, self.seed, self.window = shards, batch, seed, window
        self.rank, self.ranks = rank, ranks
        self.position: Callable[[], tuple[int, int]] = lambda: (0, 0)  # asked when an epoch begins

    def __len__(self) -> int:
        return -(-sum(shard.samples for shard in self.shards) // self.batch)

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, start = self.position()
        order = epoch_order(self.shards, self.seed, epoch, self.window)
        for first in range(start * self.batch, len(order), self.batch):
            yield order[first : first + self.batch][self.rank :: self.ranks]


class DataModule(L.LightningDataModule):
    """Streams the training shards of several sources, mixed, each sample once per epoch. No shard may be named twice.

    sources: folders of shards; remedy: the sentence that ends a missing-shards error;
    global_batch: samples per optimiser step, over all devices; workers: loader processes (-1: cores - 1, at most 8);
    shuffle_window: shards mixed at a time; wants_features: whether what encoders make of the media is to be read
    instead of the media, see vllava.features.
    """

    def __init__(
        self,
        sources: list[str],
        decode: Decoder,
        assembler: Assembler,
        global_batch: int,
        seed: int,
        remedy: str = "",
        workers: int = -1,
        shuffle_window: int = 64,
        wants_features: bool = False,
    ) -> None:
        super().__init__()
        if not sources:
            raise UserError("data.sources is empty: name at least one folder of shards.")
        self.sources, self.remedy = sources, remedy
        self.shards = read_sources(sources, remedy)
        self.decode, self.assembler = decode, assembler
        self.wants_features = wants_features
        self.global_batch, self.seed, self.shuffle_window = global_batch, seed, shuffle_window
        self.workers = min(max((os.cpu_count() or 2) - 1, 1), 8) if workers < 0 else workers
        self.samples = sum(shard.samples for shard in self.shards)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch)

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        return batch.to(device, non_blocking=True)  # from pinned memory, while the device still computes

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = GlobalBatchSampler(self.shards, self.global_batch, self.seed, self.shuffle_window, rank, ranks)
        if trainer:  # a resumed run goes on with the next unseen sample
            sampler.position = lambda: divmod(trainer.global_step, self.steps_per_epoch)
        return DataLoader(
            ShardDataset(self.shards, self.decode, self.assembler, open_shards=2 * self.shuffle_window),
            batch_size=None,  # the sampler yields whole batches
            sampler=sampler,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )


def _start_worker(_: int) -> None:
    """One thread each; and Ctrl-C, which reaches all processes of a terminal, is the main process's to answer."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
