"""The first global batches of a run as they will reach the model."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vllava.batch import IGNORE_INDEX
from vllava.data.broken import printable, why
from vllava.data.datamodule import DataModule, GlobalBatchSampler
from vllava.data.packing import ConversationPacker, PackedSample
from vllava.data.patience import RemoteUserError
from vllava.data.samples import Medium
from vllava.data.shards import ShardReader
from vllava.inspection.tokens import Chip, chips

OPEN_SHARDS = 64
LOSSLESS = 112  # pixels: smaller pictures are shown as they are, larger ones as JPEG of high quality


@dataclass
class ShownMedium:
    """A picture, or the frames of a video, as data URIs of what the encoder sees; times in seconds, where known."""

    kind: str
    size: int
    pictures: list[str]
    times: tuple[float, ...] = ()


@dataclass
class ShownSample:
    """One sample of a batch: whole, or in figures alone, or broken."""

    key: str
    broken: str | None = None
    tokens: int = 0
    text: int = 0  # tokens of it that are no visual ones
    supervised: int = 0
    chips: list[Chip] = field(default_factory=list)
    media: list[ShownMedium] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return bool(self.chips)


@dataclass
class ShownRow:
    """A micro-batch."""

    samples: list[ShownSample]

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)


@dataclass
class ShownBatch:
    """A global batch: its rows, and the samples that are left out of it."""

    rows: list[ShownRow] = field(default_factory=list)
    broken: list[ShownSample] = field(default_factory=list)

    @property
    def samples(self) -> list[ShownSample]:
        return [sample for row in self.rows for sample in row.samples]


def first_batches(data: DataModule, count: int, whole: int) -> list[ShownBatch]:
    """The first `count` batches of the first epoch, dealt to one device; of the first `whole` samples all is shown."""
    assert isinstance(data.assembler, ConversationPacker)
    deal = data.assembler.deal(data.shards)
    sampler = GlobalBatchSampler(
        data.shards, data.global_batch, data.seed, data.shuffle_window, deal=deal, draws=data.draws
    )
    reader = ShardReader(data.shards, OPEN_SHARDS)
    found = [ShownBatch()] if count else []
    for piece in sampler if count else ():
        batch = found[-1]
        shown: list[ShownSample] = []
        packed: list[PackedSample] = []
        for shard, index in piece.rows.tolist():
            sample, one = _show(data, reader, (shard, index), whole > 0)
            whole -= 1
            if one is None:
                batch.broken.append(sample)
            else:
                shown.append(sample)
                packed.append(one)
        for row in data.assembler.collate(packed) if packed else ():
            batch.rows.append(ShownRow(shown[: row.num_samples]))
            shown = shown[row.num_samples :]
        if not piece.more:
            if len(found) == min(count, len(sampler)):
                break
            found.append(ShownBatch())
    return found


def _show(
    data: DataModule, reader: ShardReader, place: tuple[int, int], whole: bool
) -> tuple[ShownSample, PackedSample | None]:
    """A sample as the stream would prepare it; not packed where it is broken."""
    shard = data.shards[place[0]]
    packer = data.assembler
    shown = ShownSample(printable(f"{shard.path}:{reader.key(*place)}"))
    try:
        sample = data.decode(*reader.read(*place))
        packed = packer.prepare(sample)
    except RemoteUserError:  # of a server, not of the sample
        raise
    except Exception as error:  # of a stranger's sample, as when it is trained on
        shown.broken = why(error)
        return shown, None
    shown.tokens = len(packed)
    shown.text = sum(token >= 0 for token in packed.token_ids)
    shown.supervised = sum(label != IGNORE_INDEX for label in packed.labels)
    if whole:
        assert isinstance(packer, ConversationPacker)
        shown.chips = chips(packed, packer.tokenizer, packer.specs)
        shown.media = [show_medium(medium) for medium in sample.media]
    return shown, packed


def show_medium(medium: Medium) -> ShownMedium:
    """A medium for the page; without pictures where it is features already."""
    if medium.pixels.ndim == 2:
        return ShownMedium(medium.kind, 0, [])
    stack = medium.pixels if medium.kind == "video" else medium.pixels[None]
    pictures = [data_uri(frame.permute(1, 2, 0).numpy()) for frame in stack]
    return ShownMedium(medium.kind, stack.shape[-1], pictures, medium.times)


def data_uri(pixels: np.ndarray) -> str:
    """Pixels [H, W, 3] uint8 as a data: URI."""
    kind, buffer = ("PNG" if max(pixels.shape) < LOSSLESS else "JPEG"), io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=90)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
