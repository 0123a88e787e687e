"""The slow LlamaTokenizer of transformers 4.31, which the original code reads a `tokenizer.model` with.

Its ids, by a fast tokenizer that knows which characters each token came from. What the class does around special tokens
is in its settings here, and for `legacy: false` in what follows the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from vllava.errors import UserError, reading
from vllava.model.sentencepiece_model import LARGEST, SPACE, Model, pipeline, read_model

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast")  # names of the class; None: not said
RULES = "rules"  # where a saved folder says that its ids are those of the slow tokenizer
_SLOW = "LlamaTokenizer of transformers 4.31"
_NO_SPACE = f"{_SLOW}, no space before a text"
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class SlowLlama(PreTrainedTokenizerFast):
    """A tokenizer that keeps its `tokenizer.model`, and with `legacy: false` follows what that meant in 4.31.

    There the text after a special token is tokenised with a space before it, and the space is taken from its first
    token afterwards: what remains of it is looked up as it is, and is the unknown token where it is no piece.
    """

    sentencepiece: bytes | None = None  # the file tokenizer.model

    @property
    def legacy(self) -> bool:
        """Whether the space before the text after a special token stays."""
        return self.init_kwargs.get(RULES) != _SLOW or self.init_kwargs.get("legacy", True) is not False

    @legacy.setter
    def legacy(self, value: bool) -> None:  # `transformers` sets every setting that it is given
        self.init_kwargs["legacy"] = value

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **settings: Any) -> Any:
        if not self.legacy:  # 4.31 takes the mark of a space for a space
            text, text_pair = _spaced(text), _spaced(text_pair)
        return super()._encode_plus(text, text_pair, *args, **settings)

    def _convert_encoding(self, encoding: Any, *args: Any, **settings: Any) -> tuple[dict[str, Any], list]:
        found, encodings = super()._convert_encoding(encoding, *args, **settings)
        if self.legacy:
            return found, encodings
        for index, one in enumerate(encodings):
            kept = self._without_spaces(one)
            found["input_ids"][index] = [token for token in kept if token is not None]
            for name in found.keys() - {"input_ids", "length"}:
                found[name][index] = [v for v, token in zip(found[name][index], kept, strict=True) if token is not None]
            if "length" in found:
                found["length"][index] = len(found["input_ids"][index])
        return found, encodings

    def _without_spaces(self, encoding: Any) -> list[int | None]:
        """Ids with the spaces taken away that were put after special tokens; None for a token of nothing else."""
        ids, tokens = encoding.ids, encoding.tokens  # each reading of them is a copy
        masks = encoding.special_tokens_mask  # of tokens that the text does not have
        added = set(self._tokenizer.get_added_tokens_decoder())
        special = [mask or index in added for index, mask in zip(ids, masks, strict=True)]
        kept: list[int | None] = list(ids)
        for place in range(1, len(ids)):
            if not special[place - 1] or masks[place - 1] or special[place]:
                continue
            token = tokens[place]
            following = tokens[place + 1] if place + 1 < len(ids) and not special[place + 1] else ""
            if not token.startswith(SPACE) or (token + following).startswith(2 * SPACE):
                continue  # the text itself begins with a space: then 4.31 leaves both
            kept[place] = self._id_of(token[1:]) if token != SPACE else None
        return kept

    def _id_of(self, piece: str) -> int:
        index = self._tokenizer.token_to_id(piece)
        return self._tokenizer.token_to_id(self._tokenizer.model.unk_token) if index is None else index

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **settings: Any) -> list:
        """The tokens of a text."""
        ids = self(text, pair, add_special_tokens=add_special_tokens, **settings)["input_ids"]
        return self.convert_ids_to_tokens(ids)

    def save_pretrained(self, save_directory: Any, *args: Any, **settings: Any) -> tuple[str, ...]:
        """As ever, and tokenizer.model beside it; `transformers` alone opens the folder too."""
        written = super().save_pretrained(save_directory, *args, **settings)
        path = Path(save_directory, CONFIG)
        config = {**json.loads(path.read_text(encoding="utf-8")), "tokenizer_class": PreTrainedTokenizerFast.__name__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        if self.sentencepiece is not None:
            Path(save_directory, MODEL).write_bytes(self.sentencepiece)
        return written


def _spaced(text: Any) -> Any:
    """A text, or texts in lists, with spaces for their marks."""
    if isinstance(text, (list, tuple)):
        return type(text)(_spaced(one) for one in text)
    return text.replace(SPACE, " ") if isinstance(text, str) else text


def slow_llama(folder: Path, config: dict[str, Any]) -> SlowLlama:
    """The tokenizer of a tokenizer.model, with the special tokens that the files beside it name."""
    path = folder / MODEL
    name = config.get("tokenizer_class")
    if name not in LLAMA or config.get("auto_map"):
        raise UserError(
            f"The tokenizer at {folder} is a {name or 'class of its own'}: from a tokenizer.model alone only those of "
            "Llama's kind are read. Give it a tokenizer.json."
        )
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes: too large for a SentencePiece model.")
    data = path.read_bytes()
    try:
        model = read_model(data)
        backend = pipeline(model)
    except UserError as error:
        raise UserError(f"{path} {str(error).rstrip('.')}.") from error
    named, others = _special_tokens(folder, config)
    _add(folder, config, backend, model, named, others)
    template = folder / "chat_template.jinja"
    tokenizer = SlowLlama(
        tokenizer_object=backend,
        **named,
        additional_special_tokens=others,
        add_bos_token=_setting(folder, config, "add_bos_token", True),
        add_eos_token=_setting(folder, config, "add_eos_token", False),
        legacy=_setting(folder, config, "legacy", True),
        clean_up_tokenization_spaces=False,
        model_max_length=int(config.get("model_max_length") or 1e30),
        padding_side="left" if config.get("padding_side") == "left" else "right",
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template"),
        name_or_path=str(folder),
        **{RULES: _SLOW if model.prefix else _NO_SPACE},
    )
    tokenizer.sentencepiece = data
    return tokenizer


def _special_tokens(folder: Path, config: dict[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens that have a name, by it, and the others.

    As in 4.31: the class has names for three, tokenizer_config.json and then special_tokens_map.json may give others.
    One that the latter gives as a bare text swallows the white space on both sides; an object says what it swallows.
    """
    files = {CONFIG: config, "special_tokens_map.json": json_object(folder / "special_tokens_map.json")}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokens: dict[str, AddedToken | None] = {name: _token(text) for name, text in names.items()}
    others: list[AddedToken] = []
    for file, given in files.items():
        for name in _NAMES:
            if name in given:
                plain = file == CONFIG and name in ("bos_token", "eos_token", "unk_token", "pad_token")
                tokens[name] = _read_token(folder / file, name, given[name], swallows=not plain)
        more = given.get("additional_special_tokens") or []
        if not isinstance(more, list):
            raise UserError(f"{folder / file}: additional_special_tokens is not a list.")
        others = [_read_token(folder / file, "additional_special_tokens", t, True) for t in more] or others
    named = {name: token for name, token in tokens.items() if token is not None}
    if "unk_token" not in named:
        raise UserError(f"{folder}: the tokenizer has no unk_token, which its tokenizer.model needs.")
    # One text may have several names: then an object says more than a bare text, as in 4.31.
    exact = {t.content: t for t in [*named.values(), *others] if not (t.lstrip and t.rstrip)}
    return {n: exact.get(t.content, t) for n, t in named.items()}, [exact.get(t.content, t) for t in others]


def _token(text: str, swallows: bool = False) -> AddedToken:
    return AddedToken(text, lstrip=swallows, rstrip=swallows, normalized=False, special=True)


def _read_token(path: Path, name: str, given: Any, swallows: bool) -> Any:
    """A special token as the files give it: nothing, a text, or an object."""
    if given is None:
        return None
    if isinstance(given, str) and given:
        return _token(given, swallows)
    if isinstance(given, dict) and isinstance(given.get("content"), str) and given["content"]:
        sides = {side: given.get(side, False) is True for side in ("lstrip", "rstrip")}
        return AddedToken(given["content"], normalized=False, special=True, **sides)
    raise UserError(f"{path}: {name} is no token ({str(given)[:60]!r}).")


def _add(
    folder: Path,
    config: dict[str, Any],
    backend: Tokenizer,
    model: Model,
    named: dict[str, AddedToken],
    others: Sequence[AddedToken],
) -> None:
    """Add what the vocabulary lacks: added_tokens.json in the order of its ids, then the special tokens."""
    if named["unk_token"].content != model.unknown:
        raise UserError(f"{folder}: the unk_token {named['unk_token'].content!r} is not the one of its {MODEL}.")
    special = {token.content: token for token in [*named.values(), *others]}
    path = folder / "added_tokens.json"
    added = json_object(path)
    if not all(isinstance(index, int) and not isinstance(index, bool) and text for text, index in added.items()):
        raise UserError(f"{path} does not give an id to every token.")
    later = {  # transformers from 4.34 on
        given["content"]: (int(index), given)
        for index, given in _later_tokens(folder, config).items()
        if int(index) >= len(model.pieces)
    }
    for text, (index, given) in later.items():
        if text not in added:
            added[text] = index
            special.setdefault(text, _read_token(folder / CONFIG, "added_tokens_decoder", given, False))
    for text, index in sorted(added.items(), key=lambda item: item[1]):
        known = backend.token_to_id(text)
        if known is None and index == backend.get_vocab_size():
            token = special.get(text) or AddedToken(text, lstrip=True, rstrip=True, normalized=False)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        elif known != index:
            wanted = backend.get_vocab_size() if known is None else known
            raise UserError(f"{path}: the token {text!r} should have the id {wanted:,} and has {index:,}.")
    backend.add_special_tokens(list(special.values()))


def _later_tokens(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    tokens = config.get("added_tokens_decoder") or {}
    good = isinstance(tokens, dict) and all(
        index.isdecimal() and len(index) < 10 and isinstance(token, dict) and isinstance(token.get("content"), str)
        for index, token in tokens.items()
    )
    if not good:
        raise UserError(f"{folder / CONFIG}: added_tokens_decoder does not give a token to every id.")
    return tokens


def _setting(folder: Path, config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{folder / CONFIG}: {name} is {str(value)[:60]!r}, neither true nor false.")
    return default if value is None else value


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.exists():
        return {}
    with reading(path, "It should be a JSON object."):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it is a {type(found).__name__}")
    return found
