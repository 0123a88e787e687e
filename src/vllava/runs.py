"""The folders of runs: whose each is, whether its run is under way or finished, and which of several is meant.

Beside what it is for, a run's folder holds `run.json`: the run's identity and, when it has ended, what it left. It is
written by the first process alone, and locked by it for as long as it works there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vllava.data.writing import write_json
from vllava.errors import UserError, reading
from vllava.identity import LENGTH, Identity, differences, digest, grows, in_words

MARK = ".vllava-run"  # in every run's folder: what lies there is a run's; and the lock of who works there
RECORD = "run.json"
METRICS = "metrics.json"
RESUME = "resume"  # what an unfinished run goes on from, and one that may be given more steps
PATIENCE = 8.0  # seconds in which the data workers of a run that was killed are gone, and its lock with them
KEPT = ("checkpoint", METRICS, "report.html")  # what a finished run must still have, of what it left
_WRITTEN = (
    *("config.yaml", METRICS, "history.jsonl", "answers.jsonl", "broken.jsonl", "report.html", "loss.png"),
    "model.txt",
)
_ANOTHER = "choose another folder with run_dir=…"  # what to do about most of it


@dataclass
class Run:
    """A run's folder and what it says of itself.

    left: file -> size of what a finished run left; None while it is unfinished.
    """

    folder: Path
    experiment: str
    ablation: str
    seed: int
    identity: Identity
    left: dict[str, int] | None = None
    ended: str | None = None  # when
    version: int = field(default=1, repr=False)

    @property
    def digest(self) -> str:
        return digest(self.identity)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended and all that it left is still there."""
        return self.left is not None and all(_size(self.folder / name) == size for name, size in self.left.items())

    def write(self) -> None:
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_json(self.folder / RECORD, {**content, "digest": self.digest})

    def finish(self) -> None:
        """Put down that the run has ended: the last thing it does."""
        paths = [path for name in KEPT for path in [self.folder / name, *(self.folder / name).rglob("*")]]
        self.left = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
        self.ended = time.strftime("%Y-%m-%d %H:%M")
        self.write()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def read_run(folder: Path) -> Run | None:
    """What a folder says of its run; None for one without a record. Raises UserError for a damaged one."""
    path = folder / RECORD
    if not path.is_file():
        return None
    with reading(path, f"Delete it to give the run up, or {_ANOTHER}."):
        content = json.loads(path.read_bytes())
        content.pop("digest", None)
        return Run(folder, **content)


def finished_runs(runs: Path, experiment: str) -> list[Run]:
    """The finished runs of an experiment in a folder of runs, the newest first."""
    found = []
    for path in runs.glob(f"*/{RECORD}"):
        with suppress(UserError):
            run = read_run(path.parent)
            if run and run.experiment == experiment and run.is_finished:
                found.append(run)
    return sorted(found, key=lambda run: run.ended or "", reverse=True)


def finished_as(runs: Path, experiment: str, known: str) -> Run | None:
    """The newest finished run with this digest: in a folder of runs, or as a part of a chain there."""
    found = [run for folder in (runs, *(runs.glob("*/"))) for run in finished_runs(folder, experiment)]
    same = [run for run in found if run.digest == known]
    return max(same, key=lambda run: run.ended or "", default=None)


def is_first_process() -> bool:
    """Whether this is the process of a run that writes its files."""
    return not getattr(rank_zero_only, "rank", 0)


def tell(text: str) -> None:
    """Print what concerns all processes of a run, once."""
    if is_first_process():
        print(text, flush=True)


# --- taking a folder --------------------------------------------------------------------------------------------------


def claim(folder: Path) -> None:
    """Make a folder a run's; raises UserError where, without a mark, it holds files of the names that a run writes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = [name for name in _WRITTEN if (folder / name).exists()]
        if held and not (folder / MARK).exists():
            raise UserError(
                f"{folder} holds {', '.join(held)}, which a run would replace, and is not marked as a run's folder. "
                f"Choose another one with run_dir=…, or, if an older version made it, mark it: touch {folder / MARK}"
            )
        (folder / MARK).touch()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {_ANOTHER}") from error


def place(folder: Path, rerun: bool) -> Path:
    """Where a run goes: its folder or, to run again what has finished there, the next of FOLDER-2, FOLDER-3, …"""
    number, here = 1, folder
    while rerun and (found := read_run(here)) is not None and found.is_finished:
        number += 1
        here = folder.with_name(f"{folder.name}-{number}")
    return here


@contextmanager
def occupied(run: Run) -> Iterator[Run | None]:
    """The run's folder, for this process alone; gives the run, or None where it has finished before.

    Raises UserError for a folder in which another process is at work, that is somebody else's, or that holds a run of
    another identity. In the other processes of a run it only looks.
    """
    claim(run.folder)
    if not is_first_process():
        yield _settled(run)
        return
    lock = FileLock(run.folder / MARK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        raise UserError(
            f"Another process is at work in {run.folder}: wait until it has ended, or {_ANOTHER}."
        ) from error
    except (OSError, NotImplementedError):  # a network folder without locks
        print(f"warning: {run.folder} cannot be locked: see to it that no other run is started there", flush=True)
    try:
        found = _settled(run)
        if found is not None:
            found.write()
        yield found
    finally:
        with suppress(OSError):
            lock.release()


def _why_not_go_on(before: Run, found: dict[str, tuple[int | None, int | None]]) -> str:
    """Why a run cannot be given another length; empty where it can."""
    if not grows(before.identity):
        return "its learning rate follows the steps that were planned, so with others it is another run"
    if before.left is None:
        return ""  # the task will see whether it has gone further already
    if not all(new in (None, -1) or (old not in (None, -1) and new > old) for old, new in found.values()):
        return "it has gone further already"
    if not (before.folder / RESUME).is_dir():
        return f"what it would go on from is no longer in {before.folder / RESUME}"
    return ""


def _settled(run: Run) -> Run | None:
    """The run as it goes on in its folder, None if it has finished; raises UserError where another one lies there."""
    before = read_run(run.folder)
    if before is None:
        if (run.folder / METRICS).exists() or (run.folder / "checkpoint").exists():
            raise UserError(f"{run.folder} holds a run of an older version, which would be lost: {_ANOTHER}.")
        return run
    found = differences(before.identity, run.identity)
    if not found:
        return None if before.is_finished else run
    state = f"the finished run of {before.ended}" if before.left is not None else "an unfinished run"
    if set(found) <= set(LENGTH):
        if why_not := _why_not_go_on(before, found):
            raise UserError(
                f"{run.folder} holds {state}, and {in_words(found)}: {why_not}. Train that one in a folder of its own: "
                "run_dir=…"
            )
        return run
    raise UserError(
        f"{run.folder} holds {state} of another configuration: {in_words(found)}. "
        + (
            f"Start that one again to end it, delete {run.folder} to give it up, or {_ANOTHER}"
            if before.left is None
            else "Choose another folder with run_dir=…"
        )
    )
