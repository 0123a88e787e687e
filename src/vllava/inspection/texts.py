"""What a tokenizer and a template make of a source's texts, measured on some of its conversations."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllava.batch import IGNORE_INDEX
from vllava.conversation import encode, read_conversation, without_media
from vllava.data.broken import printable, why
from vllava.data.packing import ConversationPacker
from vllava.data.patience import RemoteUserError
from vllava.data.record import read_record
from vllava.data.shards import Shard, ShardReader
from vllava.inspection.reasons import Reasons

MEASURED = 256  # conversations of a source
SHARDS = 8  # that they come from
_WORD = re.compile(r"[^\W\d_]+")


@dataclass
class Texts:
    """Counts over the conversations that were measured. Letters are spelt where no longer piece holds them."""

    conversations: int = 0
    tokens: int = 0  # of text, the template's own included
    supervised: int = 0
    unknown: int = 0
    letters: int = 0
    spelt: int = 0
    words: Counter[str] = field(default_factory=Counter)  # that are unknown or spelt
    broken: Reasons = field(default_factory=Reasons)

    def share(self, count: str, of: str = "tokens") -> float:
        """Of the tokens, or of what `of` counts."""
        return getattr(self, count) / max(getattr(self, of), 1)


def measure(shards: list[Shard], source: int, packer: ConversationPacker) -> Texts:
    """Measure conversations from all over a source; no medium is read."""
    found, reader = Texts(), ShardReader(shards, capacity=1)
    own = [number for number, shard in enumerate(shards) if shard.source == source and shard.samples]
    chosen = _spread(own, SHARDS)
    for number in chosen:
        facts = reader.facts(number)
        for index in _spread(range(shards[number].samples), -(-MEASURED // len(chosen))):
            if facts[index].broken is None:
                key = f"{shards[number].path}:{reader.key(number, index)}"
                kinds = [medium.kind for medium in facts[index].media]
                try:
                    record = read_record(reader.read(number, index, only=("json",))[1])
                    _add(found, read_conversation(record)[0], kinds, packer)
                except RemoteUserError:  # of a server, not of the sample
                    raise
                except Exception as error:  # of a stranger's sample, as when it is trained on
                    found.broken.add(key, why(error))
                found.conversations += 1
    return found


def _spread(items: Any, most: int) -> list[int]:
    """At most so many of the items, evenly spaced."""
    return [items[n] for n in np.linspace(0, len(items) - 1, min(most, len(items))).astype(int).tolist()]


def _add(found: Texts, conversation: list, kinds: list[str], packer: ConversationPacker) -> None:
    encoded = encode(conversation, packer.tokenizer, packer.template, kinds)
    unknown = getattr(packer.tokenizer, "unk_token_id", None)
    text = [token for token in encoded.token_ids if token >= 0]
    found.tokens += len(text)
    found.supervised += sum(label != IGNORE_INDEX for label in encoded.labels)
    found.unknown += sum(token == unknown for token in text)
    for message in without_media(conversation, kinds):
        _spell(found, message["value"], packer.tokenizer, unknown)


def _spell(found: Texts, text: str, tokenizer: Any, unknown: int | None) -> None:
    """Count the letters that tokens hold one by one: single ones of ASCII words, and others in several tokens each."""
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    held: Counter[int] = Counter()
    lost: set[int] = set()
    for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if token == unknown:
            lost.update(range(start, stop))
        elif len(text[start:stop].strip()) == 1:
            held[start + len(text[start:stop]) - len(text[start:stop].lstrip())] += 1
    for word in _WORD.finditer(text):
        letters = range(*word.span())
        spelt = [n for n in letters if held[n] > 1 or (held[n] and text[n].isascii() and len(letters) > 1)]
        found.letters += len(letters)
        found.spelt += len(spelt)
        if len(spelt) > len(letters) / 2 or lost.intersection(letters):
            found.words[printable(word.group(), 40)] += 1
