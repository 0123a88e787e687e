"""The same weights and samples for our model and for the port in `transformers`, what one would use instead."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import VideoLlavaConfig
from transformers import VideoLlavaForConditionalGeneration as Port

from vllava.batch import IGNORE_INDEX, Batch, Step
from vllava.conversation import PLACEHOLDER_IDS
from vllava.data.packing import PackedSample, pack_rows
from vllava.data.samples import Medium
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import load
from vllava.model.formats import MEDIA_TOKENS, read_port, write_ours
from vllava.model.video_llava import VideoLlava
from vllava.run import quiet

TOKENIZER = "assets/tokenizer"
PAPER_IMAGE_TOKENS = 256  # text lengths are scaled by what the small encoder gives for it


@dataclass(frozen=True)
class Geometry:
    """The size of a model; the default is small, with the paper's ratio of a video's tokens to an image's, 8 : 1."""

    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    vocabulary: int | None = None  # None: the toy tokenizer's
    vision_width: int = 128
    vision_layers: int = 5
    image_size: int = 64
    patch_size: int = 8
    frames: int = 8

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Mixture:
    """What a stage's batches are made of: samples by medium, and their text tokens at the paper's size."""

    counts: dict[str, int]  # of one global batch
    text_tokens: dict[str, int]
    supervised: float  # share of text tokens

    @property
    def samples(self) -> int:
        return sum(self.counts.values())


# Section 4.1.2: 558K images and 702K videos; 665K rows of images and 100K of videos. A batch has the size of the
# original's on one GPU (32 and 16). Text lengths: as in conf/model/video_llava_7b.yaml.
MIXTURES = {
    "stage1": Mixture({"image": 14, "video": 18}, {"image": 90, "video": 90}, 0.3),
    "stage2": Mixture({"image": 14, "video": 2}, {"image": 300, "video": 150}, 0.5),
    "stage1 images": Mixture({"image": 32}, {"image": 90}, 0.3),
    "stage1 videos": Mixture({"video": 32}, {"video": 90}, 0.3),
    "stage2 images": Mixture({"image": 16}, {"image": 300}, 0.5),
    "stage2 videos": Mixture({"video": 16}, {"video": 150}, 0.5),
}


def build(geometry: Geometry) -> tuple[VideoLlava, Port]:
    """Our model and the port with the same random weights, in float32. The port knows no temporal attention."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in MEDIA_TOKENS])
    image, video = tokenizer.convert_tokens_to_ids(list(MEDIA_TOKENS))
    config = VideoLlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": geometry.vision_width,
            "intermediate_size": 4 * geometry.vision_width,
            "num_hidden_layers": geometry.vision_layers,
            "num_attention_heads": geometry.vision_width // 32,
            "image_size": geometry.image_size,
            "patch_size": geometry.patch_size,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": geometry.hidden_size,
            "intermediate_size": geometry.hidden_size * 8 // 3,
            "num_hidden_layers": geometry.layers,
            "num_attention_heads": geometry.heads,
            "vocab_size": max(geometry.vocabulary or 0, len(tokenizer)),
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": 4096,
        },
        image_token_index=image,
        video_token_index=video,
        image_seq_length=geometry.patches,
        video_seq_length=geometry.frames * (1 + geometry.patches),
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "port", Path(folder) / "ours"
        Port(config).save_pretrained(theirs)
        tokenizer.save_pretrained(theirs)
        write_ours(read_port(theirs), ours)
        port = Port.from_pretrained(theirs, attn_implementation="sdpa", dtype=torch.float32)
        model, _, _ = load(ours, num_frames=geometry.frames)
    return model, port


def draw(model: VideoLlava, mixture: Mixture, seed: int = 0, scale: float | None = None) -> list[PackedSample]:
    """Random samples of one global batch, in random order; `scale` of the text lengths, if not the encoder's."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [kind for kind, count in mixture.counts.items() for _ in range(count)]
    scale = scale or model.specs["image"].tokens / PAPER_IMAGE_TOKENS
    return [
        _sample(model, kinds[i], max(round(mixture.text_tokens[kinds[i]] * scale), 4), mixture.supervised, generator)
        for i in torch.randperm(len(kinds), generator=generator).tolist()
    ]


def _sample(model: VideoLlava, kind: str, text: int, supervised: float, generator: torch.Generator) -> PackedSample:
    spec = model.specs[kind]
    words = torch.randint(10, 500, (text,), generator=generator).tolist()
    answer = max(round(text * supervised), 1)
    before = (text - answer) // 2
    ids = [*words[:before], *[PLACEHOLDER_IDS[kind]] * spec.tokens, *words[before:]]
    labels = [IGNORE_INDEX] * (len(ids) - answer) + ids[-answer:]
    shape = (3, spec.size, spec.size) if kind == "image" else (spec.frames, 3, spec.size, spec.size)
    return PackedSample(kind, ids, labels, [Medium(kind, torch.randn(shape, generator=generator))])


def padded(port: Port, samples: list[PackedSample]) -> dict[str, Tensor]:
    """One batch as the port takes it: every sample as long as the longest."""
    longest = max(map(len, samples))
    places = {
        PLACEHOLDER_IDS["image"]: port.config.image_token_id,
        PLACEHOLDER_IDS["video"]: port.config.video_token_id,
    }
    rows = [[places.get(token, token) for token in sample.token_ids] for sample in samples]
    media = [medium for sample in samples for medium in sample.media]
    inputs = {
        "input_ids": [row + [0] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
        "labels": [sample.labels + [IGNORE_INDEX] * (longest - len(sample)) for sample in samples],
    }
    pixels = {
        name: torch.stack([m.pixels for m in media if m.kind == kind])
        for name, kind in (("pixel_values", "image"), ("pixel_values_videos", "video"))
        if any(m.kind == kind for m in media)
    }
    return {**{name: torch.tensor(rows) for name, rows in inputs.items()}, **pixels}


def packed(samples: list[PackedSample], token_budget: int = 8192) -> list[Batch]:
    """The samples in rows of at most `token_budget` tokens, as training packs them."""
    return pack_rows(samples, token_budget)


def bare_trainer(callbacks: list[L.Callback], bf16: bool = False, **settings: Any) -> L.Trainer:
    """Lightning's Trainer on the CPU for one epoch, without what a benchmark has no use for."""
    quiet("ERROR")
    return L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if bf16 else "32-true",
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def repeated(step: Step, times: int) -> DataLoader:
    """A loader that gives the same step over and over."""
    steps: Any = [step] * times  # a list is all the dataset a loader needs
    return DataLoader(steps, batch_size=None)


def train_only(model: nn.Module, parts: list[str]) -> list[nn.Parameter]:
    """Freeze all parameters but those whose names contain one of `parts`; returns these."""
    model.requires_grad_(False)
    chosen = [p for name, p in model.named_parameters() if any(part in name for part in parts)]
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


TRAINED = {  # by stage, in the names of ours and of the port's
    "stage1": ["projector"],
    "stage2": ["projector", "llm.", "language_model", "lm_head"],
}


class Loop:
    """A plain training loop: AdamW, clipping, one step for each call."""

    def __init__(self, model: Any, trained: list[nn.Parameter], bf16: bool) -> None:
        self.model = model
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.bf16 = bf16

    def autocast(self) -> torch.autocast:
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.bf16)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def packed_step(self, batches: list[Batch]) -> float:
        """One step of our model over packed rows; returns the loss."""
        terms = sum(batch.num_supervised for batch in batches)
        total = 0.0
        for batch in batches:
            with self.autocast():
                loss = self.model.loss_sum(batch) / terms
            loss.backward()
            total += loss.item()
        self.step()
        return total

    def padded_step(self, inputs: dict[str, Tensor]) -> float:
        """One step of the port over a padded batch; returns the loss."""
        with self.autocast():
            loss = self.model(**inputs).loss
        loss.backward()
        self.step()
        return loss.item()
