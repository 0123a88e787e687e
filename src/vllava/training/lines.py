"""Files to which every step adds lines of JSON, and which a resumed run cuts back to where it goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop what was written after `step`, and half a line that a killed process left; returns what stays.

    The file is replaced as a whole, so that a full disk costs nothing of it. One that is not there is made, empty.
    """
    rows = [row for line in _lines(path) if (row := _row(line)) and row["step"] <= step]
    unfinished = path.with_name(f"{path.name}.part")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    return rows


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None
