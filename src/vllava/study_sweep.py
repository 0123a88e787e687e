"""All runs of a study: which they are, what is done before the first of them and after the last."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from vllava.errors import UserError, stop
from vllava.stops import CODES, SIGNALS, say
from vllava.study import FAILED, FINISHED, STUDY, UNFINISHED, Cell, Study, gather, key_of
from vllava.study_run import ASKED, CHOSEN, given_of, settings_of


def cells_of(cfg: DictConfig) -> tuple[Study, list[str], list[Cell]]:
    """The study of a sweep's configuration, what is given for all of its runs, and the runs themselves."""
    study, _, _ = settings_of(cfg)
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    parsed = OverridesParser.create().parse_overrides([*params, *cfg.hydra.overrides.task])
    for one in parsed:
        if one.is_sweep_override() and one.key_or_group not in CHOSEN:
            raise UserError(f"{one.input_line}: a study sweeps over {', '.join(CHOSEN)} alone; make it a level.")
    [jobs] = BasicSweeper.split_arguments(parsed, None)
    cells = []
    for job in jobs:
        chosen = dict(one.split("=", 1) for one in job if key_of(one) in CHOSEN)
        seed = chosen["seed"]
        cells.append(study.cell(chosen["arm"], chosen["level"], int(seed) if seed.isdigit() else seed))
    return study, given_of(list(cfg.hydra.overrides.task)), cells


class Conclude(Callback):
    """What is done before the first run of a study and after the last: `study.json`, and a list of what failed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            HydraConfig.instance().set_config(config)  # for the study's folder, before there is a job
            study, given, cells = cells_of(config)
            gather(Path(config.study_dir), study, given, cells)
        except UserError as error:
            stop(error)
        print(f"study {study.name}: {len(cells)} runs; {Path(config.study_dir) / STUDY} says how far it is", flush=True)
        launcher = str(config.hydra.launcher._target_)
        if "Joblib" in launcher:
            for number in SIGNALS:
                signal.signal(number, _pass_on)
        if "Slurm" in launcher:  # what warns a job: its run answers it, and then submitit, which requeues the job
            os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        study, given, cells = cells_of(config)
        folder = Path(config.study_dir)
        listed = [one for one in gather(folder, study, given, cells) if one.cell in cells]
        if ASKED:
            say(f"stopped by {CODES[128 + ASKED[0]]}. Start the same command again to go on.")
            sys.exit(128 + ASKED[0])
        counted = {state: sum(one.state == state for one in listed) for state in (FINISHED, FAILED, UNFINISHED)}
        said = ", ".join(f"{number} {state}" for state, number in counted.items() if number)
        print(f"study {study.name}: {said} of {len(listed)} runs; {folder / STUDY}", flush=True)
        for one in listed:
            if one.state != FINISHED:
                say(f"{one.cell.name} {one.state}: {one.error or 'start the same command again to go on.'}")
        if counted[FINISHED] < len(listed):
            sys.exit(1)


def _pass_on(number: int, _: FrameType | None) -> None:
    """Pass a signal on to the workers; each passes it on to its run, and they end by themselves."""
    ASKED.append(number)
    for worker in multiprocessing.active_children():
        if worker.pid:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)
