"""Where remote shards are: addresses, how they are joined, compared and shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vllava.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL = re.compile(r"(file|local)://", re.IGNORECASE)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@'\"]*@)?([^\s?#'\")]*)(\?[^\s'\")]*)?")
_SAME = {"s3a": "s3", "gcs": "gs", "ssh": "sftp", "abfs": "az", "abfss": "az", "http": "https"}


def is_remote(source: Any) -> bool:
    """Whether a source is an address such as s3://bucket/folder; `file://` and paths are local.

    Raises UserError for what is neither: a command of webdataset (`pipe:`), which is never run, or a chain of fsspec.
    """
    if isinstance(source, RemotePath):
        return True
    if not isinstance(source, str):
        return False
    if source.lower().startswith("pipe:"):
        raise UserError(
            f"{shown(source)!r} is a command, and no command is ever run to read data: give the address of the shards "
            "(s3://…, gs://…, https://…, hf://…) instead."
        )
    if "://" in source and ("::" in source or not _SCHEME.match(source)):
        raise UserError(
            f"{shown(source)!r} is not an address of a folder: one begins with its protocol, s3://…, gs://…, https://… "
            "or hf://…; several cannot be chained, shards are kept on this machine without being told (data.cache)."
        )
    return bool(_SCHEME.match(source)) and not _LOCAL.match(source)


def local_path(source: str) -> str:
    """The path of a local source, with `file://` or without."""
    return _LOCAL.sub("", source, count=1)


def shown(text: str) -> str:
    """A text with addresses as they may be shown: without passwords, and without signatures, which queries hold."""
    return _ADDRESS.sub(lambda found: found[1] + found[2] + ("?…" if found[3] else ""), text)


@dataclass(frozen=True)
class RemotePath:
    """A remote folder or file. As text it is without its query and its password; `url` is the whole of it.

    A query, such as the signature of a link, belongs to every file of the folder: https://host/shards?sig=x holds
    https://host/shards/00000.tar?sig=x. Raises UserError for an address that does not lead to a folder.
    """

    url: str

    def __post_init__(self) -> None:
        if not is_remote(self.url) or re.search(r"[\x00-\x1f\x7f]", self.url):
            raise UserError(f"{shown(self.url)!r} is not an address such as https://host/folder.")
        protocol, _, rest = self.url.partition("://")
        object.__setattr__(self, "url", f"{protocol.lower()}://{rest}")
        if self.is_http and "#" in rest:
            raise UserError(
                f"{shown(self.url)} has a '#', which ends an address: write %23 where it is part of a name."
            )

    @property
    def protocol(self) -> str:
        """s3, https, …"""
        return self.url.partition("://")[0]

    @property
    def host(self) -> str:
        """What follows the protocol up to the first slash: a host, with user and port, or a bucket."""
        return re.split(r"[/?]", self.url.partition("://")[2], maxsplit=1)[0]

    @property
    def is_http(self) -> bool:
        """Whether it is read by HTTP itself."""
        return self.protocol in ("http", "https")

    def __truediv__(self, name: str) -> RemotePath:
        folder, mark, query = self.url.partition("?")
        return RemotePath(f"{folder.rstrip('/')}/{quote(name) if self.is_http else name}{mark}{query}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.url.partition("://")[2].partition("?")[0].rstrip("/").rpartition("/")[2]

    def with_name(self, name: str) -> RemotePath:
        """Another file of the same folder."""
        folder, mark, query = self.url.partition("?")
        return RemotePath(f"{folder.rstrip('/').rpartition('/')[0]}{mark}{query}") / name

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def identity(self) -> str:
        """The same text for addresses that differ in spelling alone."""
        host, slash, path = self.url.partition("://")[2].partition("/")
        path, mark, query = path.partition("?")
        path = re.sub(r"/(\./)*", "/", re.sub(r"/+", "/", slash + path)).rstrip("/")
        host = re.sub(r":(80|443)$", "", host.lower()) if self.is_http else host
        return f"{_SAME.get(self.protocol, self.protocol)}://{host}{path}{mark}{query}"
