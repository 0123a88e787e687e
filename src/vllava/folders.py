"""Folders that this program writes: each appears whole or not at all, and takes the place of nothing but its own kind.

Beside what it is for, every such folder holds `.vllava-files.json`: the name and the hash of each file written. What it
does not list, or what is no longer as listed, is somebody's work, and is never deleted without being told to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vllava.errors import UserError, reason

RECORD = ".vllava-files.json"
# What versions that kept no record wrote into a checkpoint's folder, beside its vllava.json.
_UNRECORDED = re.compile(
    r"vllava\.json|projector\.safetensors|"
    r"(llm|image_encoder|video_encoder)/([a-z_]+\.json|model[-\w]*\.safetensors(\.index\.json)?|[a-z_]+\.(model|jinja|txt))"
)


def safe_name(name: str) -> str:
    """A name as that of a folder or a file: letters, digits, hyphens, full stops, and underscores for all else."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def strangers(folder: Path) -> list[str]:
    """What in a folder is not as this program wrote it, by name; empty where all of it is."""
    names = entries(folder)
    try:
        written = json.loads((folder / RECORD).read_bytes())["files"]
    except FileNotFoundError:
        known = "vllava.json" in names
        return [name for name in names if not (known and _UNRECORDED.fullmatch(name))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return names
    return [name for name in names if name != RECORD and not _as_written(folder / name, dict(written).get(name))]


def entries(folder: Path) -> list[str]:
    """Every file, link and empty folder below a folder, by its name from there."""
    found = []
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        found += [Path(where, name) for name in (*files, *links)]
        if not files and not folders and Path(where) != folder:
            found.append(Path(where))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def sha256_of(*paths: Path) -> str:
    """The SHA-256 of files, one after the other, read a piece at a time."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _as_written(path: Path, written: object) -> bool:
    """Whether a path is the very file that the record speaks of."""
    if not isinstance(written, dict) or path.is_symlink() or not path.is_file():
        return False
    return path.stat().st_size == written.get("bytes") and sha256_of(path) == written.get("sha256")


def _write_record(folder: Path) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in entries(folder)
        if (folder / name).is_file() and name != RECORD
    }
    (folder / RECORD).write_text(json.dumps({"version": 1, "files": files}, indent=1) + "\n")


def require_replaceable(
    folder: Path,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    not_ours: Callable[[Path], list[str]] = strangers,
) -> None:
    """Raises UserError where a folder must not be written; call it before long work.

    A folder that is not there or empty may be, and one whose contents we wrote ourselves; with `overwrite`, any other
    too. Never a link, a file, the current or the home folder or one above them, or what is being read: `inputs`.
    """
    try:
        _require_replaceable(folder, overwrite, inputs, not_ours)
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a place that is closed to us
        raise UserError(f"{str(folder)[:200]} cannot be written ({reason(error)}).") from error


def _require_replaceable(
    folder: Path, overwrite: bool, inputs: Iterable[Path], not_ours: Callable[[Path], list[str]]
) -> None:
    target = folder.resolve()
    if folder.is_symlink():
        raise UserError(f"{folder} is a link: name the folder that is to be written itself.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, and a folder is to be written there: choose another name.")
    for place, name in ((Path.cwd(), "current"), (Path.home(), "home")):
        if target == place.resolve() or target in place.resolve().parents:
            raise UserError(
                f"{folder} (the folder {target}) is the {name} folder or one above it, which is never replaced: "
                "name a new folder. An empty name means the current folder."
            )
    occupied = folder.is_dir() and any(folder.iterdir())
    for path in inputs:
        with suppress(OSError, ValueError):  # of a name that no folder can have
            source = path.resolve()
            if target == source or target in source.parents or (occupied and source in target.parents):
                raise UserError(f"{folder} is, holds or is part of {source}, which is being read: name another folder.")
    if occupied and not overwrite and (found := not_ours(folder)):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{folder} holds what this program did not write, or what changed since: {', '.join(found[:3])}{more}. "
            "It is left as it is. Move it away, name another folder, or insist with --overwrite if the command has it."
        )


@contextmanager
def replacing(
    folder: Path,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    not_ours: Callable[[Path], list[str]] = strangers,
) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error.

    Until then `folder` stays as it was. Raises UserError where it must not be replaced, see `require_replaceable`, or
    cannot be written.
    """
    inputs = list(inputs)
    require_replaceable(folder, overwrite, inputs, not_ours)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f"{folder.name[:40]}.unfinished-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}).") from error
    new, old = workspace / "new", workspace / "old"
    try:
        new.mkdir()
        yield new
        _write_record(new)
        require_replaceable(folder, overwrite, inputs, not_ours)  # the user may have added something meanwhile
        try:
            if folder.exists():
                os.rename(folder, old)
            os.rename(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.rename(old, folder)
            raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}).") from error
    finally:
        if folder.exists() or not old.exists():
            shutil.rmtree(workspace, ignore_errors=True)
