"""A SentencePiece `tokenizer.model` of Llama's kind, as a pipeline of the `tokenizers` library that gives the same ids.

The file is a protobuf message, of which we need few fields: a reader of our own is shorter than a dependency, and it
never believes a length that the file cannot hold. What we could not tokenise exactly is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from vllava.errors import UserError

SPACE = "▁"  # what a space is in a piece
# Published files have up to 5 MB, 262,144 pieces, 31 characters a piece and 600,000 merges.
LARGEST, MOST_PIECES, LONGEST, MOST_MERGES = 16 << 20, 300_000, 256, 1_000_000
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_JSON = "Give the folder a tokenizer.json (`save_pretrained` of its own tokenizer class writes one)."


class Piece(NamedTuple):
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says."""

    pieces: list[Piece]
    byte_fallback: bool  # a character that is no piece becomes its bytes, not the unknown token
    prefix: bool  # a space is put before the text

    @property
    def ids(self) -> dict[str, int]:
        """The id of every piece."""
        return {piece.text: index for index, piece in enumerate(self.pieces)}

    @property
    def unknown(self) -> str:
        """The piece for what no piece can write."""
        return next(piece.text for piece in self.pieces if piece.kind == _UNKNOWN)


def read_model(data: bytes) -> Model:
    """The model in the bytes of a file.

    Raises UserError, a sentence without a subject, where it is no such file or one of a kind that is not Llama's.
    """
    _require(len(data) <= LARGEST, f"has {len(data):,} bytes: too large for a SentencePiece model")
    try:
        pieces, trainer, normalizer = _message(data)
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(f"is not a SentencePiece model, or a damaged one ({error})") from error
    _require(bool(pieces), "is not a SentencePiece model, or an empty one")
    kind = trainer.get(3, 1)
    _require(kind == 2, f"is a {_KINDS.get(kind, kind)} model of SentencePiece; only bpe is read here. {_JSON}")
    rules = {
        "a precompiled normalisation": bool(normalizer.get(2)),
        "the removal of extra spaces": bool(normalizer.get(4, 1)),
        "spaces that are not escaped": not normalizer.get(5, 1),
        "spaces as suffixes": bool(trainer.get(24, 0)),
    }
    unlike = [name for name, asked in rules.items() if asked]
    _require(not unlike, f"asks for {' and '.join(unlike)}, which Llama's models do not. {_JSON}")
    _check(pieces, bool(trainer.get(35, 0)))
    return Model(pieces, bool(trainer.get(35, 0)), bool(normalizer.get(3, 1)))


def _check(pieces: list[Piece], byte_fallback: bool) -> None:
    texts, kinds = Counter(piece.text for piece in pieces), Counter(piece.kind for piece in pieces)
    [(most, count)] = texts.most_common(1)
    _require(count == 1, f"has the piece {most!r} {count} times")
    _require(min(kinds) >= _NORMAL and max(kinds) <= _BYTE, f"has pieces of a kind {max(kinds)} that is not known")
    _require(kinds[_UNKNOWN] == 1, f"has {kinds[_UNKNOWN]} unknown pieces instead of one")
    _require(not kinds[_USER_DEFINED] and not kinds[_UNUSED], f"has user-defined or unused pieces. {_JSON}")
    _require(all(math.isfinite(piece.score) for piece in pieces), "has a score that is not a number")
    _require(all(0 < len(piece.text) <= LONGEST for piece in pieces), "has a piece that is empty or too long")
    every = {f"<0x{byte:02X}>" for byte in range(256)}
    found = {piece.text for piece in pieces if piece.kind == _BYTE}
    _require(found == every if byte_fallback else not found, "has not one piece for each byte")
    normal = [piece for piece in pieces if piece.kind == _NORMAL]
    characters = {piece.text for piece in normal if len(piece.text) == 1}
    unreachable = [piece.text for piece in normal if not characters.issuperset(piece.text)]
    _require(not unreachable, f"has pieces of characters that are no pieces themselves, such as {unreachable[:1]}")
    # SentencePiece merges pieces of the same score from left to right, ranks cannot. It comes to the same where all of
    # them are runs of one character, as Llama's runs of spaces are: there the longest is made first.
    runs: dict[float, set[str]] = {}
    for piece in normal:
        if len(piece.text) > 1:
            runs.setdefault(piece.score, set()).add(piece.text)
    tied = [texts for texts in runs.values() if len(texts) > 1 and len({c for text in texts for c in text}) > 1]
    _require(not tied, f"has pieces of the same score, such as {sorted(tied[0])[:2] if tied else ()}. {_JSON}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


def pipeline(model: Model) -> Tokenizer:
    """The tokenizer, special tokens and post-processing aside."""
    normalise = [normalizers.Prepend(SPACE)] if model.prefix else []
    backend = Tokenizer(
        BPE(
            vocab=model.ids,
            merges=_merges(model.pieces),
            unk_token=model.unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    backend.normalizer = normalizers.Sequence([*normalise, normalizers.Replace(" ", SPACE)])
    if not any(one != SPACE == next_one for piece in model.pieces for one, next_one in pairwise(piece.text)):
        # No piece reaches over the beginning of a word, so words can be merged one by one: in linear time.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    end = [decoders.Strip(" ", left=1)] if model.prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return backend


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the piece of the highest score first, as SentencePiece merges."""
    normal = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    ranked = []
    for text, score in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                ranked.append((-score, -len(left), left, right))
        _require(len(ranked) <= MOST_MERGES, f"has pieces that can be made in more than {MOST_MERGES:,} ways")
    return [(left, right) for *_, left, right in sorted(ranked)]


# --- protobuf ---------------------------------------------------------------------------------------------------------


def _message(data: bytes) -> tuple[list[Piece], dict[int, int], dict[int, int]]:
    """The pieces, and the numbers among the settings of trainer and normaliser (for a text, its length) by field."""
    pieces: list[Piece] = []
    settings: dict[int, dict[int, int]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) == MOST_PIECES:
                raise ValueError(f"more than {MOST_PIECES:,} pieces")
            fields = dict(_fields(_bytes(value)))
            [score] = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
            pieces.append(Piece(_bytes(fields.get(1, b"")).decode(), score, _number(fields.get(3, _NORMAL))))
        elif number in settings:
            settings[number] |= {n: v if isinstance(v, int) else len(v) for n, v in _fields(_bytes(value))}
    return pieces, settings[2], settings[3]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: a number for a varint, else the bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"byte {place} begins no field")
        if not number or length > len(data) - place:
            raise ValueError(f"a field at byte {place} claims {length:,} bytes")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits per byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"a number at byte {place} has no end")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a text belongs")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a text where a number belongs")
    return value
