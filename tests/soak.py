"""Kills runs over and over, and looks whether each ends as an undisturbed one: `make soak`.

Every life of a run gets another number of workers, now and then of processes, and an end: a signal to one of its
processes or to all, at a random moment, inside a save, while it loads, or when its last step is done. Runs go on from
where they were until they are finished; then their weights, and the loss of every step, must be those of a run that
nobody disturbed: to the bit as long as one process trained, else to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

# What every run needs, before there are any: they are forked.
import lightning  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402

import vllava.run  # noqa: E402, F401
from data_prep.toy import make  # noqa: E402
from vllava.runs import read_run  # noqa: E402
from vllava.training.generations import Generations  # noqa: E402

STEPS = 20
LIMIT = 240.0  # seconds of a life at most
SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WHOM = ("main", "main", "main", "group", "worker", "decoder")
OF_TWO = (*WHOM, "rank", "rank", "rank")  # where two processes train: the second alone
WHEN = ("step", "step", "save", "save", "loading", "end")


class Life:
    """One process of a run, with what it starts, in a group of its own."""

    def __init__(self, world: Path, folder: Path, workers: int, ranks: int, minutes: float) -> None:
        self.folder, self.ranks = folder, ranks
        arguments = ["+experiment=stage1", f"world={world}", f"run_dir={folder}", "logger=none", "data.global_batch=12"]
        arguments += [f"data.workers={workers}", "data.decoder=decord", f"save_minutes={minutes}", "stop_seconds=60"]
        arguments += ["trainer.precision=32-true", "trainer.accelerator=cpu"]
        arguments += ["trainer=single"] if ranks == 1 else ["trainer=ddp", f"trainer.devices={ranks}"]
        self.log = folder.with_suffix(".log")
        self.pid = _forked(arguments, self.log) if ranks == 1 else _started(arguments, self.log)
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def steps(self) -> int:
        path = self.folder / "history.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def until(self, happened, seconds: float = LIMIT) -> None:
        limit = time.monotonic() + seconds
        while self.poll() is None and not happened() and time.monotonic() < limit:
            time.sleep(0.005)

    def end(self) -> int:
        self.until(lambda: False)
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise SystemExit(f"{self.folder} stands still; see {self.log}")
        while _group(self.pid):  # workers see in a moment that they are alone
            time.sleep(0.05)
        return self.code or 0

    def targets(self, whom: str) -> list[int]:
        """The processes that a signal goes to."""
        if whom in ("main", "group"):
            return [self.pid]
        found = []
        for pid, parent, line in _processes():
            if whom == "decoder" and "vllava.data.decord" in line and _descends(pid, self.pid):
                found.append(pid)
            if whom == "rank" and parent == self.pid and "train_ddp_process_" in line:
                found.append(pid)
            if whom == "worker" and parent == self.pid and not ("decord" in line or "train_ddp" in line):
                found.append(pid)
        return found[:1]


def _forked(arguments: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")
    sys.exit(0)


def _started(arguments: list[str], log: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "train.py", *arguments]
    with open(log, "a") as file:
        options = {"stdout": file, "stderr": file, "start_new_session": True, "cwd": ROOT, "env": environment}
        process = subprocess.Popen(command, **options)
    process.returncode = 0  # whose end is awaited here
    return process.pid


def _processes() -> list[tuple[int, int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if state != "Z":
            found.append((int(folder.name), int(parent), line))
    return found


def _descends(pid: int, ancestor: int) -> bool:
    parents = {one: parent for one, parent, _ in _processes()}
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def _group(leader: int) -> list[int]:
    found = []
    for pid, _, _ in _processes():
        try:
            if os.getpgid(pid) == leader:
                found.append(pid)
        except OSError:
            continue
    return found


def kill(life: Life, chance: random.Random) -> str | None:
    """Wait for a moment and send a signal; returns what was done, None if the run was over before."""
    whom, when = chance.choice(OF_TWO if life.ranks > 1 else WHOM), chance.choice(WHEN)
    number = signal.SIGKILL if whom in ("worker", "decoder") else chance.choice(SENT)
    begun = life.steps()
    if when == "loading":
        time.sleep(chance.uniform(0, 3 if life.ranks == 1 else 15))
    elif when == "end":
        life.until(lambda: life.steps() >= STEPS)
        time.sleep(chance.uniform(0, 1.5))
    else:
        mark = min(begun + chance.randint(1, 6), STEPS)
        seen = life.folder / "history.jsonl"
        stamp = seen.stat().st_mtime if seen.is_file() else 0
        life.until(lambda: seen.is_file() and seen.stat().st_mtime > stamp and life.steps() >= mark)
        if when == "save":
            life.until(lambda: any((life.folder / "resume").glob("*.part")), 5)
            time.sleep(chance.choice([0, 0, 0.002, 0.01]))
        else:
            time.sleep(chance.uniform(0, 0.4))
    if life.poll() is not None:
        return None
    targets = life.targets(whom)
    if not targets:
        whom, targets = "main", [life.pid]
    (os.killpg if whom == "group" else os.kill)(targets[0], number)
    return f"{number.name} to {whom} ({when})"


def differences(whole: Path, folder: Path, tolerance: float) -> list[str]:
    """What of a run is not as in the undisturbed one."""
    rows = [[json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()] for f in (whole, folder)]
    wrong = []
    if [row["step"] for row in rows[1]] != list(range(1, STEPS + 1)):
        wrong.append(f"steps {[row['step'] for row in rows[1]]}")
    far = max(abs(one["loss"] - other["loss"]) for one, other in zip(*rows, strict=False))
    if far > 10 * tolerance:
        wrong.append(f"a loss differs by {far:g}")
    samples = [json.loads((f / "metrics.json").read_text())["samples"] for f in (whole, folder)]
    if samples[0] != samples[1]:
        wrong.append(f"{samples[1]} samples")
    ours, theirs = (load_file(f / "checkpoint" / "projector.safetensors") for f in (whole, folder))
    far = max(float((value.double() - theirs[name].double()).abs().max()) for name, value in ours.items())
    if far > tolerance:
        wrong.append(f"a weight differs by {far:g}")
    return wrong


def soak(kills: int, seed: int, out: Path, two: float) -> int:
    """Returns the number of runs that did not end as the undisturbed one, or with a wrong exit code."""
    chance = random.Random(seed)
    shutil.rmtree(out, ignore_errors=True)
    world, whole = out / "world", out / "undisturbed"
    for split in ("stage1", "eval"):
        make(split, world, seed=0, scale=0.04, processes=2)
    began = time.monotonic()
    if Life(world, whole, 1, 1, 60).end():
        raise SystemExit(f"the undisturbed run failed; see {whole}.log")
    done, bad, finished, counts = 0, 0, 0, Counter[str]()
    while done < kills:
        folder, shared, saved = out / f"run-{finished:03d}", False, 0
        while True:
            ranks = 2 if chance.random() < two else 1
            minutes = chance.choice([0, 0, 0.02])
            life = Life(world, folder, chance.choice([0, 1, 3]), ranks, minutes)
            begun = life.steps()
            what = kill(life, chance) if done < kills else None
            code = life.end()
            shared |= ranks > 1 and life.steps() > saved
            states = Generations(folder / "resume").newest() if (folder / "resume").exists() else []
            now = int(states[0].name[-8:]) if states else 0
            done += what is not None
            counts[what.split(" (")[0] if what else "undisturbed"] += 1
            print(f"{done}: {folder.name} ranks {ranks}: {what}: code {code}, state {saved} -> {now}", flush=True)
            ended = (run := read_run(folder)) is not None and run.is_finished  # killed as it cleared up
            if code == 0 or ended:
                break
            trained = begun < life.steps() < STEPS  # it was asked to stop while it trained
            asked = what is not None and not what.startswith("SIGKILL")
            if trained and asked and (code < 0 or now != life.steps()):
                print(f"  WRONG: code {code}, {life.steps()} steps; see {life.log}", flush=True)
                bad += 1
            if what is None or now < saved:
                print(f"  WRONG: code {code}, state {now} after {saved}; see {life.log}")
                bad += 1
                if what is None:
                    break
            saved = now
        finished += 1
        whole_run = (folder / "metrics.json").exists()
        if whole_run and (wrong := differences(whole, folder, 1e-6 if shared else 0.0)):
            print(f"  WRONG: {folder}: {'; '.join(wrong)}")
            bad += 1
        elif whole_run:
            shutil.rmtree(folder)
    minutes = (time.monotonic() - began) / 60
    print("; ".join(f"{what} {number}" for what, number in sorted(counts.items())))
    print(f"soak: seed {seed}, {done} kills, {finished} runs, {bad} wrong, {minutes:.1f} minutes")
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "soak")
    parser.add_argument("--two", type=float, default=0.15, help="how often two processes train")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(bool(soak(options.kills, options.seed, options.out.absolute(), options.two)))
