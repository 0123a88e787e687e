"""From a conversation to token ids and labels.

A template writes the conversation as pieces of text, each known to be supervised or not. The whole text is
then tokenised, and a token carries loss where its characters lie in a supervised piece: supervision is
decided while the text is built, and nothing is recovered by searching in it afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllava.batch import IGNORE_INDEX
from vllava.errors import UserError, memory_limit
from vllava.templates import (
    MEDIA_MARKS,
    RESERVED,
    TEMPLATES,
    VICUNA_SYSTEM,
    Message,
    Piece,
    Template,
    chat_template,
    llava_v1,
    plain,
    split_system,
    template,
    vicuna_v1,
)

__all__ = [
    "MAX_CHARACTERS",
    "MAX_TURNS",
    "PLACEHOLDER_IDS",
    "TEMPLATES",
    "VICUNA_SYSTEM",
    "EncodedConversation",
    "Message",
    "Piece",
    "Template",
    "chat_template",
    "encode",
    "ends_of_turn",
    "llava_v1",
    "media_in",
    "placeholders",
    "plain",
    "read_conversation",
    "split_system",
    "template",
    "vicuna_v1",
    "without_media",
]

# Stand-ins for a medium in token ids, until the batch is packed. Negative, so no vocabulary contains them.
PLACEHOLDER_IDS = {"image": -200, "video": -201}
_PLACEHOLDER = re.compile(r"<(image|video)>")
_KIND_OF_MARK = {mark: kind for kind, mark in MEDIA_MARKS.items()}
_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

# A conversation beyond these is no training sample but a damaged record; it would take minutes to tokenise.
MAX_TURNS = 1_000
MAX_CHARACTERS = 1_000_000
PROBE_BYTES = 2**29  # that a template, a stranger's program, may take for two short rounds


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids with one negative placeholder id for each medium, and labels of the same length."""

    token_ids: list[int]
    labels: list[int]

    @property
    def media(self) -> list[str]:
        """The kinds of the media, in placeholder order."""
        kinds = {id_: kind for kind, id_ in PLACEHOLDER_IDS.items()}
        return [kinds[token] for token in self.token_ids if token in kinds]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_conversation(record: Mapping[str, Any]) -> tuple[list[Message], int]:
    """The conversation of a record in our form, and how many turns were dropped from its beginning.

    Turns are `{"from", "value"}` under "conversations", or `{"role", "content"}` under "messages"; a system text is a
    first turn or the key "system". A first turn from gpt is dropped, as the original does (`preprocess_v1`).
    Raises UserError for anything else.
    """
    turns = record["conversations"] if "conversations" in record else record.get("messages")
    if turns is None:
        raise UserError('the record has no conversation: it needs "conversations" or "messages"')
    messages = _messages(turns)
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f'"system" is not a text but {type(system).__name__}')
    given, turns = split_system(messages)
    if given and system and given != system:
        raise UserError('the key "system" and the first turn are two different system texts')
    dropped = int(len(turns) > 1 and turns[0]["from"] == "gpt")
    text = given or system
    conversation = [*([{"from": "system", "value": text}] if text else []), *turns[dropped:]]
    _check_order(conversation, dropped)
    return conversation, dropped


def _messages(turns: Any) -> list[Message]:
    """Turns in our form; raises UserError for what is no turn, a speaker nobody knows, or a text that is none."""
    if not isinstance(turns, (list, Sequence)) or isinstance(turns, str):  # a list is known more quickly
        raise UserError(f"the conversation is not a list of turns but {type(turns).__name__}")
    if not turns:
        raise UserError("the conversation is empty: it needs at least one human turn")
    if len(turns) > MAX_TURNS:
        raise UserError(f"the conversation has {len(turns):,} turns, more than {MAX_TURNS:,}")
    messages = [_message(number, turn) for number, turn in enumerate(turns, 1)]
    if (characters := sum(len(message["value"]) for message in messages)) > MAX_CHARACTERS:
        raise UserError(f"the conversation has {characters:,} characters, more than {MAX_CHARACTERS:,}")
    return messages


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, (dict, Mapping)):
        raise UserError(f'turn {number} is not of the form {{"from": "human" | "gpt", "value": text}}')
    name, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(text, str):
        raise UserError(f'turn {number} is not of the form {{"from": "human" | "gpt", "value": text}}: it has no text')
    speaker = _SPEAKERS.get(name) if isinstance(name, str) else None
    if speaker is None:
        raise UserError(f"turn {number} is from {str(name)[:40]!r}; speakers are: {', '.join(_SPEAKERS)}")
    if RESERVED.search(text):
        raise UserError(f"turn {number} holds a noncharacter of Unicode (U+FDD0 to U+FDD3), which text never does")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"turn {number} is no valid text: half a surrogate pair at character {error.start}") from error
    return {"from": speaker, "value": text}


def _check_order(conversation: Sequence[Message], dropped: int = 0) -> None:
    system, turns = split_system(conversation)
    if not turns:
        raise UserError("the conversation is empty: it needs at least one human turn")
    first = 1 + dropped + (system is not None)
    for index, message in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if message["from"] != expected:
            raise UserError(f"turn {first + index} is from {message['from']!r}, expected {expected!r}: turns alternate")


# --- media ------------------------------------------------------------------------------------------------------------


def media_in(
    conversation: Sequence[Message], files: Sequence[str | None], looks: Sequence[str | None] = ()
) -> list[str]:
    """The kind of each medium of a sample, in order, by the placeholders of its human turns.

    files: what each medium is known to be, or None; looks: what the file's first bytes say. `<image>` and `<video>`
    that no medium answers to are text (HTML), as are those in answers: where there are more placeholders than media,
    the files decide which kinds are meant. Raises UserError, which names turns, where the two do not fit.
    """
    if not files:
        return []
    shown = [kind for _, kind in placeholders(conversation)]
    if len(shown) > len(files):
        meant = {kind for kind in (looks or files) if kind}
        shown = [kind for kind in shown if kind in meant]
    if len(shown) != len(files):
        raise UserError(_differ(conversation, [kind or "file" for kind in files]))
    return shown


def placeholders(conversation: Sequence[Message]) -> list[tuple[int, str]]:
    """(index of the turn, kind) of each placeholder in a human turn."""
    return [
        (index, kind)
        for index, message in enumerate(conversation)
        if message["from"] == "human"
        for kind in _PLACEHOLDER.findall(message["value"])
    ]


def _differ(conversation: Sequence[Message], given: Sequence[str]) -> str:
    """In words, that human turns show other media than the sample has."""
    places = [f"<{kind}> in turn {index + 1}" for index, kind in placeholders(conversation)]
    words = f"placeholders and media differ: the text shows {', '.join(places[:8]) or 'none'}, the sample has "
    words += ", ".join(given[:8]) or "none"
    others = [i for i, m in enumerate(conversation, 1) if m["from"] != "human" and _PLACEHOLDER.search(m["value"])]
    if others and len(places) < len(given):
        words += f"; turn {others[0]} holds a placeholder and is not the human's: only human turns may show media"
    return words


def _marked(conversation: Sequence[Message], media: Sequence[str] | None, mark: Mapping[str, str]) -> list[Message]:
    """The conversation with the placeholders of `media` replaced; the others are text.

    None for `media` means every placeholder of a human turn. Raises UserError where they are others than `media`.
    """
    shown = [kind for _, kind in placeholders(conversation)]
    kinds = set(PLACEHOLDER_IDS) if media is None else set(media)
    if media is not None and [kind for kind in shown if kind in kinds] != list(media):
        raise UserError(_differ(conversation, media))

    def replace(match: re.Match[str]) -> str:
        return mark[match.group(1)] if match.group(1) in kinds else match.group()

    return [
        {**message, "value": _PLACEHOLDER.sub(replace, message["value"])} if message["from"] == "human" else message
        for message in conversation
    ]


def without_media(conversation: Sequence[Message], media: Sequence[str] | None = None) -> list[Message]:
    """The same conversation with the placeholders of its media, and the white space around its turns, taken out."""
    nothing = dict.fromkeys(PLACEHOLDER_IDS, "")
    return [{**m, "value": m["value"].strip()} for m in _marked(conversation, media, nothing)]


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode(
    conversation: Sequence[Message], tokenizer: Any, template: Template, media: Sequence[str] | None = None
) -> EncodedConversation:
    """Tokenise a conversation and label its answers.

    media: the kinds of the sample's media in order; a placeholder of another kind is text. By default every
    placeholder of a human turn stands for a medium. A conversation that ends with a human turn gives the prompt of an
    answer to come, with nothing after it.
    Raises UserError for an empty conversation, unknown speakers, turns out of order, or media that are not shown.
    """
    messages = _messages(conversation)
    _check_order(messages)
    pieces = template(_marked(messages, media, MEDIA_MARKS), tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(piece.text) for piece in pieces if piece.token]
    labels = [IGNORE_INDEX] * len(ids)
    pieces = [piece for piece in pieces if not piece.token]
    text = "".join(piece.text for piece in pieces)
    supervised = bytearray().join(bytes([piece.supervised]) * len(piece.text) for piece in pieces)  # per character

    start = 0
    for match in [*RESERVED.finditer(text), None]:
        stop = match.start() if match else len(text)
        # Each stretch of text between media is tokenised on its own, as the original does (`tokenizer_image_token`).
        tokens = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token, (first, last) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            inside = any(supervised[start + first : start + max(last, first + 1)])
            ids.append(token)
            labels.append(token if inside else IGNORE_INDEX)
        if match:
            ids.append(PLACEHOLDER_IDS[_KIND_OF_MARK[match.group()]])
            labels.append(IGNORE_INDEX)
            start = match.end()
    return EncodedConversation(ids, labels)


def ends_of_turn(tokenizer: Any, template: Template) -> list[int]:
    """The tokens with which a model that learned from this template ends an answer.

    There may be two: some templates end the last answer otherwise than those before it. Raises UserError where the
    template cannot write a conversation of two rounds.
    """
    two_rounds = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}] * 2
    with memory_limit(PROBE_BYTES, "The tokenizer's chat template does not come to an end. Choose another one."):
        probe = encode(two_rounds, tokenizer, template).labels
    after = [*probe[1:], IGNORE_INDEX]
    return sorted({a for a, b in zip(probe, after, strict=True) if a != IGNORE_INDEX and b == IGNORE_INDEX})
