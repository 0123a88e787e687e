"""Uniformly spaced frames of video files, decoded by decord or PyAV."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Any

import numpy as np
from PIL import Image

from vllava.errors import UserError


def frame_indices(total: int, frames: int) -> list[int]:
    """`frames` uniformly spaced indices, first and last included, truncated as the original code does."""
    return np.linspace(0, total - 1, frames).astype(int).tolist()


class VideoDecoder:
    """Maps a video file's bytes and a number of frames to that many RGB pictures."""

    def __call__(self, data: bytes, frames: int) -> list[Image.Image]:
        """Raises UserError if the file is unreadable or has no frames."""
        try:
            found = self._decode(data, frames)
        except UserError:
            raise
        except Exception as error:  # decoders raise whatever they like at a damaged file
            raise UserError(f"unreadable video ({_reason(error)})") from error
        if len(found) == 0:
            raise UserError("the video has no frames")
        return [Image.fromarray(frame) for frame in found]

    def _decode(self, data: bytes, frames: int) -> Any:
        """Arrays [H, W, 3] uint8, none if the video has no frames."""
        raise NotImplementedError


def _reason(error: Exception) -> str:
    """The first line of an error, without the time and source line that decord puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", line)


class PyavDecoder(VideoDecoder):
    """PyAV, in this process: reads the whole video, and reports every damaged file as an error."""

    def _decode(self, data: bytes, frames: int) -> list[np.ndarray]:
        import av

        with av.open(io.BytesIO(data)) as container:
            if not container.streams.video:
                return []
            decoded = list(container.decode(video=0))
            indices = frame_indices(len(decoded), frames) if decoded else []
            return [decoded[i].to_ndarray(format="rgb24") for i in indices]


class DecordDecoder(VideoDecoder):
    """decord, in a process of its own.

    decord seeks, so it is quick with long videos; but some damaged files make it crash or wait for ever, and every
    video it has opened costs memory for good. Its process is ended after `seconds` with one video, which is then
    an error like any other, and renewed after `videos` of them.
    """

    def __init__(self, seconds: float = 60.0, videos: int = 500) -> None:
        self.seconds, self.videos = seconds, videos
        self._owner = 0  # a forked worker must not talk to its parent's process

    def _decode(self, data: bytes, frames: int) -> np.ndarray:
        if self._owner != os.getpid() or self._decoded >= self.videos:
            self._start()
        self._decoded += 1
        try:
            self._channel.send_bytes(frames.to_bytes(4, "little") + data)
            if not self._channel.poll(self.seconds):
                self._stop()
                raise UserError(f"unreadable video (decord did not return within {self.seconds:g} s)")
            reply = json.loads(self._channel.recv_bytes())
            if "error" in reply:
                raise UserError(reply["error"])
            return np.frombuffer(self._channel.recv_bytes(), np.uint8).reshape(reply["shape"])
        except (EOFError, OSError) as error:
            status = self._stop()
            cause = signal.Signals(-status).name if status < 0 else f"exit code {status}"
            raise UserError(f"unreadable video (decord crashed: {cause})") from error

    def _start(self) -> None:
        if self._owner == os.getpid():
            self._stop()
        self._channel, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "vllava.data.video", str(theirs.fileno())]
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
            return self._process.wait()

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self._stop()

    def __getstate__(self) -> dict:
        return {"seconds": self.seconds, "videos": self.videos, "_owner": 0}  # processes do not travel


DECODERS = {"decord": DecordDecoder, "pyav": PyavDecoder}


def video_decoder(name: str) -> VideoDecoder:
    """The decoder of that name, or for "auto" decord where it is installed (it has no wheel for some platforms).

    Raises UserError for an unknown name, or if decord is asked for and not installed.
    """
    installed = importlib.util.find_spec("decord") is not None
    if name == "auto":
        name = "decord" if installed else "pyav"
    if name not in DECODERS:
        raise UserError(f"data.decoder={name!r} is not known; there are: auto, {', '.join(DECODERS)}.")
    if name == "decord" and not installed:
        raise UserError("decord is not installed here: choose data.decoder=pyav.")
    return DECODERS[name]()


def _serve(channel: Connection) -> None:
    """The decord process: a request is a number of frames and a file; the reply is a shape and pixels, or an error."""
    import decord

    while True:
        try:
            request = channel.recv_bytes()
        except EOFError:
            return
        try:
            reader = decord.VideoReader(io.BytesIO(request[4:]), num_threads=1)
            indices = frame_indices(len(reader), int.from_bytes(request[:4], "little")) if len(reader) else []
            found = reader.get_batch(indices).asnumpy() if indices else np.empty((0, 0, 0, 3), np.uint8)
        except Exception as error:
            channel.send_bytes(json.dumps({"error": f"unreadable video ({_reason(error)})"}).encode())
        else:
            channel.send_bytes(json.dumps({"shape": found.shape}).encode())
            channel.send_bytes(found.tobytes())


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
