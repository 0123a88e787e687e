"""train.py in processes that have imported the libraries already, which takes most of a short run's time."""

import os
from pathlib import Path

from shard_fixtures import ROOT

from vllava.forked import Forked


class Started(Forked):
    """One process of `python train.py ARGUMENTS`; what it prints goes to LOG.stdout and LOG.stderr."""

    def __init__(self, arguments, log):
        self._out, self._err = Path(f"{log}.stdout"), Path(f"{log}.stderr")
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)
        here = os.getcwd()
        os.chdir(ROOT)  # a process starts where this one is
        try:
            super().__init__(ROOT / "train.py", [*map(str, arguments)], self._out, self._err)
        finally:
            os.chdir(here)

    def poll(self):
        return self._process.exitcode

    def end(self, seconds=300):
        """Wait for its end; gives the exit code, what it wrote to stdout, and to stderr."""
        self._process.join(seconds)
        ended = self.poll()
        self._process.kill()  # nothing, if it has ended
        assert ended is not None, "train.py hangs"
        return ended, self._out.read_text(), self._err.read_text()


def train(arguments, log):
    """Run train.py to its end; see `Started.end`."""
    return Started(arguments, log).end()
