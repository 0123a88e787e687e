"""What one loader process delivers, beside the bare decoding; and the share of a step that training waits for it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import lightning as L
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from data_prep.shards import write_manifest, write_shard
from data_prep.toy_render import encode_jpeg, encode_mp4
from perf.contenders import MIXTURES, TOKENIZER, Geometry, bare_trainer, build
from perf.timing import take_turns, timed
from vllava.batch import MediumSpec
from vllava.data.build import conversation_data
from vllava.data.datamodule import Piece, ShardDataset
from vllava.data.media import decode_image
from vllava.data.video import video_decoder
from vllava.model.build import load_tokenizer
from vllava.training.callbacks import Throughput
from vllava.training.stage import Stage
from vllava.training.task import Recipe

HEADER = (
    "one process, one thread, for an encoder of 224 pixels: JPEGs of 500 x 375, H.264 clips of 320 x 240 and 5 s, "
    "prepared frames of 224 x 224, cached features of a ViT-L in bfloat16; below: training at toy size"
)
SPECS = {"image": MediumSpec(224, 256), "video": MediumSpec(224, 8 * 257, 8)}
SAMPLES = 24  # read in a turn


def picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A smooth random picture with some noise, which compresses as a photograph does."""
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return (np.asarray(coarse) + rng.normal(0, 6, (height, width, 3))).clip(0, 255).astype(np.uint8)


def clip(rng: np.random.Generator, seconds: int = 5, fps: int = 25) -> np.ndarray:
    """A view that moves over a larger picture."""
    whole = picture(rng, 320 + seconds * fps, 240)
    return np.stack([whole[:, i : i + 320] for i in range(seconds * fps)])


class Kinds:
    """A medium of each kind that a shard may hold: (placeholder, extension, contents)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        frames = [encode_jpeg(picture(rng, 224, 224)) for _ in range(SPECS["video"].frames)]
        self.media: dict[str, tuple[str, str, bytes | list[bytes]]] = {
            "images": ("image", "jpg", encode_jpeg(picture(rng, 500, 375))),
            "raw video": ("video", "mp4", encode_mp4(clip(rng))),
            "prepared frames": ("video", "jpg", frames),
            "cached features, images": ("image", "image.safetensors", _features(SPECS["image"].tokens)),
            "cached features, videos": ("video", "video.safetensors", _features(SPECS["video"].tokens)),
        }

    def write(self, kind: str, folder: Path, samples: int = SAMPLES) -> None:
        """A shard of samples with such a medium each."""
        folder.mkdir(parents=True)
        placeholder, extension, contents = self.media[kind]
        record = {"conversations": talk(placeholder)}
        rows = ((f"{number:05d}", record, [(extension, contents)]) for number in range(samples))
        write_manifest(folder, [write_shard(folder / "0.tar", rows)], {"made": "for a benchmark"})


def _features(tokens: int) -> bytes:
    return safetensors.torch.save({"features": torch.randn(tokens, 1024).bfloat16()})


def talk(placeholder: str) -> list[dict]:
    """One round about a medium."""
    answer = "A small red circle lies above a large blue square, and to the right of both there is a green star."
    return [{"from": "human", "value": f"<{placeholder}>\nDescribe it."}, {"from": "gpt", "value": answer}]


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of samples/s for each kind of medium, then the share of a step that waits for data."""
    kinds = Kinds()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as root:
        rows = []
        for kind in kinds.media:
            folder = Path(root) / kind
            kinds.write(kind, folder)
            contenders = {"whole": timed(_read(folder)), **_bare(*kinds.media[kind])}
            timing = take_turns(contenders, repeats)
            rows.append({"data": kind, "samples/s": SAMPLES / timing.median("whole")})
            if "bare" in contenders:
                rows[-1] |= {
                    "bare decoding/s": SAMPLES / timing.median("bare"),
                    "share of it": timing.ratio("whole", "bare"),
                }
    torch.set_num_threads(threads)
    return [*rows, *stalls(bf16)]


def _read(folder: Path) -> Callable[[], object]:
    """Everything a worker does: read, decode, resize, normalise, tokenise, pack."""
    data = conversation_data(SPECS, load_tokenizer(TOKENIZER), {"video": [str(folder)]}, ["video"], SAMPLES, seed=0)
    dataset = ShardDataset(data.shards, data.decode, data.assembler, open_shards=1)
    rows = np.array([(0, index) for index in range(SAMPLES)])

    def read() -> object:
        step = dataset[Piece(rows)]
        assert not step.broken, step.broken
        return step

    return read


def _bare(placeholder: str, extension: str, contents: bytes | list[bytes]) -> dict[str, Callable[[], float]]:
    """A loop that decodes files and does nothing else; there is none for features."""
    if extension.endswith("safetensors"):
        return {}
    if extension == "mp4" and isinstance(contents, bytes):
        decode = video_decoder("auto")
        return {"bare": timed(lambda: [decode(contents, SPECS["video"].frames) for _ in range(SAMPLES)])}
    files = [contents] if isinstance(contents, bytes) else contents
    return {"bare": timed(lambda: [decode_image(file) for _ in range(SAMPLES) for file in files])}


class _Waits(L.Callback):
    """The share of each step that passed waiting for data, as it is logged."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        self.shares.append(float(trainer.callback_metrics["data_wait_share"]))


def stalls(bf16: bool, steps: int = 12) -> list[dict]:
    """Rows of the share of a step that waits for one loader process, for stage 1 at the small size."""
    counts = MIXTURES["stage1"].counts
    rows = []
    for videos in ("prepared frames", "raw video"):
        model, _ = build(Geometry())
        with tempfile.TemporaryDirectory() as root:
            sources = {"image": [f"{root}/images"], "video": [f"{root}/videos"]}
            kinds = Kinds()
            kinds.write("images", Path(root) / "images", steps * counts["image"])
            kinds.write(videos, Path(root) / "videos", steps * counts["video"])
            data = conversation_data(
                model.specs,
                load_tokenizer(TOKENIZER),
                sources,
                ["image", "video"],
                sum(counts.values()),
                seed=0,
                workers=1,
            )
            waits = _Waits()
            trainer = bare_trainer([Throughput(), waits], bf16, log_every_n_steps=1)
            trainer.fit(Stage(model, ["projector"], Recipe(lr=1e-5)), data)
        rows.append({"data": f"stage 1, images and {videos}", "waiting share of a step": median(waits.shares[2:])})
    return rows
