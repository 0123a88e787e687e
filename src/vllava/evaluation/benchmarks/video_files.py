"""Videos of benchmarks by their names: an ending is found for each, in the folders where they may lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vllava.evaluation.files import medium_file
from vllava.evaluation.questions import FileMedium

ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".MP4", ".AVI", ".MOV", ".MKV", ".WEBM")


class Videos:
    """The videos below a folder. folders: where they may lie, "." the folder itself, absolute paths as they are;
    prefixes: that a name may lack.

    Each folder is listed once; no file is opened. A video that is nowhere is one at its likeliest place, which is then
    found to be missing; raises UserError for a name that leads out of the folder.
    """

    def __init__(self, root: Path, folders: Sequence[str], prefixes: Sequence[str] = ("",)) -> None:
        self.root, self.folders, self.prefixes = root, tuple(folders), tuple(prefixes)

    def find(self, name: str) -> FileMedium:
        """The video of this name, with or without its ending."""
        wanted = PurePosixPath(name)
        names = [f"{prefix}{wanted.name}" for prefix in self.prefixes]
        # what ends like a video has its ending already
        has_ending = wanted.suffix in ENDINGS
        files = [*(names if has_ending else ()), *(each + ending for each in names for ending in ENDINGS)]
        for folder in self.folders:
            for file in files:
                medium = medium_file("video", self.root / folder, str(wanted.parent / file))
                if medium.path.name in self._listed(medium.path.parent):
                    return medium
        return medium_file("video", self.root / self.folders[0], str(wanted.parent / files[0]))

    def _listed(self, folder: Path) -> frozenset[str]:
        if folder not in self._lists:
            self._lists[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        return self._lists[folder]

    @cached_property
    def _lists(self) -> dict[Path, frozenset[str]]:
        return {}
