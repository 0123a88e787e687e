"""Talk with a trained model about images and videos: `python -m vllava.chat --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers.utils import logging as transformers_logging

from vllava.checks import Count, NotNegative, Range, Seed
from vllava.commands import Parser, number
from vllava.conversation import TEMPLATES, Message, placeholders
from vllava.data.build import conversation_packer, sample_decoder
from vllava.data.samples import Medium, Sample, SampleDecoder
from vllava.data.video import DECODERS
from vllava.errors import UserError, stop
from vllava.evaluation.answers import ask, encoded
from vllava.model.checkpoint import load
from vllava.model.device import best_device
from vllava.model.finding import Folders, add_foundations


def read_medium(kind: str, path: Path, decode: SampleDecoder) -> Medium:
    """An image or video file as the model takes it; raises UserError that names the file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        return decode.image(path.read_bytes()) if kind == "image" else decode.video(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def answers(
    checkpoint: str,
    media: list[tuple[str, Path]],
    questions: Iterable[str],
    max_new_tokens: int,
    decoder: str = "auto",
    num_frames: int | None = None,
    template: str | None = None,
    foundations: Folders = (),
    **sampling: Any,
) -> Iterator[str]:
    """Answer questions in one conversation; the media are shown before the first, or where it says, and encoded once.

    Greedy, unless `sampling` says otherwise in the words of `transformers`' generation. foundations: folders to look
    into for what the checkpoint does not hold itself.
    """
    model, tokenizer, description = load(checkpoint, num_frames, foundations)
    model.to(best_device())
    decode = sample_decoder(model.specs, description.image_fit, decoder, description.frame_sampling)
    packer = conversation_packer(model.specs, tokenizer, **description.prompt(template))
    shown = [encoded(model, read_medium(kind, path, decode)) for kind, path in media]
    conversation: list[Message] = []
    for question in questions:
        asked = {"from": "human", "value": question}
        if not conversation and [kind for _, kind in placeholders([asked])] != [medium.kind for medium in shown]:
            asked["value"] = "".join(f"<{medium.kind}>\n" for medium in shown) + question
        conversation.append(asked)
        answer = ask(model, packer, [Sample("chat", conversation, shown)], max_new_tokens, **sampling)[0]
        conversation.append({"from": "gpt", "value": answer})
        yield answer


def typed() -> Iterator[str]:
    """Questions typed at the terminal, until an empty line or the end of input."""
    while True:
        try:
            question = input("question (empty to stop): ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        yield question


class _Show(argparse.Action):
    """Collects --image and --video in the order they are given."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.media = [*namespace.media, (option_string.lstrip("-"), Path(values))]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m vllava.chat",
        "Talk with a trained model about images and videos.",
        "--checkpoint outputs/runs/stage2-united-s1/checkpoint --video clip.mp4 'What happens?'",
    )
    parser.add_argument(
        "question",
        nargs="*",
        help="questions, asked one after the other; without any, type them. "
        "The first may say where the media stand: '<image> before <video>, what changed?'",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a run's checkpoint folder")
    add_foundations(parser)
    parser.add_argument("--image", action=_Show, metavar="FILE", help="an image to show (may be repeated)")
    parser.add_argument("--video", action=_Show, metavar="FILE", help="a video to show (may be repeated)")
    parser.add_argument(
        "--max-new-tokens",
        type=number(Count),
        default=64,
        metavar="N",
        help="of an answer at most (default: %(default)s)",
    )
    parser.add_argument(
        "--decoder", default="auto", choices=("auto", *DECODERS), help="of videos (default: %(default)s)"
    )
    parser.add_argument("--num-frames", type=number(Count), metavar="N", help="of a video (default: as in training)")
    parser.add_argument("--template", choices=TEMPLATES, help="of the prompt (default: as in training)")
    parser.add_argument(
        "--temperature",
        type=number(NotNegative),
        default=0.0,
        metavar="T",
        help="of sampling; 0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=number(Annotated[float, Range(0, 1, above=True)]),
        default=1.0,
        metavar="P",
        help="sample among the likeliest tokens that have this probability together (default: %(default)s)",
    )
    parser.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="of sampling (default: %(default)s)")
    parser.set_defaults(media=[])
    options = parser.parse_args(arguments)
    sampling = {}
    if options.temperature:
        torch.manual_seed(options.seed)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    transformers_logging.disable_progress_bar()
    questions = options.question or typed()
    try:
        for answer in answers(
            options.checkpoint,
            options.media,
            questions,
            options.max_new_tokens,
            options.decoder,
            options.num_frames,
            options.template,
            options.foundations,
            **sampling,
        ):
            print(answer, flush=True)
    except UserError as error:
        stop(error)
    except KeyboardInterrupt:
        return 130  # what a shell gives for Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
