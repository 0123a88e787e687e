"""Checkpoints of other formats, turned into our own once and found again."""

from __future__ import annotations

import logging
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vllava.convert import import_checkpoint
from vllava.folders import safe_name
from vllava.identity import checkpoint_in
from vllava.model.checkpoint import DESCRIPTION, read_description
from vllava.model.files import Checkpoint, is_hub_id, local_folder
from vllava.model.finding import Folders, named_folders

log = logging.getLogger(__name__)

IMPORTED = "imported"  # in a folder of runs
TEMPLATE = "vicuna_v1"  # the original's, and the port's


def imported(given: str, into: Path, search: Folders = ()) -> Path:
    """The folder of a checkpoint in our format: the given one, or that of what was made of it.

    given: a checkpoint of ours, an original Video-LLaVA or one of the port in `transformers`: a folder or a hub id.
    into: where the imported ones lie, each made once and said aloud. search: folders to look into for vision towers
    that an original names by a hub id. Raises UserError where it cannot be read.
    """
    if not (Path(given) / "config.json").is_file() and not is_hub_id(given):
        return Path(given)  # whoever opens it will say what it lacks
    if (Path(given) / DESCRIPTION).is_file():
        return Path(given)
    source = local_folder(given)
    if not (source / "config.json").is_file():
        return Path(given)
    config = Checkpoint(source).config
    name = safe_name(given if is_hub_id(given) else source.resolve().name)
    folder = into / f"{name}-{checkpoint_in(source)}"
    into.mkdir(parents=True, exist_ok=True)
    with FileLock(into / f".{folder.name}.lock"):  # the other processes of a run wait for the first one
        if not (folder / DESCRIPTION).is_file():
            print(f"checkpoint: {given} is imported to {folder}, once", flush=True)
            import_checkpoint(str(source), folder, _towers(config, search), TEMPLATE)
        else:
            print(f"checkpoint: {folder}, imported from {given}", flush=True)
    _warn_of_lost_time(folder)
    return folder


def _towers(config: dict, search: Folders) -> dict[str, str]:
    """Medium -> folder of the tower that an original names, where one of that name lies in a folder of `search`."""
    found = {}
    for kind in ("image", "video"):
        name = config.get(f"mm_{kind}_tower")
        places = [place / Path(name).name for place in named_folders(search)] if isinstance(name, str) and name else []
        if place := next((place for place in places if (place / "config.json").is_file()), None):
            found[kind] = str(place)
    return found


@rank_zero_only
def _warn_of_lost_time(folder: Path) -> None:
    if read_description(folder).encoders.get("video", {}).get("temporal") is False:
        log.warning(
            "%s looks at each frame of a video alone: its video encoder has no temporal attention, for which the port "
            "in transformers has no place. Take the original checkpoint for the paper's model.",
            folder,
        )
