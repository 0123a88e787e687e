"""Whatever a shard or its manifest holds, it is read as what it is or refused in words; nothing is lost."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hostile_shards import ACCEPTED, END, GOOD, MANIFESTS, ONE, RECORD, REFUSED, member, write_hostile_source
from hypothesis import given, settings
from hypothesis import strategies as st

from vllava.data.index import SAMPLE_BYTES, split_name
from vllava.data.shards import Shard, ShardReader, read_manifest, read_sources
from vllava.data.tar import members
from vllava.errors import UserError


def read_one(folder):
    return ShardReader(read_manifest(folder, "Ask for it again."), 1).read(0, 0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_shard_that_is_wrong_is_refused_by_its_name(tmp_path, name):
    shard, words = REFUSED[name]
    write_hostile_source(tmp_path / "s", shard)
    with pytest.raises(UserError) as error:
        ShardReader([Shard(tmp_path / "s" / "0.tar", 1)], 1).read(0, 0)
    assert str(tmp_path / "s" / "0.tar") in str(error.value) and re.search(words, str(error.value))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_shard_that_is_odd_but_clear_is_read(tmp_path, name):
    write_hostile_source(tmp_path / "s", ACCEPTED[name])
    key, content = read_one(tmp_path / "s")
    assert key.rsplit("/", 1)[-1] in ("a", "passwd", "例", "\\xe9t\\xe9") and content == {"json": RECORD}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_is_wrong_is_refused_with_the_remedy(tmp_path, name):
    manifest, words = MANIFESTS[name]
    write_hostile_source(tmp_path / "s", manifest=manifest)
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "s", "Ask for it again.")
    assert str(tmp_path / "s") in str(error.value) and re.search(words, str(error.value))
    assert len(str(error.value)) < 1000 and "\x1b" not in str(error.value)
    if "same file" not in words:
        assert str(error.value).endswith("Ask for it again.")


def test_shards_in_folders_within_are_read_though_their_names_are_equal(tmp_path):
    folder = write_hostile_source(tmp_path / "s", manifest={"shards": [ONE, {**ONE, "name": "sub/0.tar"}]})
    assert [shard.path for shard in read_manifest(folder, "")] == [folder / "0.tar", folder / "sub" / "0.tar"]


@pytest.mark.parametrize("again", ["s", "t/../s", "link", "hard"])
def test_one_shard_in_two_sources_is_an_error_that_names_both(tmp_path, again):
    folder = write_hostile_source(tmp_path / "s")
    (tmp_path / "t").mkdir()
    os.symlink(folder, tmp_path / "link")
    write_hostile_source(tmp_path / "hard")
    (tmp_path / "hard" / "0.tar").unlink()
    os.link(folder / "0.tar", tmp_path / "hard" / "0.tar")
    with pytest.raises(UserError, match=rf"{folder}/0.tar and {tmp_path}/{again}/0.tar are the same file"):
        read_sources([folder, tmp_path / again], "")


@pytest.mark.parametrize("folder", [5, None, ["a"], {"a": 1}, "a\0b"])
def test_a_source_that_is_no_path_is_an_error(folder):
    with pytest.raises(UserError, match="is not a folder of shards"):
        read_sources([folder], "")


def test_members_of_a_sample_may_lie_apart(tmp_path):
    """As `tar` writes a folder's files in the order of the disk."""
    (tmp_path / "a.tar").write_bytes(
        member() + member(b"b.json") + member(b"a.0.jpg", b"x") + member(b"b.txt", b"y") + END
    )
    reader = ShardReader([Shard(tmp_path / "a.tar", 2)], 1)
    assert [reader.read(0, i) for i in range(2)] == [
        ("a", {"json": RECORD, "0.jpg": b"x"}),
        ("b", {"json": RECORD, "txt": b"y"}),
    ]


def test_a_sample_larger_than_a_worker_can_hold_is_not_read(tmp_path):
    size = SAMPLE_BYTES + 1
    with open(tmp_path / "a.tar", "wb") as file:  # sparse on the disk
        info = tarfile.TarInfo("a.0.mp4")
        info.size = size
        file.write(info.tobuf())
        file.seek(-(-size // 512) * 512, 1)
        file.write(GOOD)
    reader = ShardReader([Shard(tmp_path / "a.tar", 1)], 1)
    assert reader.key(0, 0) == "a"
    with pytest.raises(UserError, match=f"have {size + len(RECORD)} bytes"):
        reader.read(0, 0)
    assert reader.read(0, 0, only=["json"]) == ("a", {"json": RECORD})


def test_a_shard_cut_while_it_is_open_is_named_not_read_short(tmp_path):
    (tmp_path / "a.tar").write_bytes(member() + member(b"b.json", bytes(100_000)) + END)
    reader = ShardReader([Shard(tmp_path / "a.tar", 2)], 1)
    reader.read(0, 0)
    os.truncate(tmp_path / "a.tar", 50_000)
    with pytest.raises(UserError, match="shorter"):
        reader.read(0, 1)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 511), value=st.integers(0, 255), data=st.data())
def test_any_byte_of_a_header_may_be_wrong(tmp_path_factory, place, value, data):
    """Then the checksum does not fit; and where it was made to fit, what is read lies inside the file."""
    shard = bytearray(member() + member(b"a.0.jpg", b"x" * 600) + END)
    shard[place] = value
    if data.draw(st.booleans()):
        shard[148:156] = b" " * 8
        shard[148:156] = b"%06o\0 " % sum(shard[:512])
    path = tmp_path_factory.mktemp("s") / "a.tar"
    path.write_bytes(shard)
    with open(path, "rb") as file:
        try:
            found = list(members(file, len(shard)))
        except ValueError:
            return
    assert all(m.offset >= 0 and m.offset + m.size <= len(shard) for m in found)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.json", ("a", "json")),
        ("v1.5/a.0.jpg", ("v1.5/a", "0.jpg")),
        ("./a.json", ("./a", "json")),
        ("a.", ("a", "")),
        ("a..jpg", ("a", ".jpg")),
        (".json", None),
        ("folder/.json", None),
        ("README", None),
        ("v1.5/README", None),
        ("", None),
    ],
)
def test_a_members_name_is_parted_at_its_own_first_dot(name, parts):
    assert split_name(name) == parts


LIMITED = """
import resource, sys
from pathlib import Path
from vllava.data.shards import Shard, ShardReader
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20),) * 2)
for path in map(Path, sys.argv[1:]):
    try:
        ShardReader([Shard(path, 1)], 1).read(0, 0)
    except Exception as error:
        print(type(error).__name__, "MemoryError" in str(error))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is not listed here")
def test_what_a_header_claims_is_not_allocated(tmp_path):
    """In a process that may have 64 MiB more, no shard that claims gigabytes runs out of memory."""
    names = [name for name in REFUSED if "8 GiB" in name or "2^80" in name or "99999999" in REFUSED[name][1]]
    paths = [tmp_path / f"{number}.tar" for number in range(len(names))]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes(REFUSED[name][0])
    assert len(names) >= 6
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["UserError False"] * len(names)
