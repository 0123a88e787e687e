"""Folders of shards as a configuration names them, by modality."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from vllava.errors import UserError

Folders = dict[str, list[str]]  # by modality
MODALITIES = ("image", "video", "text")
STAGES = ("stage1", "stage2")  # those that may have blocks of their own in `data`
REMEDY = (  # a user's, not the toy's
    "`python -m data_prep.prepare` makes shards of your own files, `python -m data_prep.index` a manifest for shards "
    "that you have: see docs/data.md."
)


def folders(where: str, node: Any) -> Folders:
    """Modality -> folders of what a configuration holds at `where`: a folder or a list of them; null is not named.

    An empty list stays: nothing is wanted of that modality. Raises UserError for whatever else.
    """
    return {kind: _listed(f"{where}.{kind}", value) for kind, value in _by_modality(where, node).items()}


def questions(where: str, node: Any) -> dict[str, dict[str, str]]:
    """Modality -> name -> folder; a folder without a name goes by its path. Raises UserError for whatever else."""
    found = {}
    for kind, value in _by_modality(where, node).items():
        if isinstance(value, dict):
            found[kind] = {str(name): _folder(f"{where}.{kind}.{name}", folder) for name, folder in value.items()}
        else:
            found[kind] = {folder: folder for folder in _listed(f"{where}.{kind}", value)}
    return {kind: named for kind, named in found.items() if named}


def united(sources: list[Folders]) -> Folders:
    """All folders of several, each once."""
    kinds = dict.fromkeys(kind for one in sources for kind in one)
    return {kind: list(dict.fromkeys(f for one in sources for f in one.get(kind, []))) for kind in kinds}


def check_spelling(overrides: Iterable[str]) -> None:
    """Raises UserError for an override of folders with no modality, or with one that is none.

    Hydra's own message for these does not name the right spelling: it advises to add the wrong one.
    """
    for override in overrides:
        found = re.match(rf"[+~]*(data\.(?:(?:{'|'.join(STAGES)})\.)?)(\w+)[.=]", override)
        near = difflib.get_close_matches(found[2], ("sources", "held_out"), 1, 0.8) if found else []
        if found and near and near[0] != found[2]:
            raise UserError(f"Unknown key {found[1]}{found[2]}: did you mean {found[1]}{near[0]}?")
    of_data = rf"data\.(?:(?:{'|'.join(STAGES)})\.)?sources|data\.held_out"
    keys = rf"[+~]*((?:{of_data}|(?:evaluation|validation)\.sources|preview))"
    for override in overrides:
        if found := re.match(rf"{keys}(?:\.|=\{{\s*)(\w+)", override):
            _require_modality(found[1], found[2])
        elif (found := re.match(rf"{keys}=(.+)", override)) and not re.match(r"\{|null$|\?", found[2]):
            raise _modality_missing(found[1], found[2])


def _require_modality(where: str, name: object) -> None:
    """Raises UserError, with the right spelling, for a key of folders that is no modality."""
    if name not in MODALITIES:
        near = difflib.get_close_matches(str(name), MODALITIES, n=1)
        hint = f"did you mean {where}.{near[0]}?" if near else f"there are: {', '.join(MODALITIES)}."
        raise UserError(f"{where}.{name}: no modality is called {name!r}; {hint}")


def _modality_missing(where: str, value: object) -> UserError:
    """What to say where folders are given without their modality."""
    named = " or ".join(f"{where}.{kind}=[FOLDER, …]" for kind in MODALITIES)
    return UserError(f"{where}={value} does not say of which modality the folders are: write {named}.")


def _by_modality(where: str, node: Any) -> dict[str, Any]:
    if node is None or node == "???":
        return {}
    if not isinstance(node, dict):
        raise _modality_missing(where, node)
    for name in node:
        _require_modality(where, name)
    return {kind: value for kind, value in node.items() if value is not None}


def _listed(where: str, value: Any) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise UserError(f"{where} is a list of folders: {where}=[FOLDER, …]")
    return [_folder(where, folder) for folder in value]


def _folder(where: str, folder: Any) -> str:
    if not isinstance(folder, str) or not folder.strip():
        raise UserError(f"{where} names folders by their paths, and {folder!r} is none: {where}=[FOLDER, …]")
    return folder
