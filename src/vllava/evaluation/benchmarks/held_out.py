"""Held-out samples in folders of shards, of whatever kind: a user's own, or the toy world's."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllava.conversation import Message, placeholders, read_conversation, without_media
from vllava.data.address import is_remote
from vllava.data.broken import printable
from vllava.data.patience import Remote
from vllava.data.record import Parsed, parse, read_record
from vllava.data.samples import BROKEN, Medium, Sample, SampleDecoder
from vllava.data.shards import Shard, ShardReader, read_manifest
from vllava.errors import UserError
from vllava.evaluation import answers as old
from vllava.evaluation.answers import check_question, named, places
from vllava.evaluation.benchmark import Benchmark, Metric, Row
from vllava.evaluation.questions import Answer, Question, Verdict
from vllava.features import FeatureWriter

KINDS = ("image", "video", "text")
_OPEN = 128  # shards that a process keeps open: questions come by their length, and so from all of them in turn
_readers: OrderedDict[tuple[int, str], ShardReader] = OrderedDict()


@dataclass(frozen=True)
class ShardMedium:
    """A medium of a sample in a shard: a file, the frames of a video, or what its encoder made of it."""

    kind: str
    shard: Shard
    index: int  # of the sample in the shard
    number: int  # among the sample's media
    features: Shard | None = None  # of the same samples, their media as an encoder sees them

    @property
    def key(self) -> str:
        return f"{self.shard.path}:{self.index}.{self.number}"

    def read(self) -> bytes:
        file = parse(self._members()).files[self.number]
        if file.prepared or file.features_of:
            raise UserError("the shard holds frames or features in place of the medium's file")
        return file.data[0]

    @property
    def encoded(self) -> ShardMedium:
        """The same as its encoder sees it, where that is kept."""
        return self if self.features is None else replace(self, shard=self.features)

    def decoded(self, decode: SampleDecoder) -> Medium:
        """The medium as the model takes it; raises UserError for anything that is wrong with the sample."""
        return decode.medium(self._members(), self.number)

    def _members(self) -> dict[str, bytes]:
        return _reader(self.shard).read(0, self.index)[1]


def _reader(shard: Shard) -> ShardReader:
    """The reader of a shard, kept by each process for itself: an open file's place would be shared with a fork."""
    key = os.getpid(), str(shard.path)
    if key not in _readers:
        _readers[key] = ShardReader([shard], capacity=1)
        if len(_readers) > _OPEN:
            _readers.popitem(last=False)
    _readers.move_to_end(key)
    return _readers[key]


@dataclass
class HeldOut(Benchmark):
    """The last human turn of each sample is asked; what follows it is the true answer, if anything does.

    sources: medium -> name -> folder of shards; a sample counts with the medium it has, wherever its folder stands.
    remedy: the sentence that ends a missing-shards error. cache: how shards on servers are read. groups: name -> types
    of questions that also count together.
    """

    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    remedy: str = ""
    cache: Remote | Mapping[str, Any] | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    features: dict[str, Shard] = field(default_factory=dict, init=False)  # of a shard, by its path

    metrics: tuple[Metric, ...] = field(
        default=(Metric("accuracy", ("accuracy",), headline=True), Metric("chance", ("chance",))), init=False
    )

    def restrict(self, taken: Collection[str]) -> None:
        """Pass over the sources of media that a model does not take; raises UserError where none is left."""
        if unknown := sorted(set(self.sources) - set(KINDS)):
            raise UserError(f"evaluation.sources names {', '.join(unknown)}; there are: {', '.join(KINDS)}.")
        kept = {kind: named for kind, named in self.sources.items() if kind in taken or kind == "text"}
        if not kept:
            named = ", ".join(self.sources)
            raise UserError(f"evaluation.sources names {named} alone; the model takes {', '.join(taken)}.")
        self.sources = kept

    def use_features(self, writer: FeatureWriter, gigabytes: float | None) -> None:
        """Have the media read as an encoder sees them, after writing what is missing beside the shards.

        They stay media where features may not take so much, and on servers. Raises UserError where none can be written.
        """
        named = dict.fromkeys(folder for folders in self.sources.values() for folder in folders.values())
        sources = [Path(folder) for folder in named if not is_remote(folder)]
        folders = writer.write_all(sources, self.remedy, gigabytes)
        if folders is None:
            return
        for source, folder in zip(sources, folders, strict=True):
            both = read_manifest(source, self.remedy), read_manifest(folder, self.remedy)
            self.features |= {str(shard.path): encoded for shard, encoded in zip(*both, strict=True)}

    def questions(self) -> list[Question]:
        """Raises UserError, which names the sample, for a record that is none or whose question is of an odd kind."""
        folders = dict.fromkeys(pair for named in self.sources.values() for pair in named.items())
        return [question for name, folder in folders for question in self._of_folder(name, folder)]

    def _of_folder(self, name: str, folder: str) -> Iterator[Question]:
        for place, reader, shard, index in places(folder, self.remedy, remote=Remote.of(self.cache)):
            with named(place):
                found = _parsed(reader, shard, index)
                check_question(found.record)
            where = reader.shards[shard], index
            features = self.features.get(str(where[0].path))
            media = [ShardMedium(kind, *where, number, features) for number, kind in enumerate(found.kinds)]
            yield _question(place, name, reader.key(shard, index), found, media)

    def rows(self, answers: Sequence[Answer], verdicts: Mapping[str, Verdict]) -> list[Row]:
        return [_row(answer, plain, self.groups) for answer in answers if (plain := in_words(answer)).scored]


def _row(answer: Answer, plain: old.Answer, groups: Mapping[str, Sequence[str]]) -> Row:
    together = [name for name, types in groups.items() if plain.type in types]
    parts = [plain.medium, f"{plain.medium}/{answer.question.about['source']}"]
    parts += [f"{plain.medium}/{kind}" for kind in (plain.type, *together)]
    cluster = answer.question.media[0].key if answer.question.media else answer.question.id
    return Row(cluster, {"accuracy": float(plain.correct), "chance": plain.chance}, tuple(dict.fromkeys(parts)))


def _parsed(reader: ShardReader, shard: int, index: int) -> Parsed:
    """What a sample says; its media are read only where they are needed to know which placeholders are meant."""
    names = reader.members(shard, index)
    record = reader.read(shard, index, only=("json",))[1]
    if BROKEN in names:
        conversation, dropped = read_conversation(read_record(record))
        kinds = [kind for _, kind in placeholders(conversation)]
        return Parsed(read_record(record), conversation, dropped, [], kinds)
    found = parse({**dict.fromkeys(names, b""), **record})
    if found.files and len(placeholders(found.conversation)) > len(found.files):
        found = parse(reader.read(shard, index)[1])
    return found


def _question(id: str, source: str, key: str, found: Parsed, media: list[ShardMedium]) -> Question:
    last = found.conversation[-1]
    answered = last["from"] == "gpt"
    said = found.record.get("question", {})
    return Question(
        id,
        tuple(found.conversation[:-1] if answered else found.conversation),
        tuple(media),
        last["value"] if answered else None,
        {
            "source": source,
            "key": key,
            "type": printable(said.get("type", "question")),
            "options": tuple(said.get("options", ())),
        },
    )


def in_words(answer: Answer) -> old.Answer:
    """An answer in the form in which answers to samples are shown and compared."""
    question = answer.question
    return old.Answer(
        key=question.about["key"],
        medium=question.media[0].kind if question.media else "text",
        type=question.about["type"],
        question=_asked(question),
        truth=question.truth,
        answer=answer.text or "",
        options=question.about["options"],
        broken=answer.broken,
    )


def _asked(question: Question) -> str:
    kinds = [medium.kind for medium in question.media]
    turns: list[Message] = without_media(question.conversation, kinds)
    return turns[-1]["value"]


def sample_of(question: Question, decode: SampleDecoder) -> Sample:
    """The sample of a question, decoded, to be shown."""
    media = [medium.decoded(decode) for medium in question.media if isinstance(medium, ShardMedium)]
    return Sample(question.about["key"], list(question.conversation), media)
