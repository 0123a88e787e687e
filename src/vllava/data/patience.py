"""How long a server is waited for and how often it is asked: the settings, and what they come to at one file."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from vllava.checks import NotNegative, Range, Whole
from vllava.data.address import RemotePath, shown
from vllava.data.streams import RefusedError
from vllava.errors import UserError, reason

_ACCESS = "Check the address, the network of this machine, and what it may read there."


class RemoteUserError(UserError):
    """A file on a server cannot be had, or is not what it should be: no matter of one sample."""


class AbsentUserError(RemoteUserError):
    """A file is not there, or not for us to read: some stores do not tell the two apart."""


@dataclass(frozen=True)
class Remote:
    """How remote shards are read.

    folder, gigabytes: where their copies are kept on this machine, and how much of them; 0 keeps none. seconds: the
    limit of one answer, of up to 4 MiB. retries: how often what failed is tried again. options: of fsspec, by protocol:
    {"s3": {"endpoint_url": …}}; secrets belong in the environment or the protocol's own files.
    """

    folder: str | Path = "~/.cache/vllava/shards"
    gigabytes: NotNegative = 100.0
    seconds: Annotated[float, Range(1e-3)] = 60.0
    retries: Whole = 5
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (("gigabytes", self.gigabytes, 0), ("seconds", self.seconds, 1e-3), ("retries", self.retries, 0))
        for name, value, least in numbers:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value <= 1e9 or (name == "retries" and value != int(value)):
                raise UserError(f"data.cache.{name}={value!r} is not a number such as {getattr(Remote, name):g}.")
        if not isinstance(self.options, Mapping) or not all(isinstance(one, Mapping) for one in self.options.values()):
            raise UserError("data.cache.options holds options by protocol: data.cache.options.s3.endpoint_url=…")
        if not isinstance(self.folder, (str, os.PathLike)) or not str(self.folder) or "\0" in str(self.folder):
            raise UserError(f"data.cache.folder={self.folder!r} is not the path of a folder.")

        object.__setattr__(self, "options", _plain(self.options))

    @classmethod
    def of(cls, settings: Remote | Mapping[str, Any] | None) -> Remote:
        """The settings of a configuration's node; the defaults for none."""
        return settings if isinstance(settings, Remote) else cls(**settings or {})

    @property
    def path(self) -> Path:
        """The folder of the copies."""
        return Path(self.folder).expanduser()


def _plain(node: Any) -> Any:
    """A configuration's node as dictionaries and lists, which libraries take."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    return (
        [_plain(value) for value in node] if isinstance(node, Sequence) and not isinstance(node, (str, bytes)) else node
    )


class Patience:
    """Counts what failed at one file: waits before it is tried again, or raises RemoteUserError.

    No cause is attached: its traceback would show signatures.
    """

    def __init__(self, path: RemotePath, settings: Remote) -> None:
        self.path, self.settings = path, settings
        self.failures, self.tries, self.began = 0, 0, time.monotonic()

    def wait(self, error: Exception) -> None:
        """After an error; longer each time, and as long as a server asks, up to the time limit."""
        seconds, retries = self.settings.seconds, self.settings.retries
        self.failures, self.tries = self.failures + 1, self.tries + 1
        status = _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise AbsentUserError(f"{self.path} does not exist ({said(error)}). Check the address.") from None
        if isinstance(error, PermissionError) or status in (401, 403):
            raise AbsentUserError(f"{self.path} cannot be read ({said(error)}). {_ACCESS}") from None
        if is_final(error):
            raise RemoteUserError(f"{self.path} cannot be read ({said(error)}). {_ACCESS}") from None
        if self.failures > retries:
            taken = time.monotonic() - self.began
            raise RemoteUserError(
                f"{self.path} cannot be read ({said(error)}), tried {self.tries} times in {taken:.3g} s. {_ACCESS} "
                f"data.cache.seconds={seconds:g} is the time limit of one answer, data.cache.retries={retries} says "
                "how often to try again. A run that is started again goes on where it was."
            ) from None
        asked = str((getattr(error, "headers", None) or {}).get("Retry-After", ""))
        pause = min(seconds, seconds / 60 * 2 ** (self.failures - 1)) * random.SystemRandom().uniform(0.5, 1.5)
        time.sleep(min(seconds, max(pause, float(asked) if asked.isdigit() else 0.0)))


def said(error: BaseException) -> str:
    """An error in one line, without what addresses keep secret."""
    text = shown(reason(error))
    return f"{type(error).__name__}: {text}" if type(error).__module__ == "builtins" and " " not in text else text


def _status(error: Exception) -> int | None:
    """The status of an HTTP answer behind an error, whichever library raised it."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def is_final(error: Exception) -> bool:
    """Whether the same would happen again: a mistake in the address or the settings, or no permission."""
    if status := _status(error):
        return 400 <= status < 500 and status not in (408, 425, 429)
    finals = (RefusedError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, TypeError, ValueError)
    return isinstance(error, finals) or type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError")
