"""A causal LM from a checkpoint of `transformers`: read strictly, and nothing of the checkpoint's own code is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from vllava.errors import UserError, reading
from vllava.model.attention import PACKED
from vllava.model.files import FLOATS, MOST_LAYERS, Checkpoint, refuse, require_same, warn_of_no_numbers
from vllava.model.headers import read_json

_LARGEST_SIZE = 1 << 24  # of anything a config.json counts; the largest vocabularies have a few 100,000 words
_COUNTED = re.compile(
    r"^(num|n)_(?!param)|(^|_)(size|dim|heads|embd|inner|positions?|embeddings|rank|layers|depth)(_|$)"
)
_POSITIVE = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
_REPEATED = re.compile(r"^(num|n)_.*(layers?|experts)$|layers$|^depth$")  # each costs time to build
_CONSTANTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def read_llm(checkpoint: Checkpoint, path: str, as_stored: bool = False, **settings: Any) -> PreTrainedModel:
    """The language model of a checkpoint in float32, with attention over packed rows; `path` is what the user said.

    With `as_stored` the weights stay of the type that the files have, if it is one, and mapped: processes share the
    pages, and memory is taken when a weight is cast or moved.

    Raises UserError, before the weights are read where the files' headers show it, for a checkpoint that is not one
    of a causal LM, is quantised, needs code of its own, or whose tensors are missing, left over, or of another shape
    or type.
    """
    config = read_config(checkpoint, path)
    with reading(f"The language model at {path}"):
        with torch.device("meta"):
            wanted = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, trust_remote_code=False)
        require_room(checkpoint, wanted)
        tensors = checkpoint.tensors()
        with quiet():
            # By its class and from tensors: given the folder, `transformers` would also follow what an
            # adapter_config.json or other files in it name.
            llm, report = type(wanted).from_pretrained(
                None,
                config=wanted.config,
                state_dict=tensors,
                attn_implementation=PACKED,
                dtype=_stored_type(tensors) if as_stored else torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # we judge the report ourselves
                generation_config=_generation_config(checkpoint.folder),
                **settings,
            )
        judge(report, f"{path} does not fit {type(llm).__name__}")
    llm.config.name_or_path, llm.config.dtype = path, torch.float32  # however it is stored
    warn_of_no_numbers(llm, checkpoint.folder)
    return llm


def _stored_type(tensors: dict[str, Tensor]) -> torch.dtype:
    """The type of all weights, or float32 where they are of several."""
    types = {value.dtype for value in tensors.values() if value.dtype in FLOATS}
    return types.pop() if len(types) == 1 else torch.float32


def read_config(checkpoint: Checkpoint, path: str) -> PreTrainedConfig:
    """The settings of a checkpoint's language model; raises UserError where they are none we can take."""
    given = checkpoint.config
    checkpoint.require(
        not (checkpoint.folder / "adapter_config.json").is_file(),
        "holds adapters (adapter_config.json): merge them into their model first",
    )
    checkpoint.require(
        not given.get("quantization_config"),
        "is quantised, and such weights cannot be trained: give the model it was made from; model.llm.four_bit=true "
        "quantises while loading",
    )
    require_sizes(checkpoint)
    try:
        with reading(f"The settings {checkpoint.folder / 'config.json'}"):
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        if type(config) in AutoModelForCausalLM._model_mapping:
            return config
    except UserError:
        if not given.get("auto_map"):
            raise
    if given.get("auto_map"):
        raise UserError(
            f"{path} needs program code of its own (auto_map in its config.json), and code that comes with a "
            "checkpoint is never run here. Choose a model that transformers knows by itself."
        )
    raise UserError(
        f"No language model at {path}: a {given.get('model_type')} is not among the causal LMs of transformers."
    )


def require_sizes(checkpoint: Checkpoint) -> None:
    """Raises UserError that names a size in config.json which no model has, before anything of it is built."""
    for key, value in _sizes(checkpoint.config):
        most = MOST_LAYERS if _REPEATED.search(key) else _LARGEST_SIZE
        checkpoint.require(
            value <= most and (value > 0 or key not in _POSITIVE),
            f"has {key}={str(value)[:40]} in its config.json, where at most {most:,} is expected and more than none",
        )


def _sizes(node: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers in a JSON value that say how large or how many something is, each under its nearest name."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _sizes(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _sizes(value, key)
    elif type(node) is int and _COUNTED.search(key):
        yield key, node


def require_room(checkpoint: Checkpoint, wanted: nn.Module) -> None:
    """Raises UserError where a model would be much larger than its weights, or these are no fractions."""
    expected, layout = wanted.state_dict(), checkpoint.layout
    otherwise = f"{checkpoint.folder} does not fit {type(wanted).__name__}"
    held = sum(value.numel() for value in layout.values())
    if sum(p.numel() for p in wanted.parameters()) > 4 * held + (1 << 24):
        require_same(layout, expected, otherwise)
        raise UserError(f"{otherwise}: config.json describes a model much larger than its weights.")
    prefix = getattr(wanted, "base_model_prefix", "") + "."
    whole = [
        f"{str(value.dtype).removeprefix('torch.')}, expected numbers of 16 bits or more: {name}"
        for name, value in layout.items()
        if value.dtype not in FLOATS
        and any(_floating(expected.get(alias)) for alias in (name, prefix + name, name.removeprefix(prefix)))
    ]
    refuse(otherwise, [], [], whole)


def _floating(value: Tensor | None) -> bool:
    return value is not None and value.dtype in FLOATS


def judge(report: dict[str, Any], otherwise: str, ignored: tuple[str, ...] = ()) -> None:
    """Raises UserError `otherwise: …` for what `transformers` says is missing, left over or of another shape.

    ignored: parts of the names that may be left over.
    """
    left_over = [
        name for name in report["unexpected_keys"] if not any(part in name for part in (*_CONSTANTS, *ignored))
    ]
    refuse(
        otherwise,
        sorted(report["missing_keys"]),
        sorted(left_over),
        [f"shape {tuple(f)}, expected {tuple(w)}: {name}" for name, f, w in sorted(report["mismatched_keys"])],
    )


def _generation_config(folder: Path) -> GenerationConfig | None:
    """How a checkpoint says it ends its answers, if it does."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    with reading(path):
        return GenerationConfig.from_dict(read_json(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notices and bars of `transformers`: what it tells of a checkpoint we judge, and say, ourselves."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
