"""A look at the run's folder before Hydra writes into it, whose own errors are tracebacks."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vllava.errors import reason


class RequireWritable(Callback):
    """Ends the program in words where the run's folder, or that of a sweep, cannot be written to."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        _require(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        _require(Path(config.hydra.sweep.dir))


def _require(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:  # Hydra makes a warning of every other exception
        sys.exit(
            f"error: The folder {folder} cannot be written to ({reason(error)}). Make room, mend its permissions or "
            "choose another one with run_dir=… (runs=… for a sweep)."
        )
