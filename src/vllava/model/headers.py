"""What a file of weights says it holds, checked against the file itself before anything is allocated for it.

A layout is a mapping from names to tensors on the meta device: shapes and types without contents.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllava.errors import UserError, reading

LARGEST_JSON = 16 << 20  # bytes; the index of a published model of 600 billion parameters has 9 MB
_LARGEST_HEADER = 8 << 20  # bytes, of one safetensors file: some 50,000 tensors
_SHARED = 8  # how often a .bin file may use the same numbers again: tied embeddings do, once or twice
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises UserError that names the file."""
    with reading(path, "It has to be a JSON object."):
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise UserError(f"{path} has {size:,} bytes; a file of settings has at most {LARGEST_JSON:,}.")
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise UserError(f"{path} holds a {type(found).__name__} where a JSON object is expected.")
        return found


def read_layout(path: Path) -> dict[str, Tensor]:
    """The layout of a .safetensors or .bin file; raises UserError where the file does not hold what it announces."""
    with reading(path, "Is it a complete file of tensors?"):
        return _safetensors_layout(path) if path.suffix == ".safetensors" else _pickled_layout(path)


def _safetensors_layout(path: Path) -> dict[str, Tensor]:
    """By the format's description: 8 bytes of length, a JSON header, then the tensors' bytes without gaps."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"it announces a header of {length:,} bytes and has {size:,}")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    layout = {}
    spans = []
    for name, entry in header.items():
        shape, dtype, (begin, end) = entry["shape"], DTYPES.get(entry["dtype"]), entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"tensor {name!r} is of an unknown type, {str(entry['dtype'])[:20]}")
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has sizes that are no numbers, or negative")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
        spans.append((begin, end))
        if end > size - 8 - length:
            raise ValueError(f"tensor {name!r} ends at byte {end:,} of {size - 8 - length:,}")
        layout[name] = torch.empty(shape, dtype=dtype, device="meta")
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise ValueError(f"its tensors overlap, or leave a gap at byte {min(begin, place):,}")
        place = end
    if place != size - 8 - length:
        raise ValueError(f"its tensors end at byte {place:,} of {size - 8 - length:,}")
    return layout


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _pickled_layout(path: Path) -> dict[str, Tensor]:
    """By the zip archive's own list, and by what an unpickler that knows nothing but tensors finds."""
    if not zipfile.is_zipfile(path):  # as torch wrote before version 1.6, without a list to check
        return {name: value.to("meta") for name, value in only_tensors(load_pickled(path)).items()}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(
        member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size for member in members
    ):
        raise ValueError("its contents are compressed, as torch.save never does")
    held = Counter(member.file_size for member in members if "/data/" in member.filename)
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its contents are larger than the file")
    layout = only_tensors(load_pickled(path, "meta"))
    storages = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in layout.values()}
    if Counter(storages.values()) - held:
        raise ValueError("it announces tensors of other sizes than it holds")
    used = sum(value.numel() * value.element_size() for value in layout.values())
    if used > _SHARED * sum(storages.values()):
        raise ValueError(f"its tensors have {used:,} bytes, made of {sum(storages.values()):,}")
    return layout


def load_pickled(path: Path, device: str = "cpu") -> Any:
    """What a .bin file holds; nothing but tensors is unpickled. Mapped rather than read, if it can be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions of pickle
            mapped = device == "cpu" and zipfile.is_zipfile(path)
            return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds something else than tensors: pickled program code is never run here. "
            "Take the model's .safetensors file."
        ) from error


def only_tensors(found: Any) -> dict[str, Tensor]:
    """A state dict with plain tensors; raises ValueError for anything else."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
        if not isinstance(name, str) or not plain:
            raise ValueError(f"{str(name)[:80]!r} is no plain tensor")
    return {name: value.detach() for name, value in found.items()}
