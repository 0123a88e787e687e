"""Tokenizers: any fast one of `transformers`, and those of the paper's models, which are published otherwise.

Llama 2, Vicuna and Video-LLaVA come with a SentencePiece `tokenizer.model`, which the original code reads with a slow
tokenizer: such a folder gives its ids here (slow_llama.py). A folder with a tokenizer.json is read as that file stands.
"""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from vllava.errors import UserError, reading
from vllava.model.slow_llama import CONFIG, LLAMA, MODEL, RULES, SlowLlama, json_object, slow_llama

JSON = "tokenizer.json"
FILES = ["*.json", "*.jinja", "*.txt", MODEL]  # of a tokenizer, on a hub
_MOST_IDS = 10_000_000  # embeddings are made for every id: more is a damaged or hostile file


def load_tokenizer(path: str) -> Any:
    """The tokenizer saved at `path`, a folder or a hub id.

    Code that lies in the folder is never run, and nothing is asked at the terminal. Raises UserError if there is no
    tokenizer, if its files are damaged, or if it is not a fast one.
    """
    folder = tokenizer_folder(path)
    config = json_object(folder / CONFIG)
    _check_settings(folder, config)
    with reading(folder / JSON, "Is it complete?"):
        _check_charsmaps(json_object(folder / JSON).get("normalizer"))
    with reading(f"The tokenizer at {path}", "Is it complete, and of a kind that transformers knows?"):
        tokenizer = _guarded(_read, folder, config)
        if not tokenizer.is_fast:
            raise UserError(f"The tokenizer at {path} is not a fast one: labels need its character offsets.")
        _guarded(tokenizer, "a b")  # some faults show only here, and should not do so in the middle of the data
        largest = max(_guarded(tokenizer.get_vocab).values(), default=-1)
        if not 0 <= largest < _MOST_IDS:
            raise UserError(f"The tokenizer at {path} has no tokens, or the id {largest:,}, which is no id of a token.")
    return tokenizer


def tokenizer_folder(path: str) -> Path:
    """The folder of a tokenizer; one on a hub is downloaded."""
    folder = Path(path)
    if not str(path).strip() or "\0" in str(path):
        raise UserError("No tokenizer is named: give a folder or a hub id.")
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"No tokenizer at {path}: it is a file. Give the folder it lies in.")
    if len(folder.parts) > 2 or folder.is_absolute() or Path(folder.parts[0]).exists():
        raise UserError(f"No tokenizer at {path}: there is no such folder.")
    try:
        return Path(snapshot_download(str(path), allow_patterns=FILES))
    except Exception as error:  # of the hub, of the network, of its cache
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"No tokenizer at {path}: there is no such folder, nor on the hub ({lines[0]}).") from error


def _check_settings(folder: Path, config: dict[str, Any]) -> None:
    length, template = config.get("model_max_length"), config.get("chat_template")
    if length is not None and (not isinstance(length, (int, float)) or not 0 < length < float("inf")):
        raise UserError(f"{folder / CONFIG}: model_max_length is {str(length)[:60]!r}, not a length.")
    if not isinstance(template, (str, list, dict, type(None))):
        raise UserError(f"{folder / CONFIG}: chat_template is {str(template)[:60]!r}, not a template.")


def _check_charsmaps(normaliser: Any) -> None:
    """Raises ValueError for a table that claims more than it holds: allocating it would end the process."""
    if isinstance(normaliser, list):
        for one in normaliser:
            _check_charsmaps(one)
    elif isinstance(normaliser, dict):
        _check_charsmaps([value for value in normaliser.values() if isinstance(value, (list, dict))])
        table = b64decode(normaliser.get("precompiled_charsmap") or "AAAAAA==")
        if int.from_bytes(table[:4], "little") > len(table) - 4:
            raise ValueError("its precompiled_charsmap claims more than it holds")


def _guarded(call: Any, *arguments: Any) -> Any:
    """A call into the tokenizers library, whose panics are no Exception: they become one."""
    try:
        return call(*arguments)
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(f"the tokenizers library gives up: {error}") from error
        raise


def _read(folder: Path, config: dict[str, Any]) -> Any:
    """A local folder's tokenizer."""
    name = config.get("tokenizer_class")
    has_model, has_json = (folder / MODEL).is_file(), (folder / JSON).is_file()
    if has_model and not has_json:
        return slow_llama(folder, config)
    if not has_json or (name not in LLAMA[1:] and RULES not in config):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if not has_json or type(tokenizer).__name__ not in LLAMA:
            return tokenizer
    # The Llama class of transformers 5 puts a normaliser of its own in the place of the file's.
    tokenizer = SlowLlama.from_pretrained(folder, local_files_only=True)
    tokenizer.sentencepiece = (folder / MODEL).read_bytes() if has_model else None
    return tokenizer
