"""A checkpoint with all that it refers to in one folder, file by file as they were."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from vllava.errors import UserError, reason
from vllava.folders import RECORD, replacing
from vllava.model.checkpoint import (
    LLM,
    PROJECTOR,
    find_parts,
    load,
    read_description,
    tokenizer_of,
    write_description,
)
from vllava.model.files import WEIGHTS, Checkpoint, local_folder
from vllava.model.finding import CONFIG, Folders
from vllava.model.tokenizer import FILES as TOKENIZER_FILES
from vllava.model.tokenizer import tokenizer_folder

_TEMPLATES = "additional_chat_templates/*.jinja"


def pack(source: Path, out: Path, search: Folders = (), overwrite: bool = False, link: bool = False) -> None:
    """Write a checkpoint of ours as one folder that needs nothing beside itself, and opens wherever it lies.

    search: folders to look into for its encoders and LLM; link: hard links in place of copies, where the file system
    has them. The new folder is opened, and its hashes compared, before it appears. Raises UserError for a part that
    is not found or cannot be copied, and where `out` must not be replaced.
    """
    description = read_description(source)
    places = find_parts(source, description, search)
    folders = {kind: local_folder(place) for kind, place in places.items()}
    tokenizer = tokenizer_folder(tokenizer_of(source, description, places))
    with replacing(out, overwrite, [source, tokenizer, *folders.values()]) as unfinished:
        for kind, folder in folders.items():
            name = LLM if kind == "llm" else f"{kind}_encoder"
            _copy(_model_files(folder), folder, unfinished / name, link)
            description.sha256.setdefault(kind, Checkpoint(folder).sha256)
            if kind != "llm":
                description.encoders[kind]["path"] = name
                if not Path(places[kind]).exists():
                    description.origin.setdefault(f"mm_{kind}_tower", places[kind])  # by its hub id others find it too
        _copy(_tokenizer_files(tokenizer), tokenizer, unfinished / (description.tokenizer or LLM), link)
        if description.encoders:
            _copy([source / PROJECTOR], source, unfinished, link)
        description.llm, description.folder, description.files = LLM, "", {}
        write_description(description, unfinished)
        load(unfinished)


def _model_files(folder: Path) -> list[Path]:
    checkpoint = Checkpoint(folder)
    weights = checkpoint.weights
    index = "model.safetensors" if weights[0].suffix == ".safetensors" else "pytorch_model.bin"
    settings = [CONFIG, "generation_config.json", *([] if weights[0].name in WEIGHTS else [f"{index}.index.json"])]
    return [*weights, *(folder / name for name in settings if (folder / name).is_file())]


def _tokenizer_files(folder: Path) -> list[Path]:
    found = {path for pattern in (*TOKENIZER_FILES, _TEMPLATES) for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name != RECORD and not path.name.endswith(".index.json"))


def _copy(files: list[Path], folder: Path, to: Path, link: bool) -> None:
    for path in files:
        target = to / path.relative_to(folder)
        if target.exists():  # the model's settings, which the patterns of a tokenizer's files hold too
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if link:
                with suppress(OSError):  # another file system, or one without hard links: a copy does as well
                    os.link(path.resolve(), target)
                    continue
            shutil.copyfile(path, target)
        except OSError as error:
            raise UserError(f"{path} cannot be copied to {target} ({reason(error)}).") from error
