"""Eight frames of a video: ours against decord, seeking and reading forward, and PyAV decoding everything."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image

from perf.timing import take_turns, timed
from vllava.data.video import frame_indices, video_decoder

HEADER = "8 frames of a video, one process, one thread; H.264 with B-frames, key frames where scenes change, every 5 s"
FRAMES, FPS = 8, 30
NOISE = 10  # of a camera, new in every frame: at 320 x 240 about 400 kbit/s
# name -> width, height, seconds, options of the encoder
VIDEOS = {
    "10 s, 320 x 240": (320, 240, 10, {}),
    "30 s, 320 x 240": (320, 240, 30, {}),
    "60 s, 320 x 240": (320, 240, 60, {}),
    "10 s, 640 x 360": (640, 360, 10, {}),
    "60 s, 640 x 360": (640, 360, 60, {}),
    "60 s, 320 x 240, one key frame": (320, 240, 60, {"g": "9999", "sc_threshold": "0"}),
    "60 s, 320 x 240, a key frame a second": (320, 240, 60, {"g": "30"}),
    "10 min, 320 x 240": (320, 240, 600, {}),
}
DISTINCT = 10  # seconds of a video that are encoded; longer ones repeat them


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of clips/s of each contender, how much faster ours is, and peak memory above that of an idle process."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        for name, (width, height, seconds, options) in VIDEOS.items():
            path.write_bytes(video(width, height, seconds, options))
            contenders = {who: timed(partial(decode, path.read_bytes())) for who, decode in CONTENDERS.items()}
            if seconds > 60:  # everything at once does not fit into memory
                del contenders["PyAV, all"]
            timing = take_turns(contenders, repeats)
            rows.append({"video": name})
            rows[-1] |= {f"{who}, clips/s": 1 / timing.median(who) for who in contenders}
            rows[-1]["ours / decord seeking"] = timing.ratio("ours", "decord seeking")
            rows[-1] |= {f"{who}, MB": _memory(path, who) for who in contenders}
    return rows


def video(width: int, height: int, seconds: int, options: dict[str, str]) -> bytes:
    """A view that wanders over a larger picture, which changes every five seconds, with an encoder's usual settings."""
    from perf.data import picture  # here, since with it comes torch, and this file measures its own memory

    encoded = seconds if "sc_threshold" in options else min(seconds, DISTINCT)
    rng = np.random.default_rng(0)
    noise = rng.integers(-NOISE, NOISE + 1, (16, height, width, 1), np.int16)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "threads": "1", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        packets = []
        for number in range(encoded * FPS):
            if number % (5 * FPS) == 0:
                whole = picture(rng, width + 5 * FPS, height)
            pixels = whole[:, number % (5 * FPS) :][:, :width] + noise[number % 16]
            packets += stream.encode(av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24"))
        packets += stream.encode()
        for repeat in range(seconds // encoded):
            for packet in packets:
                again = av.Packet(bytes(packet))
                again.pts, again.dts = (at + repeat * encoded * FPS for at in (packet.pts, packet.dts))
                again.time_base, again.is_keyframe, again.stream = packet.time_base, packet.is_keyframe, stream
                container.mux(again)
    return buffer.getvalue()


def _ours(data: bytes) -> object:
    return list(video_decoder("auto")(data, FRAMES))


def _decord_seeking(data: bytes) -> object:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(frame_indices(len(reader), FRAMES)).asnumpy()


def _decord_forward(data: bytes) -> object:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    wanted = set(frame_indices(len(reader), FRAMES))
    frames = ((number, reader.next()) for number in range(len(reader)))
    return [frame.asnumpy() for number, frame in frames if number in wanted]


def _pyav_all(data: bytes) -> object:
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = list(container.decode(video=0))
    return [
        Image.fromarray(frames[i].to_ndarray(format="rgb24", threads=1)) for i in frame_indices(len(frames), FRAMES)
    ]


CONTENDERS: dict[str, Callable[[bytes], object]] = {
    "ours": _ours,
    "decord seeking": _decord_seeking,
    "decord forward": _decord_forward,
    "PyAV, all": _pyav_all,
}


def _memory(path: Path, who: str) -> float:
    done = subprocess.run([sys.executable, "-m", "perf.decoding", str(path), who], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: str, who: str) -> float:
    """Peak memory of this process while it decodes, above what it took with the file and all libraries in it, MB."""
    if who.startswith("decord"):
        import decord  # noqa: F401
    data = Path(path).read_bytes()
    before = _peak()
    CONTENDERS[who](data)
    return _peak() - before


def _peak() -> float:
    """Peak memory of this process alone, MB; getrusage would count what its parent held when it began."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
