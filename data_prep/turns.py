"""The conversation of a row, in whatever form it is written, as turns of text with the media that turns name."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.dataset import Dataset
from data_prep.references import field, filled
from vllava.conversation import MAX_TURNS
from vllava.errors import UserError, reason

Turn = dict[str, Any]  # {"from", "value"}
PartMedium = tuple[str, Any]  # its kind, and what names it: None where the row's fields do

PLACEHOLDER = re.compile(r"<(image|video)>")
_HUMAN, _GPT = ("human", "user"), ("gpt", "assistant")
_KNOWN = {*_HUMAN, *_GPT, "system"}
_TEXT_PARTS = {"text", "input_text", "output_text"}
_MEDIUM_PARTS = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video", "input_video": "video", "video_file": "video",
}  # fmt: skip


def read_turns(row: Mapping[str, Any], dataset: Dataset) -> tuple[Any, list[PartMedium]]:
    """The turns of a row, with a placeholder for each medium that a part of a turn is, and these media in order.

    The turns are for `vllava.conversation.read_conversation` to judge: what is no turn is passed on as it is. Raises
    UserError for a row without a conversation, and for parts that are neither text nor media.
    """
    turns = field(row, dataset.fields.conversations)
    if turns is None and any(row.get(name) == [] for name in dataset.fields.conversations):
        return [], []
    if turns is None:
        turns = _asked_and_answered(row, dataset)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a column of JSON
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the conversation is a text that is no JSON ({reason(error)})") from error
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        turns = _from_columns(turns)
    if not isinstance(turns, list) or len(turns) > MAX_TURNS:
        return turns, []
    media: list[PartMedium] = []
    read = [_turn(number, turn, dataset, media) for number, turn in enumerate(turns, 1)]
    return _marked(read, media), media


def _from_columns(turns: Mapping[str, list[Any]]) -> Any:
    """Turns that a table holds as columns: {"from": [...], "value": [...]}."""
    if len({len(column) for column in turns.values()}) != 1:
        raise UserError("the conversation is of columns of different lengths")
    return [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]


# --- questions and answers --------------------------------------------------------------------------------------------


def _asked_and_answered(row: Mapping[str, Any], dataset: Dataset) -> list[Turn]:
    """The turns of a row that has a question and an answer, or a list of such pairs."""
    pairs = field(row, dataset.fields.pairs)
    if pairs is None:
        return _pair(row, dataset, "the row")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise UserError("the questions and answers of the row are no list of objects")
    return [turn for number, pair in enumerate(pairs, 1) for turn in _pair(pair, dataset, f"pair {number}")]


def _pair(row: Mapping[str, Any], dataset: Dataset, what: str) -> list[Turn]:
    asked, answered = dataset.fields.question, dataset.fields.answer
    question, answer = (_scalar(field(row, names), what, names) for names in (asked, answered))
    if question is None and answer is None:
        if {*asked, *answered} & set(row):
            raise UserError(f"{what} has no question and no answer: they are empty")
        raise UserError(
            'the record has no conversation: it needs "conversations" or "messages", or a question and an answer '
            f"({', '.join(asked)}; {', '.join(answered)})"
        )
    if answer is None:
        if dataset.unanswered:
            return [{"from": "human", "value": question}]
        raise UserError(f"{what} has a question and no answer in {_or(answered)}")
    if question is None:
        if not dataset.instructions:
            raise UserError(f"{what} has an answer and no question in {_or(asked)}; for captions set instructions=[…]")
        question = dataset.instructions[zlib.crc32(answer.encode(errors="surrogatepass")) % len(dataset.instructions)]
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _scalar(value: Any, what: str, names: Sequence[str]) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, dict):  # the type and options of a question, not its text
        return None
    raise UserError(f"{what}: {_or(names)} is not a text but {type(value).__name__}")


def _or(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


# --- turns of parts ---------------------------------------------------------------------------------------------------


def _turn(number: int, turn: Any, dataset: Dataset, media: list[PartMedium]) -> Any:
    """A turn as {"from", "value"}, its parts joined; the media of its parts are added to `media`."""
    if not isinstance(turn, dict):
        return turn
    speaker = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
    if isinstance(speaker, str):
        speaker = dataset.speakers.get(speaker, speaker)
        plain = speaker.strip().lower()
        speaker = plain if plain in _KNOWN else speaker
    content = next((turn[key] for key in ("value", "content") if turn.get(key) is not None), None)
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return {"from": speaker, "value": content}
    parts = [_part(number, part) for part in content]
    shown = [part for part in parts if isinstance(part, tuple)]
    if shown and speaker not in _HUMAN:
        raise UserError(f"turn {number} is not the human's and holds a medium: only human turns may show media")
    media.extend(shown)
    return {"from": speaker, "value": parts}


def _part(number: int, part: Any) -> str | PartMedium:
    """A part of a turn: its text, or its medium."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise UserError(f"turn {number} holds a part that is neither text nor an object but {type(part).__name__}")
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind is None:
        kind = next((key for key in _MEDIUM_PARTS if key in part), "text" if "text" in part else None)
    if kind in _TEXT_PARTS:
        text = part.get("text", "")
        if not isinstance(text, str):
            raise UserError(f"turn {number} holds a part whose text is not a text but {type(text).__name__}")
        return text
    if kind not in _MEDIUM_PARTS:
        raise UserError(f"turn {number} holds a part of the type {str(kind)[:40]!r}; parts are: text, image, video")
    return _MEDIUM_PARTS[kind], _part_source(kind, part)


def _part_source(kind: str, part: Mapping[str, Any]) -> Any:
    """What names the medium of a part: a name, a URI, bytes; None where nothing does."""
    keys = (kind, _MEDIUM_PARTS[kind], f"{_MEDIUM_PARTS[kind]}_url", "path", "url", "bytes", "source", "data")
    value = next((part[key] for key in keys if filled(part.get(key))), None)
    if isinstance(value, dict) and value.get("type") == "base64" and isinstance(value.get("data"), str):
        return f"data:;base64,{value['data']}"
    return value


def _marked(turns: list[Any], media: Sequence[PartMedium]) -> list[Any]:
    """Turns of parts joined to texts, with a placeholder for each medium.

    Where the texts already show as many placeholders as there are media in parts, those say where the media stand.
    """
    if not any(map(_in_parts, turns)):
        return turns
    texts = "\n".join(part for turn in turns if _in_parts(turn) for part in turn["value"] if isinstance(part, str))
    shown = Counter(PLACEHOLDER.findall(texts)) if media else Counter()
    write = shown != Counter(kind for kind, _ in media)
    return [{**turn, "value": _joined(turn["value"], write)} if _in_parts(turn) else turn for turn in turns]


def _in_parts(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn["value"], list)


def _joined(parts: Sequence[str | PartMedium], write: bool) -> str:
    """One text: media stand on lines of their own, as in LLaVA's data; texts follow one another as they are."""
    text = ""
    medium_before = False
    for part in parts:
        if isinstance(part, tuple):
            if write:
                text += ("\n" if text and not text[-1].isspace() else "") + f"<{part[0]}>"
                medium_before = True
        elif part:
            text += ("\n" if medium_before and not part[0].isspace() else "") + part
            medium_before = False
    return text
