"""Our own checkpoint folders, whole: the frozen towers too."""

from __future__ import annotations

import json
from pathlib import Path

from vllava.errors import UserError
from vllava.folders import replacing
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import (
    LLM,
    PROJECTOR,
    Description,
    find_parts,
    read_description,
    read_projector,
    tokenizer_of,
    write_description,
)
from vllava.model.files import Checkpoint, write_tensors
from vllava.model.finding import Folders
from vllava.model.formats.parts import Parts, Tower, checked, tower_config, under
from vllava.model.llm import read_config


def read_ours(folder: Path, search: Folders = ()) -> Parts:
    """The parts of one of our checkpoint folders, whole towers included; search: where else to look for them."""
    description = read_description(folder)
    places = find_parts(folder, description, search)
    towers, layers, names = {}, set(), {}
    for kind, settings in description.encoders.items():
        if settings.get("_target_") != "vllava.model.encoders.ClipEncoder":
            raise UserError(f"{folder}: its {kind} encoder is a {settings.get('_target_')}; other formats know CLIP's.")
        tower = Checkpoint(places[kind])
        towers[kind] = Tower(tower_config(tower), under(tower.tensors(), "vision_model."))
        if settings.get("frames") and towers[kind].temporal:
            towers[kind].config["num_frames"] = settings["frames"]
        layers.add(settings.get("feature_layer", -2))
        if not Path(places[kind]).exists():
            names[f"mm_{kind}_tower"] = places[kind]  # a hub id, by which others find it too
    if len(layers) != 1:
        raise UserError(f"{folder}: the encoders' feature layers differ ({sorted(layers)}); other formats know one.")
    llm = Checkpoint(places["llm"])
    parts = Parts(
        read_config(llm, str(llm.folder)),
        llm.tensors(),
        read_projector(folder / PROJECTOR),
        towers,
        load_tokenizer(tokenizer_of(folder, description, places)),
        layers.pop(),
        {**names, **description.origin},
        description.image_fit,
        description.template,
    )
    return checked(parts, folder)


def write_ours(
    parts: Parts, folder: Path, template: str | None = None, image_fit: str | None = None, overwrite: bool = False
) -> None:
    """One of our checkpoint folders that holds every part; template and image_fit if not those of the parts."""
    with replacing(folder, overwrite) as unfinished:
        encoders = {}
        for kind, tower in parts.towers.items():
            name = f"{kind}_encoder"
            (unfinished / name).mkdir()
            (unfinished / name / "config.json").write_text(json.dumps({"vision_config": tower.config}, indent=1) + "\n")
            write_tensors({f"vision_model.{n}": v for n, v in tower.tensors.items()}, unfinished / name)
            encoders[kind] = {
                "_target_": "vllava.model.encoders.ClipEncoder",
                "path": name,
                "medium": kind,
                "feature_layer": parts.feature_layer,
            }
            if kind == "video" and not tower.temporal:
                encoders[kind] |= {"temporal": False, "frames": tower.config["num_frames"]}
        write_tensors(parts.projector, unfinished, PROJECTOR)
        _write_llm(parts, unfinished / LLM)
        description = Description(
            encoders,
            LLM,
            template or parts.template,
            image_fit or parts.image_fit,
            ["projector", "llm"],
            origin=parts.settings,
        )
        for kind in encoders:
            description.sha256[kind] = Checkpoint(unfinished / f"{kind}_encoder").sha256
        write_description(description, unfinished)


def _write_llm(parts: Parts, folder: Path) -> None:
    folder.mkdir()
    parts.llm_config.save_pretrained(folder)
    write_tensors(parts.llm, folder)
    parts.tokenizer.save_pretrained(folder)
