"""Where a benchmark's data lies: the original's eval/ folder, a Hugging Face data set in a folder or on the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from vllava.errors import UserError, reason

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """The folder in which the files of the original's layout lie or, where `tables`, that of a data set in Parquet."""

    folder: Path
    tables: bool


def find_place(root: str, name: str, file: str, on_hub: Sequence[str] = ("*.parquet",)) -> Place:
    """Recognises a benchmark's layout by the files that are found.

    root: eval/, its folder for this benchmark (eval/NAME), the folder of a data set, or a hub id (owner/name).
    file: the one that tells the original's layout, or a pattern of it. on_hub: patterns of the files that are wanted of
    a data set on the hub. Raises UserError that lists what was looked for.
    """
    folder = Path(root).expanduser()
    if not folder.exists() and len(Path(root).parts) == 2 and not Path(root).is_absolute():
        return Place(_from_hub(root, on_hub), tables=True)
    for place in (folder, folder / name):
        if next(place.glob(file), None):
            return Place(place, tables=False)
    for place in (folder / name, folder):
        if next(place.rglob("*.parquet"), None):
            return Place(place, tables=True)
    looked = f"neither {folder / name / file} nor {folder / file} nor a Parquet file below {folder}"
    raise UserError(f"No data of this benchmark at {root}: there is {looked}. docs/benchmarks.md shows both layouts.")


def _from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a data set on the hub; what is downloaded is said before."""
    try:
        found = HfApi().dataset_info(name, files_metadata=True)
        wanted = [file for file in found.siblings or [] if any(fnmatch(file.rfilename, p) for p in patterns)]
        if not wanted:
            told = f"The data set {name} on the hub has no files {' or '.join(patterns)}"
            raise UserError(f"{told}. Fetch those that hold this benchmark, and give their folder.")
        size = sum(file.size or 0 for file in wanted)
        log.warning(
            "%s: %d files, %.2f GB, are fetched from the hub unless they are here", name, len(wanted), size / 1e9
        )
        return _fetched(name, patterns)
    except UserError:
        raise
    except Exception as error:  # of the hub, of the network, of its cache
        with suppress(OSError, ValueError):  # not here either, or no name of one
            return _fetched(name, patterns, local_files_only=True)
        raise UserError(
            f"There is no folder {name}, and the hub gives no data set of that name ({reason(error)}). Give the "
            "folder of the data; docs/benchmarks.md shows both layouts."
        ) from error


def _fetched(name: str, patterns: Sequence[str], local_files_only: bool = False) -> Path:
    found = snapshot_download(
        name, repo_type="dataset", allow_patterns=list(patterns), local_files_only=local_files_only
    )
    return Path(found)
