"""From a conversation to token ids and labels.

A template writes the conversation as pieces of text, each known to be supervised or not. The whole text is
then tokenised, and a token carries loss where its characters lie in a supervised piece: supervision is
decided while the text is built, and nothing is recovered by searching in it afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllava.batch import IGNORE_INDEX
from vllava.errors import UserError

# Stand-ins for a medium in token ids, until the batch is packed. Negative, so no vocabulary contains them.
PLACEHOLDER_IDS = {"image": -200, "video": -201}
_PLACEHOLDER = re.compile(r"<(image|video)>")

Message = dict[str, str]  # {"from": "human" | "gpt", "value": text}, LLaVA's format


@dataclass(frozen=True)
class Piece:
    """A stretch of text and whether its tokens carry loss; a `token` stands by itself, apart from the text after it."""

    text: str
    supervised: bool = False
    token: bool = False


Template = Callable[[Sequence[Message], Any], list[Piece]]


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


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def vicuna_v1(conversation: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """Vicuna v1: `{system} USER: {question} ASSISTANT: {answer}</s>USER: …`; loss on ` {answer}</s>`."""
    pieces = [*_bos(tokenizer), Piece(VICUNA_SYSTEM + " ")]
    for message in conversation:
        if message["from"] == "human":
            pieces.append(Piece(f"USER: {message['value']} ASSISTANT:"))
        else:
            pieces.append(Piece(f" {message['value']}{tokenizer.eos_token}", supervised=True))
    return pieces


def plain(conversation: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """LLaVA-1.5's first-stage format: the visual tokens, the caption and a newline; the instruction is not used."""
    pieces = _bos(tokenizer)
    for message in conversation:
        if message["from"] == "human":
            pieces.append(Piece("".join(f"<{kind}>" for kind in _PLACEHOLDER.findall(message["value"]))))
        else:
            pieces.append(Piece(message["value"] + "\n", supervised=True))
    return pieces


def chat_template(conversation: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """The tokenizer's own chat template; loss from where an answer would be generated through the token that ends it.

    Raises UserError where the tokenizer has no chat template, or one in which an answer's place or end is not known.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("This tokenizer has no chat template. Choose data.template=vicuna_v1 or plain.")
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[m["from"]], "content": m["value"]} for m in conversation]
    text = _render(chat, tokenizer)
    pieces: list[Piece] = []
    done = 0
    for turn in range(1, len(chat), 2):
        start, stop = _answer_span(text, chat, turn, tokenizer)
        pieces += [Piece(text[done:start]), Piece(text[start:stop], supervised=True)]
        done = stop
    return [*pieces, Piece(text[done:])]


def _render(chat: list[dict], tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] == "user")


def _answer_span(text: str, chat: list[dict], turn: int, tokenizer: Any) -> tuple[int, int]:
    """Where the answer `turn` lies in the rendered text: from the end of its generation prompt through its end token.

    What stands around the answer is what does not change when another answer takes its place.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    marked = _render([*chat[:turn], {**chat[turn], "content": mark}, *chat[turn + 1 :]], tokenizer)
    before, found, after = marked.partition(mark)
    if not (found and text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        raise UserError(f"The tokenizer's chat template does not write answer {turn // 2 + 1} as it stands. {_ANOTHER}")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    end = re.match(rf"\s*({'|'.join(map(re.escape, special))})", after) if special else None
    if end is None:
        raise UserError(
            "The tokenizer's chat template ends an answer with no special token, so a model could not learn where to "
            f"stop. {_ANOTHER}"
        )
    # Where a template writes earlier turns otherwise than the last one, a turn may not begin as its prompt did.
    prompt = _render(chat[:turn], tokenizer)
    start = len(prompt) if before.startswith(prompt) else len(before)
    return start, len(text) - len(after) + end.end()


_ANOTHER = "Choose data.template=vicuna_v1, or a tokenizer with another chat template."


TEMPLATES: dict[str, Template] = {
    "vicuna_v1": vicuna_v1,
    "plain": plain,
    "chat": chat_template,
}


def template(name: str) -> Template:
    """The template of that name; raises UserError that lists the names there are."""
    if name not in TEMPLATES:
        raise UserError(f"No conversation template is called {name!r}; there are: {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def encode(conversation: Sequence[Message], tokenizer: Any, template: Template) -> EncodedConversation:
    """Tokenise a conversation and label its answers.

    A conversation that ends with a human turn gives the prompt of an answer to come, with nothing after it.
    Raises UserError for an empty conversation, unknown speakers, turns out of order, or a placeholder in an answer.
    """
    _check(conversation)
    pieces = template(conversation, tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(piece.text) for piece in pieces if piece.token]
    labels = [IGNORE_INDEX] * len(ids)
    pieces = [piece for piece in pieces if not piece.token]
    text = "".join(piece.text for piece in pieces)
    supervised = bytearray(len(text))  # per character
    start = 0
    for piece in pieces:
        supervised[start : start + len(piece.text)] = bytes([piece.supervised]) * len(piece.text)
        start += len(piece.text)

    start = 0
    for match in [*_PLACEHOLDER.finditer(text), None]:
        stop = match.start() if match else len(text)
        tokens = tokenizer(text[start:stop], add_special_tokens=False, return_offsets_mapping=True)
        for token, (first, last) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            inside = any(supervised[start + first : start + max(last, first + 1)])
            ids.append(token)
            labels.append(token if inside else IGNORE_INDEX)
        if match:
            ids.append(PLACEHOLDER_IDS[match.group(1)])
            labels.append(IGNORE_INDEX)
            start = match.end()
    return EncodedConversation(ids, labels)


def end_of_turn(tokenizer: Any, template: Template) -> int:
    """The token with which a model that learned from this template ends an answer.

    Raises UserError where the template cannot write a conversation of two rounds.
    """
    probe = encode([{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}] * 2, tokenizer, template)
    return next(label for label in reversed(probe.labels) if label != IGNORE_INDEX)


def without_media(conversation: Sequence[Message]) -> list[Message]:
    """The same conversation with its placeholders, and the line breaks around them, taken out."""
    return [{**message, "value": _PLACEHOLDER.sub("", message["value"]).strip()} for message in conversation]


def _bos(tokenizer: Any) -> list[Piece]:
    return [Piece(tokenizer.bos_token, token=True)] if tokenizer.bos_token else []


def _check(conversation: Sequence[Message]) -> None:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise UserError(f"the conversation is not a list of turns but {type(conversation).__name__}")
    if not conversation:
        raise UserError("the conversation is empty: it needs at least one human turn")
    for index, message in enumerate(conversation):
        expected = ("human", "gpt")[index % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f'turn {index + 1} is not of the form {{"from": "human" | "gpt", "value": text}}')
        if message.get("from") != expected:
            raise UserError(f"turn {index + 1} is from {message.get('from')!r}, expected {expected!r}: turns alternate")
        if expected == "gpt" and _PLACEHOLDER.search(message["value"]):
            raise UserError(
                f"turn {index + 1}, an answer, contains a media placeholder: only a human turn may show one"
            )
