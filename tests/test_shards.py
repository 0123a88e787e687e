"""Reading shards: the right bytes, the right order, and a clear word where a shard is wrong."""

import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import (
    SPECS,
    image_sample,
    jpeg,
    talk,
    video_sample,
    write_plain_manifest,
    write_source,
    write_tar,
)

from data_prep.shards import modality, write_shard
from vllava.batch import MediumSpec
from vllava.data.build import sample_decoder
from vllava.data.order import epoch_order
from vllava.data.shards import Shard, ShardReader, read_manifest
from vllava.data.writing import write_tar as write_members
from vllava.errors import UserError

REMEDY = "Make them with `python -m data_prep.toy stage1`."


def read_all(shards, capacity=1):
    reader = ShardReader(shards, capacity)
    return [reader.read(s, i) for s, shard in enumerate(shards) for i in range(shard.samples)]


def by_tarfile(path):
    """Members by key, as the standard library reads them."""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return list(samples.items())


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    write_source(folder, [(image_sample, video_sample)[i % 2](f"k{i}", 40 + i) for i in range(10)], per_shard=4)
    return folder


def test_reader_returns_what_tarfile_reads(source):
    expected = [sample for path in sorted(source.glob("*.tar")) for sample in by_tarfile(path)]
    assert len(expected) == 10
    assert read_all(read_manifest(source, REMEDY)) == expected


def test_reading_in_any_order_with_few_open_files_gives_the_same_samples(source):
    shards = read_manifest(source, REMEDY)
    expected = read_all(shards)
    places = [(s, i) for s, shard in enumerate(shards) for i in range(shard.samples)]
    reader = ShardReader(shards, capacity=1)
    for number in np.random.default_rng(0).permutation(len(places)):
        assert reader.read(*places[number]) == expected[number]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the open files of a process are not listed here")
def test_a_reader_keeps_no_more_shards_open_than_its_capacity(source):
    shards = read_manifest(source, REMEDY)
    reader = ShardReader(shards, capacity=2)
    for shard in (0, 1, 2, 0, 1, 2):
        reader.read(shard, 0)
        names = [Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
        assert sum(source in name.parents for name in names) <= 2


def test_a_reader_that_has_open_files_can_be_pickled_and_reads_the_same(source):
    shards = read_manifest(source, REMEDY)
    reader = ShardReader(shards, capacity=3)
    first = reader.read(1, 2)
    assert pickle.loads(pickle.dumps(reader)).read(1, 2) == first


def test_key_ends_at_the_first_dot_of_the_file_name_not_of_a_folder(tmp_path):
    record = json.dumps({"conversations": talk()}).encode()
    write_tar(tmp_path / "a.tar", [("v1.5/one.json", record), ("v1.5/one.0.jpg", b"x"), ("v1.5/two.json", record)])
    samples = read_all([Shard(tmp_path / "a.tar", 2)])
    assert samples == [("v1.5/one", {"json": record, "0.jpg": b"x"}), ("v1.5/two", {"json": record})]


# --- media of a sample ------------------------------------------------------------------------------------------------


def decode(members):
    return sample_decoder(SPECS)("key", members)


def mean_shade(pixels):
    """The grey value, 0..255, of pixels."""
    return float(pixels.float().mean())


def test_prepared_frames_become_a_video_in_the_order_of_their_numbers():
    shades = [10, 40, 70, 100, 130, 160, 190, 220]
    members = {f"0.frame{i:02d}.jpg": jpeg(shade) for i, shade in enumerate(shades)}
    shuffled = dict(sorted(members.items(), key=lambda item: item[0][::-1]))
    members = {"json": json.dumps({"conversations": talk(placeholder="<video>")}).encode(), **shuffled}
    (medium,) = decode(members).media
    assert medium.kind == "video" and medium.pixels.shape == (8, 3, 64, 64)
    assert [mean_shade(frame) for frame in medium.pixels] == pytest.approx(shades, abs=4)


def test_media_come_in_the_order_of_their_numbers_also_beyond_nine():
    members = {f"{i}.jpg": jpeg(10 + 20 * i) for i in range(12)}
    text = "\n".join(["<image>"] * 12)
    members["json"] = json.dumps({"conversations": talk(placeholder=text)}).encode()
    found = [mean_shade(medium.pixels) for medium in decode(members).media]
    assert found == pytest.approx([10 + 20 * i for i in range(12)], abs=4)


def test_images_videos_and_prepared_frames_mix_in_one_sample():
    _, _, [(_, clip)] = video_sample("key", 200)
    members = {"json": json.dumps({"conversations": talk(placeholder="<video><image><video>")}).encode()}
    members |= {"0.mp4": clip, "1.jpg": jpeg(30), **{f"2.frame{i:02d}.jpg": jpeg(90) for i in range(8)}}
    media = decode(members).media
    assert [medium.kind for medium in media] == ["video", "image", "video"]
    assert [mean_shade(medium.pixels) for medium in media] == pytest.approx([200, 30, 90], abs=4)


def test_frames_are_written_as_they_are_read(tmp_path):
    frames = [jpeg(shade) for shade in (10, 60, 110, 160)]
    record = {"id": "a", "conversations": talk(placeholder="<video>")}
    entry = write_shard(tmp_path / "0.tar", [("a", record, [("jpg", frames)])])
    _, members = ShardReader([Shard(tmp_path / "0.tar", entry["samples"])], 1).read(0, 0)
    assert [members[f"0.frame{i:02d}.jpg"] for i in range(4)] == frames


@pytest.mark.parametrize("count", [1, 10, 99, 100, 101, 128, 1001])
def test_the_names_of_any_number_of_frames_sort_as_the_frames_do(tmp_path, count):
    frames = [b"frame %d" % index for index in range(count)]
    record = {"id": "a", "conversations": talk(placeholder="<video>")}
    write_shard(tmp_path / "0.tar", [("a", record, [("jpg", frames)])])
    _, members = ShardReader([Shard(tmp_path / "0.tar", 1)], 1).read(0, 0)
    names = sorted(name for name in members if name != "json")
    assert [members[name] for name in names] == frames
    assert [int(name.split(".")[1].removeprefix("frame")) for name in names] == list(range(count))


def test_128_prepared_frames_are_a_video_in_their_order(tmp_path):
    frames = [jpeg(shade) for shade in range(60, 188)]
    record = {"id": "a", "conversations": talk(placeholder="<video>")}
    write_shard(tmp_path / "0.tar", [("a", record, [("jpg", frames)])])
    decoder = sample_decoder({"video": MediumSpec(32, 8, 128)})
    (medium,) = decoder(*ShardReader([Shard(tmp_path / "0.tar", 1)], 1).read(0, 0)).media
    shades = [mean_shade(frame) for frame in medium.pixels]
    assert shades == pytest.approx(list(range(60, 188)), abs=1.5)


# --- what is written --------------------------------------------------------------------------------------------------

RECORD = {"id": "a", "conversations": talk(placeholder="")}


@pytest.mark.parametrize(
    "key", ["", "clip.v1", ".", "..", "a/", "/a", "a//b", "./a", "../a", "a/../b", "v1.5/clip.v2", "a\0b", "a\nb"]
)
def test_a_key_that_would_not_be_read_again_is_refused_before_a_shard_appears(tmp_path, key):
    with pytest.raises(UserError, match=f"The key {re.escape(repr(key))} cannot be written"):
        write_shard(tmp_path / "0.tar", [("good", RECORD, []), (key, RECORD, [])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [5, None, b"a", ("a",), "\ud800", "a" * 5000])
def test_a_key_that_is_no_text_or_endless_is_refused(tmp_path, key):
    with pytest.raises(UserError, match=re.escape(repr(key))):
        write_shard(tmp_path / "0.tar", [(key, RECORD, [])])
    assert list(tmp_path.iterdir()) == []


def test_two_equal_keys_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="The key 'clip' comes twice"):
        write_shard(tmp_path / "0.tar", [("clip", RECORD, []), ("other", RECORD, []), ("clip", RECORD, [])])


@pytest.mark.parametrize(
    "record", [{"a": float("nan")}, {"a": float("inf")}, {"a": b"x"}, {"a": {1, 2}}, {"a": "\ud800"}, {("a",): 1}]
)
def test_a_record_that_is_no_json_is_refused_by_the_key(tmp_path, record):
    with pytest.raises(UserError, match="The record of 'clip' cannot be written as JSON"):
        write_shard(tmp_path / "0.tar", [("clip", record, [])])


@pytest.mark.parametrize(
    ("medium", "words"),
    [
        (("jpg", "text"), "is not bytes but str"),
        (("jpg", None), "is not bytes but NoneType"),
        (("jpg", [b"x", "text"]), "is not bytes but str"),
        (("jpg", []), "has no frames"),
        ((".jpg", b"x"), "write jpg"),
        ((5, b"x"), "write jpg"),
        (("a/b", b"x"), "extension '0.a/b'"),
        (("j\npg", b"x"), "extension '0.j"),
    ],
)
def test_a_medium_that_could_not_be_read_again_is_refused_by_the_key(tmp_path, medium, words):
    with pytest.raises(UserError, match=rf"'clip'.*{words}"):
        write_shard(tmp_path / "0.tar", [("clip", RECORD, [medium])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extension", ["", "_x", "__key__", "a/b", "a\0", 5])
def test_an_extension_that_would_not_be_read_again_is_refused(tmp_path, extension):
    with pytest.raises(UserError, match="'clip' cannot have a file of the extension"):
        write_members(tmp_path / "0.tar", [("clip", {extension: b"x"})])


def test_a_sample_without_files_is_refused_for_it_would_be_lost(tmp_path):
    with pytest.raises(UserError, match="'clip' has no files"):
        write_members(tmp_path / "0.tar", [("clip", {})])


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(samples=st.lists(st.tuples(words, st.dictionaries(words, st.binary(max_size=600), max_size=3)), max_size=4))
def test_what_is_written_is_read_again_as_it_was_given_and_all_else_is_refused(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("s") / "0.tar"
    try:
        entry = write_members(path, samples)
    except UserError:
        assert not path.exists()
        return
    assert (entry["samples"], entry["bytes"]) == (len(samples), path.stat().st_size)
    assert read_all([Shard(path, len(samples))]) == [(key, dict(sorted(files.items()))) for key, files in samples]


@settings(max_examples=100, deadline=None)
@given(
    key=st.from_regex(r"\A([a-z.é]{1,5}/)?[a-z é_-]{1,40}\Z"),
    files=st.dictionaries(st.from_regex(r"\A[a-z0-9][a-z.]{0,9}\Z"), st.binary(max_size=9), min_size=1),
)
def test_ordinary_keys_and_extensions_are_written(tmp_path_factory, key, files):
    path = tmp_path_factory.mktemp("s") / "0.tar"
    write_members(path, [(key, files)])
    assert read_all([Shard(path, 1)]) == [(key, dict(sorted(files.items())))]


def test_an_interrupted_writer_leaves_nothing_and_an_older_shard_whole(tmp_path):
    def samples():
        yield "a", {"json": b"new"}
        raise KeyboardInterrupt

    write_members(tmp_path / "0.tar", [("a", {"json": b"old"})])
    with pytest.raises(KeyboardInterrupt):
        write_members(tmp_path / "0.tar", samples())
    assert read_all([Shard(tmp_path / "0.tar", 1)]) == [("a", {"json": b"old"})]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0.tar.index"]


def test_too_few_prepared_frames_are_an_error():
    members = {"json": json.dumps({"conversations": talk(placeholder="<video>")}).encode()}
    members |= {f"0.frame{i:02d}.jpg": jpeg() for i in range(5)}
    with pytest.raises(UserError, match="5 prepared frames, the model takes 8"):
        decode(members)


def test_a_medium_without_an_encoder_is_an_error():
    members = {"json": json.dumps({"conversations": talk()}).encode(), "0.jpg": jpeg()}
    with pytest.raises(UserError, match="image"):
        sample_decoder({"video": SPECS["video"]})("key", members)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", "text"),
        ("<image>\nhi", "image"),
        ("hi\n<video>", "video"),
        ("<image><video>", "mixed"),
        ("<image>\nis there a <video> tag?", "image"),
    ],
)
def test_the_manifest_names_a_samples_modality_by_its_media(text, expected):
    files = {"text": [], "image": [jpeg()], "video": [b"a video"], "mixed": [jpeg(), b"a video"]}[expected]
    record = {"json": json.dumps({"conversations": talk(question=text, placeholder="")}).encode()}
    assert modality({**record, **{f"{number}.bin": file for number, file in enumerate(files)}}) == expected


def test_text_about_tags_is_text_and_what_is_no_sample_is_unreadable():
    record = {"json": json.dumps({"conversations": talk("What is <video>?", "<image> is none.", "")}).encode()}
    assert modality(record) == "text"
    assert modality({**record, "0.jpg": jpeg(), "1.jpg": jpeg()}) == modality({"json": b"{"}) == "unreadable"


# --- the order of an epoch --------------------------------------------------------------------------------------------

shard_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def order_of(sizes, seed=0, epoch=0, window=3):
    return epoch_order([Shard(Path(f"{i}.tar"), size) for i, size in enumerate(sizes)], seed, epoch, window)


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 2**32), epoch=st.integers(0, 50), window=st.integers(1, 15))
def test_an_epoch_visits_every_sample_exactly_once(sizes, seed, epoch, window):
    order = order_of(sizes, seed, epoch, window)
    assert sorted(map(tuple, order)) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@settings(max_examples=60, deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 2**32), window=st.integers(1, 15))
def test_no_more_than_a_window_of_shards_is_being_read_at_any_time(sizes, seed, window):
    order = order_of(sizes, seed, window=window)[:, 0]
    first = {shard: min(np.flatnonzero(order == shard)) for shard in range(len(sizes))}
    last = {shard: max(np.flatnonzero(order == shard)) for shard in range(len(sizes))}
    for place in range(len(order)):
        assert sum(first[shard] <= place <= last[shard] for shard in range(len(sizes))) <= window


@settings(max_examples=30, deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 2**32), epoch=st.integers(0, 50), window=st.integers(1, 15))
def test_equal_seed_and_epoch_give_an_equal_order(sizes, seed, epoch, window):
    assert (order_of(sizes, seed, epoch, window) == order_of(sizes, seed, epoch, window)).all()


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_gives_another_order(change):
    assert (order_of([10] * 8) != order_of([10] * 8, **change)).any()


def test_samples_of_one_window_are_mixed():
    order = order_of([50] * 4, window=4)
    quarters = [np.bincount(part[:, 0], minlength=4) for part in np.split(order, 4)]
    assert min(count.min() for count in quarters) > 3


# --- shards and manifests that are wrong ------------------------------------------------------------------------------


def test_a_missing_folder_is_an_error_that_ends_with_the_remedy(tmp_path):
    with pytest.raises(UserError) as error:
        read_manifest(tmp_path / "nowhere", REMEDY)
    assert str(tmp_path / "nowhere") in str(error.value) and str(error.value).endswith(REMEDY)


def test_a_missing_manifest_is_an_error_that_ends_with_the_remedy(source):
    (source / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        read_manifest(source, REMEDY)
    assert "manifest.json" in str(error.value) and str(error.value).endswith(REMEDY)


def test_a_missing_shard_is_an_error_that_names_it_and_the_remedy(source):
    (source / "00001.tar").unlink()
    with pytest.raises(UserError) as error:
        read_manifest(source, REMEDY)
    assert "00001.tar" in str(error.value) and str(error.value).endswith(REMEDY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": 3}', '{"shards": [{"name": "00000.tar"}]}'])
def test_a_manifest_that_is_not_one_is_an_error(source, text):
    (source / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"not a shard manifest.*Make them with"):
        read_manifest(source, REMEDY)


def test_a_manifest_without_a_sample_is_an_error(source):
    write_plain_manifest(source, {})
    with pytest.raises(UserError, match="Make them with"):
        read_manifest(source, REMEDY)


@pytest.mark.parametrize("claimed", [3, 5])
def test_a_count_that_disagrees_with_the_tar_is_an_error(source, claimed):
    write_plain_manifest(source, {"00000.tar": claimed})
    with pytest.raises(UserError, match=rf"00000.tar holds 4 samples, its manifest says {claimed}"):
        read_all(read_manifest(source, REMEDY))


def test_a_file_that_is_no_tar_is_an_error(source):
    (source / "00000.tar").write_bytes(b"no tar at all" * 200)
    (source / "00000.tar.index").unlink()
    write_plain_manifest(source, {"00000.tar": 4})
    with pytest.raises(UserError, match=r"00000.tar cannot be read as a tar file"):
        read_all(read_manifest(source, REMEDY))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_shard_is_an_error_whether_or_not_the_manifest_knows_its_size(source, share):
    path = source / "00000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: int((last.offset_data + last.size) * share)])
    with pytest.raises(UserError, match=rf"00000.tar has {path.stat().st_size} bytes, .*manifest.json lists it with"):
        read_manifest(source, REMEDY)
    with pytest.raises(UserError, match=r"00000.tar .*Make this shard again"):
        read_all([Shard(path, 4)])


class Bomb:
    """Pickles to a command that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "exploded")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "0.pkl", "0.pyd"])
def test_nothing_in_a_shard_is_ever_unpickled(tmp_path, extension):
    crater = tmp_path / "crater"
    bomb = pickle.dumps(Bomb(crater))
    record = json.dumps({"conversations": talk(placeholder="")}).encode()
    write_tar(tmp_path / "a.tar", [("k.json", record), (f"k.{extension}", bomb)])
    [(_, members)] = read_all([Shard(tmp_path / "a.tar", 1)])
    assert members[extension] == bomb
    if extension.startswith("0."):  # where a medium should be
        with pytest.raises(UserError, match="placeholders and media differ"):
            decode(members)
    else:
        assert decode(members).media == []
    assert not crater.exists()
    pickle.loads(bomb)
    assert crater.read_text() == "exploded"  # the bomb is live


def test_a_shard_name_never_reaches_a_shell(tmp_path):
    crater = tmp_path / "crater"
    name = f"pipe:touch {crater}".replace("/", "")
    write_tar(tmp_path / name, [("k.json", json.dumps({"conversations": talk(placeholder="")}).encode())])
    write_plain_manifest(tmp_path, {name: 1})
    assert [key for key, _ in read_all(read_manifest(tmp_path, REMEDY))] == ["k"]
    write_plain_manifest(tmp_path, {f"pipe:touch {crater}": 1})
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(tmp_path, REMEDY)
    assert not crater.exists()
