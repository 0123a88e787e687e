"""Where the foundations of a checkpoint lie now: its encoders, and an LLM that was not trained, found by their hashes.

Each is looked for, in this order,

1. where it lay in training: by its path from the checkpoint's folder, then by its whole path (a relative one, of
   earlier versions, from the working directory and from each folder above the checkpoint);
2. in the folders that are named: `--foundations`, `foundations.search`, the environment's VLLAVA_FOUNDATIONS (folders
   with `:` between them), down to two levels below each;
3. beside the checkpoint: in folders called `foundations`, `models` or `assets` in its own folder or any above it, down
   to two levels; among the folders in its own; and, unless another model has taken the place where it lay, among the
   folders next to it;
4. on the hub, if it was named by its id.

Only what has the hash that was recorded is ever taken. A part without one, of early versions, is taken where it lay.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vllava.errors import UserError, reading
from vllava.folders import sha256_of
from vllava.model.files import Checkpoint, is_hub_id, local_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "VLLAVA_FOUNDATIONS"
BESIDE = (
    "foundations",
    "models",
    "assets",
)  # folders of these names are looked into, in the checkpoint's folder and above
CONFIG = "config.json"
SETTINGS = (CONFIG, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
_LEVELS = 2  # below a folder that is looked into
_SHOWN = 200  # characters of a path in a message

Folders = str | Path | Sequence[str | Path]


def add_foundations(parser: argparse.ArgumentParser) -> None:
    """Give a command the option `--foundations`."""
    parser.add_argument(
        "--foundations",
        metavar="FOLDER",
        action="append",
        default=[],
        help="look here too for encoders and an LLM that the checkpoint does not hold itself (may be repeated)",
    )


@dataclass(frozen=True)
class Foundation:
    """One part of a model as a checkpoint records it."""

    kind: str  # "image", "video" or "llm"
    path: str  # where it lay, or its hub id
    sha256: str | None = None  # of its weights
    size: int | None = None  # of its weights, in bytes: what has another is not read
    settings: dict[str, str] | None = None  # its other files that matter -> their SHA-256, see `settings_of`
    relative: str | None = None  # its path from the checkpoint's folder

    @property
    def name(self) -> str:
        return "LLM" if self.kind == "llm" else f"{self.kind} encoder"

    def is_at(self, place: Path) -> bool:
        """Whether a folder holds the very weights; one that cannot be read does not."""
        with suppress(UserError, OSError):
            checkpoint = Checkpoint(place)
            return self.size in (None, size_of(checkpoint)) and checkpoint.sha256 == self.sha256
        return False

    def others(self, place: Path) -> list[str]:
        """Which of a folder's settings, beside the weights, are not those of training, as far as these are recorded."""
        if self.settings is None:
            return []
        found = settings_of(self.kind, place)
        return [name for name in SETTINGS if found.get(name) != self.settings.get(name)]


def size_of(checkpoint: Checkpoint) -> int:
    """The bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in checkpoint.weights)


def settings_of(kind: str, place: Path) -> dict[str, str]:
    """The SHA-256 of the files that say what a part's weights mean, by name; of an LLM its tokenizer's too."""
    names = SETTINGS if kind == "llm" else (CONFIG,)
    with reading(f"The checkpoint {place}"):
        return {name: sha256_of(place / name) for name in names if os.path.isfile(place / name)}


def find(part: Foundation, folder: Path, search: Folders = ()) -> str:
    """Where a part of the checkpoint in `folder` lies, see the module's docstring: a folder's path, or a hub id.

    search: folders to look into beside the usual ones. Of several that have its weights, one that also has its
    settings, see `settings_of`, is taken; where none has, the first, with a warning that names them. Raises UserError
    that says what was looked for and where, if it is not found, or if what lies in its place is another or damaged.
    """
    with reading(f"The checkpoint {part.path[:_SHOWN]}"):  # a name that no folder can have
        on_hub_too = not Path(part.path).exists() and is_hub_id(part.path)
    named = named_folders(search)
    lay = [place for place in _where_it_lay(part, folder) if os.path.isdir(place)]
    if part.sha256 is None and lay:
        return str(lay[0])
    taken = None
    if part.sha256 is not None:
        replaced = any((place / CONFIG).is_file() for place in lay)
        for place in dict.fromkeys(chain(lay, _near(folder, named, siblings=not replaced))):
            if part.is_at(place):
                if not part.others(place):
                    return str(place)
                taken = taken or place
    if taken:
        others = ", ".join(part.others(taken))
        log.warning("%s has the weights of the %s of %s, but not the same %s", taken, part.name, folder, others)
        return str(taken)
    refused = ""
    if on_hub_too and not lay:
        try:
            on_hub = local_folder(part.path)
            if part.sha256 is None or part.is_at(on_hub):
                return part.path
            refused = f" (on the hub, {part.path} is another now)"
        except UserError as error:
            refused = f" ({error.paragraph.rstrip('.')})"
    raise _not_found(part, folder, named, lay, refused)


def named_folders(search: Folders) -> list[Path]:
    """The folders that a user names."""
    given = [search] if isinstance(search, (str, Path)) else list(search or ())
    given += [name for name in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if name]
    return [_absolute(Path(name).expanduser()) for name in given]


def _absolute(path: Path) -> Path:
    """An absolute path without `..`, links in it left as they are."""
    return Path(os.path.abspath(path))


def _where_it_lay(part: Foundation, folder: Path) -> Iterator[Path]:
    homes = dict.fromkeys((_absolute(folder), folder.resolve()))  # what a link leads to has moved with its neighbours
    if part.relative:
        yield from (_absolute(home / part.relative) for home in homes)
    if os.path.isabs(part.path):
        yield Path(part.path)
    else:
        yield _absolute(Path(part.path))
        yield from (_absolute(above / part.path) for home in homes for above in home.parents)


def _near(folder: Path, named: list[Path], siblings: bool) -> Iterator[Path]:
    for place in named:
        yield from _below(place, _LEVELS)
    homes = dict.fromkeys((_absolute(folder), folder.resolve()))
    for above in dict.fromkeys(chain.from_iterable((home, *home.parents) for home in homes)):
        for name in BESIDE:
            yield from _below(above / name, _LEVELS)
    for home in homes:
        yield from _below(home, 1)
        if siblings:
            yield from _below(home.parent, 1)


def _below(place: Path, levels: int) -> Iterator[Path]:
    """The folders with a config.json among a folder and those below it, hidden ones left out."""
    if os.path.isfile(place / CONFIG):
        yield place
    if levels:
        with suppress(OSError):  # not there, or closed to us
            for name in sorted(os.listdir(place)):
                if not name.startswith(".") and os.path.isdir(place / name):
                    yield from _below(place / name, levels - 1)


def _not_found(part: Foundation, folder: Path, named: list[Path], lay: list[Path], refused: str) -> UserError:
    known = f"its hash begins with {part.sha256[:12]}" if part.sha256 else "its hash is not recorded"
    looked = [f"in {place}{'' if place.is_dir() else ' (which is not there)'}" for place in named]
    looked += ["beside the checkpoint", f"in folders called {', '.join(BESIDE)} there or higher up"]
    where = f"Looked for {'; '.join(looked)}{refused}."
    remedy = (
        "Name the folder where it lies now: --foundations FOLDER for a command, foundations.search=[FOLDER] for a run, "
        f"{ENVIRONMENT}=FOLDER for both. A checkpoint that needs nothing beside itself is made, where it still "
        "opens, by `python -m vllava.convert pack CHECKPOINT OUT`."
    )
    if lay:
        with suppress(OSError):
            _ = Checkpoint(lay[0]).layout  # if it is damaged, this says how
        return UserError(
            f"{folder} was trained with another {part.name} than {lay[0]} (their hashes differ), and the one it was "
            f"trained with ({known}) is not found. {where} {remedy}"
        )
    return UserError(
        f"No checkpoint of the {part.name} that {folder} was trained with is found ({known}); it lay at "
        f"{part.path[:_SHOWN]}. {where} {remedy}"
    )
