"""Annotations and media files become shards: every row a sample or a reject, the same bytes whoever makes them."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from picture_fixtures import encoded as picture_file
from prepare_fixtures import (
    ROOT,
    contents,
    environment,
    manifest,
    many,
    preparation,
    prepared,
    rejects,
    row,
    samples,
    write_media,
    write_rows,
)
from shard_fixtures import audio_file, jpeg, mp4
from video_files import encoded as video_file

from data_prep import blocks, workplace
from data_prep.annotations import Dataset
from data_prep.executors import LocalProcesses, RayCluster
from data_prep.media import MediaSettings, choice, find, format_of, frames_of, load
from data_prep.prepare import look, main, prepare
from data_prep.rows import MediaRef
from data_prep.summary import Ids
from data_prep.verify import verify
from vllava.data.picture import decode_image
from vllava.data.shards import ShardReader, read_manifest
from vllava.data.video import video_decoder
from vllava.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set, and what an undisturbed preparation makes of it."""
    folder = tmp_path_factory.mktemp("world")
    many(folder / "files")
    prepared(folder / "files", folder / "out")
    return folder


# --- media ------------------------------------------------------------------------------------------------------------

PICTURE, CLIP = jpeg(), mp4()


def reason(folder, kind, name, **media):
    write_rows(folder, [row(0, kind, name), row(1)])
    prepared(folder, folder / "out", **media)
    found = rejects(folder / "out")
    assert [(reject["row"], reject["id"], reject["medium"]) for reject in found] == [(0, "row-0", name)]
    assert list(samples(folder / "out")) == ["000000001"]
    return found[0]["reason"]


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("image", b"", "empty"),
        ("video", b"", "empty"),
        ("image", b"<html>404</html>", "no known format"),
        ("image", CLIP, "no known format"),
        ("image", PICTURE[:300], "unreadable image"),
        ("video", PICTURE, "it is a picture, of the format JPEG"),
        ("video", b"plain text", "unreadable video"),
        ("video", CLIP[: len(CLIP) // 2], "video"),
        ("video", video_file(container="matroska", count=8).partition(b"\x1f\x43\xb6\x75")[0], "End of file"),
        ("video", audio_file(), "no frames"),
    ],
)
def test_a_broken_medium_is_a_reject_that_says_why(tmp_path, kind, data, words):
    name = {"image": "medium.jpg", "video": "medium.mp4"}[kind]
    (tmp_path / name).write_bytes(data)
    assert words in reason(tmp_path, kind, name)


@pytest.mark.parametrize("name", ["medium.jpg", "folder/medium.jpg", "medium", "a" * 300 + ".jpg", "rows.json/x.jpg"])
def test_a_missing_file_is_a_reject(tmp_path, name):
    assert "does not exist" in reason(tmp_path, "image", name) or len(name) > 255


def test_what_is_no_plain_file_is_a_reject_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert "pipe" in reason(tmp_path, "image", "pipe.jpg")
    with pytest.raises(UserError, match="a folder, not a file"):
        find(tmp_path / "folder.jpg", "image")


def test_a_file_of_which_a_sample_has_no_room_is_rejected_unread(tmp_path):
    with open(tmp_path / "huge.mp4", "wb") as file:
        file.truncate(1 << 30)
    assert f"{1 << 30} bytes" in reason(tmp_path, "video", "huge.mp4")


@pytest.mark.parametrize(
    ("named", "there", "kind"),
    [
        ("a.jpg", "a.JPG", "image"),
        ("a.JPG", "a.jpg", "image"),
        ("a.jpg", "a.Jpeg", "image"),
        ("a.png", "a.jpg", "image"),
        ("deep/er/a.jpg", "deep/er/a.webp", "image"),
        ("v_1", "v_1.mp4", "video"),
        ("v.1", "v.1.mkv", "video"),
        ("a.mp4", "a.WEBM", "video"),
        ("größe.mp4", unicodedata.normalize("NFD", "größe.mp4"), "video"),
        (unicodedata.normalize("NFD", "größe.jpg"), "größe.PNG", "image"),
        ("图片 1.jpg", "图片 1.jpg", "image"),
    ],
)
def test_a_file_is_found_under_another_extension_case_or_form_of_unicode(tmp_path, named, there, kind):
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)
    assert find(tmp_path / named, kind) == (path, len(PICTURE))


def test_a_file_that_is_there_is_meant_whatever_lies_beside_it(tmp_path):
    write_media(tmp_path, a__jpg=b"one", a__png=b"another", a__JPG=b"third")
    assert find(tmp_path / "a.jpg", "image") == (tmp_path / "a.jpg", 3)


def test_a_file_that_may_not_be_read_is_a_reject(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    (tmp_path / "a.jpg").chmod(0o000)
    assert "cannot be read" in reason(tmp_path, "image", "a.jpg")


def test_several_files_that_may_be_meant_are_named(tmp_path):
    write_media(tmp_path, a__png=PICTURE, a__webp=PICTURE)
    with pytest.raises(UserError, match=r"several may be meant instead: a\.png, a\.webp"):
        find(tmp_path / "a.jpg", "image")


PIXELS = decode_image(PICTURE)


@pytest.mark.parametrize(
    ("data", "kind", "extension"),
    [
        *(
            (picture_file(PIXELS, form), "image", extension)
            for form, extension in {
                "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif",
                "HEIF": "heic",
            }.items()
        ),
        (picture_file(PIXELS, "GIF"), "video", "gif"),
        (CLIP, "video", "mp4"),
        *(
            (video_file(codec, container, count=8), "video", extension)
            for codec, container, extension in [
                ("libx264", "mov", "mov"), ("libx264", "matroska", "mkv"), ("libvpx-vp9", "webm", "webm"),
                ("mpeg4", "avi", "avi"), ("flv", "flv", "flv"), ("libx264", "mpegts", "ts"),
                ("mpeg2video", "mpeg", "mpg"), ("wmv2", "asf", "wmv"),
            ]
        ),
    ],
)  # fmt: skip
def test_the_extension_in_the_shard_is_that_of_the_real_format(data, kind, extension):
    assert format_of(data, kind, "wrong.EXT") == extension


def test_members_of_a_sample_have_the_extensions_of_their_formats_and_the_bytes_of_the_files(tmp_path):
    png = picture_file(PIXELS, "PNG")
    write_media(tmp_path / "nested" / "图", a__JPG=png, clip__MP4=CLIP)
    write_rows(tmp_path, [row(0, "image", "nested/图/a.jpg"), row(1, "video", "nested/图/clip.MP4")])
    prepared(tmp_path, tmp_path / "out")
    found = samples(tmp_path / "out")
    assert found["000000000"]["0.png"] == png
    assert found["000000001"]["0.mp4"] == CLIP
    assert json.loads(found["000000000"]["json"])["id"] == "row-0"


def test_without_a_check_broken_media_pass_if_they_begin_as_their_kind_does(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE[:300])
    write_rows(tmp_path, [row(0, "image", "a.jpg")])
    prepared(tmp_path, tmp_path / "out", check="none")
    assert samples(tmp_path / "out")["000000000"]["0.jpg"] == PICTURE[:300]


def test_bytes_in_a_row_are_taken_as_files_are():
    assert load(MediaRef("image", None, PICTURE, "image 1 of the row"), MediaSettings()).data == PICTURE
    with pytest.raises(UserError, match="empty"):
        load(MediaRef("image", None, b"", "image 1 of the row"), MediaSettings())


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_are_those_that_training_takes_with_their_times(tmp_path):
    clip = video_file(count=60, fps=30, height=96, width=128)
    (tmp_path / "a.mp4").write_bytes(clip)
    write_rows(tmp_path, [row(0, "video", "a.mp4")])
    prepared(tmp_path, tmp_path / "out", video="frames", frames="8", short_side=48)
    sample = samples(tmp_path / "out")["000000000"]
    expected = video_decoder("auto")(clip, 8)
    pictures = [decode_image(sample[f"0.frame{number:02d}.jpg"]) for number in range(8)]
    assert sorted(sample) == [*(f"0.frame{number:02d}.jpg" for number in range(8)), "json"]
    assert json.loads(sample["json"])["frame_times"] == {"0": [round(time, 3) for time in expected.times]}
    assert {picture.size for picture in pictures} == {(64, 48)}
    for picture, wanted in zip(pictures, expected, strict=True):
        middle, right = picture.getpixel((32, 24)), wanted.getpixel((64, 48))
        assert max(abs(a - b) for a, b in zip(middle, right, strict=True)) < 6


def test_a_rate_takes_the_frames_shown_at_those_times():
    times = [0.0, 0.4, 0.9, 1.1, 1.9, 2.0]
    assert choice("fps:1")(times) == [0, 2, 5]
    assert choice("fps:2")(times) == [0, 1, 2, 3, 5]
    assert choice("fps:30")(times) == [0, 1, 2, 3, 4, 5]  # no frame twice
    assert choice("fps:1")([0.0]) == [0]


def test_many_frames_are_decoded_a_few_at_a_time(monkeypatch):
    clip = video_file(count=50, fps=10)
    whole, times = frames_of(clip, choice("50"), 256)
    monkeypatch.setattr("data_prep.media.BATCH", 7)
    assert frames_of(clip, choice("50"), 256) == (whole, times)
    assert times == [round(number / 10, 3) for number in range(50)]


def test_a_video_that_would_give_frames_without_end_is_refused():
    with pytest.raises(UserError, match="10001 s of video give"):
        choice("fps:1")([0.0, 10_001.0])


@pytest.mark.parametrize("frames", ["0", "-1", "8.5", "fps:0", "fps:", "fps:x", "99999", "many", ""])
def test_a_rule_for_frames_that_is_none_is_refused(frames):
    with pytest.raises(UserError, match="--frames"):
        MediaSettings(frames=frames)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_every_row_is_a_sample_or_a_reject(world):
    counts = manifest(world / "out")["settings"]["counts"]
    assert (counts["rows"], counts["written"], counts["rejected"]) == (40, 32, 8)
    assert counts["modalities"] == {"image": 16, "text": 8, "video": 8}
    assert [reject["row"] for reject in rejects(world / "out")] == list(range(2, 40, 5))
    assert sorted(int(key) for key in samples(world / "out")) == [n for n in range(40) if n % 5 != 2]
    assert not (world / "out" / ".unfinished").exists()


def test_the_shards_are_read_as_any_others(world):
    shards = read_manifest(world / "out", "")
    reader = ShardReader(shards, 2)
    assert [reader.key(0, index) for index in range(shards[0].samples)] == ["000000000", "000000001", "000000003"]


def test_a_block_without_a_sample_gives_no_shard(tmp_path):
    write_rows(tmp_path, [row(n, "image", "missing.jpg") for n in range(4)] + [row(4)])
    tally = prepared(tmp_path, tmp_path / "out", rows_per_shard=2)[""]
    assert [shard["name"] for shard in manifest(tmp_path / "out")["shards"]] == ["00002.tar"]
    assert (tally.rows, tally.written, tally.rejected, tally.shards) == (5, 1, 4, 1)


def test_processes_change_no_byte(world, tmp_path):
    prepared(world / "files", tmp_path / "out", processes=3)
    assert contents(tmp_path / "out") == contents(world / "out")


@pytest.fixture(scope="session")
def local_ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_changes_no_byte(world, tmp_path, local_ray):
    prepare(preparation(world / "files"), tmp_path / "out", RayCluster(), shown=False)
    assert contents(tmp_path / "out") == contents(world / "out")


def test_a_second_run_does_nothing(world):
    before = {path: path.stat().st_mtime_ns for path in (world / "out").rglob("*")}
    assert prepared(world / "files", world / "out") is None
    assert {path: path.stat().st_mtime_ns for path in (world / "out").rglob("*")} == before


def test_annotations_that_were_only_touched_are_the_same(tmp_path):
    many(tmp_path / "files", 8)
    prepared(tmp_path / "files", tmp_path / "out")
    os.utime(tmp_path / "files" / "rows.json", (0, 0))
    assert prepared(tmp_path / "files", tmp_path / "out") is None


def test_other_settings_are_refused_with_the_difference(world):
    with pytest.raises(UserError, match=r"rows_per_shard: 4 before, 8 now; *media.short_side|rows_per_shard: 4 before"):
        prepared(world / "files", world / "out", rows_per_shard=8)
    with pytest.raises(UserError, match=r'media.check: "decode" before, "none" now'):
        prepared(world / "files", world / "out", check="none")


def test_other_annotations_are_refused(world, tmp_path):
    many(tmp_path / "files")
    prepared(tmp_path / "files", tmp_path / "out")
    write_rows(tmp_path / "files", [row(0)])
    with pytest.raises(UserError, match=r"annotations.0.sha256"):
        prepared(tmp_path / "files", tmp_path / "out")


@pytest.mark.parametrize("name", ["notes.txt", "00007.tar", "manifest.json", ".hidden", "train/00000.tar", "empty/"])
def test_a_folder_with_anything_else_in_it_is_left_as_it_is(tmp_path, name):
    write_rows(tmp_path, [row(0)])
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("{}")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=name.rstrip("/")):
        prepared(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out") == before and not (tmp_path / "out" / ".prepare.lock").exists()


def test_a_strangers_file_in_an_unfinished_folder_is_named(tmp_path):
    many(tmp_path / "files", 8)
    stop_after(tmp_path, 1)
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"mine\.txt"):
        prepared(tmp_path / "files", tmp_path / "out")


def test_two_at_once_are_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(workplace, "PATIENCE", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    with open(out / ".prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another preparation is at work"):
            prepared(world / "files", out)
    prepared(world / "files", out)
    assert contents(out) == contents(world / "out")


def test_nothing_at_all_is_an_error_that_says_why_and_leaves_nothing(tmp_path):
    write_rows(tmp_path, [row(n, "image", "missing.jpg") for n in range(4)])
    with pytest.raises(UserError, match=r"Nothing of mine can be written(.|\n)*4 x the file does not exist"):
        prepared(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    (tmp_path / "missing.jpg").write_bytes(PICTURE)
    assert prepared(tmp_path, tmp_path / "out")[""].written == 4


def test_held_out_rows_are_in_shards_of_their_own_and_share_no_medium(tmp_path):
    write_media(tmp_path, **{f"{n}__jpg": jpeg(n) for n in range(20)})
    write_rows(tmp_path, [row(n, "image", f"{n % 20}.jpg") for n in range(60)] + [row(n) for n in range(60, 100)])
    parts = prepared(tmp_path, tmp_path / "out", held_out=0.3, check="none", rows_per_shard=16)
    train, held_out = (samples(tmp_path / "out" / part) for part in ("train", "held-out"))
    assert sorted([*train, *held_out]) == [f"{n:09d}" for n in range(100)]
    assert 10 < len(held_out) < 50
    assert not {m["0.jpg"] for m in train.values() if "0.jpg" in m} & {m.get("0.jpg") for m in held_out.values()}
    assert (parts["train"].rows, parts["held-out"].rows) == (len(train), len(held_out))
    assert all(not found.problems for found in verify(tmp_path / "out", 0, LocalProcesses(1), shown=False).values())
    assert prepared(tmp_path, tmp_path / "out", held_out=0.3, check="none", rows_per_shard=16) is None


def test_ids_that_come_twice_are_kept_counted_and_named(tmp_path):
    rows = [row(n) for n in range(6)]
    rows[3]["id"] = rows[5]["id"] = rows[1]["id"]
    del rows[4]["id"]
    write_rows(tmp_path, rows)
    tally = prepared(tmp_path, tmp_path / "out")[""]
    assert tally.repeated == {"ids": 1, "rows": 3, "examples": ["row-1"]}
    records = [json.loads(members["json"]) for members in samples(tmp_path / "out").values()]
    assert [record["id"] for record in records] == ["row-0", "row-1", "row-2", "row-1", "000000004", "row-1"]


def test_ids_are_counted_in_several_turns_as_in_one(monkeypatch):
    rng = random.Random(0)
    ids = [json.dumps(f"id {rng.randrange(400)} ä") for _ in range(1000)]
    whole, parts = Ids(), Ids()
    for start in range(0, 1000, 100):
        whole.add(ids[start : start + 100])
        parts.add(ids[start : start + 100])
    counts = {text: ids.count(text) for text in ids}
    found = whole.repeated()
    assert found["ids"] == sum(count > 1 for count in counts.values())
    assert found["rows"] == sum(count for count in counts.values() if count > 1)
    assert all(counts[json.dumps(name)] > 1 for name in found["examples"]) and len(found["examples"]) == 3
    monkeypatch.setattr("data_prep.summary._AT_ONCE", 64)
    assert parts.repeated() == found


def test_a_library_that_breaks_makes_a_reject_and_no_crash(world, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(blocks, "load", broken)
    prepared(world / "files", tmp_path / "out")
    assert {reject["reason"] for reject in rejects(tmp_path / "out")} == {"unexpected ZeroDivisionError: oh"}
    assert len(samples(tmp_path / "out")) == 8


def test_a_full_disk_is_one_paragraph_and_what_was_made_is_kept(world, tmp_path, monkeypatch):
    write = blocks.write_tar

    def full(path, samples):
        if path.name == "00003.tar":
            raise OSError(28, "No space left on device")
        return write(path, samples)

    monkeypatch.setattr(blocks, "write_tar", full)
    with pytest.raises(UserError, match=r"No space left on device.*make room and run the same command again"):
        prepared(world / "files", tmp_path / "out")
    monkeypatch.setattr(blocks, "write_tar", write)
    prepared(world / "files", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(world / "out")


def test_a_worker_that_is_killed_is_one_paragraph(world, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "load", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="A worker process was killed"):
        prepared(world / "files", tmp_path / "out", processes=2)
    monkeypatch.undo()
    prepared(world / "files", tmp_path / "out", processes=2)
    assert contents(tmp_path / "out") == contents(world / "out")


def test_media_in_rows_end_a_block_before_it_is_too_large(monkeypatch):
    rows = [(f"row {n}", {"image": {"bytes": bytes(40), "path": "x"}}) for n in range(10)]
    monkeypatch.setattr(blocks, "rows", lambda dataset: iter(rows))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    made = list(blocks.blocks(Dataset("mine", ROOT, ()), 512, 0))
    assert [len(block.rows) for block in made] == [3, 3, 3, 1]
    assert [block.number for block in made] == [0, 1, 2, 3]


# --- a dry run --------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_a_run_does(world, tmp_path):
    done = prepared(world / "files", tmp_path / "out")[""]
    would = look(preparation(world / "files", check="none"), LocalProcesses(2), shown=False)[""]
    assert would.counts() == done.counts()
    assert (would.shards, list(would.reasons)) == (done.shards, list(done.reasons))
    assert [r.row for r in would.reasons["the file does not exist"].examples] == [2, 7, 12]
    assert would.bytes == done.bytes


def test_a_dry_run_reads_no_media_unless_they_are_to_be_decoded(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE[:300])
    (tmp_path / "a.jpg").chmod(0o000)
    write_rows(tmp_path, [row(0, "image", "a.jpg"), row(1, "image", "empty.jpg")])
    (tmp_path / "empty.jpg").write_bytes(b"")
    tally = look(preparation(tmp_path, check="none"), LocalProcesses(1), shown=False)[""]
    assert (tally.written, list(tally.reasons)) == (1, ["the file is empty"])
    (tmp_path / "a.jpg").chmod(0o600)
    assert look(preparation(tmp_path, check="decode"), LocalProcesses(1), shown=False)[""].written == 0


# --- conservation -----------------------------------------------------------------------------------------------------

KINDS = ["text", "good", "missing", "broken", "none", "number", "empty answer"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=30), per_shard=st.integers(1, 9), held=st.booleans())
def test_rows_are_conserved(tmp_path_factory, kinds, per_shard, held):
    folder = tmp_path_factory.mktemp("conserved")
    write_media(folder, good__jpg=PICTURE, broken__jpg=b"nothing")
    made = {
        "text": lambda n: row(n),
        "none": lambda n: {"id": n},
        "number": lambda n: n,
        "empty answer": lambda n: {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]},
    }
    write_rows(
        folder, [made.get(kind, lambda n, k=kind: row(n, "image", f"{k}.jpg"))(n) for n, kind in enumerate(kinds)]
    )
    good = {n for n, kind in enumerate(kinds) if kind in ("text", "good")}
    if not good:
        with pytest.raises(UserError, match="Nothing"):
            prepared(folder, folder / "out", rows_per_shard=per_shard, held_out=held * 0.5)
        return
    parts = prepared(folder, folder / "out", rows_per_shard=per_shard, held_out=held * 0.5)
    left_out = [reject["row"] for part in parts for reject in rejects(folder / "out" / part)]
    assert {int(key) for key in samples(folder / "out")} == good
    assert sorted(left_out) == [n for n in range(len(kinds)) if n not in good]
    assert sum(tally.rows for tally in parts.values()) == len(kinds)
    assert not any(found.problems for found in verify(folder / "out", 1, LocalProcesses(1), shown=False).values())


# --- killed and started again -----------------------------------------------------------------------------------------


def run_apart(world, out, processes=2):
    """A preparation in a process group of its own, forked so that it starts at once."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            prepared(world / "files", out, processes=processes)
        finally:
            os._exit(0)
    return child


def stop_after(folder, shards):
    """An unfinished preparation: stopped by an error after so many shards."""
    made = []

    def stop(*_):
        if len(made) == shards:
            raise KeyboardInterrupt
        made.append(1)
        return real(*_)

    real, blocks.write_tar = blocks.write_tar, stop
    try:
        with pytest.raises(KeyboardInterrupt):
            prepared(folder / "files", folder / "out")
    finally:
        blocks.write_tar = real


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(world, tmp_path, seed):
    rng, out = random.Random(seed), tmp_path / "out"
    for _ in range(3):
        child = run_apart(world, out)
        time.sleep(rng.uniform(0, 0.25))
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # it has not begun yet
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    prepared(world / "files", out, processes=2)
    assert contents(out) == contents(world / "out")


def test_what_was_finished_is_not_made_again(world, tmp_path):
    many(tmp_path / "files")
    stop_after(tmp_path, 5)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(times) == 5
    prepared(tmp_path / "files", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times} == times
    assert samples(tmp_path / "out") == samples(world / "out")


def test_a_shard_that_was_cut_meanwhile_is_made_again(world, tmp_path):
    many(tmp_path / "files")
    stop_after(tmp_path, 5)
    os.truncate(tmp_path / "out" / "00002.tar", 1000)
    prepared(tmp_path / "files", tmp_path / "out")
    assert samples(tmp_path / "out") == samples(world / "out")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_one_line_that_says_how_to_go_on(tmp_path, number, status):
    many(tmp_path / "files", 4000)
    (tmp_path / "mine.yaml").write_text(f"root: {tmp_path / 'files'}\nannotations: rows.json\n")
    command = [sys.executable, "-m", "data_prep.prepare", "mine.yaml", "--out", "out", "--processes", "2"]
    with subprocess.Popen(
        [*command, "--rows-per-shard", "40"], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(20) == status, said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}") and "the same command goes on" in last
    assert "Traceback" not in said
    assert not list((tmp_path / "out").rglob("*.part"))


def test_the_command_says_what_it_did(world, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(f"root: {world / 'files'}\nannotations: rows.json\n")
    command = [str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "32 of 40 rows written (image 16, text 8, video 8): 1 shard" in said
    assert "8 x the file does not exist" in said and "rows.json row 2, missing.jpg" in said
    assert main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*command[:1], "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .*--frames fps:x"):
        main([*command, "--frames", "fps:x"])
