"""decord, reading forward in a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe

import numpy as np
from PIL import Image

from vllava.errors import UserError


class _KilledError(UserError):
    """Somebody, or a machine without memory, has ended decord's process."""


class Decord:
    """Frames of videos by number, read by decord from the first frame on, without a seek.

    Some damaged files make decord crash or wait for ever, and every video it has opened costs memory for good. Its
    process is ended after `seconds` with one video, and renewed after `videos` of them.
    """

    def __init__(self, seconds: float = 60.0, videos: int = 500) -> None:
        self.seconds, self.videos = seconds, videos
        self._owner = 0  # a forked worker must not talk to its parent's process

    def read(self, data: bytes, numbers: list[int]) -> list[Image.Image]:
        """The frames of these numbers, which rise; raises UserError if decord cannot read them.

        Where its process was killed from outside, which is not the video's fault, it is asked once more.
        """
        try:
            return self._read(data, numbers)
        except _KilledError:
            return self._read(data, numbers)

    def _read(self, data: bytes, numbers: list[int]) -> list[Image.Image]:
        if self._owner != os.getpid() or self._decoded >= self.videos:
            self._start()
        self._decoded += 1
        try:
            self._channel.send_bytes(json.dumps(numbers).encode())
            self._channel.send_bytes(data)
            if not self._channel.poll(self.seconds):
                self._stop()
                raise UserError(f"unreadable video (decord did not return within {self.seconds:g} s)")
            reply = json.loads(self._channel.recv_bytes())
            if "error" in reply:
                raise UserError(f"unreadable video ({reply['error']})")
            pixels = np.frombuffer(self._channel.recv_bytes(), np.uint8).reshape(reply["shape"])
            if pixels.shape[3:] != (3,):  # of narrow videos, with the padding of rows taken for pixels
                raise UserError(f"unreadable video (decord gives pictures of shape {pixels.shape[1:]})")
            return [Image.fromarray(frame) for frame in pixels]
        except (EOFError, OSError) as error:
            status = self._stop()
            cause = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            kind = _KilledError if -status in (signal.SIGKILL, signal.SIGTERM) else UserError
            raise kind(f"unreadable video (decord crashed: {cause})") from error

    def _start(self) -> None:
        if self._owner == os.getpid():
            self._stop()
        self._channel, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "vllava.data.decord", str(theirs.fileno())]
            # In a session of its own, Ctrl-C does not reach it: it ends when this process closes the channel.
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        self._owner, self._decoded = os.getpid(), 0

    def _stop(self) -> int:
        """End the process, if it has not ended by itself; returns its exit status."""
        self._owner = 0
        self._channel.close()
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return 0  # by us

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self._stop()

    def __getstate__(self) -> dict:
        return {"seconds": self.seconds, "videos": self.videos, "_owner": 0}  # processes do not travel


def _serve(channel: Connection) -> None:
    """The process: a request is numbers of frames and a file; the reply is a shape and pixels, or an error."""
    while True:
        try:
            numbers, data = json.loads(channel.recv_bytes()), channel.recv_bytes()
        except EOFError:
            return
        try:
            found = _read_forward(data, numbers)
        except Exception as error:
            channel.send_bytes(json.dumps({"error": _reason(error)}).encode())
        else:
            channel.send_bytes(json.dumps({"shape": found.shape}).encode())
            channel.send_bytes(found.tobytes())


def _read_forward(data: bytes, numbers: list[int]) -> np.ndarray:
    import decord

    reader, wanted, found = decord.VideoReader(io.BytesIO(data), num_threads=1), set(numbers), {}
    for number in range(max(numbers) + 1):
        frame = reader.next()
        if number in wanted:
            found[number] = frame.asnumpy()
    return np.stack([found[number] for number in numbers])


def _reason(error: Exception) -> str:
    """The first line of an error, without the time and source line that decord puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
