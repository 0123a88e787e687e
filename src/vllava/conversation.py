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
    """The tokenizer's own chat template.

    An answer's piece is what the rendered text gains when the answer is added after the generation prompt.
    Raises UserError where the tokenizer has no chat template, or one that rewrites earlier turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("This tokenizer has no chat template. Choose data.template=vicuna_v1 or plain.")
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[m["from"]], "content": m["value"]} for m in conversation]
    pieces: list[Piece] = []
    done = ""
    for index, message in enumerate(chat):
        is_answer = message["role"] == "assistant"
        text = tokenizer.apply_chat_template(chat[: index + 1], tokenize=False, add_generation_prompt=not is_answer)
        if not text.startswith(done):
            raise UserError(
                f"The tokenizer's chat template rewrites earlier turns when turn {index + 1} is added, so the answers' "
                "places in the text are not known. Choose data.template=vicuna_v1, or a template that only appends."
            )
        pieces.append(Piece(text[len(done) :], supervised=is_answer))
        done = text
    return pieces


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
