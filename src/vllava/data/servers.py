"""Shards on servers: their manifests, their indexes, and their bytes, from copies on this machine or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import SEEK_CUR, SEEK_END, SEEK_SET, RawIOBase
from typing import Any, BinaryIO

from vllava.data.address import RemotePath
from vllava.data.cache import ShardCache
from vllava.data.index import INDEX_BYTES, Entry, Place, index_path, parse_index
from vllava.data.patience import AbsentUserError, Remote, RemoteUserError
from vllava.data.remote import Store
from vllava.errors import UserError

AT_ONCE = 16  # files whose sizes are asked for at the same time
LOOKED_AT = 256  # files of a folder at most whose sizes are asked for before a run: each is checked when it is read


class Servers:
    """Where the shards of a run come from. May be forked and pickled."""

    def __init__(self, settings: Remote) -> None:
        self.store = Store(settings)
        room = int(settings.gigabytes * 1e9)
        self.cache = ShardCache(settings.path, room, self.store) if room else None

    def sizes(self, paths: Sequence[RemotePath]) -> dict[str, int | None]:
        """By address the sizes of files, as servers say; of very many, some. Raises UserError for a missing one."""
        some = paths[:: -(-len(paths) // LOOKED_AT)] if paths else paths
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                sizes = list(pool.map(lambda path: self.store.state(path).size, some))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # one is enough to know
                raise
        return dict(zip((path.url for path in some), sizes, strict=True))

    def shard(self, path: RemotePath, size: int | None, sha256: str | None) -> RemoteShard:
        """A shard to read from; size, sha256: what its manifest lists."""
        if size is None:
            size = self.store.state(path).size
        if size is None:
            raise RemoteUserError(f"Nobody says how many bytes {path} has: its manifest should list them.")
        return RemoteShard(self, path, size, sha256)

    def index(self, path: RemotePath, size: int) -> list[Entry] | None:
        """The index beside a shard of `size` bytes; None if there is none. Raises UserError if it does not fit."""
        try:
            try:
                return self._index(path, size)
            except RemoteUserError:
                raise
            except UserError:  # it may have suffered on its way
                return self._index(path, size)
        except AbsentUserError:
            return None

    def _index(self, path: RemotePath, size: int) -> list[Entry]:
        place = index_path(path)
        return parse_index(self.store.read(place, INDEX_BYTES), str(place), size)


class RemoteShard(RawIOBase):
    """A shard on a server as a file: of a copy, which is fetched when the first byte is asked for, or without one."""

    def __init__(self, servers: Servers, path: RemotePath, size: int, sha256: str | None) -> None:
        super().__init__()
        self.servers, self.path, self.size, self.sha256 = servers, path, size, sha256
        self._copy: BinaryIO | None = None
        self._place = 0

    def entries(self) -> list[Entry] | None:
        """The samples as the index lists them; None where there is no index, and the headers are to be read.

        Raises UserError where members are read one by one, and no index, or no checksum in it, tells right from wrong.
        """
        entries = self.servers.index(self.path, self.size)
        known = entries is not None and all(
            place.crc is not None for entry in entries for place in entry.files.values()
        )
        if self.servers.cache is None and not known:
            raise UserError(
                f"{self.path} has no index beside it with a checksum for each member, and without copies of shards "
                "(data.cache.gigabytes=0) samples are found and verified by that alone. Write it where the shards were "
                "made, with python -m data_prep.index FOLDER, and store it with them; or allow copies."
            )
        return entries

    def member(self, place: Place) -> bytes:
        """The bytes of a member, verified by the copy's checksum or its own."""
        if self.servers.cache is None:
            return self.servers.store.read_at(self.path, place.offset, place.size, place.crc)
        file = self._opened(self.servers.cache)
        file.seek(place.offset)
        return file.read(place.size)

    def _opened(self, cache: ShardCache) -> BinaryIO:
        if self._copy is None:
            self._copy = cache.open(self.path, self.size, self.sha256)
        return self._copy

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._place = max(0, offset + {SEEK_SET: 0, SEEK_CUR: self._place, SEEK_END: self.size}[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self.member(Place(self._place, max(0, min(len(buffer), self.size - self._place))))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def close(self) -> None:
        if self._copy is not None:
            self._copy.close()
        super().close()
