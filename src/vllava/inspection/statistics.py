"""Figures over all samples of a run's sources, from the shards' indexes alone: nothing is decoded, no picture kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from vllava.batch import MediumSpec
from vllava.data.address import shown
from vllava.data.broken import printable
from vllava.data.index import Entry
from vllava.data.lengths import Lengths
from vllava.data.mixture import Source
from vllava.data.shards import Shard, ShardReader
from vllava.inspection.reasons import Reasons, read_rejects

MODALITIES = ("image", "video", "mixed", "text")  # of samples
EXAMPLES = 5
QUANTILES = (0, 0.05, 0.5, 0.95, 1)
BINS_PER_OCTAVE = 4  # of a histogram of tokens


@dataclass
class SourceStatistics:
    """One source. `columns` hold a number for each sample, or each picture or video, of which it is known."""

    modality: str  # that it is named under
    folder: str  # as it may be shown
    samples: int
    drawn: int  # of an epoch
    max_length: int
    modalities: Counter[str] = field(default_factory=Counter)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    unfit: Counter[str] = field(default_factory=Counter)  # samples with a medium of a kind that the model does not take
    broken: Reasons = field(default_factory=Reasons)
    rejects: Reasons = field(default_factory=Reasons)
    unindexed: int = 0  # shards

    @property
    def times(self) -> float:
        """How often an epoch shows each sample."""
        return self.drawn / self.samples if self.samples else 0.0

    def column(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.empty(0))

    @property
    def too_long(self) -> int:
        """Samples of more tokens than `max_length`, as estimated."""
        return int((self.column("tokens") > self.max_length).sum())

    def tokens_of(self, modality: str) -> np.ndarray:
        """The tokens of the samples of a modality."""
        return self.column("tokens")[self.column("modality") == MODALITIES.index(modality)]

    def quantiles(self, name: str) -> list[float]:
        """Least, 5 %, median, 95 % and greatest; empty where nothing is known."""
        values = self.column(name)
        return np.quantile(values, QUANTILES).tolist() if len(values) else []

    def histogram(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Edges [N + 1], on a logarithmic scale, and the samples of each modality in each bin [N]."""
        tokens = self.column("tokens")
        edges = token_edges(int(tokens.max()) if len(tokens) else 1, self.max_length)
        counts = {kind: np.histogram(self.tokens_of(kind), edges)[0] for kind in MODALITIES}
        return edges, {kind: count for kind, count in counts.items() if count.any()}

    def common_sizes(self, most: int = EXAMPLES) -> list[tuple[int, int, int]]:
        """(width, height, how many) of the most frequent sizes of pictures."""
        sizes, counts = np.unique(self.column("width") * 2**20 + self.column("height"), return_counts=True)
        first = np.argsort(-counts, kind="stable")[:most]
        return [(int(sizes[n]) >> 20, int(sizes[n]) % 2**20, int(counts[n])) for n in first]


def token_edges(longest: int, max_length: int) -> np.ndarray:
    """Edges of bins, BINS_PER_OCTAVE to a doubling, from 16 tokens or less to beyond the longest and the limit."""
    last = int(np.ceil(np.log2(max(longest + 1, 1.5 * max_length)) * BINS_PER_OCTAVE))
    return np.concatenate([[0], 2 ** (np.arange(4 * BINS_PER_OCTAVE, last + 1) / BINS_PER_OCTAVE)])


@dataclass
class Repeats:
    """How often things come again: `total` of them, of which `distinct` are different."""

    total: int = 0
    distinct: int = 0
    shared: int = 0  # different ones that come more than once
    examples: list[tuple[int, list[str]]] = field(default_factory=list)  # (how often, the first keys)

    @property
    def share(self) -> float:
        """Of those that came before, in all."""
        return (self.total - self.distinct) / self.total if self.total else 0.0


@dataclass
class Survey:
    """All sources together."""

    sources: list[SourceStatistics]
    samples: Repeats  # of the same conversation about the same media
    media: Repeats  # a use of a medium in a sample, as often as there are samples that use it

    @property
    def drawn(self) -> int:
        """Samples of an epoch."""
        return sum(source.drawn for source in self.sources)


def survey(
    shards: list[Shard], sources: Sequence[Source], draws: Sequence[int], lengths: Lengths, max_length: int
) -> Survey:
    """Read every index, a shard at a time; in memory stay a few numbers of each sample."""
    reader = ShardReader(shards, capacity=1)
    found = [
        SourceStatistics(one.modality, shown(one.folder), 0, drawn, max_length, rejects=read_rejects(one.folder))
        for one, drawn in zip(sources, draws, strict=True)
    ]
    parts: list[dict[str, list[np.ndarray]]] = [defaultdict(list) for _ in found]
    seen: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, shard in enumerate(tqdm(shards, unit=" shards", disable=None, leave=False)):
        entries, source = reader.entries(number), found[shard.source]
        source.samples += len(entries)
        source.unindexed += any(place.crc is None for entry in entries[:1] for place in entry.files.values())
        _count(entries, lengths.specs, source, shard)
        costs = lengths.of_facts([entry.facts for entry in entries if entry.facts], shard.source)
        for name, column in _columns(entries, costs, lengths.specs).items():
            parts[shard.source][name].append(column)
        for name, column in _identities(number, entries).items():
            seen[name].append(column)
    for source, columns in zip(found, parts, strict=True):
        source.columns = {name: np.concatenate(column) for name, column in columns.items()}
    same = {name: np.concatenate(column) for name, column in seen.items()}
    repeats = {name: _repeats(same[name], same[f"places of {name}"], reader) for name in ("samples", "media")}
    return Survey(found, **repeats)


def _count(entries: list[Entry], specs: dict[str, MediumSpec], source: SourceStatistics, shard: Shard) -> None:
    for entry in entries:
        facts = entry.facts
        assert facts is not None
        source.modalities[facts.modality] += 1
        if facts.broken is not None:
            source.broken.add(f"{shard.path}:{entry.key}", facts.broken)
        for kind in {medium.kind for medium in facts.media} - set(specs):
            source.unfit[kind] += 1


def _columns(entries: list[Entry], costs: np.ndarray, specs: dict[str, MediumSpec]) -> dict[str, np.ndarray]:
    """Of the samples of a shard that can be trained on, and of all their media."""
    facts = [entry.facts for entry in entries if entry.facts]
    fit = [f.broken is None and all(medium.kind in specs for medium in f.media) for f in facts]
    good = [f for f, fits in zip(facts, fit, strict=True) if fits]
    images = [m for f in facts for m in f.media if m.kind == "image" and m.width and m.height]
    videos = [m for f in facts for m in f.media if m.kind == "video"]
    columns = {
        "tokens": (costs[np.array(fit, bool), 0], np.int32),
        "modality": ([MODALITIES.index(f.modality) for f in good], np.int8),
        "characters": ([f.characters for f in good], np.int32),
        "turns": ([f.turns for f in good], np.int32),
        "width": ([m.width for m in images], np.int64),
        "height": ([m.height for m in images], np.int64),
        "frames": ([m.frames for m in videos if m.frames is not None], np.int64),
        "seconds": ([m.seconds for m in videos if m.seconds is not None], np.float32),
    }
    return {name: np.array(values, kind) for name, (values, kind) in columns.items()}


def _identities(shard: int, entries: list[Entry]) -> dict[str, np.ndarray]:
    """What tells samples, and media, apart (64 bits each), and the places [N, 2] of the samples they stand in.

    Where there are no checksums, samples with media are left out: they could not be told apart.
    """
    samples: list[int] = []
    media: list[int] = []
    places: dict[str, list[tuple[int, int]]] = {"samples": [], "media": []}
    for index, entry in enumerate(entries):
        facts, own = entry.facts, _media_of(entry)
        if facts is None or facts.broken is not None or len(own) != len(facts.media):
            continue
        samples.append(hash((facts.text, facts.characters, *own)))
        places["samples"].append((shard, index))
        media += set(own)
        places["media"] += [(shard, index)] * len(set(own))
    found = {"samples": np.array(samples, np.int64), "media": np.array(media, np.int64)}
    return found | {f"places of {name}": np.array(rows, np.int32).reshape(-1, 2) for name, rows in places.items()}


def _media_of(entry: Entry) -> list[int]:
    """The identity of each medium, from the checksums and sizes of its members; of those that have them."""
    members: dict[str, list[tuple[str, int, int | None]]] = defaultdict(list)
    for name, place in entry.files.items():
        if name[0].isdigit():
            members[name.partition(".")[0]].append((name, place.size, place.crc))
    return [
        hash(tuple((size, crc) for _, size, crc in sorted(files)))
        for _, files in sorted(members.items(), key=lambda item: int(item[0]))
        if all(crc is not None for _, _, crc in files)
    ]


def _repeats(identities: np.ndarray, places: np.ndarray, reader: ShardReader) -> Repeats:
    order = np.argsort(identities, kind="stable")
    _, first, counts = np.unique(identities[order], return_index=True, return_counts=True)
    found = Repeats(len(identities), len(counts), int((counts > 1).sum()))
    for group in np.argsort(-counts, kind="stable")[:EXAMPLES]:
        if counts[group] > 1:
            rows = places[order[first[group] : first[group] + min(counts[group], 3)]]
            keys = [
                printable(f"{reader.shards[shard].path}:{reader.key(shard, index)}") for shard, index in rows.tolist()
            ]
            found.examples.append((int(counts[group]), keys))
    return found
