"""How many tokens a sample will have, before it is read: exact for its media, estimated for its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllava.batch import MediumSpec
from vllava.conversation import Message, read_conversation
from vllava.data.index import Facts
from vllava.data.patience import RemoteUserError
from vllava.data.record import read_record
from vllava.data.shards import Shard, ShardReader
from vllava.errors import UserError

MEASURED = 64  # samples of a source, by which the lengths of its texts are estimated

CountText = Callable[[list[Message]], int]  # the tokens of a conversation, media apart; UserError for an odd one


@dataclass(frozen=True)
class TextLength:
    """Tokens of a text from its turns and characters; in whole numbers, for all ranks must come to the same ones."""

    first: int  # what the template writes around the first round
    further: int  # and around each further one
    tokens: int = 0  # of so many characters
    characters: int = 1

    def __call__(self, facts: Facts) -> int:
        around = self.first + self.further * max(facts.turns // 2 - 1, 0)
        return around + facts.characters * self.tokens // self.characters


def text_length(count: CountText, conversations: list[list[Message]]) -> TextLength:
    """The estimate that fits some conversations."""
    round_: list[Message] = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "a"}]
    first = count(round_)
    try:
        further = max(count([*round_, *round_]) - first, 0)
    except UserError:  # a template of one round
        further = 0
    bare = TextLength(first, further)
    tokens = characters = 0
    for conversation in conversations:
        try:
            long = count(conversation)
        except UserError:  # a broken sample, which is found when it is read
            continue
        facts = Facts(characters=sum(len(m["value"]) for m in conversation), turns=len(conversation))
        tokens += max(long - bare(facts), 0)
        characters += facts.characters
    return TextLength(first, further, tokens, max(characters, 1))


@dataclass
class Lengths:
    """The costs of samples: tokens, and frames to encode. Read a shard at a time, and kept.

    A source's texts are estimated from its first samples, so they are the same in every process and every run.
    """

    shards: list[Shard]
    specs: dict[str, MediumSpec]
    count: CountText
    _texts: dict[int, TextLength] = field(default_factory=dict)
    _costs: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = ShardReader(self.shards, capacity=1)

    def costs(self, rows: np.ndarray) -> np.ndarray:
        """[samples, 2] tokens and frames of rows (shard, index). A broken sample counts as one token."""
        found = np.empty((len(rows), 2), np.int64)
        for shard in np.unique(rows[:, 0]).tolist():
            here = rows[:, 0] == shard
            found[here] = self.of_shard(shard)[rows[here, 1]]
        return found

    def of_shard(self, shard: int) -> np.ndarray:
        """The costs of all samples of a shard."""
        if shard not in self._costs:
            self._costs[shard] = self.of_facts(self._reader.facts(shard), self.shards[shard].source)
        return self._costs[shard]

    def of_facts(self, facts: Sequence[Facts], source: int) -> np.ndarray:
        """The costs of samples of a source, of which so much is known."""
        text = self._text(source)
        return np.array([self._cost(one, text) for one in facts], np.int64).reshape(-1, 2)

    def _cost(self, facts: Facts, text: TextLength) -> tuple[int, int]:
        specs = [self.specs[medium.kind] for medium in facts.media if medium.kind in self.specs]
        if facts.broken is not None or len(specs) < len(facts.media):
            return 1, 0
        return text(facts) + sum(spec.tokens for spec in specs), sum(spec.frames for spec in specs)

    def _text(self, source: int) -> TextLength:
        if source not in self._texts:
            first = next(n for n, shard in enumerate(self.shards) if shard.source == source and shard.samples)
            conversations = []
            for index in range(min(MEASURED, self.shards[first].samples)):
                try:
                    record = read_record(self._reader.read(first, index, only=("json",))[1])
                    conversations.append(read_conversation(record)[0])
                except RemoteUserError:  # another rank might read it, and come to other lengths
                    raise
                except UserError:
                    continue
            self._texts[source] = text_length(self.count, conversations)
        return self._texts[source]
