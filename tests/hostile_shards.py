"""Shards and manifests as no honest writer makes them, byte by byte."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

from shard_fixtures import jpeg, talk

RECORD = json.dumps({"id": 1, "conversations": talk(placeholder="")}).encode()
PICTURE = json.dumps({"id": 1, "conversations": talk()}).encode()
END = bytes(1024)


def header(name=b"a.json", size=0, kind=b"0", prefix=b"", magic=b"ustar\x0000", checksum=None, size_field=None):
    """One header block; what does not fit its fields is the caller's wish."""
    block = bytearray(512)
    block[0 : len(name[:100])] = name[:100]
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136] = size_field if size_field is not None else b"%011o\0" % size
    block[136:148], block[156:157], block[257:265] = b"00000000000\0", kind, magic
    block[345 : 345 + len(prefix)] = prefix
    block[148:156] = b" " * 8
    block[148:156] = checksum if checksum is not None else b"%06o\0 " % sum(block)
    return bytes(block)


def member(name=b"a.json", data=RECORD, **changes):
    return header(name, len(data), **changes) + padded(data)


def padded(data):
    return data + bytes(-len(data) % 512)


def pax(*records, size=None, kind=b"x", raw=None):
    """An extended header with these (key, value) records."""
    content = raw
    if content is None:
        content = b""
        for key, value in records:
            body = b" " + key + b"=" + value + b"\n"
            length = len(body)
            while len(b"%d" % length) + len(body) != length:
                length = len(b"%d" % length) + len(body)
            content += b"%d" % length + body
    return header(b"PaxHeader", len(content) if size is None else size, kind=kind) + padded(content)


def gnu_name(name, size=None, kind=b"L"):
    return header(b"././@LongLink", len(name) + 1 if size is None else size, kind=kind) + padded(name + b"\0")


def binary(value):
    """A size in GNU tar's binary form."""
    return b"\x80" + value.to_bytes(11, "big")


def by_library(*entries, form=tarfile.PAX_FORMAT):
    """A tar file of (TarInfo or name, bytes), as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, data in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def entry(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


GOOD = member() + END
PICTURES = member(b"a.0.jpg", jpeg()) + member(b"a.json", PICTURE) + END

# Bytes of a shard whose manifest says that it holds one sample, and what the reader has to say of it.
REFUSED = {
    "empty": (b"", "before its end mark"),
    "zeros": (bytes(10240), "holds 0 samples"),
    "text": (b"no tar at all" * 200, "no tar header at byte 0"),
    "random": (bytes(range(256)) * 8, "no tar header at byte 0"),
    "gzip": (gzip.compress(GOOD), "compressed with gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + GOOD, "compressed with zstd"),
    "bzip2": (bz2.compress(GOOD), "compressed with bzip2"),
    "xz": (lzma.compress(GOOD), "compressed with xz"),
    "zip": (b"PK\x03\x04" + GOOD, "compressed with zip"),
    "cut in the content": (member(b"a.json", b"x" * 2000)[:1500], "claims 2000 bytes, of which the file has 988"),
    "cut in a header": (member() + header(b"b.json")[:300], "before its end mark"),
    "cut between members": (member() + member(b"a.0.jpg", b""), "before its end mark"),
    "cut in the padding": (member()[:-10], "before its end mark"),
    "two joined": (GOOD + GOOD, "follow its end mark"),
    "two joined after a long gap": (GOOD + bytes(3 << 20) + GOOD, "follow its end mark"),
    "garbage at the end": (GOOD + b"\0" * 600 + b"x", "follow its end mark"),
    "a header with one bit flipped": (bytes([GOOD[0] ^ 1]) + GOOD[1:], "no tar header at byte 0"),
    "no checksum": (member(checksum=b" " * 8) + END, "no tar header at byte 0"),
    "a checksum of letters": (member(checksum=b"abcdefgh") + END, "no tar header at byte 0"),
    "a size of 8 GiB": (header(size_field=b"77777777777\0") + padded(RECORD) + END, "claims 8589934591 bytes"),
    "a binary size of 2^80": (header(size_field=binary(1 << 80)) + END, "claims 1208925819614629174706176 bytes"),
    "a negative binary size": (header(size_field=b"\xff" * 12) + END, "where a size should be"),
    "a size with a sign": (header(size_field=b"-0000000001\0") + END, "where a size should be"),
    "a size in letters": (header(size_field=b"0000000xyz1\0") + END, "where a size should be"),
    "an octal size with a 9": (header(size_field=b"00000000009\0") + END, "where a size should be"),
    "a PAX header of 8 GiB": (pax(size=(1 << 33) - 1, raw=b"") + GOOD, "claims 8589934591 bytes"),
    "a PAX header longer than the file": (pax(size=900_000, raw=b"") + GOOD, "before its end mark"),
    "a PAX size longer than the file": (pax((b"size", b"99999999999")) + GOOD, "claims 99999999999 bytes"),
    "a PAX size of 10^30": (pax((b"size", b"9" * 30)) + GOOD, "where a number should be"),
    "a negative PAX size": (pax((b"size", b"-512")) + GOOD, "where a number should be"),
    "a PAX record of length 0": (pax(raw=b"0 path=b.json\n") + GOOD, "damaged"),
    "a PAX record beyond its header": (pax(raw=b"999 path=b.json\n") + GOOD, "damaged"),
    "a PAX record without a length": (pax(raw=b"path=b.json\n" * 9) + GOOD, "damaged"),
    "a PAX record without an equals sign": (pax(raw=b"8 path \n") + GOOD, "damaged"),
    "a PAX header of spaces": (pax(raw=b" " * 500_000) + GOOD, "damaged"),
    "a PAX name with a line break": (pax((b"path", b"a\nb.json")) + GOOD, "control character"),
    "a PAX name with a NUL": (pax((b"path", b"a\0b.json")) + GOOD, "control character"),
    "a PAX name with an escape": (pax((b"path", b"\x1b[2Ja.json")) + GOOD, "control character"),
    "a PAX name of a megabyte": (pax((b"path", b"a" * 1_000_000 + b".json")) + GOOD, "too long"),
    "a PAX header that gives all files one name": (pax((b"path", b"a.json"), kind=b"g") + GOOD, "all files one path"),
    "a PAX header that gives all files one size": (pax((b"size", b"1"), kind=b"g") + GOOD, "all files one size"),
    "a PAX header of 200,000 records": (pax(raw=b"5 a=\n" * 200_000) + GOOD, "more than 1000 records"),
    "a GNU name of 8 GiB": (gnu_name(b"a", size=(1 << 33) - 1) + GOOD, "claims 8589934591 bytes"),
    "a GNU name longer than the file": (gnu_name(b"a", size=900_000) + GOOD, "before its end mark"),
    "a GNU link of 8 GiB": (gnu_name(b"a", size=(1 << 33) - 1, kind=b"K") + GOOD, "claims 8589934591 bytes"),
    "a GNU name of a megabyte": (gnu_name(b"a" * 1_000_000 + b".json") + GOOD, "too long"),
    "a thousand names and no file": (gnu_name(b"a.json") * 1000, "before its end mark"),
    "an old sparse file": (member(kind=b"S") + END, "is a sparse file"),
    "a PAX sparse file, 0.1": (pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"9")) + GOOD, "sparse"),
    "a PAX sparse file, 1.0": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"99999999999")) + GOOD,
        "sparse",
    ),
    "a symbolic link": (by_library((entry("a.json", tarfile.SYMTYPE, "/etc/passwd"), b"")), "is a link"),
    "a hard link": (by_library(("b.json", RECORD), (entry("a.json", tarfile.LNKTYPE, "b.json"), b"")), "is a link"),
    "a device": (by_library((entry("a.json", tarfile.CHRTYPE), b"")), "is no plain file"),
    "a pipe": (by_library((entry("a.json", tarfile.FIFOTYPE), b"")), "is no plain file"),
    "a volume's label": (member(kind=b"V") + END, "is no plain file"),
    "one file twice": (member() + member() + END, "holds two files a.json"),
    "one file twice, apart": (member() + member(b"b.json") + member() + END, "holds two files a.json"),
    "a hidden file alone": (member(b".json") + END, "holds 0 samples.*such as .json"),
    "a file without a dot": (member(b"README") + END, "holds 0 samples.*such as README"),
    "a key that is a folder": (member(b"folder/.json") + END, "holds 0 samples.*such as folder/.json"),
    "two samples": (member() + member(b"b.json") + END, "holds 2 samples"),
    "thousands of samples": (b"".join(header(b"%06d.json" % i) for i in range(3000)) + END, "holds more than"),
}

# Odd, but what they hold is clear.
ACCEPTED = {
    "by the library, PAX": by_library(("a.json", RECORD)),
    "by the library, GNU": by_library(("a.json", RECORD), form=tarfile.GNU_FORMAT),
    "by the library, ustar": by_library(("a.json", RECORD), form=tarfile.USTAR_FORMAT),
    "a long name, PAX": by_library(("f/" * 90 + "a.json", RECORD)),
    "a long name, GNU": by_library(("f/" * 90 + "a.json", RECORD), form=tarfile.GNU_FORMAT),
    "a long name, ustar": by_library(("f/" * 90 + "a.json", RECORD), form=tarfile.USTAR_FORMAT),
    "a name beyond ASCII": by_library(("été/例.json", RECORD)),
    "a name in Latin-1": member(b"\xe9t\xe9.json") + END,
    "an absolute name": by_library(("/etc/passwd.json", RECORD)),
    "a name that leads upwards": by_library(("../../a.json", RECORD)),
    "a name like the mark of bzip2": by_library(("BZh9/a.json", RECORD)),
    "a folder": by_library((entry("f/", tarfile.DIRTYPE), b""), ("f/a.json", RECORD)),
    "an old folder": header(b"f/", kind=b"\0") + member(b"f/a.json") + END,
    "no magic": member(magic=bytes(8), kind=b"\0") + END,
    "a size in binary": header(size_field=binary(len(RECORD))) + padded(RECORD) + END,
    "a global comment": pax((b"comment", b"made by git"), kind=b"g") + GOOD,
    "other PAX attributes": pax((b"mtime", b"1.5"), (b"SCHILY.xattr.user", b"\xff=\n1 ")) + GOOD,
    "one block of zeros at the end": member() + bytes(512),
    "a megabyte of zeros at the end": member() + bytes(1 << 20),
    "hidden files of a Mac": member(b"._a.json", b"Mac OS X") + GOOD,
    "files that belong to no sample": member(b"README", b"hello") + GOOD,
}

# Manifests of a folder in which lie `0.tar`, one sample, and `sub/0.tar`; and what has to be said of them.
ONE = {"name": "0.tar", "samples": 1}
MANIFESTS = {
    "nothing": ("", "not a shard manifest"),
    "half of one": ('{"shards": [', "not a shard manifest"),
    "a list": ("[]", "not a shard manifest"),
    "null": ("null", "not a shard manifest"),
    "bytes that are no text": (b"\xff\xfe\x00{", "not a shard manifest"),
    "no list of shards": ({"shards": {"0.tar": 1}}, "not a shard manifest"),
    "deep nesting": ("[" * 200_000, "not a shard manifest"),
    "deep nesting inside": ('{"shards": ' + "[" * 200_000, "not a shard manifest"),
    "a number of a million digits": ('{"shards": [{"name": "0.tar", "samples": 1' + "0" * 1_000_000, "not a shard"),
    "entries that are texts": ({"shards": ["0.tar"]}, "an entry has no name: '0.tar'"),
    "no name": ({"shards": [{"samples": 1}]}, "an entry has no name"),
    "a name that is a list": ({"shards": [{"name": ["0.tar"], "samples": 1}]}, "an entry has no name"),
    "an empty name": ({"shards": [{"name": "", "samples": 1}]}, "does not lead to a file in this folder"),
    "an absolute name": ({"shards": [{"name": "/etc/passwd", "samples": 1}]}, "does not lead to a file"),
    "a name that leads upwards": ({"shards": [{"name": "../s/0.tar", "samples": 1}]}, "does not lead to a file"),
    "a name with a NUL": ({"shards": [{"name": "0.tar\0", "samples": 1}]}, "does not lead to a file"),
    "a name with an escape": ({"shards": [{"name": "\x1b[2J", "samples": 1}]}, "does not lead to a file"),
    "a name with half a surrogate pair": ('{"shards": [{"name": "\\ud800", "samples": 1}]}', "manifest.json"),
    "a folder": ({"shards": [{"name": "sub", "samples": 1}]}, "is not a file"),
    "a shard that is not there": ({"shards": [{"name": "9.tar", "samples": 1}]}, "does not exist"),
    "a very long name": ({"shards": [{"name": "a" * 5000, "samples": 1}]}, "manifest.json cannot be read"),
    "no count": ({"shards": [{"name": "0.tar"}]}, "counts are whole numbers"),
    "a count that is a text": ({"shards": [{"name": "0.tar", "samples": "1"}]}, "counts are whole numbers"),
    "a count that is a fraction": ({"shards": [{"name": "0.tar", "samples": 1.0}]}, "counts are whole numbers"),
    "a count that is true": ({"shards": [{"name": "0.tar", "samples": True}]}, "counts are whole numbers"),
    "a count that is null": ({"shards": [{"name": "0.tar", "samples": None}]}, "counts are whole numbers"),
    "a negative count": ({"shards": [{"name": "0.tar", "samples": -1}]}, "counts are whole numbers"),
    "a count that is no number": ('{"shards": [{"name": "0.tar", "samples": NaN}]}', "counts are whole numbers"),
    "an endless count": ('{"shards": [{"name": "0.tar", "samples": 1e999}]}', "counts are whole numbers"),
    "no sample": ({"shards": [{"name": "0.tar", "samples": 0}]}, "lists no samples"),
    "no shard": ({"shards": []}, "lists no samples"),
    "a count that the file cannot hold": ({"shards": [{"name": "0.tar", "samples": 99}]}, "takes 512 of them or more"),
    "a count of 10^12": ({"shards": [{"name": "0.tar", "samples": 10**12}]}, r"holds 1e\+12 samples"),
    "a count of 10^400": ({"shards": [{"name": "0.tar", "samples": 10**400}]}, "manifest.json"),
    "another size": ({"shards": [{**ONE, "bytes": 5}]}, r"0.tar has \d+ bytes, .*manifest.json lists it with 5"),
    "a size that is a text": ({"shards": [{**ONE, "bytes": "10240"}]}, "counts are whole numbers"),
    "a negative size": ({"shards": [{**ONE, "bytes": -1}]}, "counts are whole numbers"),
    "a shard twice": ({"shards": [ONE, ONE]}, "are the same file"),
    "a shard twice by another name": ({"shards": [ONE, {**ONE, "name": "./0.tar"}]}, "are the same file"),
    "a shard twice through a link": ({"shards": [ONE, {**ONE, "name": "link.tar"}]}, "are the same file"),
}


def write_hostile_source(folder, shard=GOOD, manifest=None):
    """A folder with a shard of these bytes, a second one in a folder within, a link to the first, and a manifest."""
    (folder / "sub").mkdir(parents=True)
    (folder / "0.tar").write_bytes(shard)
    (folder / "sub" / "0.tar").write_bytes(GOOD)
    os.symlink(folder / "0.tar", folder / "link.tar")
    content = {"shards": [ONE]} if manifest is None else manifest
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    (folder / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
