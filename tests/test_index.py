"""The index beside a shard: what it says is what the shard holds, whoever wrote either of them."""

import json
import shutil
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import image_sample, jpeg, mp4, talk, text_sample, video_sample, write_source, write_tar

from data_prep.index import main
from vllava.data.index import Facts, MediumFacts, index_path, read_index, scan
from vllava.data.shards import ShardReader, read_manifest
from vllava.errors import UserError


@pytest.fixture
def source(tmp_path):
    """A folder of one shard: a picture, a clip, a text, a clip of prepared frames, and what is no sample."""
    prepared = {"conversations": talk(placeholder="<video>")}
    both = {"conversations": talk(placeholder="<image> and <video>")}
    samples = [
        image_sample("image"),
        video_sample("video"),
        text_sample("text"),
        ("prepared", prepared, [("jpg", [jpeg(), jpeg(), jpeg()])]),
        ("both", both, [("jpg", jpeg()), ("mp4", mp4())]),
        ("broken", {"conversations": talk()}, []),
        ("no-picture", {"conversations": talk()}, [("jpg", b"not a picture")]),
    ]
    write_source(tmp_path / "source", samples, per_shard=10)
    return tmp_path / "source"


def entries_of(folder):
    shard = folder / "00000.tar"
    return read_index(index_path(shard), shard.stat().st_size)


def test_an_index_lists_every_member_where_a_tar_reader_finds_it(source):
    with tarfile.open(source / "00000.tar") as tar:
        found = {m.name: (m.offset_data, m.size, zlib.crc32(tar.extractfile(m).read())) for m in tar.getmembers()}
    listed = {f"{e.key}.{name}": tuple(place) for e in entries_of(source) for name, place in e.files.items()}
    assert listed == found and len(found) == 15


def test_an_index_says_what_a_sample_holds_before_it_is_decoded(source):
    facts = {entry.key: entry.facts for entry in entries_of(source)}
    said = sum(len(turn["value"]) for turn in talk())
    text = zlib.crc32(b"human\0<image>\nWhat is it?\0gpt\0a circle")
    assert facts["image"] == Facts((MediumFacts("image", 64, 64),), said, 2, text)
    assert facts["video"].media == (MediumFacts("video", 64, 64, 8, 1.0),)
    assert facts["prepared"].media == (MediumFacts("video", 64, 64, 3),)
    assert (facts["text"].media, facts["text"].characters) == ((), said - len("<image>\n"))
    assert [medium.kind for medium in facts["both"].media] == ["image", "video"]
    assert "placeholders and media differ" not in str(facts["broken"].broken)  # <image> without a medium is text
    assert facts["no-picture"].media == (MediumFacts("image"),)
    assert [f.modality for f in facts.values()] == ["image", "video", "text", "video", "mixed", "text", "image"]


def test_what_is_no_sample_is_listed_with_its_reason(tmp_path):
    write_source(tmp_path / "s", [("odd", {"conversations": []}, []), text_sample("good")], per_shard=2)
    odd, good = entries_of(tmp_path / "s")
    assert "empty" in odd.facts.broken and odd.facts.modality == "unreadable" and good.facts.broken is None


def test_facts_are_the_same_without_an_index(source):
    [shard] = read_manifest(source, "")
    with_index = ShardReader([shard], 1).facts(0)
    index_path(shard.path).unlink()
    without = ShardReader([shard], 1).facts(0)
    strip = [[medium.kind for medium in facts.media] for facts in with_index]
    assert strip == [[medium.kind for medium in facts.media] for facts in without]
    assert [(f.characters, f.turns, f.text, f.broken) for f in with_index] == [
        (f.characters, f.turns, f.text, f.broken) for f in without
    ]


def test_with_an_index_no_tar_header_is_read(source):
    [shard] = read_manifest(source, "")
    content = bytearray(shard.path.read_bytes())
    content[:512] = b"x" * 512  # the first header
    shard.path.write_bytes(content)
    assert ShardReader([shard], 1).read(0, 0)[0] == "image"
    index_path(shard.path).unlink()
    with pytest.raises(UserError, match="no tar header"):
        ShardReader([shard], 1).read(0, 0)


def test_a_byte_that_changed_after_indexing_is_never_read_as_right(source):
    [shard] = read_manifest(source, "")
    place = entries_of(source)[1].files["0.mp4"]
    content = bytearray(shard.path.read_bytes())
    content[place.offset + place.size // 2] ^= 1
    shard.path.write_bytes(content)
    reader = ShardReader([shard], 1)
    with pytest.raises(UserError, match=r"'0\.mp4' are not those that the shard's index speaks of"):
        reader.read(0, 1)
    assert reader.read(0, 0)[0] == "image"


def test_an_index_of_another_shard_is_refused(source, tmp_path):
    write_source(tmp_path / "other", [text_sample("a")], per_shard=1)
    shutil.copy(tmp_path / "other" / "00000.tar.index", source / "00000.tar.index")
    with pytest.raises(UserError, match=r"00000\.tar does not fit its index .* data_prep\.index"):
        ShardReader(read_manifest(source, ""), 1).key(0, 0)


FIRST = {"version": 1, "shard": "00000.tar", "bytes": 1000, "samples": 1}
GOOD = {
    "key": "a",
    "modality": "text",
    "files": {"json": [0, 10, 5]},
    "characters": 1,
    "turns": 2,
    "text": 7,
    "media": [],
}


@pytest.mark.parametrize(
    ("header", "line", "said"),
    [
        ({"version": 2}, {}, "version"),
        ({"bytes": 999}, {}, "999"),
        ({"samples": 2}, {}, "lists 1 samples and announces 2"),
        ({}, {"files": {"json": [0, 1001, None]}}, "does not lie in the shard"),
        ({}, {"files": {"json": [-1, 10, None]}}, "does not lie in the shard"),
        ({}, {"files": {"json": [1 << 70, 10, None]}}, "does not lie in the shard"),
        ({}, {"files": {"json": [0, True, None]}}, "does not lie in the shard"),
        ({}, {"files": {"json": [0, 10, "x"]}}, "checksum"),
        ({}, {"files": {}}, "no files"),
        ({}, {"files": 3}, "does not fit its index"),
        ({}, {"key": 3}, "no key"),
        ({}, {"turns": -1}, "counts"),
        ({}, {"media": [{"kind": "image", "odd": 1}]}, "odd"),
        ({}, {"media": [{"kind": "sound"}]}, "sound"),
        ({}, {"media": [{"kind": "video", "frames": "many"}]}, "many"),
    ],
)
def test_a_hostile_index_is_refused_by_name(tmp_path, header, line, said):
    path = tmp_path / "x.tar.index"
    path.write_text(f"{json.dumps(FIRST | header)}\n{json.dumps(GOOD | line)}\n")
    with pytest.raises(UserError, match=said) as raised:
        read_index(path, 1000)
    assert str(path) in str(raised.value)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_an_index_or_an_error_of_one_paragraph(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("index") / "x.tar.index"
    path.write_bytes(json.dumps(FIRST).encode() + b"\n" + content)
    with pytest.raises(UserError):
        read_index(path, 1000)


# --- shards made elsewhere --------------------------------------------------------------------------------------------


def test_shards_made_elsewhere_get_an_index_and_a_manifest(tmp_path, capsys):
    record = json.dumps({"conversations": talk()}).encode()
    for folder, keys in (("train/00", ["a/b.c/k1", "k2"]), ("train/01", ["k1"])):
        (tmp_path / folder).mkdir(parents=True)
        members = [(f"{key}.{name}", data) for key in keys for name, data in (("json", record), ("0.jpg", jpeg()))]
        write_tar(tmp_path / folder / "shard-0.tar", [("README", b"no sample"), *members])
    assert main([str(tmp_path), "--processes", "1"]) == 0
    assert "3 image" in capsys.readouterr().out
    shards = read_manifest(tmp_path, "")
    reader = ShardReader(shards, 2)
    assert [reader.key(0, 0), reader.key(0, 1), reader.key(1, 0)] == ["a/b.c/k1", "k2", "k1"]
    assert reader.facts(0)[0].media == (MediumFacts("image", 64, 64),)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.index")}
    assert main([str(tmp_path), "--processes", "1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.index")}


def test_an_index_made_later_is_the_one_that_is_written_with_the_shard(source):
    index = index_path(source / "00000.tar")
    written = index.read_bytes()
    index.unlink()
    assert main([str(source), "--processes", "1"]) == 0
    assert index.read_bytes() == written


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="holds no shards"):
        main([str(tmp_path)])


def test_scanning_ends_where_there_are_too_many_samples(tmp_path):
    write_tar(tmp_path / "x.tar", [(f"k{n}.json", b"{}") for n in range(20)])
    with open(tmp_path / "x.tar", "rb") as file:
        assert len(scan(file, (tmp_path / "x.tar").stat().st_size, most=5)[0]) == 6
