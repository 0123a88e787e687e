"""Small videos of many kinds, written by FFmpeg through PyAV, and what FFmpeg shows of a video: the reference."""

import io
import struct
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

FIELD = Path(__file__).parent / "data" / "videos"  # files as they are met with; what is right is in test_video.py
X265 = {"x265-params": "keyint=20:log-level=none:pools=none:frame-threads=1"}
QUICK = {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}


def field_file(name):
    return (FIELD / name).read_bytes()


def pictures(count, height=48, width=64, noise=0):
    """Grey pictures whose brightness tells their number, with a colour in three corners."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = np.full((height, width, 3), round(20 + 200 * number / max(1, count - 1)), int)
        pixels[: height // 4, : width // 4] = (220, 30, 30)
        pixels[: height // 4, -(width // 4) :] = (30, 220, 30)
        pixels[-(height // 4) :, : width // 4] = (30, 30, 220)
        yield (pixels + rng.integers(-noise, noise + 1, pixels.shape)).clip(0, 255).astype(np.uint8)


def encoded(
    codec="libx264", container="mp4", count=60, fps=30, height=48, width=64, layout="yuv420p", noise=0, times=None,
    gop=None, bframes=None, shape=None, muxer=None, **options,
):  # fmt: skip
    """A video file. times: of each frame, in ms; shape: sample aspect ratio; muxer and options: FFmpeg's own."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=muxer or {}) as out:
        stream = out.add_stream(codec, rate=fps, options={"threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, layout
        if gop is not None:
            stream.gop_size = gop
        if bframes is not None:
            stream.max_b_frames = bframes
        if shape:
            stream.sample_aspect_ratio = shape
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(pictures(count, height, width, noise)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=layout, threads=1)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def copied(
    data, container="mp4", start=0.0, first=0, extra=None, change=lambda number, content: content, muxer=None, default=0
):
    """The packets of a video in another file.

    start: cut there, as `ffmpeg -ss START -c copy` does; first: the packets before it are lost; extra: adds streams
    before the video's and returns a function that fills them; change: other contents of a packet; default: whether the
    video is marked as the default one.
    """
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container, options=muxer or {}) as out:
        fill = extra(out) if extra else None
        old = source.streams.video[0]
        new = out.add_stream_from_template(old)
        new.disposition = default
        shift = int(start / old.time_base)
        if start:
            source.seek(shift, stream=old)
        if fill:
            fill()
        for number, packet in enumerate(source.demux(old)):
            if packet.size and number >= first:
                again = av.Packet(change(number, bytes(packet)))
                again.pts, again.dts, again.duration = packet.pts - shift, packet.dts - shift, packet.duration
                again.time_base, again.is_keyframe, again.stream = packet.time_base, packet.is_keyframe, new
                out.mux(again)
    return buffer.getvalue()


def turned(data, a, b, c, d):
    """An MP4 with another display matrix: a pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    head = data.index(b"tkhd") + 4
    at = head + (40 if data[head] == 0 else 52)
    return (
        data[:at] + struct.pack(">9i", *(65536 * n for n in (a, b, 0, c, d)), 0, 0, 0, 1 << 30)[:36] + data[at + 36 :]
    )


def with_sound(out):
    """A stream of silence before the video's."""
    stream = out.add_stream("aac", rate=16000, layout="mono")

    def fill():
        for block in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, block * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode())

    return fill


def with_cover(out):
    """An attached picture before the video."""
    stream = out.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.disposition = 0x400

    def fill():
        white = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
        out.mux(stream.encode(white.reformat(format="yuvj420p")))

    return fill


def animation(disposal, transparent):
    """A GIF of Pillow's, with uneven delays, small changes, and transparent pixels."""
    frames = []
    for number in range(12):
        frame = Image.new("RGBA", (40, 30), (0, 0, 0, 0) if transparent else (90, 40, 20, 255))
        frame.paste((10 * number, 200, 255 - 20 * number, 255), (2 * number, 5, 2 * number + 10, 20))
        frames.append(frame)
    buffer = io.BytesIO()
    delays = [20 + 30 * (number % 4) for number in range(12)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=delays, disposal=disposal, loop=0)
    return buffer.getvalue()


def _hide(number, content):
    """A frame of VP8 that is not to be shown, every seventh."""
    return bytes([content[0] & ~0x10]) + content[1:] if number % 7 == 3 else content


def _kinds():
    kinds = {}
    for bframes in ("0", "2", "8"):
        for gop in ("1", "12", "250"):
            name = f"H.264, {bframes} B-frames, group of {gop}"
            kinds[name] = lambda bframes=bframes, gop=gop: encoded(count=61, bf=bframes, g=gop)
    for name in ("matroska", "avi", "flv", "mpegts", "3gp", "mov", "asf", "h264", "mpeg", "nut"):
        kinds[f"H.264 in {name}"] = lambda name=name: encoded(container=name, g="20")
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    opened = {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=3:scenecut=0"}
    refreshed = {"x264-params": "intra-refresh=1:keyint=20:bframes=0"}
    kinds |= {
        "H.264 in fragments": lambda: encoded(g="20", muxer=fragments),
        "H.264 in live Matroska": lambda: encoded(container="matroska", g="20", muxer={"live": "1"}),
        "H.264, open groups": lambda: encoded(count=80, **opened),
        "H.264 refreshed bit by bit": lambda: encoded(count=80, **refreshed),
        "H.264 of 10 bits": lambda: encoded(layout="yuv420p10le"),
        "H.264 of full range": lambda: encoded(layout="yuvj420p"),
        "H.264 of odd size": lambda: encoded(width=53, height=37, layout="yuv444p"),
        "H.264, wide pixels": lambda: encoded(shape=Fraction(4, 3)),
        "H.264, uneven times": lambda: encoded(count=20, times=[10 * n * n for n in range(20)]),
        "H.264, one frame": lambda: encoded(count=1),
        "H.264, two frames": lambda: encoded(count=2),
        "HEVC": lambda: encoded("libx265", **X265),
        "HEVC in Matroska": lambda: encoded("libx265", "matroska", **X265),
        "HEVC of 10 bits in MPEG-TS": lambda: encoded("libx265", "mpegts", layout="yuv420p10le", **X265),
        "VP8, live": lambda: encoded("libvpx", "webm", gop=20, muxer={"live": "1"}),
        "VP8, hidden frames": lambda: copied(encoded("libvpx", "webm", gop=20), "webm", change=_hide),
        "VP9": lambda: encoded("libvpx-vp9", "webm", count=90, noise=5, gop=40, **QUICK),
        "VP9 in MP4, odd size": lambda: encoded("libvpx-vp9", "mp4", width=53, height=37, gop=40, **QUICK),
        "AV1": lambda: encoded("libsvtav1", count=40, height=64, preset="10", g="16"),
        "AV1 in WebM": lambda: encoded("libsvtav1", "webm", count=40, height=64, noise=5, preset="10", g="16"),
        "MPEG-4 in AVI, no B-frames": lambda: encoded("mpeg4", "avi", gop=12, bframes=0),
        "GIF": lambda: encoded("gif", "gif", fps=10, layout="rgb8", count=40),
        "Motion JPEG": lambda: encoded("mjpeg", "avi", layout="yuvj420p"),
        "WMV 1": lambda: encoded("wmv1", "asf", gop=12),
        "WMV 2": lambda: encoded("wmv2", "asf", gop=12),
        "MS MPEG-4": lambda: encoded("msmpeg4", "avi", gop=12),
        "Flash": lambda: encoded("flv", "flv", gop=12),
        "H.263": lambda: encoded("h263", "3gp", height=144, width=176, gop=12),
        "QuickTime animation": lambda: encoded("qtrle", "mov", layout="rgb24"),
        "raw": lambda: encoded("rawvideo", "avi", count=10),
        "APNG": lambda: encoded("apng", "apng", layout="rgb24", count=10),
        "sound first": lambda: copied(encoded(g="20"), extra=with_sound),
    }
    for side in (16, 24, 48, 72):
        kinds[f"H.264, {side} wide"] = lambda side=side: encoded(width=side, height=side)
    for codec, names in {"mpeg4": ("mp4", "avi", "m4v"), "mpeg2video": ("mpeg", "mpegts", "matroska", "mp4")}.items():
        for name in names:
            kinds[f"{codec} in {name}"] = lambda codec=codec, name=name: encoded(codec, name, gop=12, bframes=2)
    for name in ("mpeg", "mpeg1video"):
        kinds[f"MPEG-1 in {name}"] = lambda name=name: encoded("mpeg1video", name, gop=12, bframes=2)
    for start in (0.5, 1.3, 2.2, 3.9):
        for gop in (12, 120):
            kinds[f"cut at {start}, group of {gop}"] = lambda s=start, g=gop: copied(
                encoded(count=120, g=str(g)), start=s
            )
        kinds[f"cut at {start}, no B-frames"] = lambda s=start: copied(encoded(count=120, g="30", bf="0"), start=s)
    for first in (7, 21, 25):
        kinds[f"open groups, {first} packets lost"] = lambda n=first: copied(encoded(count=80, **opened), first=n)
        kinds[f"HEVC, {first} packets lost"] = lambda n=first: copied(encoded("libx265", **X265), first=n)
    kinds["MPEG-4, 5 packets lost"] = lambda: copied(encoded("mpeg4", gop=12, bframes=2), first=5)
    kinds["MPEG-2, 5 packets lost"] = lambda: copied(encoded("mpeg2video", gop=12, bframes=2), first=5)
    kinds["MPEG-TS, cut"] = lambda: encoded(container="mpegts", g="20")[188 * 20 :]
    for disposal in (1, 2):
        for clear in (False, True):
            kinds[f"GIF, disposal {disposal}, transparent {clear}"] = lambda d=disposal, c=clear: animation(d, c)
    for name in sorted(
        path.name for path in FIELD.iterdir() if path.name not in ("rot90.mp4", "rot180.mp4", "hd60s.mp4")
    ):
        kinds[name] = lambda name=name: field_file(name)
    return kinds


KINDS = _kinds()


@cache
def kind(name):
    return KINDS[name]()


@cache
def shown(name):
    """All frames of a kind as FFmpeg gives them, and their times in seconds (None where the file tells none)."""
    with av.open(io.BytesIO(kind(name))) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
        pixels = [frame.to_ndarray(format="rgb24", threads=1) for frame in frames]
        times = [None if frame.pts is None else frame.pts * float(frame.time_base or 0) for frame in frames]
    return pixels, times
