"""Data modules from plain settings; the model's specs and the tokenizer are added when a run is put together."""

from __future__ import annotations

from typing import Annotated, Any

from vllava.batch import MediumSpec
from vllava.checks import Count, NotNegative, OneOf, Seed
from vllava.conversation import TEMPLATES, ends_of_turn
from vllava.conversation import template as find_template
from vllava.data.address import is_remote, shown
from vllava.data.datamodule import DataModule, Workers
from vllava.data.media import FITS, Preprocess
from vllava.data.mixture import Source, portions
from vllava.data.packing import CaptionPairs, ConversationPacker
from vllava.data.patience import Remote
from vllava.data.samples import SampleDecoder
from vllava.data.video import DECODERS, SAMPLINGS, video_decoder
from vllava.errors import UserError

Specs = dict[str, MediumSpec]
MODALITIES = ("image", "video", "text")
FEATURES = ("online", "cache")
Modality = Annotated[str, OneOf(MODALITIES)]
Times = NotNegative | dict[str, NotNegative]
Template = Annotated[str, OneOf(TEMPLATES)]
Fit = Annotated[str, OneOf(FITS)]
DecoderName = Annotated[str, OneOf(("auto", *DECODERS))]
Sampling = Annotated[str, OneOf(SAMPLINGS)]


def _chosen(sources: dict[str, list[str]], modalities: list[str]) -> list[Source]:
    """The sources of the wanted modalities."""
    unknown = sorted((set(modalities) | set(sources)) - set(MODALITIES))
    if unknown:
        raise UserError(f"No modality is called {', '.join(unknown)}; there are: {', '.join(MODALITIES)}.")
    for kind, folders in sources.items():
        if not isinstance(folders, list):
            raise UserError(f"data.sources.{kind} is a list of folders: data.sources.{kind}=[FOLDER, …]")
    return [Source(kind, folder) for kind in modalities for folder in sources.get(kind, [])]


def conversation_packer(
    specs: Specs,
    tokenizer: Any,
    template: Template = "vicuna_v1",
    max_length: Count = 3072,
    token_budget: Count = 8192,
    template_options: dict[str, Any] | None = None,
) -> ConversationPacker:
    """The packer of a template's name; raises UserError where the tokenizer's own template is asked for and unfit."""
    found = find_template(template, template_options)
    ends_of_turn(tokenizer, found)
    return ConversationPacker(tokenizer, found, specs, token_budget, max_length)


def sample_decoder(
    specs: Specs, image_fit: Fit = "crop", decoder: DecoderName = "auto", frame_sampling: Sampling = "index"
) -> SampleDecoder:
    """The decoder for a model's specs."""
    return SampleDecoder(specs, Preprocess(fit=image_fit), video_decoder(decoder, frame_sampling))


def conversation_data(
    specs: Specs,
    tokenizer: Any,
    sources: dict[str, list[str]],
    modalities: list[Modality],
    global_batch: Count,
    seed: Seed,
    template: Template = "vicuna_v1",
    template_options: dict[str, Any] | None = None,
    max_length: Count = 3072,
    token_budget: Count = 8192,
    image_fit: Fit = "crop",
    decoder: DecoderName = "auto",
    remedy: str = "",
    workers: Workers = -1,
    shuffle_window: Count = 64,
    num_frames: Count | None = None,
    features: Annotated[str, OneOf(FEATURES)] = "online",
    features_gigabytes: NotNegative | None = None,
    frame_sampling: Sampling = "index",
    mixture: dict[str, Times] | None = None,
    cache: Remote | dict[str, Any] | None = None,
) -> DataModule:
    """Conversations in packed micro-batches, for the stages and for training a language model.

    sources: modality -> folders of shards; only `modalities` are used. num_frames: frames of a video, which
    the video encoder decides; raises UserError if it takes another number. features: "online" or "cache", see
    vllava.features; features_gigabytes: that they may take beside all sources. frame_sampling: "index" or "time", see
    vllava.data.video. mixture: how much of each source an epoch holds, see vllava.data.mixture. cache: of shards on
    servers, see vllava.data.patience. See DataModule, ConversationPacker, Preprocess and SampleDecoder for the other
    settings.
    """
    if num_frames and "video" in specs and specs["video"].frames != num_frames:
        raise UserError(
            f"data.num_frames={num_frames}, but the video encoder takes {specs['video'].frames} frames: set "
            "encoder.video.frames to the same number."
        )
    if features not in FEATURES:
        raise UserError(f"data.features={features!r} is not known; there are: {', '.join(FEATURES)}.")
    chosen = _chosen(sources, modalities)
    if features == "cache" and (servers := [source.folder for source in chosen if is_remote(source.folder)]):
        raise UserError(
            f"data.features=cache writes beside the shards, and cannot to {shown(servers[0])}: copy them here."
        )
    return DataModule(
        [source.folder for source in chosen],
        sample_decoder(specs, image_fit, decoder, frame_sampling),
        conversation_packer(specs, tokenizer, template, max_length, token_budget, template_options),
        global_batch,
        seed,
        remedy,
        workers,
        shuffle_window,
        features == "cache",
        portions(mixture, chosen),
        remote=Remote.of(cache),
        features_gigabytes=features_gigabytes,
    )


def caption_data(
    specs: Specs,
    tokenizer: Any,
    sources: dict[str, list[str]],
    modalities: list[Modality],
    global_batch: Count,
    seed: Seed,
    max_length: Count = 77,
    image_fit: Fit = "crop",
    decoder: DecoderName = "auto",
    remedy: str = "",
    workers: Workers = -1,
    shuffle_window: Count = 64,
    frame_sampling: Sampling = "index",
    cache: Remote | dict[str, Any] | None = None,
) -> DataModule:
    """Media with captions, a global batch at a time, for pre-training encoders."""
    return DataModule(
        [source.folder for source in _chosen(sources, modalities)],
        sample_decoder(specs, image_fit, decoder, frame_sampling),
        CaptionPairs(tokenizer, max_length),
        global_batch,
        seed,
        remedy,
        workers,
        shuffle_window,
        remote=Remote.of(cache),
    )
