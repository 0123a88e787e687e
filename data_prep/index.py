"""Write the index of shards that have none, and a manifest: `python -m data_prep.index FOLDER …`.

For any folder of WebDataset shards, made here or elsewhere. A key ends at the first dot of a file's own name, as for
webdataset and Energon. What the members must be called to be trained on: README.md.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vllava.checks import Count
from vllava.commands import Parser, number
from vllava.data.index import index_path
from vllava.data.shards import MANIFEST
from vllava.data.writing import index_shard, write_manifest
from vllava.errors import UserError


def index_folder(folder: Path, processes: int = 1, again: bool = False) -> dict[str, int]:
    """Write the indexes that a folder's shards lack (or all of them), and its manifest if there is none.

    Returns how many samples of each modality the newly indexed shards hold, and the reasons why some are none. Raises
    UserError for a folder without shards, or a shard that is no tar file.
    """
    shards = _shards(folder)
    if not shards:
        raise UserError(f"{folder} holds no shards (files NAME.tar).")
    manifest = folder / MANIFEST
    missing = [path for path in shards if again or not manifest.is_file() or not index_path(path).is_file()]
    found: Counter[str] = Counter()
    entries = []
    with ProcessPoolExecutor(processes) as pool:
        made = pool.map(partial(index_shard, folder=folder), missing)
        for entry, reasons in tqdm(made, total=len(missing), unit=" shards", disable=None):
            entries.append(entry)
            found.update(entry["modalities"])
            found.update({f"unreadable: {reason}": count for reason, count in reasons.items()})
    if not manifest.is_file():
        write_manifest(folder, entries, {"indexed": "python -m data_prep.index"})
    return dict(found)


def _shards(folder: Path) -> list[Path]:
    """The shards of a folder and those below it, but for folders with a manifest of their own, as features have."""
    apart = [path.parent for path in folder.rglob(MANIFEST) if path.parent != folder]
    shards = (path for path in folder.rglob("*.tar") if path.is_file())
    return sorted(path for path in shards if not any(path.is_relative_to(other) for other in apart))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m data_prep.index", "Write the index of shards that have none, and a manifest.", "data/mine"
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of shards, NAME.tar")
    parser.add_argument("--again", action="store_true", help="also where there is an index already")
    parser.add_argument(
        "--processes", type=number(Count), default=os.cpu_count(), metavar="N", help="at a time (default: all cores)"
    )
    options = parser.parse_args(arguments)
    try:
        for folder in options.folders:
            found = index_folder(folder, options.processes, options.again)
            print(f"{folder}: " + (", ".join(f"{count} {name}" for name, count in found.items()) or "nothing to do"))
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
