"""Where a row says that its media are: names of files, pictures and videos in the row itself."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from data_prep.dataset import Dataset
from vllava.batch import MEDIA_KINDS
from vllava.errors import UserError, reason

PATTERN = re.compile(r"\{(\w+)(?::([^{}]*))?\}")  # {name} or {number:06d} in a field's name
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+(?=://)|data(?=:)")
_ENCODED = re.compile(
    r"(?:/9j/|iVBOR|UklGR|R0lGOD|AAAA)[A-Za-z0-9+/=\s]{1000,}"
)  # a JPEG, PNG, WebP, GIF, MP4 in base64


@dataclass(frozen=True)
class MediaRef:
    """A medium as a row names it: a path or the bytes themselves."""

    kind: str  # image | video
    path: (
        Path | None
    )  # as named, under the data set's folder; may lack its extension, or have another or upper-case one
    data: bytes | None
    name: str  # for messages: the name in the row, or "image 1 of the row" for bytes


def filled(value: Any) -> bool:
    """Whether a field holds something: not null, an empty text or list, NaN, or a picture of which both are null."""
    if value is None or value == "" or value == [] or (isinstance(value, float) and value != value):
        return False
    return any(map(filled, value.values())) if isinstance(value, dict) else True


def field(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What a row holds under one of the names, or None. Raises UserError where it holds two different things."""
    found: Any = None
    under = ""
    for name in names:
        value = _patterned(row, name) if "{" in name else row.get(name)
        if value is None or not filled(value):
            continue
        if found is not None and _list(found) != _list(value):
            raise UserError(f"the row holds two different things under {under!r} and {name!r}: one of them is meant")
        found, under = (value, name) if found is None else (found, under)
    return found


def named_media(row: Mapping[str, Any], dataset: Dataset) -> dict[str, list[MediaRef]]:
    """The media that a row names in its fields, by kind, in order; raises UserError for names that are none."""
    names = {"image": dataset.fields.image, "video": dataset.fields.video}
    return {
        kind: [reference(kind, value, dataset, index) for index, value in enumerate(_list(field(row, names[kind])), 1)]
        for kind in MEDIA_KINDS
    }


def video_by_id(row: Mapping[str, Any], dataset: Dataset) -> list[MediaRef]:
    """The video that a row names by an id, if it does: a file of that name with whatever extension."""
    name = next((row[name] for name in dataset.fields.video_id if filled(row.get(name))), None)
    if name is None:
        return []
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise UserError(f"the id of the row's video is no text but {type(name).__name__}")
    return [
        MediaRef("video", _place("video", str(name), dataset.videos_by_id or dataset.videos, dataset), None, str(name))
    ]


def reference(kind: str, value: Any, dataset: Dataset, number: int) -> MediaRef:
    """The medium that a value stands for: a name, a URI, bytes, or a mapping with one of them.

    Raises UserError for an address on a network, a name that leads out of the data set's folder, bytes that are none.
    """
    name = f"{kind} {number} of the row"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url", "filename") if value.get(key) is not None), None)
    if isinstance(value, (bytes, bytearray, memoryview)):
        if not len(value):
            raise UserError(f"{name} is empty: it has no bytes")
        return MediaRef(kind, None, bytes(value), name)
    if isinstance(value, list):
        raise UserError(f"{name} is a list: frames cannot be named one by one, name the file of the video")
    if not isinstance(value, str) or not value:
        raise UserError(f"{name} is no name of a file but {type(value).__name__}")
    scheme = _SCHEME.match(value)
    if scheme and scheme[0].lower() == "data":
        return MediaRef(kind, None, _inline(name, value), name)
    if _ENCODED.fullmatch(value):
        return MediaRef(kind, None, _decoded(name, value), name)
    if scheme and scheme[0].lower() == "file":
        path = unquote(urlsplit(value.replace("?", "%3F").replace("#", "%23")).path, errors="surrogateescape")
        return MediaRef(kind, _place(kind, path, _folder(kind, dataset), dataset), None, value)
    if scheme:
        raise UserError(f"{kind} {value[:200]!r} is an address: only files of this machine are read, download it first")
    return MediaRef(kind, _place(kind, value, _folder(kind, dataset), dataset), None, value)


def _folder(kind: str, dataset: Dataset) -> str:
    return dataset.images if kind == "image" else dataset.videos


def _place(kind: str, name: str, folder: str, dataset: Dataset) -> Path:
    """The path of a name under its folder; raises UserError where it leads out of the data set."""
    if "\0" in name:
        raise UserError(f"{kind} {name[:200]!r} is no name of a file: it holds a null character")
    if "\\" in name and "/" not in name:  # written on Windows
        name = name.replace("\\", "/")
    base, places = _bases(dataset.root, folder)
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(places) and not dataset.outside:
        raise UserError(
            f"{kind} {name[:200]!r} leads out of the data set's folder {dataset.root}: set root=…, or outside=true if "
            "it may"
        )
    return Path(path)


@cache
def _bases(root: Path, folder: str) -> tuple[str, tuple[str, ...]]:
    """The path of a folder, and how the paths of files begin that lie in it or in the data set's."""
    base = os.path.normpath(os.path.join(root, os.path.expanduser(folder)))
    return base, tuple(f"{place.rstrip('/')}/" for place in (str(root), base))


def _inline(name: str, uri: str) -> bytes:
    head, comma, content = uri.partition(",")
    if not comma:
        raise UserError(f"{name} is a data: URI without a comma: it is cut")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    return _decoded(name, unquote(content))


def _decoded(name: str, text: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name} is no base64 ({reason(error)}): it is cut or damaged") from error
    if not data:
        raise UserError(f"{name} is empty: it has no bytes")
    return data


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [one for one in value if filled(one)]
    return [] if value is None else [value]


def _patterned(row: Mapping[str, Any], pattern: str) -> str | None:
    """The pattern filled with the row's fields, or None where one of them is not there."""
    names = [match[1] for match in PATTERN.finditer(pattern)]
    if not names or not all(filled(row.get(name)) for name in names):
        return None
    try:
        return PATTERN.sub(lambda match: format(row[match[1]], match[2] or ""), pattern)
    except (ValueError, TypeError) as error:
        raise UserError(f"the pattern {pattern!r} does not fit the row ({reason(error)})") from error
