"""Measure the shipped foundations, and gather them from their runs: `python -m vllava.evaluation.foundations -h`."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vllava.batch import CaptionBatch, MediumSpec
from vllava.data.build import caption_data, conversation_data, conversation_packer, sample_decoder
from vllava.errors import UserError, stop
from vllava.evaluation.answers import answer_all, read_samples
from vllava.folders import RECORD as WRITTEN
from vllava.folders import replacing
from vllava.model.build import load_llm, load_tokenizer, video_llava
from vllava.model.encoders import ClipEncoder
from vllava.model.files import Checkpoint
from vllava.model.languagebind import LanguageBind

RECORD = "foundations.json"  # beside the assets: recipe, hash and figures of each
RUNS = {  # asset -> the experiments that make it, one after the other
    "languagebind-image": ("align_image",),
    "languagebind-video": ("align_video",),
    "clip": ("clip",),
    "mae": ("mae",),
    "llm": ("llm", "llm_time"),
}
RECIPE_KEYS = ("model", "task", "data", "trainer", "seed")
_FRAMES = 8
_REMEDY = "Make them with `python -m data_prep.toy foundations-test`."


def _batches(size: int, kind: str, folder: Path, tokenizer: Path) -> list[CaptionBatch]:
    """A held-out source, as an encoder of pictures of `size` pixels reads it."""
    data = caption_data(
        {kind: MediumSpec(size, 0, _FRAMES if kind == "video" else 1)},
        load_tokenizer(str(tokenizer)),
        {kind: [str(folder)]},
        [kind],
        global_batch=128,
        seed=0,
        workers=0,
        remedy=_REMEDY,
    )
    return [batch for step in data.train_dataloader() for batch in step.micro_batches]


def _size(encoder: LanguageBind) -> int:
    return encoder.config.vision_config.image_size


@torch.no_grad()
def _embed(encoder: LanguageBind, batches: Sequence[CaptionBatch]) -> tuple[Tensor, Tensor]:
    """Embeddings of media and of their captions [n, D]."""
    media = torch.cat([encoder.embed_media(batch.pixels) for batch in batches])
    return media, torch.cat([encoder.embed_text(batch.token_ids, batch.attention_mask) for batch in batches])


@torch.no_grad()
def _middles(encoder: LanguageBind, batches: Sequence[CaptionBatch]) -> Tensor:
    """Embeddings of videos' middle frames as images [n, D]."""
    return torch.cat([encoder.embed_media(batch.pixels[:, _FRAMES // 2]) for batch in batches])


def retrieval(queries: Tensor, answers: Tensor) -> float:
    """How often a query's nearest answer is its own, among all of them."""
    return round((queries @ answers.T).argmax(1).eq(torch.arange(len(queries))).float().mean().item(), 4)


@torch.no_grad()
def perplexity(llm_path: Path, folder: Path) -> float:
    """exp(mean loss) over the answers' tokens of held-out text."""
    model = video_llava(load_llm(str(llm_path))).eval()
    tokenizer = load_tokenizer(str(llm_path))
    sources = {"text": [str(folder)]}
    data = conversation_data({}, tokenizer, sources, ["text"], global_batch=64, seed=0, workers=0, remedy=_REMEDY)
    batches = [batch for step in data.train_dataloader() for batch in step.micro_batches]
    total = sum(float(model.loss_sum(batch)) for batch in batches)
    return round(math.exp(total / sum(batch.num_supervised for batch in batches)), 4)


def reading(llm_path: Path, folder: Path) -> dict[str, float]:
    """How often the language model answers rightly about scenes in words: over all questions, and for each type."""
    tokenizer = load_tokenizer(str(llm_path))
    model = video_llava(load_llm(str(llm_path))).eval()
    samples = list(read_samples(folder, sample_decoder({}), _REMEDY))
    answers = answer_all(model, conversation_packer({}, tokenizer), samples, batch_size=64, max_new_tokens=16)
    groups = {"reading": answers}
    for answer in answers:
        groups.setdefault(f"reading_{answer.type}", []).append(answer)
    return {name: round(sum(a.correct for a in group) / len(group), 4) for name, group in groups.items()}


def image_to_video(video: Path, images: str, held_out: str, tokenizer: str) -> float:
    """How often the middle frame of a held-out video, as an image, finds that video: how well two encoders are aligned.

    video, images: checkpoints of the two. Neither is ever trained on such pairs: both are aligned with text alone.
    """
    encoder, stills = (LanguageBind.from_pretrained(one, dtype=torch.float32).eval() for one in (video, images))
    batches = _batches(_size(encoder), "video", Path(held_out), Path(tokenizer))
    return retrieval(_middles(stills, batches), _embed(encoder, batches)[0])


@torch.no_grad()
def token_similarity(video: Path, images: str, held_out: str, tokenizer: str) -> float:
    """How alike two encoders' tokens of one picture are, which is what the LLM reads of it: 1 where they are the same.

    video, images: checkpoints of the two. The mean cosine similarity of a token of held-out videos' middle frames and
    that of the same patch of the frame as an image; from the tokens of each encoder their mean is taken.
    """
    clips, stills = ClipEncoder(str(video), "video"), ClipEncoder(images, "image")
    batches = _batches(clips.spec.size, "video", Path(held_out), Path(tokenizer))
    theirs = torch.cat([stills(batch.pixels[:, _FRAMES // 2]) for batch in batches])
    ours = torch.cat([clips(batch.pixels).unflatten(1, (_FRAMES, -1))[:, _FRAMES // 2, 1:] for batch in batches])
    ours, theirs = (tokens - tokens.mean((0, 1)) for tokens in (ours, theirs))
    return round(cosine_similarity(ours, theirs, dim=-1).mean().item(), 4)


def measure(assets: Path, world: Path) -> dict[str, dict[str, float]]:
    """The figures of every foundation that has any, on the held-out sources: retrieval among all of a source."""
    held_out = world / "foundations"
    tokenizer = assets / "tokenizer"

    def load(name: str) -> LanguageBind:
        return LanguageBind.from_pretrained(assets / name, dtype=torch.float32).eval()

    figures: dict[str, dict[str, float]] = {}
    image, video = load("languagebind-image"), load("languagebind-video")
    for name, encoder in (("languagebind-image", image), ("clip", load("clip"))):
        media, text = _embed(encoder, _batches(_size(encoder), "image", held_out / "held-out-images", tokenizer))
        figures[name] = {"image_to_text": retrieval(media, text), "text_to_image": retrieval(text, media)}
    clips = _batches(_size(video), "video", held_out / "held-out-videos", tokenizer)
    media, text = _embed(video, clips)
    figures["languagebind-video"] = {
        "video_to_text": retrieval(media, text),
        "text_to_video": retrieval(text, media),
        "image_to_video": retrieval(_middles(image, clips), media),
    }
    figures["llm"] = {
        "perplexity": perplexity(assets / "llm", held_out / "held-out-text"),
        **reading(assets / "llm", held_out / "reading"),
    }
    return figures


# What decides nothing of the weights.
_INDIFFERENT = ("start_from", "remedy", "max_broken_share", "on_nan", "max_skipped", "features_gigabytes")


def recipe(config: dict) -> dict:
    """The part of a run's configuration that decides what it trains, without the paths of the run itself.

    Before and after `config.settle` it is the same: folders that are not named decide nothing.
    """

    def without_paths(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: without_paths(value) for key, value in node.items() if key not in _INDIFFERENT}

    found = {key: without_paths(config[key]) for key in RECIPE_KEYS}
    data = {key: value for key, value in found["data"].items() if key not in ("stage1", "stage2", "held_out")}
    found["trainer"] = {key: found["trainer"][key] for key in ("precision", "max_epochs", "max_steps")}
    return {**found, "data": {**data, "sources": {kind: named for kind, named in data["sources"].items() if named}}}


def gather(runs: Path, assets: Path, world: Path) -> dict:
    """Copy each asset's checkpoint from its last run, measure it, and write the record."""
    record: dict = {}
    for name, experiments in RUNS.items():
        folders = [_run_of(experiment, runs) for experiment in experiments]
        source = folders[-1] / "checkpoint"
        source = source / "llm" if name == "llm" else source
        with replacing(assets / name) as unfinished:
            shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns(WRITTEN), dirs_exist_ok=True)
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
        record[name] = {
            "sha256": Checkpoint(assets / name).sha256,
            "seconds": round(sum(m["seconds"] for m in metrics), 1),
            "final_loss": round(metrics[-1]["final_tenth"]["loss"], 4),
            "recipes": {name: recipe(config) for name, config in zip(experiments, configs, strict=True)},
        }
    for name, figures in measure(assets, world).items():
        record[name]["figures"] = figures
    (assets / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def _run_of(experiment: str, runs: Path) -> Path:
    """The folder of an experiment's run."""
    folders = sorted(runs.glob(f"{experiment}-*"))
    if len(folders) != 1:
        raise UserError(f"Expected one run of {experiment} in {runs}, found {len(folders)}. Run `make foundations`.")
    return folders[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllava.evaluation.foundations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--runs", type=Path, help="gather the checkpoints of these runs into the assets first")
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where they lie (default: %(default)s)")
    parser.add_argument("--world", type=Path, default=Path("data/toy"), help="the toy world (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.runs:
            gather(options.runs, options.assets, options.world)
        for name, figures in measure(options.assets, options.world).items():
            print(name, *(f"  {key:24}{value:.3f}" for key, value in figures.items()), sep="\n")
    except UserError as error:
        stop(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
