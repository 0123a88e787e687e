"""Runs that are asked to stop, and disks that fail them: what is saved stays whole, and the exit code is not 0."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from shard_fixtures import ROOT
from torch.utils.data import DataLoader

from vllava.errors import UserError
from vllava.stops import Stopped, Stops
from vllava.training.lines import cut_back
from vllava.training.ranks import LAUNCHER, end_with_launcher
from vllava.training.saving import Generations, SaveToResume, folder_in_use


def write(generations, step, content=b"state"):
    """Save a state: a file, or a folder where the content is a mapping of names to bytes."""
    generations.prepare()
    path = generations.unfinished(step)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        for name, data in content.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    generations.finish(path)


@pytest.fixture
def generations(tmp_path):
    (tmp_path / "run").mkdir()
    return Generations(tmp_path / "run" / "resume")


@pytest.fixture
def folders(generations):
    """Generations whose states are folders, as several processes write them."""
    for step in (3, 7):
        write(generations, step, {"meta.pt": b"m%d" % step, "shards/0.distcp": b"00", "shards/1.distcp": b"11"})
    return generations


def names(paths):
    return [path.name for path in paths]


def test_the_two_newest_states_are_kept_newest_first(generations):
    assert generations.newest() == []
    for step in (5, 40, 120):
        write(generations, step, b"after %d" % step)
    assert names(generations.newest()) == ["step-00000120", "step-00000040"]
    assert generations.newest()[0].read_bytes() == b"after 120"
    assert sorted(os.listdir(generations.folder)) == [
        "step-00000040",
        "step-00000040.json",
        "step-00000120",
        "step-00000120.json",
    ]
    record = json.loads((generations.folder / "step-00000120.json").read_text())
    assert record["files"] == {".": {"bytes": 9, "crc32": zlib.crc32(b"after 120")}}


def test_a_state_that_is_a_folder_is_one_as_well(folders):
    newest = folders.newest()
    assert names(newest) == ["step-00000007", "step-00000003"]
    assert (newest[0] / "meta.pt").read_bytes() == b"m7" and (newest[0] / "shards" / "1.distcp").read_bytes() == b"11"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a changed byte": lambda state: flip(state / "shards/1.distcp"),
    "a cut": lambda state: os.truncate(state / "meta.pt", 1),
    "an empty file": lambda state: os.truncate(state / "shards/0.distcp", 0),
    "a lost file": lambda state: (state / "shards/0.distcp").unlink(),
    "a lost folder": lambda state: state.rename(state.parent / "elsewhere"),
    "a cut record": lambda state: os.truncate(f"{state}.json", 20),
    "a record of something else": lambda state: Path(f"{state}.json").write_text("[1, 2]"),
    "a lost record": lambda state: os.unlink(f"{state}.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_state_falls_back_to_the_one_before_with_a_warning(folders, damage, caplog):
    newest = folders.newest()[0]
    DAMAGES[damage](newest)
    assert names(folders.newest()) == ["step-00000003"]
    assert str(newest) in caplog.text
    write(folders, 7, {"meta.pt": b"again"})  # the run comes there once more
    assert names(folders.newest()) == ["step-00000007", "step-00000003"]
    assert (newest / "meta.pt").read_bytes() == b"again" and not (newest / "shards").exists()


def test_two_damaged_states_are_a_mistake_that_says_what_to_do(folders):
    for state in folders.newest():
        flip(state / "meta.pt")
    with pytest.raises(UserError, match=r"step-00000007/meta.pt is damaged.*step-00000003/meta.pt.*delete .*resume"):
        folders.newest()


@pytest.mark.parametrize("saved", [(), (2,)])
def test_a_save_that_was_interrupted_costs_nothing(generations, saved):
    for step in saved:
        write(generations, step)
    generations.prepare()
    generations.unfinished(5).write_bytes(b"half")
    assert names(generations.newest()) == [f"step-{step:08d}" for step in saved]
    (generations.folder / "step-00000005").write_bytes(b"renamed, but its record not yet written")
    assert names(generations.newest()) == [f"step-{step:08d}" for step in saved]
    write(generations, 6)
    assert generations.newest()[0].name == "step-00000006"
    assert not generations.unfinished(5).exists() and not (generations.folder / "step-00000005").exists()


def test_states_are_removed_at_the_end_and_nothing_else(folders):
    (folders.folder / "notes.txt").write_text("a user's")
    folders.clear()
    assert os.listdir(folders.folder) == ["notes.txt"]
    (folders.folder / "notes.txt").unlink()
    folders.clear()
    assert not folders.folder.exists()


def test_rows_after_the_step_and_half_a_line_are_dropped(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.2}\n{"step": 4, "lo')
    assert [row["loss"] for row in cut_back(path, 2)] == [2.0, 1.5]
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    assert cut_back(tmp_path / "new.jsonl", 0) == []


# --- a process and its signals

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from vllava import forked
from vllava.stops import Stops, Stopped, attend
def ready(): print("ready", os.getpid(), flush=True)
def wait(script): return attend(lambda: forked.Forked(Path(script), []))
forked._context.set_forkserver_preload([])  # which takes seconds
"""


def process(code, **options):
    """A process that runs `code` and has said that it is ready."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    running = subprocess.Popen([sys.executable, "-c", PROGRAM + code], env=environment, **options)
    assert running.stdout.readline().startswith("ready")
    return running


def ended(running, seconds=20):
    _, told = running.communicate(timeout=seconds)
    return running.returncode, told


CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_loading_or_exporting_ends_the_process_with_its_code(number):
    running = process("with Stops(60):\n ready()\n time.sleep(60)")
    running.send_signal(number)
    assert ended(running)[0] == CODES[number]


def test_a_signal_that_somebody_swallowed_is_not_lost():
    running = process("with Stops(60):\n try:\n  ready()\n  time.sleep(60)\n except BaseException: pass\n")
    running.send_signal(signal.SIGTERM)
    assert ended(running)[0] == 143


WAITING = """
with Stops({seconds}) as stops:
    stops.waits, stops.kept = True, "Step 7 is saved."
    ready()
    for _ in range(300):
        time.sleep(0.1)
        {then}
"""


def test_while_the_run_waits_a_signal_is_noted():
    then = "if stops.asked: print('after the step', flush=True); raise Stopped(stops.asked)"
    running = process(WAITING.format(seconds=60, then=then))
    running.send_signal(signal.SIGUSR1)
    assert running.stdout.read() == "after the step\n" and ended(running)[0] == 138


def test_what_does_not_end_in_time_is_ended_hard():
    running = process(WAITING.format(seconds=1, then="pass"))
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    code, told = ended(running)
    assert code == 143 and 0.9 < time.monotonic() - began < 10
    assert "did not come to an end within stop_seconds=1 after SIGTERM. Step 7 is saved." in told
    assert "Traceback" not in told


def test_a_second_signal_of_the_same_kind_stops_at_once_but_not_one_that_was_passed_on():
    running = process(WAITING.format(seconds=60, then="pass"))
    for _ in range(3):  # to the process, to its group, and passed on by its parent
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(1)
    assert running.poll() is None
    running.send_signal(signal.SIGTERM)
    code, told = ended(running)
    assert code == 143 and "at once, by a second SIGTERM" in told


SLEEPING = """
import time
from vllava.stops import Stops
with Stops(9):
    print("ready", flush=True)
    time.sleep(60)
"""
DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(1)
sys.exit({})
"""


@pytest.mark.parametrize(
    ("number", "whom"), [(signal.SIGTERM, "one"), (signal.SIGUSR1, "group"), (signal.SIGINT, "one")]
)
def test_a_parent_passes_signals_on_and_ends_with_its_childs_code(number, whom, tmp_path):
    script = tmp_path / "sleeping.py"
    script.write_text(SLEEPING)
    running = process(f"sys.exit(wait({str(script)!r}))", start_new_session=True)
    (os.killpg if whom == "group" else os.kill)(running.pid, number)
    assert ended(running)[0] == CODES[number]


def test_a_child_that_fails_or_ends_well_after_a_signal_stops_its_parent_all_the_same(tmp_path):
    script = tmp_path / "deaf.py"
    for code, wanted in ((0, 143), (1, 1)):
        script.write_text(DEAF.format(code))
        running = process(f"sys.exit(wait({str(script)!r}))")
        running.send_signal(signal.SIGTERM)
        assert ended(running)[0] == wanted


def test_a_process_for_another_device_whose_first_one_has_ended_ends_too(monkeypatch):
    monkeypatch.setattr("vllava.training.ranks.die_with_parent", lambda number: None)  # not this process, please
    for first, ends in ((str(os.getppid()), False), ("1", True)):
        monkeypatch.setenv(LAUNCHER, first)
        with pytest.raises(SystemExit) if ends else nullcontext():
            end_with_launcher("train_ddp_process_1")
        end_with_launcher("stage1")  # the first process itself


def meets(rank, attempt, port):
    """In a process of its own: where it meets the others after a restart, and the sum of their ranks and 1."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": str(attempt), "RANK": str(rank)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ["WORLD_SIZE"] = "2"
    if attempt == 1 and rank == 0:
        time.sleep(0.5)  # the other is there first, and may not take an old address for that of this one
    end_with_launcher("stage1")
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    total = torch.tensor([rank + 1])
    torch.distributed.all_reduce(total)
    return int(total), os.environ["MASTER_PORT"] != str(port)


def test_processes_that_torchrun_starts_again_do_not_look_for_those_that_have_ended():
    agent = torch.distributed.TCPStore("localhost", 0, is_master=True)
    for attempt in (0, 1):
        with ProcessPoolExecutor(2, get_context("fork")) as processes:
            found = list(processes.map(meets, (0, 1), (attempt, attempt), (agent.port, agent.port)))
        assert found == [(3, attempt == 1)] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_child_is_asked_to_stop_when_its_parent_is_killed(tmp_path):
    script = tmp_path / "sleeping.py"
    child = (
        "import time; print('ready', flush=True); from vllava.stops import *\ntry:\n with Stops(9): time.sleep(60)\n"
    )
    script.write_text(child + f"finally: open({str(tmp_path / 'ended')!r}, 'w').close()")
    running = process(f"wait({str(script)!r})")
    time.sleep(0.5)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 10
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("seconds", [0, -1, "120", None, True, float("nan")])
def test_stop_seconds_is_a_number(seconds):
    with pytest.raises(UserError, match="stop_seconds"):
        Stops(seconds)


# --- training


class Line(L.LightningModule):
    """Fits a weight by steps that know their number."""

    def __init__(self, at=(), does=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1000))
        self.at, self.does, self.seen = at, does, []

    def training_step(self, batch, index):
        if self.global_step + 1 in self.at:
            self.does(self)
        self.seen.append(self.global_step)
        return ((self.weight - self.global_step) ** 2).mean()  # of its step, wherever the run began

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def train(module, saving, ckpt_path=None, **options):
    trainer = L.Trainer(
        max_steps=10,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[saving],
        **options,
    )
    trainer.fit(module, DataLoader(torch.arange(10.0)), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("step", [1, 4, 10])
def test_a_run_that_is_asked_to_stop_saves_after_the_whole_step_and_goes_on_to_the_same_weights(
    number, step, generations, capfd
):
    before = signal.getsignal(signal.SIGTERM)
    undisturbed = Line()
    train(undisturbed, SaveToResume(Generations(generations.folder.parent / "other"), 60))
    stops = Stops(60)
    module = Line([step], lambda _: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as stopped, stops:
        train(module, SaveToResume(generations, 60, stops))
    assert stopped.value.code == CODES[number]
    assert names(generations.newest()) == [f"step-{step:08d}"] and module.seen == list(range(step))
    assert f"stopped by {signal.Signals(number).name} after step {step}" in capfd.readouterr().err
    resumed = Line()
    train(resumed, SaveToResume(generations, 60), ckpt_path=generations.newest()[0])
    assert resumed.seen == list(range(step, 10)) and torch.equal(resumed.weight, undisturbed.weight)
    assert signal.getsignal(signal.SIGTERM) is before


def test_lightnings_own_answers_to_signals_are_not_installed(generations, monkeypatch):
    """On SLURM it would requeue the job by itself, and save to a file that nothing reads."""
    for name, value in {"JOB_ID": "1", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    stops, found = Stops(60), []
    module = Line([2], lambda _: found.extend(signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM)))
    with stops:
        train(module, SaveToResume(generations, 60, stops))
    assert found == [stops._answer, stops._answer]


def limited(bytes_):
    """As on a full disk, no file can become longer than this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_keeps_the_state_before_and_nothing_of_the_new_one(generations):
    module = Line([6], lambda _: limited(1000))
    try:
        with pytest.raises(UserError, match=r"step-00000006.part cannot be written.*after step 5 is in .*Make room"):
            train(module, SaveToResume(generations, 0))
    finally:
        limited(resource.RLIM_INFINITY)
    assert names(generations.newest()) == ["step-00000005", "step-00000004"]
    assert not generations.unfinished(6).exists()
    resumed = Line()
    train(resumed, SaveToResume(generations, 60), ckpt_path=generations.newest()[0])
    assert resumed.seen == [5, 6, 7, 8, 9]


def in_a_mount(folder, does):
    """Fork, mount a small disk at `folder` for the child alone, and do something there; what it gives, None: cannot."""
    told = folder.parent / "told"
    if (pid := os.fork()) == 0:
        try:
            if ctypes.CDLL(None).unshare(0x20000) == 0:  # CLONE_NEWNS
                subprocess.run(["mount", "--make-rprivate", "/"], check=True)
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], check=True)
                torch.set_num_threads(1)
                told.write_text(does())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return told.read_text() if told.exists() else None


BROKEN_DISKS = {
    "full": "head -c 600k /dev/zero > {}/filler",
    "read-only": "mount -o remount,ro {}",
    "lost": "umount -l {}",
}


@pytest.mark.parametrize("how", BROKEN_DISKS)
def test_a_disk_that_fails_ends_the_run_in_words_and_keeps_the_states_before(how, tmp_path):
    """A real file system, in a mount of the test's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    folder = disk / "run"
    generations = Generations(folder / "resume")

    def run():
        folder.mkdir()
        broken = Line([6], lambda _: subprocess.run(BROKEN_DISKS[how].format(disk), shell=True))
        try:
            with folder_in_use(folder, Stops(60)):
                train(broken, SaveToResume(generations, 0))
        except UserError as error:
            return f"{[path.name for path in generations.newest()]} {error}"
        return "no error"

    told = in_a_mount(disk, run)
    if told is None:
        pytest.skip("mounting needs rights that this process does not have")
    kept = "[]" if how == "lost" else "['step-00000005', 'step-00000004']"  # on the disk that is gone
    assert told.startswith(kept) and "cannot be written" in told and "after step 5 is in" in told, told
    assert "start the same command again" in told and not os.listdir(disk)  # nothing was put beneath the mount


class Background(SingleDeviceStrategy):
    """Writes its states in a thread, and waits for `gate` before the rename."""

    def __init__(self, gate, fails=False):
        super().__init__("cpu")
        self.gate, self.fails, self.pool = gate, fails, ThreadPoolExecutor(1)

    def save_in_background(self, checkpoint, path):
        def written():
            assert self.gate.wait(20)
            if self.fails:
                raise OSError(28, "No space left on device")
            torch.save(checkpoint, path)

        return self.pool.submit(written)


def test_a_strategy_that_writes_in_the_background_lets_the_training_go_on(generations):
    gate, seen = threading.Event(), []

    def look(module):
        seen.append((module.global_step, names(generations.newest())))
        gate.set()

    saving = SaveToResume(generations, 0.0)
    saving.seconds = 0.3
    saving.on_train_start = lambda *_: setattr(saving, "saved_at", time.monotonic() - 1)  # due after the first step
    train(Line([3], look), saving, strategy=Background(gate))
    assert seen == [(2, [])]  # two steps were taken while the first state was written
    assert generations.newest()[-1].name == "step-00000001"


def test_a_write_in_the_background_that_fails_stops_the_run_in_words(generations):
    gate = threading.Event()
    gate.set()
    with pytest.raises(UserError, match=r"step-0000000\d.part cannot be written .*No space left"):
        train(Line(), SaveToResume(generations, 0), strategy=Background(gate, fails=True))
    assert generations.newest() == []
