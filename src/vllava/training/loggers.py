"""Where metrics go: W&B, TensorBoard, CSV files, several of them, or none. No step of a run is there twice."""

from __future__ import annotations

import base64
import csv
import io
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from vllava.checks import OneOf
from vllava.errors import UserError, reason
from vllava.training.continued import Continued
from vllava.training.wandb_run import MODES, WandbSettings, open_run, stop_client, usable_mode

log = logging.getLogger(__name__)
SAMPLES = "held_out_samples"
COLUMNS = ("id", "group", "question", "answer", "truth", "correct", "state", "words")  # of a table, as far as there are


def build(
    run_dir: Path,
    config: dict[str, Any],
    wandb: bool = False,
    tensorboard: bool = False,
    csv: bool = False,
    project: str = "vllava",
    mode: Annotated[str, OneOf(MODES)] = "auto",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: list[str] | None = None,
    notes: str | None = None,
    x_axis: str = "samples_seen",
) -> list[Logger]:
    """The loggers that conf/logger chooses: their files select one each, and W&B's has the other values.

    Raises UserError if one of them cannot be used.
    """
    loggers: list[Logger | None] = []
    if wandb:
        settings = WandbSettings(project, mode, entity, name, group, job_type, tags, notes, x_axis)
        loggers.append(wandb_logger(run_dir, settings, config))
    if tensorboard:
        loggers.append(tensorboard_logger(run_dir))
    if csv:
        loggers.append(CsvFile(run_dir))
    return [logger for logger in loggers if logger is not None]


def wandb_logger(run_dir: Path, settings: WandbSettings, config: dict[str, Any]) -> Logger | None:
    """Weights & Biases, or None if WANDB_MODE=disabled; raises UserError for a mode that cannot be had."""
    # Only one rank asks: the others never wait for a server.
    mode, trouble = usable_mode(settings.mode) if _rank() == 0 else ("offline", "")
    if trouble:
        _say_offline(trouble, run_dir)
    return None if mode == "disabled" else WandbRun(run_dir, settings, mode, config)


def tensorboard_logger(run_dir: Path) -> Logger:
    """TensorBoard's files in the run's folder; raises UserError where TensorBoard is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError("logger=tensorboard needs TensorBoard: pip install 'vllava[tensorboard]'.") from error
    return TensorBoardFiles(run_dir)


def _rank() -> int:
    """This process's rank, as Lightning knows it from the environment before a strategy is set up."""
    return getattr(rank_zero_only, "rank", 0)


def _say_offline(trouble: str, run_dir: Path) -> None:
    log.warning(
        "%s Training goes on, with W&B offline: its files are in %s, for `wandb sync` later.",
        trouble,
        run_dir / "wandb",
    )


class WandbRun(Continued, WandbLogger):
    """One W&B run for a run folder. A step that it holds already is left out: a resumed run computes the same again."""

    title = "W&B"

    def __init__(self, run_dir: Path, settings: WandbSettings, mode: str, config: dict[str, Any]) -> None:
        super().__init__(name=settings.name or run_dir.name, project=settings.project, save_dir=run_dir)
        self.run_dir, self.settings, self.mode, self.config = run_dir, settings, mode, config
        self.last = 0  # the last step that the run held when it was opened

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment, self.last = self._open()
        return self._experiment

    def _open(self) -> tuple[Any, int]:
        try:
            return open_run(self.run_dir, self.settings, self.mode, self.config)
        except Exception as error:
            trouble = f"W&B could not start the run ({reason(error)})."
            if self.settings.mode == "online":
                raise UserError(trouble) from error
            if self.mode == "offline":
                self.failed = True
                log.warning("%s Training goes on without it.", trouble)
                return _DummyExperiment(), 0
            _say_offline(trouble, self.run_dir)
            self.mode = "offline"
            stop_client()
            return self._open()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """At the end of a run that is stopped, all is written at once: the process may not live to do it at its end."""
        super().finalize(status)
        if status != "success" and self.mode == "offline" and self._experiment is not None:
            self.guarded(lambda: self.experiment.finish(exit_code=1))

    def cut(self, step: int) -> int:
        _ = self.experiment
        return self.last

    def write(self, metrics: dict[str, Any], step: int | None) -> None:
        numbered = metrics if step is None else {**metrics, "trainer/global_step": step}
        self.guarded(lambda: self.experiment.log(numbered, step=step))

    def conclude(self, figures: dict[str, float]) -> None:
        self.experiment.summary.update(figures)

    def show(self, rows: list[dict[str, Any]], step: int | None, name: str = SAMPLES) -> None:
        import wandb

        columns = [column for column in COLUMNS if column in rows[0]]
        data = [
            [wandb.Html("".join(f'<img src="{uri}">' for uri in row["pictures"])), *(row[c] for c in columns)]
            for row in rows
        ]
        if self.mode == "online" and step is not None and step <= self.last:
            step = None  # W&B drops what comes for a step that it has
        self.experiment.log({name: wandb.Table(columns=["frames", *columns], data=data)}, step=step)


class _CsvWriter(ExperimentWriter):
    """Lightning's, but for the file that is there already: it would remove it."""

    def _check_log_dir_exists(self) -> None:
        pass


class CsvFile(Continued, CSVLogger):
    """csv/metrics.csv in the run's folder."""

    title = "The CSV file"

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="csv")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _CsvWriter(self.log_dir)
        return self._experiment

    def cut(self, step: int) -> int:
        path = Path(self.log_dir) / "metrics.csv"
        if not path.is_file():
            return 0
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
            columns = list(reader.fieldnames or [])
        unfinished = path.with_name("metrics.csv.part")
        with open(unfinished, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(unfinished, path)
        self.experiment.metrics_keys = columns
        return max((int(row["step"]) for row in rows), default=0)


class TensorBoardFiles(Continued, TensorBoardLogger):
    """tensorboard/ in the run's folder."""

    title = "TensorBoard"

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, name="", version="tensorboard", default_hp_metric=False)

    def cut(self, step: int) -> int:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        last = self._last_step()
        # TensorBoard leaves out earlier points from here on when a writer says that it starts again.
        writer = self.experiment._get_file_writer()
        writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
        writer.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        return min(last, step)

    def _last_step(self) -> int:
        """The last step in the newest file that has any."""
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        files = sorted(Path(self.log_dir).glob("events.out.tfevents.*"), key=lambda path: path.name)
        for path in reversed(files):
            steps = [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]
            if steps:
                return max(steps)
        return 0

    def write(self, metrics: dict[str, Any], step: int | None) -> None:
        super().write(metrics, step)
        self.guarded(self.experiment.flush)  # or a kill loses two minutes

    def show(self, rows: list[dict[str, Any]], step: int | None, name: str = SAMPLES) -> None:
        for number, row in enumerate(rows):
            place = f"{name}/{number}"
            said = (f"**{part}** {row[part]}" for part in ("question", "answer", "truth"))
            self.experiment.add_text(place, "\n\n".join(said), step)
            if row["pictures"]:
                self.experiment.add_image(place, _strip(row["pictures"]), step, dataformats="HWC")
        self.experiment.flush()


def _strip(uris: list[str]) -> np.ndarray:
    """Pictures given as data URIs, side by side: (height, width, 3), of the lowest's height."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB") for uri in uris]
    height = min(picture.height for picture in pictures)
    return np.concatenate([np.asarray(picture)[:height] for picture in pictures], axis=1)


@rank_zero_only
def log_samples(loggers: Logger | Iterable[Logger] | None, rows: list[dict[str, Any]], step: int | None = None) -> None:
    """Held-out samples to the loggers that can show them: pictures, question, answer, truth, `rows` as the report has.

    `step`: the optimiser steps taken; those of now where it is None. Left out are steps that a resumed run's logger
    has already.
    """
    for logger in [loggers] if isinstance(loggers, Logger) else loggers or []:
        if not isinstance(logger, Continued) or not rows:
            continue
        if step is None or step > logger.held:
            now = step if step is not None or logger.trainer is None else logger.trainer.global_step
            logger.guarded(logger.show, rows, now)


@rank_zero_only
def log_evaluation(
    loggers: Logger | Iterable[Logger] | None, name: str, figures: dict[str, float], rows: list[dict[str, Any]]
) -> None:
    """What an evaluation on a benchmark of that name found: its figures as those of the run as a whole, and samples.

    rows: as for `log_samples`, each with the same of COLUMNS.
    """
    for logger in [loggers] if isinstance(loggers, Logger) else loggers or []:
        if isinstance(logger, Continued):
            logger.guarded(logger.conclude, {f"{name}/{key}": value for key, value in figures.items()})
            if rows:
                logger.guarded(logger.show, rows, None, f"{name}/samples")
