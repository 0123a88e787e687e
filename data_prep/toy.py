"""Make the toy world's shards: `python -m data_prep.toy --out data/toy stage1 stage2 eval`.

Every split has its own random streams, so training, evaluation and the foundations' data never share a
scene. Shards are bit-identical from run to run, whatever the number of processes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from data_prep.shards import MANIFEST, PLACEHOLDERS, write_manifest, write_shard
from data_prep.toy_language import (
    TEMPORAL_TYPES,
    Question,
    caption_conversation,
    cells_in_words,
    existence,
    in_words,
    question_conversation,
    questions,
)
from data_prep.toy_render import encode_jpeg, encode_mp4, render
from data_prep.toy_scene import MAX_THINGS, POPULAR_PAIRS, Scene, draw_clip, draw_picture
from vllava.checks import Count, Positive, Seed
from vllava.commands import Parser, number
from vllava.errors import UserError
from vllava.folders import replacing, require_replaceable, strangers

SHARD_SAMPLES = 512
STILL_TYPES = ("colour", "shape", "size", "position", "count", "relation", "exist")
PROBES = ("random", "popular", "adversarial")
_FEATURES = re.compile(r"features/[0-9a-f]{16}(/[^/]+\.(tar|json|lock))?")  # see vllava.features


@dataclass(frozen=True)
class Source:
    """One folder of shards: how many samples of which medium, and what is said about them."""

    name: str
    medium: str  # image | video | text
    talk: str  # caption | questions | test | probes
    samples: int
    most: int = MAX_THINGS  # things in a picture
    rounds: int = 6  # questions asked about a scene, at most
    time_first: bool = False  # whether all questions that need time come before the others
    clips: float = 0.6  # the share of texts that are about clips
    novel: bool = False  # contains colour-shape pairs that no training source contains


SPLITS: dict[str, tuple[Source, ...]] = {
    "stage1": (
        Source("stage1/images", "image", "caption", 3000),
        Source("stage1/videos", "video", "caption", 3000),
    ),
    "stage1-demo": (  # a part of stage1's samples, and below of stage2's: what a demo learns from in minutes
        Source("stage1/images", "image", "caption", 2000),
        Source("stage1/videos", "video", "caption", 2000),
    ),
    "stage2-demo": (
        Source("stage2/images", "image", "questions", 2_500),
        Source("stage2/videos", "video", "questions", 10_500, time_first=True),
        Source("stage2/text", "text", "questions", 250),
    ),
    "stage2": (
        Source("stage2/images", "image", "questions", 4_500),
        Source("stage2/videos", "video", "questions", 16_000, time_first=True),
        Source("stage2/text", "text", "questions", 1_000),
    ),
    "eval": (
        Source("eval/images", "image", "test", 560),
        Source("eval/videos", "video", "test", 1_120),
        Source("eval/novel-images", "image", "test", 140, novel=True),
        Source("eval/novel-videos", "video", "test", 140, novel=True),
    ),
    "eval-probes": (  # POPE's settings in earnest: what "eval" asks of them is too little to tell two models apart
        Source("eval/probes", "image", "probes", 1_500),
    ),
    "eval-more": (  # so many that what is left of chance is the seeds'
        Source("eval/more-videos", "video", "test", 4_480),
    ),
    "foundations": (
        # A contrastive encoder tells crowded pictures apart by colours and places alone; where there is one thing,
        # it has to learn shapes.
        Source("foundations/single-images", "image", "caption", 20_000, most=1),
        Source("foundations/images", "image", "caption", 20_000),
        Source("foundations/videos", "video", "caption", 16_000),
        Source("foundations/text", "text", "questions", 56_000, rounds=16),
        Source("foundations/text-time", "text", "questions", 40_000, clips=0.85, time_first=True),
    ),
    "foundations-video": (  # what of these the video encoder learns from, and is measured on
        Source("foundations/videos", "video", "caption", 16_000),
        Source("foundations/held-out-videos", "video", "caption", 512),
    ),
    "foundations-test": (
        Source("foundations/held-out-images", "image", "caption", 512),
        Source("foundations/held-out-videos", "video", "caption", 512),
        Source("foundations/held-out-text", "text", "questions", 512),
        Source("foundations/reading", "text", "test", 720),
    ),
}


def _stream(seed: int, source: Source, shard: int) -> random.Random:
    return random.Random(f"{seed}/{source.name}/{shard}")


def _test_question(
    draw: Callable[..., Scene], novel: bool, rng: random.Random, types: tuple[str, ...], index: int
) -> tuple[Scene, Question]:
    """A scene and a question of the type whose turn it is, such that its words do not give its answer away.

    The answer is drawn evenly from the possible ones before a scene is looked for, and no colour-shape pair is
    drawn more often than another, as training data does.
    """
    wanted = types[index % len(types)]
    if wanted == "exist":
        return _probe(draw, novel, rng, PROBES[index // len(types) % 3], rng.random() < 0.5)
    target = None
    while True:
        scene = draw(rng, novel, even=True)
        for question in questions(scene, rng):
            if question.type != wanted:
                continue
            if wanted == "order":  # the options name the things of this scene; their order is random already
                return scene, question
            target = target or rng.choice(question.options)
            if question.answer == target:
                return scene, question


def _probe(
    draw: Callable[..., Scene], novel: bool, rng: random.Random, probe: str, present: bool
) -> tuple[Scene, Question]:
    """A scene and the question whether it shows a thing, which it does or does not, in one of POPE's settings."""
    while True:
        scene = draw(rng, novel, even=True)
        question = existence(scene, rng, probe, present)
        popular = any(f"{colour} {shape}" in question.text for colour, shape in POPULAR_PAIRS)
        recoloured = any(event.kind == "recolour" for event in scene.events)
        if not recoloured and (popular or probe != "popular"):
            return scene, question


def _samples(source: Source, seed: int, shard: int, count: int) -> Iterator[tuple[str, dict, list[tuple[str, bytes]]]]:
    rng = _stream(seed, source, shard)
    slug = source.name.replace("/", "-")
    for index in range(count):
        number = shard * SHARD_SAMPLES + index
        key = f"{slug}-{number:06d}"
        clip = source.medium == "video" or (source.medium == "text" and rng.random() < source.clips)
        draw = draw_clip if clip else partial(draw_picture, most=source.most)
        record: dict = {"id": key, "source": f"toy-{slug}"}
        if source.talk in ("test", "probes"):
            if source.talk == "test":
                types = (*TEMPORAL_TYPES, *STILL_TYPES) if clip else STILL_TYPES
                scene, question = _test_question(draw, source.novel, rng, types, number)
            else:  # the settings in turn, each as often with yes as with no
                scene, question = _probe(draw, source.novel, rng, PROBES[number % 3], number // 3 % 2 == 0)
            asked = f"{PLACEHOLDERS.get(source.medium) or cells_in_words(scene)}\n{question.text}"
            record["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": question.answer}]
            record["question"] = {"type": question.type, "options": question.options}
        else:
            scene = draw(rng)
            seen = PLACEHOLDERS.get(source.medium) or in_words(scene, rng)
            if source.talk == "caption":
                record["conversations"] = caption_conversation(scene, rng, seen)
            else:
                record["conversations"] = question_conversation(scene, rng, seen, source.rounds, source.time_first)
        yield key, record, _media(source.medium, scene)


def _media(medium: str, scene: Scene) -> list[tuple[str, bytes]]:
    if medium == "text":
        return []
    frames = render(scene)
    return [("mp4", encode_mp4(frames))] if medium == "video" else [("jpg", encode_jpeg(frames[0]))]


def _write(job: tuple[Path, Source, int, int, int]) -> dict:
    folder, source, seed, shard, count = job
    return write_shard(folder / f"{shard:05d}.tar", _samples(source, seed, shard, count))


def not_ours(folder: Path) -> list[str]:
    """What in a source's folder is neither as this program wrote it nor encoder outputs that a run keeps there."""
    return [name for name in strangers(folder) if not _FEATURES.fullmatch(name)]


def remove(split: str, out: Path) -> None:
    """Remove the sources of a split; raises UserError where a folder holds anything else."""
    for source in SPLITS[split]:
        folder = out / source.name
        if folder.is_dir():
            require_replaceable(folder, not_ours=not_ours)
            shutil.rmtree(folder)
            with suppress(OSError):  # what holds something else stays
                folder.parent.rmdir()
                out.rmdir()


def make(split: str, out: Path, seed: int, scale: float, processes: int) -> None:
    """Write all sources of a split below `out`; `scale` multiplies their sample counts."""
    with ProcessPoolExecutor(processes) as pool:
        for source in SPLITS[split]:
            total = max(1, round(source.samples * scale))
            folder = out / source.name
            with replacing(folder, not_ours=not_ours) as unfinished:
                starts = range(0, total, SHARD_SAMPLES)
                jobs = [(unfinished, source, seed, i, min(SHARD_SAMPLES, total - s)) for i, s in enumerate(starts)]
                made = pool.map(_write, jobs)
                shards = list(tqdm(made, source.name, len(jobs), leave=False, disable=None, unit=" shards"))
                settings = {"world": "toy", "seed": seed, **asdict(source), "samples": total}
                write_manifest(unfinished, shards, settings)
            size = sum(shard["bytes"] for shard in shards)
            print(f"{folder / MANIFEST}: {total} samples, {len(shards)} shards, {size / 1e6:.1f} MB", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("python -m data_prep.toy", "Make the toy world's shards.", "stage1 stage2 eval --out data/toy")
    parser.add_argument(
        "splits", nargs="+", choices=sorted(SPLITS), metavar="split", help=f"any of {', '.join(SPLITS)}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("data/toy"),
        help="folder of the shards (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=number(Seed), default=0, metavar="N", help="seed of the world (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        type=number(Positive),
        default=1.0,
        metavar="X",
        help="multiplies every sample count (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=number(Count),
        default=os.cpu_count(),
        metavar="N",
        help="parallel writers (default: all cores)",
    )
    parser.add_argument("--remove", action="store_true", help="remove these splits instead of making them")
    options = parser.parse_args(arguments)
    try:
        for split in options.splits:
            if options.remove:
                remove(split, options.out)
            else:
                make(split, options.out, options.seed, options.scale, options.processes)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
