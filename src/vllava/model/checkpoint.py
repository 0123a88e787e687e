"""Trained models on disk: the trained weights, and references, with hashes, to what was not trained.

A checkpoint folder holds `vllava.json` (what the model is made of), `projector.safetensors`, and `llm/` if the
LLM was trained. Frozen encoders, and an LLM that was not trained, stay where they are, and are found by their hashes
if they or the checkpoint move: finding.py says where. A checkpoint that was imported from another format, or packed,
holds them too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vllava.batch import MEDIA_KINDS
from vllava.errors import UserError, reading, reason
from vllava.folders import replacing
from vllava.model.build import load_llm, load_tokenizer, video_llava
from vllava.model.encoders import Encoder
from vllava.model.files import (
    Checkpoint,
    read_tensors,
    require_same,
    warn_of_no_numbers,
    write_half,
    write_tensors,
)
from vllava.model.finding import Folders, Foundation, find, settings_of, size_of
from vllava.model.headers import read_json
from vllava.model.video_llava import VideoLlava

DESCRIPTION = "vllava.json"
PROJECTOR = "projector.safetensors"
LLM = "llm"
TOKENIZER = "tokenizer"


@dataclass
class Description:
    """What a checkpoint's model is made of, and how its data was prepared."""

    encoders: dict[str, dict]  # medium -> {"_target_": class in vllava, its settings}; a path may be inside the folder
    llm: str  # folder or hub id; "llm" means the folder inside the checkpoint
    template: str
    image_fit: str
    trained: list[str]
    sha256: dict[str, str] = field(default_factory=dict)  # of the parts it belongs to: "image", "video", "llm"
    origin: dict[str, Any] = field(default_factory=dict)  # what the config.json of an imported checkpoint said
    template_options: dict[str, Any] = field(default_factory=dict)  # of the tokenizer's own template
    frame_sampling: str = "index"  # of videos
    folder: str = ""  # where it was written: what lay near it then is looked for near where it lies now
    files: dict[str, dict] = field(default_factory=dict)  # of parts outside, as finding.py knows them
    tokenizer: str = ""  # "tokenizer": the folder inside the checkpoint; else the LLM's own

    def prompt(self, template: str | None = None) -> dict[str, Any]:
        """How to ask: as in training, or with another template."""
        if template in (None, self.template):
            return {"template": self.template, "template_options": self.template_options}
        return {"template": template}


def save_trained(model: VideoLlava, tokenizer: Any, description: Description, folder: Path) -> None:
    """Write a checkpoint folder; it appears whole or not at all, in place of none but one that we wrote."""
    description.sha256 = {kind: model.encoder(kind).sha256 for kind in model.encoders}
    with replacing(folder) as unfinished:
        if any(name.split(".")[0] == "llm" for name in description.trained):
            write_half(model.llm, unfinished / LLM)
            tokenizer.save_pretrained(unfinished / LLM)
            description.llm = LLM
            description.sha256["llm"] = Checkpoint(unfinished / LLM).sha256
        elif hasattr(model.llm, "sha256"):
            description.sha256["llm"] = model.llm.sha256
        elif Path(description.llm).is_dir():
            description.sha256["llm"] = Checkpoint(description.llm).sha256
        if description.tokenizer:
            tokenizer.save_pretrained(unfinished / TOKENIZER)
        if model.encoders:
            write_tensors(model.projector.state_dict(), unfinished, PROJECTOR)
        _locate(description, model, folder)
        write_description(description, unfinished)


def _locate(description: Description, model: VideoLlava, folder: Path) -> None:
    """Write down where the parts that stay outside lie, whatever the working directory, and how they are known."""
    description.folder = os.path.abspath(folder)
    description.encoders = {
        kind: {**settings, **({"path": _whole(settings["path"])} if "path" in settings else {})}
        for kind, settings in description.encoders.items()
    }
    outside = {kind: model.encoder(kind).folder for kind in model.encoders}
    if description.llm != LLM:
        description.llm = _whole(description.llm)
        outside |= {"llm": getattr(model.llm, "folder", Path(description.llm))}
    for kind, place in outside.items():
        with suppress(UserError, OSError):  # gone since it was read: it is known by its hash all the same
            size = size_of(Checkpoint(place))
            description.files[kind] = {"bytes": size, "settings": settings_of(kind, place)}


def _whole(path: str) -> str:
    """The absolute path of a folder; anything else, a hub id, as it is."""
    return os.path.abspath(path) if os.path.isdir(path) else path


def write_description(description: Description, folder: Path) -> None:
    """Write a checkpoint folder's description."""
    (folder / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n")


def read_description(folder: Path) -> Description:
    """Raises UserError where the folder is not a checkpoint of ours."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(
            f"{folder} is not a vllava checkpoint: it has no {DESCRIPTION}. A training run writes one to its folder "
            "under checkpoint/, for example outputs/runs/stage2-united-s1/checkpoint."
        )
    with reading(path, "Is it the description of a checkpoint?"):
        content = read_json(path)
        try:
            description = Description(**content)
        except TypeError as error:
            raise UserError(f"{path} cannot be understood ({reason(error)}).") from error
        for name, fits in _FORM.items():
            if not fits(getattr(description, name)):
                raise UserError(f"{path} cannot be understood: {name} is {str(content.get(name))[:80]}.")
        for settings in description.encoders.values():
            inside = folder / settings["path"] if "path" in settings else None
            if inside and inside.is_dir() and inside.resolve().is_relative_to(folder.resolve()):
                settings["path"] = str(inside)
    return description


def _all(kind: type, values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


_FORM: dict[str, Callable[[Any], bool]] = {  # what the parts of a description look like
    "encoders": lambda found: (
        isinstance(found, dict)
        and set(found) <= set(MEDIA_KINDS)
        and _all(dict, found.values())
        and _all(str, (settings.get("path", "") for settings in found.values()))
    ),
    "llm": lambda found: isinstance(found, str) and found != "",
    "template": lambda found: isinstance(found, str),
    "image_fit": lambda found: isinstance(found, str),
    "trained": lambda found: isinstance(found, list) and _all(str, found),
    "sha256": lambda found: isinstance(found, dict) and _all(str, found.values()),
    "origin": lambda found: isinstance(found, dict),
    "template_options": lambda found: isinstance(found, dict),
    "frame_sampling": lambda found: isinstance(found, str),
    "folder": lambda found: isinstance(found, str),
    "files": lambda found: (
        isinstance(found, dict)
        and _all(dict, found.values())
        and _all(int, (part.get("bytes", 0) for part in found.values()))
        and _all(dict, (part.get("settings", {}) for part in found.values()))
    ),
    "tokenizer": lambda found: found in ("", TOKENIZER),
}


def load(
    folder: str | Path, num_frames: int | None = None, search: Folders = ()
) -> tuple[VideoLlava, Any, Description]:
    """A trained model, its tokenizer and its description; `num_frames` of a video, if not as in training.

    search: folders to look into for encoders and an LLM that are no longer where they were, see finding.py. Raises
    UserError where a part is missing or is another one than in training.
    """
    folder = Path(folder)
    description = read_description(folder)
    if num_frames and "video" in description.encoders:
        description.encoders["video"]["frames"] = num_frames
    builds = {kind: _encoder_class(settings) for kind, settings in description.encoders.items()}
    places = find_parts(folder, description, search)
    encoders = {}
    for kind, settings in description.encoders.items():
        given = {**settings, **({"path": places[kind]} if kind in places else {})}
        with reading(f"The checkpoint's settings of {given.pop('_target_')}"):
            encoders[kind] = builds[kind](**given)
    model = video_llava(load_llm(places["llm"]), encoders.get("image"), encoders.get("video"))
    require_parts(model, description.sha256, folder)
    if model.encoders:
        load_projector(model, folder / PROJECTOR)
    return model.eval(), load_tokenizer(tokenizer_of(folder, description, places)), description


def find_parts(folder: Path, description: Description, search: Folders = ()) -> dict[str, str]:
    """Where the encoders ("image", "video") and the LLM ("llm") of a checkpoint lie: each a folder or a hub id.

    Raises UserError for one that is not found, see finding.py. What lies inside the checkpoint is taken unseen.
    """
    places = {}
    paths = {kind: settings["path"] for kind, settings in description.encoders.items() if "path" in settings}
    for kind, path in {**paths, "llm": description.llm}.items():
        inside = folder / LLM if path == LLM and kind == "llm" else Path(path)
        if inside == folder / LLM or (inside.is_relative_to(folder) and os.path.isdir(inside)):
            places[kind] = str(inside)
            continue
        known = description.files.get(kind, {})
        near = os.path.isabs(path) and os.path.isabs(description.folder)
        part = Foundation(
            kind,
            path,
            description.sha256.get(kind),
            known.get("bytes"),
            known.get("settings"),
            os.path.relpath(path, description.folder) if near else None,
        )
        places[kind] = find(part, folder, search)
    return places


def tokenizer_of(folder: Path, description: Description, places: dict[str, str]) -> str:
    """Where the tokenizer of a checkpoint lies: in a folder of its own, or with the LLM."""
    return str(folder / TOKENIZER) if description.tokenizer else places["llm"]


def _encoder_class(settings: dict) -> type[Encoder]:
    """An encoder's class; a checkpoint may come from a stranger, so it can name nothing but an encoder of ours."""
    target = str(settings.get("_target_"))
    module, _, name = target.rpartition(".")
    found = None
    with suppress(ImportError):
        if module.startswith("vllava.model.") and importlib.util.find_spec(module):
            found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Encoder) and found.__module__ == module):
        raise UserError(f"The checkpoint names an encoder outside this package ({target[:200]}): not loaded.")
    return found


def require_parts(model: VideoLlava, sha256: dict[str, str], where: Path) -> None:
    """Raises UserError where a model has another part than one, known by its hash, to which `where` belongs."""
    parts: dict[str, Any] = {kind: model.encoder(kind) for kind in model.encoders}
    parts |= {"llm": model.llm} if hasattr(model.llm, "sha256") else {}  # a fresh one has none
    for kind, part in parts.items():
        if sha256.get(kind, part.sha256) != part.sha256:
            name = "LLM" if kind == "llm" else f"{kind} encoder"
            raise UserError(
                f"{where} was trained with another {name} than {part.folder} (their hashes differ). "
                "Use the one it was trained with, or train a projector for this one."
            )


def read_projector(path: Path) -> dict[str, Tensor]:
    """The tensors of a projector: one of ours, or an original `mm_projector.bin`, whose names are longer."""
    tensors = read_tensors(path)
    return {re.sub(r"^(model\.)?mm_projector\.", "", name): value for name, value in tensors.items()}


def load_projector(model: VideoLlava, path: Path) -> None:
    """Load a trained projector.

    Raises UserError if it is missing or of another shape, or if the checkpoint it lies in was trained with other
    encoders or another LLM than the model's. One that was trained together with its LLM (stage 2) belongs to that LLM,
    `llm/` beside it, and not to the one both started from.
    """
    if not path.is_file():
        raise UserError(
            f"No projector at {path}. Train one with `python train.py +experiment=stage1` (same ablation, model and "
            "seed), or give one with projector=PATH/projector.safetensors."
        )
    if (path.parent / DESCRIPTION).is_file():
        description = read_description(path.parent)
        if description.llm == LLM and "llm" not in description.sha256 and (path.parent / LLM).is_dir():
            description.sha256["llm"] = Checkpoint(path.parent / LLM).sha256  # not recorded by earlier versions
        require_parts(model, description.sha256, path)
    tensors = read_projector(path)
    require_same(
        tensors, model.projector.state_dict(), f"{path} is a projector of other sizes or another make than this model's"
    )
    model.projector.load_state_dict(tensors)
    warn_of_no_numbers(model.projector, path)
