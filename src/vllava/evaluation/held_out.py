"""Held-out samples in packed rows, for the loss that a run watches while it trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vllava.batch import MEDIA_KINDS, Batch, MediumSpec
from vllava.data.broken import why
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.packing import PackedSample
from vllava.data.patience import Remote, RemoteUserError
from vllava.data.shards import ShardReader, read_sources
from vllava.errors import UserError

log = logging.getLogger(__name__)

MEDIA = (*MEDIA_KINDS, "text")  # of a sample: its first one, or none


class HeldOutRows:
    """Up to `samples` samples of each source, evenly spread over it, in rows as those of the training.

    sources: modality -> name -> folder of shards; settings: the run's resolved configuration; remedy: the sentence that
    ends a missing-shards error. Which samples lie in a row does not depend on the number of ranks. A rank decodes its
    own rows and keeps them, pixels as bytes. Raises UserError where there are no shards.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, str]],
        specs: dict[str, MediumSpec],
        tokenizer: Any,
        settings: Any,
        samples: int,
        remedy: str = "",
    ) -> None:
        if type(samples) is not int or samples < 1:
            raise UserError(f"validation.samples={samples!r} is not a number of samples: a whole number from 1 on.")
        data = settings["data"]
        self.decode = sample_decoder(specs, data["image_fit"], data["decoder"], data.get("frame_sampling", "index"))
        self.packer = conversation_packer(
            specs, tokenizer, data["template"], data["max_length"], data["token_budget"], data.get("template_options")
        )
        names = short_names({folder: name for named in sources.values() for name, folder in named.items()})
        self.shards = read_sources(list(names), remedy, Remote.of(data.get("cache")))
        self.reader = ShardReader(self.shards, capacity=4)
        deal = self.packer.deal(self.shards)
        self.media = [medium for medium in MEDIA if medium in specs or medium == "text"]
        self.pieces: list[np.ndarray] = []  # places (shard, index) of samples that are packed together
        self.cells: list[tuple[str, str]] = []  # (source, medium) of samples whose losses are added up together
        for number, source in enumerate(names.values()):
            dealt = [piece for piece in deal(self._chosen(number, samples), 1)[0] if len(piece)]
            self.pieces += dealt
            self.cells += [(source, medium) for _ in dealt for medium in self.media]

    def _chosen(self, source: int, samples: int) -> np.ndarray:
        """Places [samples, 2] of a source's samples, evenly spread."""
        places = [
            (number, index)
            for number, shard in enumerate(self.shards)
            if shard.source == source
            for index in range(shard.samples)
        ]
        return np.array(places)[np.linspace(0, len(places) - 1, min(samples, len(places))).astype(int)]

    def share(self, rank: int, ranks: int) -> list[tuple[int, Batch]]:
        """The rows of a rank, each with the number of its cell.

        A sample that cannot be trained on is named and left out; raises UserError where none of a rank's are left.
        """
        rows: list[tuple[int, Batch]] = []
        mine = range(rank, len(self.pieces), ranks)
        for number in mine:
            prepared: dict[str, list[PackedSample]] = {}
            for shard, index in self.pieces[number].tolist():
                if found := self._prepared(shard, index):
                    prepared.setdefault(found.media[0].kind if found.media else "text", []).append(found)
            for medium, listed in prepared.items():
                cell = number * len(self.media) + self.media.index(medium)
                rows += [(cell, batch) for batch in self.packer.collate(listed)]
        if len(mine) and not rows:
            raise UserError(
                "None of the held-out samples can be used for validation (see above): they need an answer, and no more "
                "tokens than data.max_length."
            )
        return rows

    def _prepared(self, shard: int, index: int) -> PackedSample | None:
        key = f"{self.shards[shard].path}:{self.reader.key(shard, index)}"
        try:
            return self.packer.prepare(self.decode(*self.reader.read(shard, index)))
        except RemoteUserError:  # of a server, not of the sample
            raise
        except Exception as error:  # of a stranger's sample
            log.warning("held-out sample left out of the validation: %s: %s", key, why(error))
            return None


def short_names(named: Mapping[str, str]) -> dict[str, str]:
    """Folder -> what to call it: a given name, or as little of the end of its path as tells it from the others."""
    names = dict(named)
    for parts in range(1, 10):
        short = {
            folder: "/".join(Path(folder).parts[-parts:]) if name == folder else name for folder, name in named.items()
        }
        names = {f: s if list(short.values()).count(s) == 1 else f for f, s in short.items()}
        if len(set(short.values())) == len(short):
            break
    return names
