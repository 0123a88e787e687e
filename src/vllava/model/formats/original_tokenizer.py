"""A tokenizer's files in the form of transformers 4.31, whose slow LlamaTokenizer the original code opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllava.errors import UserError
from vllava.model.sentencepiece_model import read_model
from vllava.model.slow_llama import MODEL

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def write_original_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    """The files of a tokenizer; returns, in words, what the original cannot open."""
    data = getattr(tokenizer, "sentencepiece", None)
    added = _added(tokenizer, data) if data else None
    if data is None or added is None:
        tokenizer.save_pretrained(folder)
        return [
            f"its tokenizer: the original reads a {MODEL} of SentencePiece, and this model's tokenizer has none of its "
            "own vocabulary. The tokenizer.json that is here instead is read by vllava and by transformers."
        ]
    tokens = tokenizer.added_tokens_decoder
    objects = {token.content: _object(token) for token in tokens.values()}
    named = {name: getattr(tokenizer, name, None) for name in _NAMED}
    special = {name: objects.get(text, text) for name, text in named.items() if text is not None}
    others = [objects[t.content] for t in tokens.values() if t.special and t.content not in named.values()]
    ids = tokenizer("a")["input_ids"]
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": tokenizer.init_kwargs.get("legacy", True) is not False,
        "add_bos_token": ids[0] == tokenizer.bos_token_id,
        "add_eos_token": ids[-1] == tokenizer.eos_token_id,
        **{name: _marked(objects.get(named[name])) for name in ("bos_token", "eos_token", "unk_token")},
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "sp_model_kwargs": {},
        **({"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}),
    }
    if others:
        special["additional_special_tokens"] = others
    _write(folder / "tokenizer_config.json", settings)
    _write(folder / "special_tokens_map.json", special)
    if added:
        _write(folder / "added_tokens.json", added)
    (folder / MODEL).write_bytes(data)
    return []


def _added(tokenizer: Any, data: bytes) -> dict[str, int] | None:
    """The tokens after those of the tokenizer.model, by id; None where the two are not of one vocabulary."""
    try:
        pieces = read_model(data).ids
    except UserError:
        return None
    vocabulary = tokenizer.get_vocab()
    if any(vocabulary.get(piece) != index for piece, index in pieces.items()):
        return None
    more = dict(sorted((item for item in vocabulary.items() if item[0] not in pieces), key=lambda item: item[1]))
    return more if list(more.values()) == list(range(len(pieces), len(vocabulary))) else None


def _object(token: Any) -> dict[str, Any]:
    sides = {"lstrip": token.lstrip, "normalized": False, "rstrip": token.rstrip, "single_word": False}
    return {"content": token.content, **sides}


def _marked(token: dict[str, Any] | None) -> dict[str, Any] | None:
    return token and {"__type": "AddedToken", **token}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
