"""Pixels of the toy world: a scene becomes a JPEG picture or an H.264 clip in an MP4 file."""

from __future__ import annotations

import io
import math

import av
import numpy as np
from PIL import Image

from data_prep.toy_scene import CLIP_FPS, IMAGE_SIZE, RADIUS, Scene

RGB = {
    "red": (214, 38, 40),
    "green": (36, 150, 52),
    "blue": (40, 70, 214),
    "yellow": (238, 220, 50),
    "purple": (140, 50, 170),
    "orange": (245, 135, 30),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5
_TRIANGLE = [np.array([np.cos(a), np.sin(a)]) for a in np.deg2rad([-30.0, 90.0, 210.0])]  # outward edge normals


def _around(centre: float, radius: float) -> slice:
    """The rows or columns of pixels that a shape may reach."""
    reach = 1.5 * radius + 1  # a triangle's corners, and the pixel of anti-aliasing
    return slice(max(0, math.floor(centre - reach)), max(0, math.ceil(centre + reach)))


def _coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """How much of each pixel a shape covers, 0..1, from its signed distance (one pixel of anti-aliasing).

    dx, dy: of the pixels from the shape's centre [rows, columns].
    """
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - radius * 0.75) - radius * 0.28
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius  # as wide as the circle: its corners tell them apart
    elif shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        arm, reach = radius * 0.33, radius
        distance = np.minimum(np.maximum(ax - reach, ay - arm), np.maximum(ax - arm, ay - reach))
    elif shape == "triangle":  # point up
        distance = np.max([dx * n[0] + (dy - radius * 0.2) * n[1] for n in _TRIANGLE], axis=0) - radius * 0.6
    else:
        raise ValueError(f"no shape named {shape!r}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def _background(seed: int) -> np.ndarray:
    """A muted background [H, W, 3] in 0..255: plain, gradient, stripes, checks or blotches, with a little noise."""
    rng = np.random.default_rng(seed)
    first, second = (rng.uniform(85, 165) + rng.uniform(-18, 18, 3) for _ in range(2))
    kind = rng.integers(5)
    angle = rng.uniform(0, np.pi)
    along = _X * np.cos(angle) + _Y * np.sin(angle)
    if kind == 0:
        mix = np.zeros_like(along)
    elif kind == 1:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(along * 2 * np.pi / rng.uniform(8, 24))
    elif kind == 3:
        step = rng.uniform(6, 16)
        mix = ((_X // step + _Y // step) % 2).astype(np.float32)
    else:
        mix = np.asarray(
            Image.fromarray(rng.random((6, 6), np.float32)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        )
    canvas = first + (second - first) * mix[..., None]
    return canvas + rng.normal(0, 4, canvas.shape)


def render(scene: Scene) -> np.ndarray:
    """All frames of a scene [frames, H, W, 3] uint8."""
    background = _background(scene.background)
    frames = []
    for frame in range(scene.frames):
        canvas = background.copy()
        for index, thing in enumerate(scene.things):
            state = scene.state(index, frame)
            if state.visible:
                radius = RADIUS[thing.size]
                here = _around(state.y, radius), _around(state.x, radius)
                alpha = _coverage(thing.shape, _X[here] - state.x, _Y[here] - state.y, radius)[..., None]
                canvas[here] += alpha * (np.array(RGB[state.colour]) - canvas[here])
        frames.append(canvas.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def encode_jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """One picture [H, W, 3] uint8 as JPEG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def encode_mp4(frames: np.ndarray, fps: int = CLIP_FPS) -> bytes:
    """Frames [T, H, W, 3] uint8 as an H.264 MP4 file; one thread, so that the bytes do not depend on the machine."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "ultrafast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", threads=1)))
        container.mux(stream.encode())
    return buffer.getvalue()
