"""A run of a study: a chain of experiments in processes of their own, of which finished ones are found again."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vllava.config import PROJECT, composed_beside
from vllava.cores import LIMITS, cores
from vllava.data.writing import write_json
from vllava.errors import UserError, reason
from vllava.folders import safe_name
from vllava.forked import Forked
from vllava.identity import digest, evaluation_identity, identity_of, tells_apart
from vllava.lineage import PROJECTOR
from vllava.runs import claim, finished_as, read_run
from vllava.settle import EVALUATE
from vllava.stops import CODES, SIGNALS, Stopped, attend, die_with_parent, say
from vllava.study import (
    FAILED,
    FINISHED,
    OWN,
    UNFINISHED,
    Cell,
    Outcome,
    Study,
    alone,
    gather,
    keep,
    key_of,
    listed_in,
    measured_in,
    names_in,
    place_of,
    relative,
    with_checkpoint,
    with_checkpoints,
)

_TURN = ".turn"  # in a run's folder: held by the study that makes it, while others wait
_PAUSE = 1.0  # seconds between two looks at a run that another study makes
CHOSEN = ("arm", "level", "seed")  # that a study sweeps over
ASKED: list[int] = []  # the signals that asked this process to stop


def given_of(overrides: Sequence[str]) -> list[str]:
    """What of a command line's overrides is for all runs of a study; raises UserError for what a study decides."""
    rest = [one for one in overrides if key_of(one) not in (*CHOSEN, "study", "study_dir", "runs")]
    for one in rest:
        if key_of(one) in (*OWN, "ablation"):
            raise UserError(f"{one}: a study decides that for each of its runs; arm=NAME chooses among its arms.")
        if key_of(one).startswith("study."):
            raise UserError(
                f"{one}: a study is what its file says: copy it to conf/study/NAME.yaml, and change it there."
            )
    return rest


def settings_of(cfg: DictConfig) -> tuple[Study, Path, Path]:
    """The study, its folder, and the folder of runs."""
    settings: Any = OmegaConf.to_container(cfg.study, resolve=True)
    return Study.of(settings), Path(cfg.study_dir), Path(cfg.runs)


@dataclass(frozen=True)
class Part:
    """One experiment of a run as it would be trained or evaluated.

    folder: where it goes if it is made now; done: where it lies finished, if it does.
    """

    experiment: str
    overrides: list[str]
    folder: Path
    done: Path | None
    settings: dict[str, Any] = field(repr=False)


def part_of(experiment: str, overrides: Sequence[str], runs: Path) -> Part:
    """An experiment with these overrides, known by its identity wherever in `runs` it lies."""
    given = [f"+experiment={experiment}", *overrides, f"runs={runs}"]
    settings: Any = OmegaConf.to_container(composed_beside(given), resolve=True)
    known = digest(evaluation_identity(settings) if settings["evaluation"] else identity_of(settings))
    name = safe_name(f"{experiment}-{settings['ablation']}-s{settings['seed']}-{known[:8]}")
    found = finished_as(runs, experiment, known)
    return Part(experiment, given, runs / name, found.folder if found else None, settings)


def before_of(study: Study, name: str, given: Sequence[str], runs: Path) -> Part:
    """A run of the study's `before`; of what is given for all runs it takes what makes no other run of it."""
    experiment, *others = study.before[name]
    indifferent = [one for one in given if not tells_apart(one)]
    return part_of(experiment.partition("=")[2], [*others, *indifferent], runs)


def after(experiment: str, made: Mapping[str, Path]) -> list[str]:
    """What an experiment of a chain is told of those before it."""
    stage2 = [folder for name, folder in made.items() if name.startswith("stage2")]
    if experiment.startswith("stage2") and "stage1" in made:
        return [f"projector={made['stage1'] / PROJECTOR}"]
    return [f"evaluation.checkpoint={stage2[-1] / 'checkpoint'}"] if experiment == EVALUATE and stage2 else []


# --- one run ----------------------------------------------------------------------------------------------------------


def run_cell(cfg: DictConfig) -> None:
    """Carry out one run of a study, and write down what became of it: a failure does not stop the others."""
    study, folder, runs = settings_of(cfg)
    given = given_of(HydraConfig.get().overrides.task)
    cell = study.cell(cfg.arm, cfg.level, cfg.seed)
    outcome = Outcome(cell.arm, cell.level, cell.seed, overrides=study.overrides_of(cell, given))
    with _noting() as asked:
        if asked():
            return
        keep(folder, outcome)
        log_of(folder, cell).parent.mkdir(exist_ok=True)
        _side_by_side()
        started = time.monotonic()
        try:
            _make_all(study, cell, outcome, folder, runs)
            outcome.end(FINISHED)
        except UserError as error:
            outcome.end(FAILED, error.paragraph)
        except Exception as error:  # of ours, or of a library: it is one run's end, and not that of the others
            outcome.end(FAILED, reason(error))
            with open(log_of(folder, cell), "a") as file:
                traceback.print_exception(error, file=file)
        except Stopped as stopped:
            outcome.end(UNFINISHED)
            ASKED.append(int(stopped.code or 0) - 128)
        outcome.seconds = round(time.monotonic() - started, 1)
        keep(folder, outcome)
        gather(folder, study, given, listed_in(folder))
        if outcome.state != UNFINISHED:
            print(f"{cell.name}: {outcome.state}" + (f": {outcome.error}" if outcome.error else ""), flush=True)


def log_of(folder: Path, cell: Cell) -> Path:
    """What a run printed."""
    return folder / "logs" / f"{cell.name}.log"


def _make_all(study: Study, cell: Cell, outcome: Outcome, folder: Path, runs: Path) -> None:
    """Make, or find, the parts of a run, one after the other."""
    log = log_of(folder, cell)
    given = given_of(HydraConfig.get().overrides.task)
    before = {name: made(before_of(study, name, given, runs), cell, log) for name in study.needed(outcome.overrides)}
    place(study, cell.level, folder, before)
    overrides = with_checkpoints(outcome.overrides, before)
    parts: dict[str, Path] = {}
    for experiment in study.chain_of(cell):
        parts[experiment] = made(part_of(experiment, [*overrides, *after(experiment, parts)], runs), cell, log)
        outcome.parts[experiment] = relative(parts[experiment], folder)
        keep(folder, outcome)


def place(study: Study, level: str, folder: Path, before: Mapping[str, Path]) -> None:
    """Measure where a level stands on the study's axis, if nobody has; with the runs of `before` that are made.

    A run that does without what is measured leaves it to another of the level.
    """
    x, path = study.levels[level].x, measured_in(folder, level)
    if not isinstance(x, str) or not set(names_in(x)) <= set(before):
        return
    path.parent.mkdir(exist_ok=True)
    with alone(path.with_name(f".{path.name}.lock")):
        if place_of(folder, level, x) is None:
            found = instantiate(study.measure)(Path(with_checkpoint(x, before)))
            write_json(path, {"of": x, "x": found})


def made(part: Part, cell: Cell, log: Path) -> Path:
    """The folder of a finished run: where it was found, or where it has now been made.

    Raises UserError where it fails, Stopped where a signal asked for it.
    """
    if part.done is None:
        claim(part.folder)
        with _in_turn(part.folder):
            found = read_run(part.folder)
            if found is None or not found.is_finished:  # another study may have made it meanwhile
                _make(part, cell, log)
        return part.folder
    print(f"{cell.name}: {part.experiment}: was done already, in {part.done}", flush=True)
    return part.done


def _make(part: Part, cell: Cell, log: Path) -> None:
    print(f"{cell.name}: {part.experiment} … ({log})", flush=True)
    script, arguments = PROJECT / "train.py", [*part.overrides, f"run_dir={part.folder}"]
    with open(log, "a") as file:
        file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} python {script} {' '.join(arguments)}\n")
        file.flush()
        begun = file.tell()

    def start() -> Forked:
        if ASKED:  # before signals were passed on
            raise Stopped(ASKED[0])
        return Forked(script, arguments, log)

    code = attend(start)
    if code in CODES:
        raise Stopped(code - 128)
    if ASKED:
        raise Stopped(ASKED[0])
    done = read_run(part.folder)
    if code != 0 or done is None or not done.is_finished:
        raise UserError(f"{part.experiment}: {_last_words(log, begun, code)} See {log} and {part.folder}.")


def _last_words(log: Path, begun: int, code: int) -> str:
    """What a process that failed said last: its error, or else its last line."""
    with open(log, errors="replace") as file:
        file.seek(begun)
        said = file.read()
    errors = re.findall(r"(?<![a-zA-Z])error: ([^\r\n]+)", said)  # a progress bar may stand before it
    if errors:
        return errors[-1].strip()
    lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
    ended = f"ended by {signal.Signals(code - 128).name}" if 128 < code < 160 else f"ended with exit code {code}"
    return f"{ended}; its last line: {lines[-1][:300]}." if lines else f"{ended} without a word."


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Wait until no other study makes the run of this folder."""
    lock = FileLock(folder / _TURN)
    with suppress(NotImplementedError):  # a network folder without locks
        waiting = False
        while not lock.is_locked:
            try:
                lock.acquire(timeout=_PAUSE)
            except Timeout:
                if not waiting:
                    print(f"waiting for {folder}, which another study makes", flush=True)
                waiting = True
            if ASKED:
                raise Stopped(ASKED[0])
    try:
        yield
    finally:
        lock.release()


def _side_by_side() -> None:
    """Where a launcher starts several at once on a machine: say how many cores are each run's own, and end with it."""
    jobs = HydraConfig.get().launcher.get("n_jobs")
    if jobs is None:
        return
    die_with_parent()
    if LIMITS[0] not in os.environ:
        os.environ[LIMITS[0]] = str(max(1, cores() // (cores() if jobs < 0 else jobs)))


# --- signals ----------------------------------------------------------------------------------------------------------


def _in_process() -> bool:
    """Whether the runs of this study are carried out by the process that was started."""
    return str(HydraConfig.get().launcher._target_).endswith("BasicLauncher")


@contextmanager
def _noting() -> Iterator[Any]:
    """Note signals that ask to stop, beside `stops.attend`, which passes them on to a run; then end as asked.

    In the process that was started, that is to exit; in one of several workers, to leave the handlers where they are,
    so that nothing more is started there; in a SLURM job, to let submitit do what it has to, such as requeueing.
    """
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, _note)
    yield lambda: bool(ASKED)
    if ASKED and _in_process():
        say(f"stopped by {CODES[128 + ASKED[0]]}. Start the same command again to go on.")
        sys.exit(128 + ASKED[0])
    if multiprocessing.parent_process() is None:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if ASKED and callable(previous[signal.Signals(ASKED[0])]):
            os.kill(os.getpid(), ASKED[0])


def _note(number: int, _: FrameType | None) -> None:
    ASKED.append(number)
