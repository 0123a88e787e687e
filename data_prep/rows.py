"""A row of annotations becomes a record and the media it names, or is rejected with a reason."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.dataset import Dataset
from data_prep.references import MediaRef, field, named_media, reference, video_by_id
from data_prep.turns import PartMedium, read_turns
from vllava.batch import MEDIA_KINDS
from vllava.conversation import Message, media_in, placeholders, read_conversation
from vllava.errors import UserError

__all__ = ["Draft", "MediaRef", "draft"]


@dataclass(frozen=True)
class Draft:
    """What a row becomes but for its media files.

    record: {"id" where the row has one, "source", "conversations", "question" where given}, ready for KEY.json;
    conversations are in LLaVA's form (from/value) with a placeholder for each medium.
    media: in placeholder order. certain: whether a reader cannot take the placeholders otherwise, as it might where the
    text shows more of them than there are media.
    """

    record: dict[str, Any]
    media: list[MediaRef]
    certain: bool


def draft(row: Any, dataset: Dataset) -> Draft:
    """The record and media of a row; raises UserError with the reason for a row that is none. Opens no file.

    What is accepted is read again as it is here: by `vllava.data.record.parse`, with the same turns and media. Where
    that is not `certain` it has to be tried.
    """
    if not isinstance(row, dict):
        raise UserError(f"the row is not an object but {type(row).__name__}")
    turns, parts = read_turns(row, dataset)
    system = field(row, dataset.fields.system)
    conversation, _ = read_conversation({"conversations": turns, "system": system})
    _check_answers(conversation, dataset)
    media = _media(row, parts, dataset)
    conversation, kinds = _fitted(conversation, media)
    left = {kind: iter(refs) for kind, refs in media.items()}
    record: dict[str, Any] = {} if (id_ := _id(row, dataset)) is None else {"id": id_}
    record |= {"source": dataset.source or dataset.name, "conversations": conversation}
    if isinstance(row.get("question"), dict):
        record["question"] = row["question"]
    certain = "question" not in record and len(placeholders(conversation)) == len(kinds)
    return Draft(record, [next(left[kind]) for kind in kinds], certain)


def _id(row: Mapping[str, Any], dataset: Dataset) -> str | int | None:
    """The row's id; whatever is neither a number nor a text is written as one."""
    value = next((row[name] for name in dataset.fields.id if row.get(name) is not None), None)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    return str(value).encode(errors="backslashreplace").decode()


def _check_answers(conversation: Sequence[Message], dataset: Dataset) -> None:
    answers = [(number, turn) for number, turn in enumerate(conversation, 1) if turn["from"] == "gpt"]
    if not answers and not dataset.unanswered:
        raise UserError("no token of the conversation is supervised: it has no answer")
    for number, turn in answers:
        if not turn["value"].strip():
            raise UserError(f"turn {number} is an empty answer")


# --- media ------------------------------------------------------------------------------------------------------------


def _media(row: Mapping[str, Any], parts: Sequence[PartMedium], dataset: Dataset) -> dict[str, list[MediaRef]]:
    """The media of a row by kind, in order, whether its fields or the parts of its turns name them."""
    named = named_media(row, dataset)
    in_parts: dict[str, list[MediaRef]] = {kind: [] for kind in MEDIA_KINDS}
    for kind, value in parts:
        if value is not None:
            in_parts[kind].append(reference(kind, value, dataset, len(in_parts[kind]) + 1))
    if not any(in_parts.values()):
        if parts and not any(named.values()):
            raise UserError(f"a turn has a part that is {_some(parts[0][0])}, and nothing names its file")
        return named if any(named.values()) else {**named, "video": video_by_id(row, dataset)}
    if sum(map(len, in_parts.values())) < len(parts):
        raise UserError("some media of the turns name their file and others do not: name all of them, or none")
    for kind in MEDIA_KINDS:
        if named[kind] and named[kind] != in_parts[kind]:
            raise UserError(f"the row names {kind}s twice, in its turns and beside them, and not the same")
    return in_parts


def _fitted(conversation: list[Message], media: Mapping[str, Sequence[MediaRef]]) -> tuple[list[Message], list[str]]:
    """The conversation with a placeholder for each medium, and the kinds in placeholder order.

    Accepted beside placeholders that fit: none at all (media of one kind go before the first question), and those of
    the other kind where all media are of one (`<image>` for a video, once or once for each frame). Raises UserError for
    what could mean two things.
    """
    given = [kind for kind in MEDIA_KINDS for _ in media[kind]]
    if not given:
        _check_text_only(conversation)
        return conversation, []
    shown = [kind for _, kind in placeholders(conversation)]
    if len(set(given)) == 1 and given[0] not in shown:
        conversation = _of_one_kind(conversation, given[0], len(given), len(shown))
    kinds = media_in(conversation, given)
    if sorted(kinds) != given:
        texts = ", ".join(f"<{kind}>" for kind in kinds)
        raise UserError(f"placeholders and media differ: the text shows {texts}, the sample has {', '.join(given)}")
    return conversation, kinds


def _of_one_kind(conversation: list[Message], kind: str, number: int, shown: int) -> list[Message]:
    """The conversation with placeholders of `kind`, where it shows none of them but maybe some of the other kind."""
    mark = f"<{kind}>"
    other = next(f"<{k}>" for k in MEDIA_KINDS if k != kind)
    if not shown:
        first = next(index for index, turn in enumerate(conversation) if turn["from"] == "human")
        text = "\n".join([*[mark] * number, *([conversation[first]["value"]] if conversation[first]["value"] else [])])
        return [*conversation[:first], {**conversation[first], "value": text}, *conversation[first + 1 :]]
    if shown == number:
        return [_replaced(turn, other, mark) for turn in conversation]
    run = re.compile(rf"{other}(?:\s*{other})+")
    if kind == "video" and number == 1 and sum(len(run.findall(t["value"])) for t in conversation) == 1:
        merged = [{**t, "value": run.sub(other, t["value"])} if t["from"] == "human" else t for t in conversation]
        return [_replaced(turn, other, mark) for turn in merged]
    return conversation


def _replaced(turn: Message, old: str, new: str) -> Message:
    return {**turn, "value": turn["value"].replace(old, new)} if turn["from"] == "human" else turn


def _check_text_only(conversation: Sequence[Message]) -> None:
    """Raises UserError where a row without media shows one as LLaVA's data do: on a line of its own, first or last.

    Elsewhere `<image>` is text (HTML).
    """
    for index, kind in placeholders(conversation):
        text = conversation[index]["value"].strip()
        after, before = text.removeprefix(f"<{kind}>").lstrip(" \t\r"), text.removesuffix(f"<{kind}>").rstrip(" \t\r")
        alone = (after != text and after[:1] in "\n") or (before != text and before[-1:] in "\n")
        if alone and f"</{kind}>" not in text:
            raise UserError(
                f"placeholders and media differ: the text shows <{kind}> in turn {index + 1}, the row names none"
            )


def _some(kind: str) -> str:
    return "an image" if kind == "image" else "a video"
