"""The data stream: shards in, one rank's share of each global batch out."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vllava.batch import Step
from vllava.checks import Count, Range, Seed
from vllava.cores import cores
from vllava.data.broken import trace, why
from vllava.data.deal import Deal, every_nth
from vllava.data.mixture import Portion, draws
from vllava.data.order import epoch_order
from vllava.data.patience import Remote, RemoteUserError
from vllava.data.samples import Sample
from vllava.data.shards import Shard, ShardReader, read_sources
from vllava.errors import UserError

Workers = Annotated[int, Range(-1, 256)]
Decoder = Callable[[str, dict[str, bytes]], Sample]  # a key and its members by extension, to a sample


class Assembler(Protocol):
    """How samples become batches: `prepare` one sample (in a worker), `collate` what was prepared.

    `deal` says how a global batch [samples, 2] of the shards is shared out: to each rank pieces, which a worker
    prepares one at a time.
    """

    def prepare(self, sample: Sample) -> Any: ...

    def collate(self, samples: list) -> list: ...

    def deal(self, shards: list[Shard]) -> Deal: ...


class Piece(NamedTuple):
    """Rows (shard, index) that a worker prepares together, and whether more of the same step follow."""

    rows: np.ndarray
    more: bool = False


class ShardDataset(Dataset):
    """Maps a piece to a part of a Step; a broken sample is reported in it, never replaced.

    Whatever goes wrong with one sample makes it a broken one. A shard that cannot be read as a whole raises UserError:
    it is more than one sample, and nobody knows which.
    """

    def __init__(self, shards: list[Shard], decode: Decoder, assembler: Assembler, open_shards: int) -> None:
        self.reader = ShardReader(shards, open_shards)
        self.decode = decode
        self.assembler = assembler

    def __getitem__(self, piece: Piece) -> Step:
        prepared = []
        step = Step([], samples=len(piece.rows), more=piece.more)
        for shard, index in piece.rows.tolist():
            key = f"{self.reader.shards[shard].path}:{self.reader.key(shard, index)}"
            try:
                sample = self.decode(*self.reader.read(shard, index))
                prepared.append(self.assembler.prepare(sample))
                step.keys.append(key)
                step.dropped_turns += sample.dropped_turns
            except RemoteUserError:  # of a server, not of the sample
                raise
            except Exception as error:  # of a stranger's sample: memory and recursion errors among them
                step.broken.append((key, why(error)))
                if text := trace(error):
                    step.tracebacks[key] = text
        step.drawn = dict(Counter(self.reader.shards[shard].source for shard in piece.rows[:, 0].tolist()))
        if prepared:
            step.micro_batches = self.assembler.collate(prepared)
        return step


class GlobalBatchSampler(Sampler):
    """Yields this rank's pieces of each global batch of an epoch, from where `position`, (epoch, batch), says.

    The last batch of an epoch is smaller when the samples do not fill it: none is dropped, none repeated. A rank has at
    least one piece of each batch, an empty one if need be.
    """

    def __init__(
        self,
        shards: list[Shard],
        batch: int,
        seed: int,
        window: int,
        rank: int = 0,
        ranks: int = 1,
        deal: Deal | None = None,
        draws: Sequence[int] | None = None,
    ) -> None:
        self.shards, self.batch, self.seed, self.window = shards, batch, seed, window
        self.rank, self.ranks = rank, ranks
        self.deal, self.draws = deal or every_nth, draws
        self.samples = sum(shard.samples for shard in shards) if draws is None else sum(draws)
        self.position: Callable[[], tuple[int, int]] = lambda: (0, 0)  # asked when an epoch begins

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return -(-self.samples // self.batch)

    def __iter__(self) -> Iterator[Piece]:
        epoch, start = self.position()
        order = epoch_order(self.shards, self.seed, epoch, self.window, self.draws)
        for first in range(start * self.batch, len(order), self.batch):
            pieces = [rows for rows in self.deal(order[first : first + self.batch], self.ranks)[self.rank] if len(rows)]
            for number, rows in enumerate(pieces or [order[:0]], 1):
                yield Piece(rows, more=number < len(pieces))


class StepLoader:
    """The steps of an epoch, put together from the pieces that workers prepare.

    What comes from a worker lies in memory it shares with this process, of which containers have little: it is copied
    at once, into pinned memory where there is a GPU.
    """

    def __init__(self, dataset: ShardDataset, sampler: GlobalBatchSampler, workers: int) -> None:
        self.sampler = sampler
        self.pieces: DataLoader = DataLoader(
            dataset,
            batch_size=None,  # the sampler yields whole pieces
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            persistent_workers=workers > 0,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Step]:
        parts: list[Step] = []
        for part in self.pieces:
            shared = self.pieces.num_workers and not self.pieces.pin_memory
            parts.append(part.clone() if shared else part)
            if not part.more:
                yield Step.joined(parts)
                parts = []


class DataModule(L.LightningDataModule):
    """Streams the training shards of several sources, mixed, each sample once per epoch. No shard may be named twice.

    sources: folders of shards; remedy: the sentence that ends a missing-shards error;
    global_batch: samples per optimiser step, over all devices; workers: loader processes (-1: cores - 1, at most 8);
    shuffle_window: shards mixed at a time; wants_features: whether what encoders make of the media is to be read
    instead of the media, see vllava.features; portions: how much of each source an epoch holds, if not all of it once;
    remote: how folders on servers are read; features_gigabytes: that features may take beside all sources.
    """

    def __init__(
        self,
        sources: list[str],
        decode: Decoder,
        assembler: Assembler,
        global_batch: Count,
        seed: Seed,
        remedy: str = "",
        workers: Workers = -1,
        shuffle_window: Count = 64,
        wants_features: bool = False,
        portions: Sequence[Portion] | None = None,
        remote: Remote | None = None,
        features_gigabytes: float | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise UserError("data.sources is empty: name at least one folder of shards.")
        self.sources, self.remedy = sources, remedy
        self.shards = read_sources(sources, remedy, remote)
        self.decode, self.assembler = decode, assembler
        self.wants_features, self.features_gigabytes = wants_features, features_gigabytes
        self.global_batch, self.seed, self.shuffle_window = global_batch, seed, shuffle_window
        self.workers = min(max(cores() - 1, 1), 8) if workers < 0 else workers
        self.sizes = [0] * len(sources)
        for shard in self.shards:
            self.sizes[shard.source] += shard.samples
        self.draws = draws(portions or [Portion()] * len(sources), self.sizes)
        self.samples = sum(self.draws)  # of an epoch

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch: of all samples, or as many as the Trainer's limit_train_batches lets it have."""
        steps = -(-self.samples // self.global_batch)
        limit = self.trainer.limit_train_batches if self.trainer else 1.0  # overfit_batches and fast_dev_run set it too
        limited = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        if limited < 1:
            raise UserError(f"trainer.limit_train_batches={limit:g} leaves none of the {steps} steps of an epoch.")
        return limited

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch of `steps_per_epoch` steps has."""
        return min(self.samples, self.steps_per_epoch * self.global_batch)

    def transfer_batch_to_device(self, batch: Step, device: torch.device, dataloader_idx: int) -> Step:
        return batch  # the task moves a micro-batch at a time

    def train_dataloader(self) -> StepLoader:
        trainer = self.trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        deal = self.assembler.deal(self.shards)
        sampler = GlobalBatchSampler(
            self.shards, self.global_batch, self.seed, self.shuffle_window, rank, ranks, deal, self.draws
        )
        if trainer:  # a resumed run goes on with the next unseen sample
            sampler.position = lambda: self._position(trainer)
        dataset = ShardDataset(self.shards, self.decode, self.assembler, open_shards=2 * self.shuffle_window)
        return StepLoader(dataset, sampler, self.workers)

    def _position(self, trainer: L.Trainer) -> tuple[int, int]:
        """The epoch and the batch in it that come next; with overfit_batches every epoch is the first one again."""
        epoch, batch = divmod(trainer.global_step, self.steps_per_epoch)
        return (0 if getattr(trainer, "overfit_batches", 0) else epoch, batch)


def start_worker(_: int) -> None:
    """One thread each; and signals to stop, which may reach all processes, are the main process's to answer."""
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)  # the main process's, if it was forked
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_for, args=(os.getppid(),), daemon=True).start()


def _end_for(parent: int) -> None:
    """End this process at a SIGTERM that its parent sends, which is how Python ends its processes, and at no other."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
