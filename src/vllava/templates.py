"""Conversation templates: how turns are written as text, and which stretches of it are answers to be learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from vllava.errors import UserError, reason, time_limit

Message = dict[str, str]  # {"from": "system" | "human" | "gpt", "value": text}, LLaVA's format

# Where a medium stands in a turn's text, while a template writes it: noncharacters of Unicode, which no text may hold.
MEDIA_MARKS = {"image": "\ufdd0", "video": "\ufdd1"}
RESERVED = re.compile("[\ufdd0-\ufdd3]")


@dataclass(frozen=True)
class Piece:
    """A stretch of text and whether its tokens carry loss; a `token` stands by itself, apart from the text after it."""

    text: str
    supervised: bool = False
    token: bool = False


# Turns that alternate, the human's first, after a system turn if there is one; they may end with a human turn.
Template = Callable[[Sequence[Message], Any], list[Piece]]


def template(name: str, options: Mapping[str, Any] | None = None) -> Template:
    """The template of that name; `options` are passed to the tokenizer's own (`enable_thinking`, `date`, …).

    Raises UserError that lists the names there are, or for options of a template that takes none.
    """
    if name not in TEMPLATES:
        raise UserError(f"No conversation template is called {name!r}; there are: {', '.join(TEMPLATES)}.")
    if not options:
        return TEMPLATES[name]
    if name != "chat":
        raise UserError(f"data.template_options={dict(options)} are for data.template=chat; {name} takes none.")
    return partial(chat_template, options=dict(options))


# --- fixed forms ------------------------------------------------------------------------------------------------------

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def vicuna_v1(conversation: Sequence[Message], tokenizer: Any, system: str = VICUNA_SYSTEM) -> list[Piece]:
    """Vicuna v1: `{system} USER: {question} ASSISTANT: {answer}</s>USER: …`; loss on ` {answer}</s>`."""
    end = _end_token(tokenizer)
    given, turns = split_system(conversation)
    pieces = [*_bos(tokenizer), Piece(f"{system if given is None else given} ")]
    for message in turns:
        if message["from"] == "human":
            pieces.append(Piece(f"USER: {message['value']} ASSISTANT:"))
        else:
            pieces.append(Piece(f" {message['value']}{end}", supervised=True))
    return pieces


def llava_v1(conversation: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """Vicuna v1 with LLaVA v1's words: what the original's evaluation asks about videos with ("llava_v1")."""
    return vicuna_v1(conversation, tokenizer, LLAVA_SYSTEM)


def plain(conversation: Sequence[Message], tokenizer: Any) -> list[Piece]:
    """LLaVA-1.5's first-stage format: the visual tokens, the caption and a newline; the instruction is not used."""
    pieces = _bos(tokenizer)
    for message in split_system(conversation)[1]:
        if message["from"] == "human":
            pieces.append(Piece("".join(RESERVED.findall(message["value"]))))
        else:
            pieces.append(Piece(message["value"] + "\n", supervised=True))
    return pieces


def split_system(conversation: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The system text, if the conversation begins with one, and the turns after it."""
    if conversation and conversation[0]["from"] == "system":
        return conversation[0]["value"], conversation[1:]
    return None, conversation


def _bos(tokenizer: Any) -> list[Piece]:
    return [Piece(tokenizer.bos_token, token=True)] if tokenizer.bos_token else []


def _end_token(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "The tokenizer has no end-of-sequence token, so a model could not learn where an answer stops. Set "
            'eos_token in its tokenizer_config.json ("eos_token": "</s>"), or choose another tokenizer.'
        )
    return tokenizer.eos_token


# --- the tokenizer's own ----------------------------------------------------------------------------------------------

TEMPLATE_SECONDS, TEMPLATE_CHARACTERS = 10, 10_000_000  # of a conversation as written
_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_MARK = "\ufdd2{}\ufdd3"  # stands for the text of a turn
_MARKS = re.compile("\ufdd2(\\d+)\ufdd3")


def chat_template(
    conversation: Sequence[Message], tokenizer: Any, options: Mapping[str, Any] | None = None
) -> list[Piece]:
    """The tokenizer's own chat template; loss on each answer as it stands, through the token that ends it.

    What the template writes around the turns is found by writing them with marks in place of their texts; so it is
    known, and not looked for, where each turn lies. What stands before an answer, an empty thought or a channel's name
    among it, is the prompt. `options` are passed to the template; `date` (YYYY-MM-DD) is what it takes for today.

    Raises UserError where the tokenizer has no chat template, where it fails, writes today's date, or leaves out,
    changes or repeats the text of a turn, and where nothing marks the end of an answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("This tokenizer has no chat template. Choose data.template=vicuna_v1 or plain.")
    chat = [{"role": _ROLES[message["from"]], "content": message["value"]} for message in conversation]
    asked = chat[-1]["role"] == "user"
    if asked:
        chat.append({"role": "assistant", "content": "?"})  # whose place shows where the prompt ends
    around = _around(chat, tokenizer, options or {})
    written = _written(_render(chat, tokenizer, options or {}), chat, around)
    ends = _end_tokens(tokenizer)
    pieces: list[Piece] = []
    done = 0  # characters of what stands between turns that belong to the answer before
    for turn, (before, text) in enumerate(zip(around, written, strict=False)):
        before = before[done:]
        done = 0
        if chat[turn]["role"] != "assistant":
            pieces.append(Piece(before + text))
            continue
        prompt = before.rstrip(" ")  # a space before the answer is part of its first token
        pieces.append(Piece(prompt))
        if asked and turn == len(chat) - 1:
            return pieces
        end = ends.match(around[turn + 1]) if ends else None
        if end is None:
            raise UserError(
                "The tokenizer's chat template ends an answer with no special token, so a model could not learn where "
                f"to stop. {_ANOTHER}"
            )
        done = end.end()
        pieces.append(Piece(before[len(prompt) :] + text + end.group(), supervised=True))
    return [*pieces, Piece(around[-1][done:])]


def _around(chat: list[dict], tokenizer: Any, options: Mapping[str, Any]) -> list[str]:
    """What the template writes before, between and after the texts of the turns: one stretch more than there are turns.

    Raises UserError unless it writes each text once, in order.
    """
    marked = [{**message, "content": _MARK.format(index)} for index, message in enumerate(chat)]
    parts = _MARKS.split(_render(marked, tokenizer, options))
    order = [int(number) for number in parts[1::2]]
    if order == list(range(len(chat))):
        return parts[::2]
    for turn in range(len(chat)):
        if order.count(turn) != 1:
            how = "leaves out" if turn not in order else "repeats"
            raise UserError(f"The tokenizer's chat template {how} {_turn(chat, turn)}.{_lists(tokenizer)} {_ANOTHER}")
    raise UserError(f"The tokenizer's chat template changes the order of the turns. {_ANOTHER}")


def _written(text: str, chat: list[dict], around: list[str]) -> list[str]:
    """The text of each turn as the template wrote it: as it stands, or without the white space around it."""
    found = []
    at = len(around[0])
    for turn, after in enumerate(around[1:]):
        content = chat[turn]["content"]
        for form in dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip())):
            if text.startswith(form + after, at):
                break
        else:
            raise UserError(
                f"The tokenizer's chat template does not write {_turn(chat, turn)} as it stands, so its tokens "
                f"would not be known. {_ANOTHER}"
            )
        found.append(form)
        at += len(form) + len(after)
    if not text.startswith(around[0]) or at != len(text):
        raise UserError(f"The tokenizer's chat template writes more when the texts are other ones. {_ANOTHER}")
    return found


def _turn(chat: list[dict], turn: int) -> str:
    """A turn in words: `answer 1`, `question 2`, `the system text`."""
    names = {"user": "question", "assistant": "answer"}
    role = chat[turn]["role"]
    return f"{names[role]} {sum(m['role'] == role for m in chat[: turn + 1])}" if role in names else "the system text"


def _render(chat: list[dict], tokenizer: Any, options: Mapping[str, Any]) -> str:
    settings = dict(options)
    day = settings.pop("date", None)
    try:
        return _apply(tokenizer, chat, _with_fixed_date(tokenizer.get_chat_template(), day), settings)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # templates raise what they like, and jinja adds its own
        if _TODAY in str(error):
            raise UserError(
                "The tokenizer's chat template writes today's date, so a model would be asked otherwise than it was "
                "trained. Fix the date: '+data.template_options.date=2024-07-26'."
            ) from error
        raise UserError(
            f"The tokenizer's chat template refuses this conversation ({reason(error)}).{_lists(tokenizer)} {_ANOTHER}"
        ) from error


def _apply(tokenizer: Any, chat: list[dict], source: str | None, settings: Mapping[str, Any]) -> str:
    """What a template writes; raises UserError if that takes too long, or is too much: it is a stranger's program."""
    endless = f"The tokenizer's chat template does not come to an end. {_ANOTHER}"
    with time_limit(TEMPLATE_SECONDS, endless):
        text = tokenizer.apply_chat_template(chat, chat_template=source, tokenize=False, **settings)
    if len(text) > TEMPLATE_CHARACTERS:
        raise UserError(endless)
    return text


_TODAY = "today is not fixed"


def _with_fixed_date(source: str, day: Any) -> str:
    """A template that takes `day` for today, and fails where it asks for a day that is not fixed."""
    if day is not None:
        try:
            fixed = date.fromisoformat(str(day))
        except ValueError as error:
            raise UserError(f"data.template_options.date={day!r} is not a day of the form 2024-07-26.") from error
        source = re.sub(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda m: repr(fixed.strftime(m[2])), source)
    return re.sub(r"\bstrftime_now\(", f"raise_exception('{_TODAY} ' ~ ", source)


def _lists(tokenizer: Any) -> str:
    """A sentence for templates that want the content of a message as a list of parts."""

    def writes(content: Any) -> bool:
        try:
            return _MARK in _apply(tokenizer, [{"role": "user", "content": content}], None, {})
        except Exception:  # whatever a template raises, it does not write this
            return False

    wants = writes([{"type": "text", "text": _MARK}]) and not writes(_MARK)
    return " It wants the content of a message as a list of parts, not as text." if wants else ""


def _end_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile(rf"\s*({'|'.join(map(re.escape, special))})") if special else None


_ANOTHER = "Choose data.template=vicuna_v1, or a tokenizer with another chat template."

TEMPLATES: dict[str, Template] = {"vicuna_v1": vicuna_v1, "llava_v1": llava_v1, "plain": plain, "chat": chat_template}
