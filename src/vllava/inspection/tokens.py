"""A packed sample token by token, as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllava.batch import IGNORE_INDEX, MediumSpec
from vllava.conversation import PLACEHOLDER_IDS
from vllava.data.broken import printable
from vllava.data.packing import PackedSample

_KINDS = {id_: kind for kind, id_ in PLACEHOLDER_IDS.items()}
_NO_CHARACTER = "\ufffd"  # what bytes decode to that are none yet


class Chip(NamedTuple):
    """What is shown as one: a token, the tokens of one character, or the visual tokens of a medium."""

    text: str
    kind: str  # text | special | unknown | image | video
    supervised: bool
    tokens: int = 1


def chips(packed: PackedSample, tokenizer: Any, specs: dict[str, MediumSpec]) -> list[Chip]:
    """All tokens of a sample in their order; their counts add up to its length."""
    special, unknown = set(tokenizer.all_special_ids), getattr(tokenizer, "unk_token_id", None)
    special |= {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[Chip] = []
    ids = packed.token_ids
    marked = [label != IGNORE_INDEX for label in packed.labels]
    place = 0
    while place < len(ids):
        token = ids[place]
        if token in _KINDS:
            kind, count = _KINDS[token], specs[_KINDS[token]].tokens
            found.append(Chip(f"{kind}: {count:,} tokens", kind, marked[place], count))
        elif token in special or token == unknown:
            kind, count = "unknown" if token == unknown else "special", 1
            found.append(Chip(printable(tokenizer.convert_ids_to_tokens(token), 80), kind, marked[place]))
        else:
            end = place
            while end < len(ids) and ids[end] >= 0 and ids[end] not in special and ids[end] != unknown:
                end += 1
            count = end - place
            found += _texts(ids[place:end], marked[place:end], tokenizer)
        place += count
    return found


def _texts(ids: list[int], marked: list[bool], tokenizer: Any) -> Iterator[Chip]:
    """Ordinary tokens, each with the characters it adds to those before it.

    A token alone does not say whether a space belongs to it, nor, if it is part of a character, which one: so it is
    decoded after the ones before it, and those that make up one character go together.
    """

    def decoded(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    context = start = 0
    for stop in range(1, len(ids) + 1):
        before, text = decoded(context, start), decoded(context, stop)
        open_ = text.endswith(_NO_CHARACTER) and stop < len(ids) and marked[stop] == marked[start]
        if open_ and stop - start < 8:
            continue
        added = text[len(before) :] if text.startswith(before) else ""
        if start == 0 and not added.startswith(" ") and _has_space(tokenizer, ids[0]):
            added = f" {added}"
        yield Chip(_visible(added), "text", marked[start], stop - start)
        context, start = start, stop


def _has_space(tokenizer: Any, token: int) -> bool:
    return tokenizer.convert_ids_to_tokens(token).startswith(("▁", "Ġ"))


def _visible(text: str) -> str:
    """Line breaks and control characters can be seen; a line break still is one."""
    return "⏎\n".join(printable(line) for line in text.split("\n")) or "∅"
