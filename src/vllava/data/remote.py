"""Reading from servers and object stores: every answer in time, tried again where that may help, no wrong byte kept."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import fsspec

from vllava.data.address import RemotePath
from vllava.data.patience import Patience, Remote, RemoteUserError, said
from vllava.data.streams import FileStream, HttpStream, RefusedError, State, Stream, within
from vllava.errors import UserError, reason

T = TypeVar("T")
PIECE = 1 << 22  # bytes that have one time limit, and after which a download counts as going on
LEAST = 1 << 16  # of a piece, where larger ones did not come in time
_IN_URLS = "%:/?[]@!$&'()*+,;=~"  # what stands for itself there
ELSEWHERE = "Name a folder with room for copies of shards with data.cache.folder, or keep fewer: data.cache.gigabytes."

# What to install for a protocol; fsspec finds it by itself.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **{"hf": "huggingface_hub", "oci": "ocifs", "oss": "ossfs", "tos": "tosfs", "smb": "smbprotocol"},
    **{"webdav": "webdav4", "hdfs": "pyarrow", "root": "fsspec-xrootd", "lakefs": "lakefs-spec"},
}


class _ChangedError(Exception):
    """The file is not the one that was being read, or that the manifest speaks of."""


class Store:
    """Reads remote files. May be forked and pickled: connections are made in the process that uses them."""

    def __init__(self, settings: Remote) -> None:
        self.settings = settings

    def state(self, path: RemotePath) -> State:
        """The size of a file and a mark that changes with it, as far as the server says."""
        return self._tried(path, lambda: self._looked_at(path))

    def _looked_at(self, path: RemotePath) -> State:
        stream = self._stream(path, 0, 1 if path.is_http else None)
        stream.close()
        return stream.state

    def read(self, path: RemotePath, limit: int) -> bytes:
        """A small file; raises UserError if it has more than `limit` bytes."""

        def whole() -> bytes:
            stream = self._stream(path)
            try:
                size = stream.state.size
                data = b"" if (size or 0) > limit else self._next(stream, limit + 1 if size is None else size)
            finally:
                stream.close()
            if max(size or 0, len(data)) > limit:
                raise UserError(f"{path} has more than {limit} bytes, too many for a file of its kind.")
            if size is not None and len(data) != size:
                raise OSError(f"{len(data)} of {size} bytes came")
            return data

        return self._tried(path, whole)

    def _next(self, stream: Stream, most: int) -> bytes:
        """What comes next of a file, `most` bytes unless it ends before."""
        arrived: list[bytes] = []
        came = 0
        while came < most:
            stream.read(min(PIECE, most - came), self.settings.seconds, arrived)
            if (now := sum(map(len, arrived))) == came:
                break
            came = now
        return b"".join(arrived)

    def read_at(self, path: RemotePath, offset: int, size: int, crc32: int | None = None) -> bytes:
        """The bytes of a file from `offset` on; raises RemoteUserError where their CRC-32 is not the given one."""

        def piece() -> bytes:
            stream = self._stream(path, offset, offset + size)
            try:
                if stream.position != offset:
                    raise RefusedError(
                        "the server sends files as a whole only; keep copies of them, data.cache.gigabytes=…"
                    )
                data = self._next(stream, size)
            finally:
                stream.close()
            if len(data) != size:
                raise OSError(f"{len(data)} of the {size} bytes from {offset} on came")
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise OSError(
                    f"the {size} bytes from {offset} on are not those of its index: one of the two was replaced"
                )
            return data

        return self._tried(path, piece) if size else b""

    def download(self, path: RemotePath, size: int, sha256: str | None, file: BinaryIO) -> None:
        """Write a file that is `size` bytes long and has that checksum to a local one, which is open and empty.

        Goes on where it was after an error. If the file changes meanwhile, or is not as said, it is read once more.
        """
        try:
            self._transfer(path, size, sha256, file, strict=True)
        except _ChangedError:
            try:  # servers may differ in their marks for the same file: with a checksum they do not matter
                self._transfer(path, size, sha256, file, strict=sha256 is None)
            except _ChangedError as error:
                raise RemoteUserError(
                    f"{path} {error}. It was read twice. The file was replaced without its manifest, or is being "
                    "written, or the network changes it: make the shard or its manifest again, or wait until it is "
                    "whole."
                ) from None

    def _transfer(self, path: RemotePath, size: int, sha256: str | None, file: BinaryIO, strict: bool) -> None:
        patience, progress = Patience(path, self.settings), _Progress(file)
        first: State | None = None
        while True:
            stream: Stream | None = None
            try:
                stream = self._stream(path, progress.done)
                first = first or stream.state
                _require_same(size, first, stream.state, strict)
                if stream.position != progress.done:
                    progress.restart()
                while progress.done < size:
                    self._piece(stream, progress, size, patience.failures)
                    if progress.has_advanced():
                        patience.failures = 0
                if stream.state.size is None and self._next(stream, 1):
                    raise _ChangedError(f"has more than {size} bytes, which its manifest lists")
                found = progress.digest.hexdigest()
                if sha256 is not None and found != sha256:
                    raise _ChangedError(f"has the checksum {found}, where its manifest lists {sha256}")
                return
            except (UserError, _ChangedError):
                raise
            except Exception as error:
                if progress.has_advanced():
                    patience.failures = 0
                patience.wait(error)
            finally:
                if stream:
                    stream.close()

    def _piece(self, stream: Stream, progress: _Progress, size: int, failures: int) -> None:
        """Add what comes next; smaller pieces after failures."""
        arrived: list[bytes] = []
        wanted = min(max(PIECE >> failures, LEAST), size - progress.done)
        try:
            stream.read(wanted, self.settings.seconds, arrived)
        finally:
            came = progress.add(arrived)
        if came < wanted:
            raise OSError(f"the answer ended after {progress.done} of {size} bytes")

    def _tried(self, path: RemotePath, attempt: Callable[[], T]) -> T:
        patience = Patience(path, self.settings)
        while True:
            try:
                return attempt()
            except UserError:
                raise
            except Exception as error:
                patience.wait(error)

    def _stream(self, path: RemotePath, start: int = 0, end: int | None = None) -> Stream:
        system, place = self._system(path)
        return (HttpStream if path.is_http else FileStream)(system, place, start, end, self.settings.seconds)

    def _system(self, path: RemotePath) -> tuple[Any, str]:
        """The file system of an address, and what that calls the file."""
        options = dict(self.settings.options.get(path.protocol, {}))
        if path.is_http:  # addresses go out as they are; proxies of the environment, and ~/.netrc
            options = {"encoded": True, **options}
            options["client_kwargs"] = {"trust_env": True, **options.get("client_kwargs", {})}
        key = (os.getpid(), path.protocol, path.host, repr(options))
        if key not in _systems:
            _systems.setdefault(key, within(self.settings.seconds, lambda: _connected(path, options)))
        system = _systems[key]
        return system, quote(path.url, _IN_URLS) if path.is_http else system._strip_protocol(path.url)


# The file systems of a process, kept until it ends, and untouched in those that are forked from it: if one were
# collected there, fsspec would try to close its connections by the event loop of the other process, and wait for it.
_systems: dict[tuple[int, str, str, str], Any] = {}


def _connected(path: RemotePath, options: dict[str, Any]) -> Any:
    package = PACKAGES.get(path.protocol)
    try:
        return fsspec.core.url_to_fs(path.url, skip_instance_cache=True, **options)[0]
    except ImportError as error:
        install = f"pip install {package}" if package else "the package that fsspec has for it"
        raise UserError(f"{path} needs a package that is not installed ({said(error)}): {install}.") from None
    except ValueError as error:
        known = ", ".join(f"{protocol}://" for protocol in ("s3", "gs", "az", "https", "hf", "sftp"))
        raise UserError(f"{path} cannot be read ({said(error)}). Known are, among others, {known}.") from None


class _Progress:
    """What has come of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self._counted = file, 0
        self.restart()

    def restart(self) -> None:
        self.done, self.digest = 0, hashlib.sha256()
        self.file.seek(0)

    def add(self, blocks: list[bytes]) -> int:
        """Write blocks, and say how many bytes they are; raises UserError where this machine's disk refuses them."""
        try:
            for block in blocks:
                self.file.write(block)
        except OSError as error:
            raise UserError(f"{self.file.name} cannot be written ({reason(error)}). {ELSEWHERE}") from error
        for block in blocks:
            self.digest.update(block)
        came = sum(map(len, blocks))
        self.done += came
        return came

    def has_advanced(self) -> bool:
        """Whether a piece has come since this last was so; what comes again after a restart does not count."""
        if self.done < self._counted + PIECE:
            return False
        self._counted = self.done
        return True


def _require_same(size: int, first: State, now: State, strict: bool) -> None:
    """Raises _ChangedError where a file is not as long as it should be, or two answers are of two files."""
    if now.size is not None and now.size != size:
        raise _ChangedError(f"has {now.size} bytes, where its manifest, or an earlier answer, says {size}")
    if strict and now.mark != first.mark:
        raise _ChangedError(f"changed while it was read (its mark was {first.mark}, and is {now.mark})")
