"""An evaluation put together from its configuration and carried out."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vllava.data.writing import appearing
from vllava.errors import UserError
from vllava.evaluation.results import Result, logged_figures, logged_samples
from vllava.model.device import best_device
from vllava.options import implied, in_words
from vllava.runs import is_first_process
from vllava.stops import Stopped, Stops, say
from vllava.training.loggers import log_evaluation
from vllava.training.ranks import Ranks, explaining

# Of the Trainer's settings, those that say where and how questions are answered.
_SETTINGS = (
    "accelerator",
    "devices",
    "strategy",
    "num_nodes",
    "plugins",
    "deterministic",
    "benchmark",
    "detect_anomaly",
)
_KEPT = "All answers that were given are kept."


def evaluate(cfg: DictConfig, stops: Stops) -> None:
    """Ask a checkpoint a benchmark, on the devices that `trainer` says; see vllava.evaluation.evaluate."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    trainer = build_trainer(settings, Path(cfg.run_dir), stops)
    if is_first_process():
        with appearing(Path(cfg.run_dir) / "config.yaml") as part:
            OmegaConf.save(cfg, part, resolve=True)
    benchmark = instantiate(settings["benchmark"], _convert_="all")
    judge = settings["judge"] or {}
    judging = partial(instantiate, judge, _convert_="all") if "_target_" in judge else None
    stops.kept = _KEPT
    tell = partial(log_result, settings) if settings["logger"] else None
    with in_words(), explaining(Ranks(trainer, stops), stops):
        instantiate(settings["evaluation"], _convert_="all")(
            benchmark=benchmark, judge=judging, trainer=trainer, tell=tell
        )


def log_result(settings: Any, result: Result, samples: list[dict[str, Any]]) -> None:
    """Give a result to the run's loggers: its figures as those of the whole run, and samples as a table."""
    loggers = instantiate(settings["logger"])(run_dir=Path(settings["run_dir"]), config=settings)
    log_evaluation(loggers, result.benchmark, logged_figures(result), logged_samples(samples))
    for logger in loggers:
        logger.finalize("success")


def build_trainer(settings: Any, run_dir: Path, stops: Stops) -> L.Trainer:
    """Lightning's Trainer for answering; raises UserError for strategies that share one model out among devices."""
    asked = settings["trainer"]
    if not isinstance(asked["strategy"], str):
        raise UserError(
            "An evaluation has the whole model on every device; trainer=fsdp and trainer=zero2 share it out "
            "among them: choose trainer=auto, ddp or single."
        )
    given = {key: value for key, value in asked.items() if key in _SETTINGS}
    cpu = asked["accelerator"] == "cpu" or (asked["accelerator"] == "auto" and best_device().type == "cpu")
    if cpu and asked["devices"] == "auto":  # a process of torchrun's, or one with all cores
        given["devices"] = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cpu and given["devices"] != 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(given["devices"])))
    with in_words(TypeError, ValueError):
        return L.Trainer(
            **given,
            **implied({"profiler": asked.get("profiler")}, [], run_dir),
            logger=False,
            callbacks=[StopAfterBlock(stops)],
            enable_checkpointing=False,
            enable_progress_bar=False,  # the questions have one of their own
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )


class StopAfterBlock(L.Callback):
    """Ends the work at a signal when the answers of the block in hand are on disk."""

    def __init__(self, stops: Stops) -> None:
        self.stops = stops

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Lightning's own answers to signals would come before ours, see vllava.training.saving.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stops.claim()
        self.stops.waits = True

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.stops.asked:
            stopped = Stopped(self.stops.asked)
            if trainer.is_global_zero:
                say(f"stopped by {stopped.signal}. {_KEPT} Start the same command again to go on.")
            raise stopped

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stops.settle()
