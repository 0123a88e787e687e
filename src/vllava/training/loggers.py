"""Where metrics go."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

from vllava.errors import UserError


def wandb_logger(run_dir: Path, name: str, config: dict[str, Any], project: str, mode: str) -> Logger:
    """Weights & Biases; `mode` auto is online if the user is logged in, else offline."""
    import wandb

    if mode not in ("auto", "online", "offline"):
        raise UserError(f"logger.mode={mode!r} is not known; there are: auto, online, offline.")
    if mode == "auto":
        mode = "online" if _logged_in() else "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(
        name=name,
        project=project,
        save_dir=run_dir,
        offline=mode == "offline",
        config=config,
        settings=wandb.Settings(console="off"),
    )


def _logged_in() -> bool:
    """Whether W&B has a key to use: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def no_logger(run_dir: Path, name: str, config: dict[str, Any]) -> None:
    """No logger: metrics.json, the loss curve and the report are written all the same."""


def log_samples(logger: Logger | None, rows: list[dict[str, Any]], step: int | None = None) -> None:
    """Held-out samples as a W&B table: frames, question, answer, truth. `rows` as the report shows them."""
    if not isinstance(logger, WandbLogger) or not rows:
        return
    import wandb

    columns = ["frames", "question", "answer", "truth", "correct"]
    data = [
        [wandb.Html("".join(f'<img src="{uri}">' for uri in row["pictures"])), *(row[c] for c in columns[1:])]
        for row in rows
    ]
    logged = {"held_out_samples": wandb.Table(columns=columns, data=data)}
    logger.experiment.log(logged if step is None else {**logged, "trainer/global_step": step})
