"""Small media files and shards for the tests, written by the same functions that write the real ones."""

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_prep.shards import write_manifest, write_shard
from data_prep.toy_render import encode_jpeg, encode_mp4
from vllava.batch import MediumSpec

SPECS = {"image": MediumSpec(64, 16), "video": MediumSpec(64, 136, 8)}
ROOT = Path(__file__).parents[1]
TOKENIZER = str(ROOT / "assets" / "tokenizer")


def jpeg(shade=120):
    """A grey 64 x 64 picture."""
    return encode_jpeg(np.full((64, 64, 3), shade, np.uint8))


def mp4(shade=120, frames=8):
    """A grey 64 x 64 clip."""
    return encode_mp4(np.full((frames, 64, 64, 3), shade, np.uint8))


def talk(question="What is it?", answer="a circle", placeholder="<image>"):
    """One round of a conversation in LLaVA's format."""
    asked = f"{placeholder}\n{question}" if placeholder else question
    return [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]


def turns(*values):
    """A conversation of these texts, the first of them the human's."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def image_sample(key, shade=120):
    return key, {"id": key, "conversations": talk()}, [("jpg", jpeg(shade))]


def video_sample(key, shade=120):
    return key, {"id": key, "conversations": talk(placeholder="<video>")}, [("mp4", mp4(shade))]


def text_sample(key):
    return key, {"id": key, "conversations": talk(placeholder="")}, []


def write_source(folder, samples, per_shard):
    """A folder of shards with its manifest; returns the keys in the order in which they were written."""
    folder.mkdir(parents=True)
    samples = list(samples)
    groups = [samples[start : start + per_shard] for start in range(0, len(samples), per_shard)]
    shards = [write_shard(folder / f"{number:05d}.tar", group) for number, group in enumerate(groups)]
    write_manifest(folder, shards, {"made": "for a test"})
    return [key for key, _, _ in samples]


def write_tar(path, members):
    """A tar file of (name, bytes) members, whatever they are called."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_plain_manifest(folder, counts):
    """A manifest that claims `counts` (file name -> samples), true or not."""
    shards = [{"name": name, "samples": samples} for name, samples in counts.items()]
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "shards": shards}))


def video_file(frames, options=None, fps=25):
    """Frames [T, H, W, 3] uint8 as an MP4 with the encoder's own defaults, B-frames included."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()


def audio_file(blocks=10):
    """An MP4 with a silent audio stream and no video stream."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        for block in range(blocks):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, block * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def empty_video_file():
    """An MP4 whose video stream was opened and closed again without a frame."""
    return video_file(np.empty((0, 64, 64, 3), np.uint8))


def image_file(picture, kind="PNG"):
    """A PIL picture, or an array, as bytes of that file format."""
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind)
    return buffer.getvalue()


def damaged(data, seed):
    """A file with a few bytes changed, and every fourth one cut."""
    rng = np.random.default_rng(seed)
    data = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 10)):
        data[place] = rng.integers(256)
    return bytes(data[: rng.integers(len(data))] if seed % 4 == 0 else data)
