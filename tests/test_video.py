"""The frames of videos against FFmpeg's own, decoded plainly from the first packet to the last."""

import io
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_fixtures import audio_file, damaged, empty_video_file, jpeg
from video_files import (
    KINDS,
    X265,
    copied,
    encoded,
    field_file,
    kind,
    pictures,
    shown,
    turned,
    with_cover,
)

from data_prep.toy_render import encode_mp4
from vllava.data import frames as rule
from vllava.data.container import MAX_PACKETS, MAX_PIXELS
from vllava.data.damage import has_hole
from vllava.data.video import DECODERS, DecordDecoder, PyavDecoder, frame_indices, frames_by_time, video_decoder
from vllava.data.video_frame import is_hidden
from vllava.errors import UserError

# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, [0, 0, 0, 0, 0, 0, 0, 0]),
        (3, [0, 0, 0, 0, 1, 1, 1, 2]),
        (7, [0, 0, 1, 2, 3, 4, 5, 6]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8]),
        (16, [0, 2, 4, 6, 8, 10, 12, 15]),
        (37, [0, 5, 10, 15, 20, 25, 30, 36]),
        (300, [0, 42, 85, 128, 170, 213, 256, 299]),
    ],
)
def test_eight_frames_are_spread_from_the_first_to_the_last_and_truncated(total, expected):
    assert frame_indices(total, 8) == expected


@settings(max_examples=100, deadline=None)
@given(total=st.integers(1, 100_000), frames=st.integers(2, 64))
def test_frame_indices_rise_from_the_first_frame_to_the_last(total, frames):
    indices = frame_indices(total, frames)
    assert len(indices) == frames and indices[0] == 0 and indices[-1] == total - 1
    assert indices == sorted(indices)
    exact = [i * (total - 1) / (frames - 1) for i in range(frames)]
    assert all(at - 1 <= index <= at + 1e-6 for index, at in zip(indices, exact, strict=True))


@settings(max_examples=100, deadline=None)
@given(gaps=st.lists(st.integers(1, 9), max_size=40), frames=st.integers(1, 20))
def test_frames_by_time_are_those_nearest_to_evenly_spaced_times(gaps, frames):
    times = np.cumsum([0, *gaps]).tolist()
    found = frames_by_time(times, frames)
    assert len(found) == frames and found == sorted(found) and found[0] == 0
    for index, time_ in zip(found, np.linspace(0, times[-1], frames), strict=True):
        assert abs(times[index] - time_) == min(abs(at - time_) for at in times)


def greys(clip):
    """Brightness of the middle of each picture."""
    middles = [np.asarray(p)[p.height // 2 - 4 :, p.width // 2 - 4 :][:8, :8] for p in clip]
    return [round(float(middle[..., 0].mean())) for middle in middles]


EVEN = [19, 48, 76, 105, 133, 163, 190, 220]
FIELD_GREYS = {
    "mpeg4_bf.avi": EVEN,
    "mpeg2.mpg": EVEN,
    "cut_gop120_2.2.mp4": [131, 143, 156, 167, 180, 193, 207, 220],
    "over_eos10.mp4": EVEN,
    "anim.gif": [20, 45, 75, 100, 130, 156, 185, 215],
    "av1.mp4": [20, 48, 78, 107, 135, 163, 190, 217],
    "h264.3gp": EVEN,
    "h264.m4v": EVEN,
    "browser_live.webm": EVEN,
    "vfr.mp4": [19, 24, 27, 31, 36, 40, 45, 220],
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FIELD_GREYS)
def test_files_from_the_field_show_what_their_makers_saw(name, decoder):
    found = greys(video_decoder(decoder)(field_file(name), 8))
    assert np.abs(np.subtract(found, FIELD_GREYS[name])).max() <= 1


def test_frames_evenly_spaced_in_time_show_the_whole_of_a_video_of_uneven_times():
    clip = video_decoder("auto", "time")(field_file("vfr.mp4"), 8)  # one frame a second after the first second
    assert np.abs(np.subtract(greys(clip), [20, 49, 77, 106, 134, 163, 191, 220])).max() <= 12
    assert clip.times == [0, 1, 2, 3, 5, 6, 7, 8]
    assert np.abs(np.subtract(greys(clip), [20 + 25 * at for at in clip.times])).max() <= 1


def test_both_samplings_agree_where_frames_are_evenly_spaced():
    index, even = (video_decoder("auto", sampling)(kind("VP9"), 30) for sampling in ("index", "time"))
    assert max(abs(a - b) for a, b in zip(index.times, even.times, strict=True)) < 1.1 / 30


# --- FFmpeg's own -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["planned", "read through"])
def way(request, monkeypatch):
    monkeypatch.setattr(rule, "SHORT", 0 if request.param == "planned" else MAX_PACKETS)


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_ffmpeg_shows(name, way):
    pixels, times = shown(name)
    for frames in (1, 8):
        clip = video_decoder("pyav")(kind(name), frames)
        wanted = frame_indices(len(pixels), frames)
        assert all(np.array_equal(a, pixels[i]) for a, i in zip(clip, wanted, strict=True))
        if None not in times and times == sorted(set(times)):
            assert clip.times == pytest.approx([times[i] - times[0] for i in wanted])


@pytest.mark.parametrize("name", KINDS)
def test_decord_gives_the_same_frames(name, decord):
    pairs = zip(decord(kind(name), 4), video_decoder("pyav")(kind(name), 4), strict=True)
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 3 for a, b in pairs)


@pytest.fixture(scope="module")
def decord():
    return video_decoder("decord")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 70),
    gop=st.sampled_from([1, 3, 10, 250]),
    bframes=st.integers(0, 5),
    container=st.sampled_from(["mp4", "matroska", "mpegts", "avi"]),
    frames=st.integers(1, 12),
    sampling=st.sampled_from(["index", "time"]),
)
def test_whatever_the_groups_the_planned_frames_are_those_that_are_read_through(
    count, gop, bframes, container, frames, sampling
):
    data = encoded(container=container, count=count, g=str(gop), bf=str(bframes), height=32, width=32)
    found = []
    for short in (0, MAX_PACKETS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rule, "SHORT", short)
            found.append(video_decoder("pyav", sampling)(data, frames))
    one, other = found
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert [*one.times, one.duration, one.fps] == pytest.approx([*other.times, other.duration, other.fps])


@pytest.mark.parametrize(
    "name", ["H.264, 8 B-frames, group of 12", "HEVC", "VP9", "AV1", "mpeg4 in mp4", "H.264 in flv"]
)
def test_a_long_video_is_not_decoded_from_end_to_end(name, monkeypatch):
    monkeypatch.setattr(rule, "SHORT", 0)
    monkeypatch.setattr(rule, "_through", lambda *_: pytest.fail("read through"))
    video_decoder("pyav")(kind(name), 3)


def test_hidden_frames_of_vp8_and_vp9_are_told_from_their_first_byte():
    assert is_hidden("vp8", b"\x01\0") and not is_hidden("vp8", b"\x11\0")
    assert is_hidden("vp9", b"\x84\0") and not is_hidden("vp9", b"\x86\0") and not is_hidden("vp9", b"\x88\0")
    assert not is_hidden("vp9", b"\x84\xc0")  # several in one
    assert len(shown("VP8, hidden frames")[0]) == 60 - len(range(3, 60, 7))


# --- what is meant by the video, and which way up ---------------------------------------------------------------------

TURNS = {
    "quarter right": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "half": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "quarter left": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "left and right swapped": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "top and bottom swapped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "about one diagonal": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
    "about the other diagonal": ((0, -1, -1, 0), lambda p: p[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_and_mirrored_as_the_file_says(turn, decoder):
    matrix, by_hand = TURNS[turn]
    plain, expected = kind("H.264, 2 B-frames, group of 12"), shown("H.264, 2 B-frames, group of 12")[0]
    clip = video_decoder(decoder)(turned(plain, *matrix), 5)
    for frame, i in zip(clip, frame_indices(61, 5), strict=True):
        found, wanted = np.asarray(frame, int), by_hand(expected[i])
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 3


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "size", "corners"), [("rot90.mp4", (64, 96), "gwrb"), ("rot180.mp4", (96, 64), "wbgr")]
)
def test_videos_of_phones_stand_upright(name, size, corners, decoder):
    colours = {"r": (221, 28, 30), "g": (29, 198, 39), "b": (29, 38, 220), "w": (239, 239, 239)}
    picture = video_decoder(decoder)(field_file(name), 8)[3]
    pixels = np.asarray(picture, int)
    assert picture.size == size
    for corner, y, x in zip(corners, (3, 3, -4, -4), (3, -4, 3, -4), strict=True):
        assert np.abs(pixels[y, x] - colours[corner]).max() <= 3


def test_a_turn_that_is_not_by_quarters_keeps_the_size_and_the_middle():
    data = turned(kind("H.264, 24 wide"), 1, 1, -1, 1)  # an eighth to the right
    clip = video_decoder("pyav")(data, 8)
    plain = video_decoder("pyav")(kind("H.264, 24 wide"), 8)
    assert clip[0].size == plain[0].size and clip[0].getpixel((0, 0)) == (0, 0, 0)
    assert abs(greys(clip)[3] - greys(plain)[3]) <= 8


@pytest.mark.parametrize(
    ("container", "cover"),
    [("mp4", with_cover), ("matroska", lambda out: out.add_attachment("cover.jpg", "image/jpeg", jpeg()) and None)],
)
def test_a_cover_picture_is_not_the_video(container, cover):
    plain = encoded(g="20")
    clip = video_decoder("pyav")(copied(plain, container, extra=cover), 8)
    assert [frame.size for frame in clip] == [(64, 48)] * 8
    assert greys(clip) == greys(video_decoder("pyav")(plain, 8))


@pytest.mark.parametrize(("default", "size"), [(0, (32, 32)), (1, (64, 48))])
def test_of_two_videos_in_a_file_the_default_one_is_meant_and_else_the_first(default, size):
    def small(out):
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.disposition = 32, 32, "yuv420p", 0

        def fill():
            for pixels in pictures(8, 32, 32):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            out.mux(stream.encode())

        return fill

    muxer = {"default_mode": "passthrough"}
    data = copied(encoded(), "matroska", extra=small, muxer=muxer, default=default)
    assert {frame.size for frame in video_decoder("pyav")(data, 8)} == {size}


def test_pixels_that_are_not_square_stay_as_they_are_stored():
    assert {frame.size for frame in video_decoder("pyav")(kind("H.264, wide pixels"), 8)} == {(64, 48)}


@pytest.mark.parametrize("decoder", DECODERS)
def test_colours_survive_decoding(decoder):
    frames = np.zeros((8, 64, 64, 3), np.uint8)
    frames[:, :32], frames[:, 32:] = (200, 60, 40), (30, 90, 210)
    decoded = np.asarray(video_decoder(decoder)(encode_mp4(frames), 8)[5], int)
    assert np.abs(decoded[8:24].mean((0, 1)) - (200, 60, 40)).max() < 8
    assert np.abs(decoded[40:56].mean((0, 1)) - (30, 90, 210)).max() < 8


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_clip_knows_its_times_rate_and_duration(decoder):
    clip = video_decoder(decoder)(field_file("h264.m4v"), 8)  # 120 frames at 30 a second
    assert clip.times == pytest.approx([i / 30 for i in frame_indices(120, 8)], abs=1e-4)
    assert clip.fps == pytest.approx(30) and clip.duration == pytest.approx(4)
    assert len(clip) == 8 and list(clip) == clip[:] and clip[-1] is clip.pictures[7]


def test_times_begin_at_the_first_frame_that_is_shown():
    clip = video_decoder("pyav")(field_file("cut_gop120_2.2.mp4"), 8)
    assert clip.times[0] == 0 and clip.duration == pytest.approx(1.8, abs=1e-3)


def test_a_raw_stream_has_no_times_of_its_own_and_is_taken_as_evenly_spaced():
    clip = video_decoder("pyav")(kind("H.264 in h264"), 4)
    assert clip.times == pytest.approx([i / clip.fps for i in frame_indices(60, 4)])


def test_one_frame_is_shown_for_as_long_as_its_file_says():
    clip = video_decoder("pyav")(kind("H.264, one frame"), 8)
    assert clip.times == [0] * 8 and clip.duration == pytest.approx(1 / 30, abs=1e-3)


# --- damage -----------------------------------------------------------------------------------------------------------


def holed(data, share):
    """A file with 200 bytes of zeros."""
    at = int(len(data) * share)
    return data[:at] + bytes(200) + data[at + 200 :]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_hole_in_the_middle_of_a_clip_makes_it_broken(decoder):
    data = encoded(height=96, width=128, noise=12)
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        with pytest.raises(UserError, match="damaged video"):
            video_decoder(decoder)(holed(data, share), 8)


NOISY = {"height": 96, "width": 128, "noise": 12}
SOLID = {
    "H.264": lambda: encoded(**NOISY),
    "H.264, long": lambda: encoded(count=300, **NOISY),
    "H.264 in MPEG-TS": lambda: encoded(container="mpegts", **NOISY),
    "H.264 in FLV": lambda: encoded(container="flv", **NOISY),
    "HEVC": lambda: encoded("libx265", **X265, **NOISY),
    "MPEG-4": lambda: encoded("mpeg4", gop=12, bframes=2, **NOISY),
    "MPEG-2": lambda: encoded("mpeg2video", "mpeg", gop=12, bframes=2, **NOISY),
    "VP8": lambda: encoded("libvpx", "webm", gop=30, **NOISY),
    "AV1": lambda: encoded("libsvtav1", preset="10", **NOISY),
    "GIF": lambda: encoded("gif", "gif", fps=10, layout="rgb8", count=20, **NOISY),
}


@pytest.mark.parametrize("name", SOLID)
def test_a_hole_where_frames_lie_is_an_error_or_leaves_those_taken_as_they_were(name):
    data, decode, errors = SOLID[name](), video_decoder("pyav"), 0
    with av.open(io.BytesIO(data)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos]
    whole = decode(data, 8)
    for at in np.linspace(places[1], places[-1] - 200, 12).astype(int):
        try:
            found = decode(data[:at] + bytes(200) + data[at + 200 :], 8)
            assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))
        except UserError:
            errors += 1
    assert errors >= 11  # the rest: the last bytes of a sector, which hold nothing


def test_zeros_that_belong_to_a_file_are_no_hole():
    assert not has_hole("mpeg", "mpeg2video", b"\xb3\x14" + bytes(300) + b"\x01\xb5\x12" + bytes(300))  # stuffing
    assert not has_hole("avi", "rawvideo", bytes(5000)) and not has_hole("avi", "mjpeg", bytes(300) + b"\xd9")
    colours = b"GIF89a\x10\0\x10\0\xf7\0\0" + bytes(768)
    colours += b"!\xf9\4\0\0\0\0\0" + b",\0\0\0\0\x10\0\x10\0\x87" + bytes(768)
    assert not has_hole("gif", "gif", colours + b"\x08\x08" + b"\x01" * 8)
    assert has_hole("gif", "gif", colours + b"\x08" + bytes(200))
    assert not has_hole("mpegts", "h264", b"\0\0\1\x09" + bytes(40)) and has_hole("flv", "h264", b"\0\x09" + bytes(40))
    assert has_hole("mpegts", "h264", b"\0\0\1\x09" + bytes(40) + b"\x07")
    assert has_hole("matroska,webm", "vp8", b"\x10" + bytes(64))


@pytest.mark.parametrize("name", ["H.264, 2 B-frames, group of 12", "VP8, live", "mpeg2video in mpeg"])
def test_a_recording_that_begins_anywhere_is_good_from_its_first_key_frame_on(name):
    container = {"VP8, live": "webm", "mpeg2video in mpeg": "matroska"}.get(name, "mp4")
    whole, rest = kind(name), copied(kind(name), container, first=5)
    found = video_decoder("pyav")(rest, 8)
    pixels = shown(name)[0]
    assert np.array_equal(found[-1], pixels[-1]) and any(np.array_equal(found[0], frame) for frame in pixels)
    assert len(whole) > len(rest)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (lambda: b"", "unreadable video"),
        (lambda: b"not a video" * 100, "unreadable video"),
        (lambda: jpeg(), "unreadable video"),
        (audio_file, "no frames"),
        (empty_video_file, "unreadable video|no frames"),
        (lambda: _TOY_CLIP[:1000], "unreadable video|no frames"),
        (lambda: _TOY_CLIP[:-600], "unreadable video|no frames"),
    ],
    ids=["empty file", "no video", "a picture", "sound only", "no frame", "no index", "cut index"],
)
def test_a_video_that_cannot_be_read_is_an_error_of_one_line(data, reason, decoder):
    with pytest.raises(UserError, match=reason) as error:
        video_decoder(decoder)(data(), 8)
    assert "\n" not in str(error.value) and "Errno" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["H.264, 2 B-frames, group of 12", "VP9", "GIF", "mpeg4 in avi", "mpeg2video in mpegts"]
)
def test_a_damaged_video_gives_frames_or_an_error_that_names_the_reason(name):
    decode, outcomes = video_decoder("pyav"), set()
    for seed in range(60):
        try:
            outcomes.add(len(decode(damaged(kind(name), seed), 8)))
        except UserError as error:
            outcomes.add("error")
            assert "video" in str(error)
    assert outcomes == {8, "error"}


# --- strangers' files -------------------------------------------------------------------------------------------------


@pytest.fixture
def address():
    """Of a server that nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x"
        with pytest.raises(BlockingIOError):
            server.accept()


def avi_with_subtitles(contents):
    """An AVI whose stream of text holds a file of another format."""

    def chunk(name, data):
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    def stream(kind, codec, layout):
        head = kind + codec + struct.pack("<IHHIIIIIIiIhhhh", 0, 0, 0, 0, 1, 25, 0, 1, 0, -1, 0, 0, 0, 64, 48)
        return chunk(b"LIST", b"strl" + chunk(b"strh", head) + chunk(b"strf", layout))

    layout = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, 24, 0x47504A4D, 0, 0, 0, 0, 0)
    text = (
        b"GAB2\0"
        + struct.pack("<HI", 2, 4)
        + "a\0".encode("utf-16-le")
        + struct.pack("<HI", 4, len(contents))
        + contents
    )
    head = chunk(b"avih", struct.pack("<14I", 40000, 0, 0, 0, 1, 0, 2, 0, 64, 48, 0, 0, 0, 0))
    head += stream(b"vids", b"MJPG", layout) + stream(b"txts", bytes(4), b"")
    frames = chunk(b"01tx", text) + chunk(b"00dc", jpeg())
    return chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + head) + chunk(b"LIST", b"movi" + frames))


def playlist(address):
    return f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\n{address}\n#EXT-X-ENDLIST\n".encode()


PLAYLISTS = {
    "HLS": playlist,
    "concat": lambda address: f"ffconcat version 1.0\nfile '{address}'\n".encode(),
    "concat of a file": lambda _: f"ffconcat version 1.0\nfile '{os.path.abspath(__file__)}'\n".encode(),
    "SDP": lambda address: b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "DASH": lambda address: f'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{address}</BaseURL></MPD>'.encode(),
    "ASX": lambda address: f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>'.encode(),
    "subtitles": lambda _: b"1\n00:00:00,000 --> 00:00:10,000\nHello\n",
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_list_of_other_files_is_no_video_and_opens_none(name, decoder, address):
    with pytest.raises(UserError, match="unreadable video"):
        video_decoder(decoder)(PLAYLISTS[name](address), 8)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_list_of_other_files_inside_a_video_opens_none(decoder, address):
    clip = video_decoder(decoder)(avi_with_subtitles(playlist(address)), 8)
    assert clip[0].size == (64, 64)  # the picture's


def test_a_header_that_announces_more_samples_than_the_file_can_hold_is_an_error():
    data = bytearray(kind("H.264, 24 wide"))
    at = data.index(b"stsz")
    data[at + 8 : at + 16] = struct.pack(">II", 1, 50_000_000)  # FFmpeg would write 3.5 GB of index
    with pytest.raises(UserError, match="announces 50,000,000"):
        video_decoder("pyav")(bytes(data), 8)
    fragments = bytearray(kind("H.264 in fragments"))
    at = fragments.index(b"trun")
    fragments[at + 4 : at + 12] = struct.pack(">II", 0, 50_000_000)
    with pytest.raises(UserError, match="announces 50,000,0"):
        video_decoder("pyav")(bytes(fragments), 8)


def test_frames_that_are_too_large_are_an_error_before_they_are_decoded(monkeypatch):
    canvas = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    picture = b",\0\0\0\0" + struct.pack("<HH", 65535, 65535) + b"\0\x02\x02\x4c\x01\0"
    with pytest.raises(UserError, match=f"larger than {MAX_PIXELS:,} pixels"):
        video_decoder("pyav")(canvas + picture * 10 + b";", 8)
    monkeypatch.setattr("vllava.data.container.MAX_PIXELS", 64 * 48 - 1)
    for name in ("H.264 in mpegts", "H.264 in fragments"):
        with pytest.raises(UserError, match="64 x 48 pixels, the limit is 3,071"):
            video_decoder("pyav")(kind(name), 8)


def test_a_video_that_takes_too_long_is_an_error():
    with pytest.raises(UserError, match="not decoded within 0 s"):
        PyavDecoder(seconds=0)(field_file("h264.m4v"), 8)


_MEASURE = """
import sys, av
from vllava.data import frames
from vllava.data.video import video_decoder
def peak():  # getrusage would count what the parent held when this process began
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
if sys.argv[2] == "through": frames.SHORT = 10**6
data = open(sys.argv[1], "rb").read()
before = peak()
assert len(video_decoder("auto")(data, 8)) == 8
print(peak() - before)
"""


@pytest.mark.parametrize("way", ["planned", "through"])
def test_a_minute_of_720p_takes_little_memory(way):
    file = os.path.join(os.path.dirname(__file__), "data", "videos", "hd60s.mp4")
    done = subprocess.run([sys.executable, "-c", _MEASURE, file, way], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 120  # MiB; all of its frames would be 2,500


# --- decoders ---------------------------------------------------------------------------------------------------------


def test_auto_is_pyav(monkeypatch):
    assert type(video_decoder("auto")) is PyavDecoder
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(video_decoder("auto")) is PyavDecoder
    with pytest.raises(UserError, match="not installed"):
        video_decoder("decord")


def test_what_is_not_known_is_an_error_that_lists_what_is():
    with pytest.raises(UserError, match="decord, pyav"):
        video_decoder("ffmpeg")
    with pytest.raises(UserError, match="index, time"):
        video_decoder("auto", "random")


def test_an_identity_tells_decoders_and_samplings_apart():
    identities = {video_decoder(name, sampling).identity for name in DECODERS for sampling in ("index", "time")}
    assert len(identities) == 4


def test_a_video_that_crashes_decord_is_read_by_pyav_and_the_next_one_by_decord():
    decode = DecordDecoder()
    decode(_TOY_CLIP, 8)
    os.kill(decode.process._process.pid, signal.SIGSEGV)
    with pytest.raises(UserError, match=r"decord crashed: SIGSEGV"):
        decode.process.read(_TOY_CLIP, [0])
    assert len(decode(_TOY_CLIP, 8)) == 8 and decode.process._process.poll() is None


def test_a_video_at_which_decord_hangs_is_read_by_pyav():
    decode = DecordDecoder()
    decode(_TOY_CLIP, 8)
    decode.process.seconds = 0.2
    os.kill(decode.process._process.pid, signal.SIGSTOP)  # as good as a hang: it will not answer
    with pytest.raises(UserError, match=r"did not return within 0\.2 s"):
        decode.process.read(_TOY_CLIP, [0])
    assert len(decode(_TOY_CLIP, 8)) == 8


def test_the_process_of_decord_is_renewed_and_ends_with_its_decoder():
    decode = DecordDecoder(videos=2)
    processes = {}
    for _ in range(4):
        decode(_TOY_CLIP, 8)
        processes[decode.process._process.pid] = decode.process._process
    assert len(processes) == 2
    decode.process.__del__()
    assert all(process.poll() is not None for process in processes.values())


def test_a_forked_worker_gets_a_process_of_its_own():
    decode = DecordDecoder()
    decode(_TOY_CLIP, 8)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        theirs = pool.submit(frames_and_ownership, decode).result()
    assert theirs == (8, True) and len(decode(_TOY_CLIP, 8)) == 8


def frames_and_ownership(decode):
    return len(decode(_TOY_CLIP, 8)), decode.process._owner == os.getpid()


_TOY_CLIP = encode_mp4(np.stack([np.full((64, 64, 3), 20 + 12 * i, np.uint8) for i in range(16)]))
