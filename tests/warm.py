"""train.py in processes that have imported the libraries already, which takes most of a short run's time."""

import multiprocessing
import os
import runpy
import signal
import sys

from shard_fixtures import ROOT

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["vllava.run", "warm"])


def _train_py(log, arguments):
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process of its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")


class Started:
    """One process of `python train.py ARGUMENTS`; what it prints goes to LOG.stdout and LOG.stderr."""

    def __init__(self, arguments, log):
        self.log = log
        self.process = _context.Process(target=_train_py, args=(log, [*map(str, arguments)]))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def end(self, seconds=300):
        """Wait for its end; gives the exit code, what it wrote to stdout, and to stderr."""
        self.process.join(seconds)
        ended = self.process.exitcode
        self.process.kill()  # nothing, if it has ended
        assert ended is not None, "train.py hangs"
        with open(f"{self.log}.stdout") as out, open(f"{self.log}.stderr") as told:
            return ended, out.read(), told.read()


def train(arguments, log):
    """Run train.py to its end; see `Started.end`."""
    return Started(arguments, log).end()
