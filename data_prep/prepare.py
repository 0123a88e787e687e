"""Annotations and media files to shards: `python -m data_prep.prepare DATASET [key=value …] --out FOLDER`.

DATASET is the name of a file in conf/prepare, or the path of one; `key=value` changes what it says. Stopped or killed
and started again, it goes on; the shards do not depend on the number of processes, nor on who made them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from data_prep.annotations import Dataset, annotation_files, read_dataset
from data_prep.blocks import STATE, Block, Outcome, blocks, look_at_block, make_block, read_outcome
from data_prep.executors import Executor, LocalProcesses, RayCluster
from data_prep.media import CHECKS, VIDEOS, MediaSettings
from data_prep.progress import Progress, rows_about
from data_prep.summary import Ids, Tally
from data_prep.workplace import MADE_BY, REJECTS, close, described, fingerprints, known_settings, parts, workplace
from vllava.checks import Count, ShareBelowOne
from vllava.commands import Parser, number
from vllava.data.shards import read_manifest
from vllava.data.writing import appearing, write_manifest
from vllava.errors import UserError

REMEDY = "Delete this folder and prepare it again."


@dataclass(frozen=True)
class Preparation:
    """What is to be made of a data set: all that its shards depend on."""

    dataset: Dataset
    media: MediaSettings
    rows_per_shard: int = 512
    held_out: float = 0.0  # the share of rows that go into shards of their own

    def __post_init__(self) -> None:
        if not 1 <= self.rows_per_shard <= 1_000_000:
            raise UserError(f"--rows-per-shard {self.rows_per_shard}: a shard has 1 to 1,000,000 rows.")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out {self.held_out}: give a share of the rows, such as 0.02 for 2 %.")

    def settings(self, known: dict | None) -> dict:
        """For the manifest; hashes of annotation files are taken from `known` settings if they have not changed."""
        files = annotation_files(self.dataset)
        return {
            "made_by": MADE_BY,
            "version": 1,
            "dataset": described(asdict(self.dataset)),
            "annotations": fingerprints(files, (known or {}).get("annotations", [])),
            "media": asdict(self.media),
            "rows_per_shard": self.rows_per_shard,
            "held_out": self.held_out,
        }


def look(preparation: Preparation, executor: Executor, shown: bool = True) -> dict[str, Tally]:
    """A dry run: what `prepare` would write and reject, of each part."""
    dataset = preparation.dataset
    tallies = {part: Tally() for part in parts(preparation.held_out)}
    ids = {part: Ids() for part in tallies}
    todo = blocks(dataset, preparation.rows_per_shard, preparation.held_out)
    with executor, Progress(rows_about(dataset), shown) as progress:
        for part, outcome in executor.run(partial(_look, dataset, preparation.media), todo):
            tallies[part].add(outcome)
            ids[part].add(outcome.ids)
            progress.add(outcome.rows)
    for part, tally in tallies.items():
        tally.repeated = ids[part].repeated()
    return tallies


def _look(dataset: Dataset, media: MediaSettings, block: Block) -> tuple[str, Outcome]:
    return block.part, look_at_block(dataset, media, block)


def prepare(preparation: Preparation, out: Path, executor: Executor, shown: bool = True) -> dict[str, Tally] | None:
    """Write the shards of a data set into a folder; None if that is done already.

    Raises UserError for a folder that is not ours to write or in use, annotations that cannot be read, or a data set
    of which nothing could be written.
    """
    settings = preparation.settings(known_settings(out))
    with workplace(out, settings, annotation_files(preparation.dataset)) as finished:
        if not finished:
            handed_out = _make(preparation, out, executor, shown)
            tallies = _finish(out, settings, handed_out)
            close(out)
            return tallies
        for part in parts(preparation.held_out):
            if json.loads((out / part / "manifest.json").read_bytes())["shards"]:
                read_manifest(out / part, REMEDY)
        close(out)
        return None


def _make(preparation: Preparation, out: Path, executor: Executor, shown: bool) -> Counter[str]:
    """Make the blocks that are not done; returns the rows of each part."""
    dataset = preparation.dataset
    handed_out: Counter[str] = Counter()

    def missing() -> Iterator[Block]:
        for block in blocks(dataset, preparation.rows_per_shard, preparation.held_out):
            handed_out[block.part] += len(block.rows)
            if read_outcome(out, block.part, block.name) is None:
                yield block
            else:
                progress.add(len(block.rows), before=True)

    with executor, Progress(rows_about(dataset), shown) as progress:
        for outcome in executor.run(partial(make_block, out, dataset, preparation.media), missing()):
            progress.add(outcome.rows)
    return handed_out


def _finish(out: Path, settings: dict, handed_out: Counter[str]) -> dict[str, Tally]:
    """Put the blocks' ends together: manifests and lists of rejects; checks that no row was lost."""
    tallies, shards = {}, {}
    for part in parts(settings["held_out"]):
        tallies[part], shards[part] = _gather(out, part)
        if tallies[part].rows != handed_out[part]:
            raise RuntimeError(f"{handed_out[part]} rows were read, {tallies[part].rows} are accounted for.")
    if not any(tally.written for tally in tallies.values()):
        close(out, made_something=False)
        for part in tallies:
            (out / part / REJECTS).unlink(missing_ok=True)
        raise UserError("\n".join([f"Nothing of {settings['dataset']['name']} can be written.", *_lines(tallies)]))
    for part, tally in tallies.items():
        write_manifest(out / part, shards[part], {**settings, "part": part, "counts": tally.counts()})
    return tallies


def _gather(out: Path, part: str) -> tuple[Tally, list[dict]]:
    """The sums and the shards' entries of a part, whose rejects are written on the way."""
    tally, shards, ids = Tally(), [], Ids(out / STATE)
    with appearing(out / part / REJECTS) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for path in sorted((out / STATE / part).glob("[0-9]*.json"), key=lambda path: int(path.stem)):
            outcome = read_outcome(out, part, path.stem)
            if outcome is None:
                raise UserError(f"{out / part} was changed by somebody while it was written: run the command again.")
            tally.add(outcome)
            shards += [outcome.shard] if outcome.shard else []
            ids.add(outcome.ids)
            file.writelines(f"{json.dumps(vars(reject), ensure_ascii=False)}\n" for reject in outcome.rejects)
    tally.repeated = ids.repeated()
    return tally, shards


# --- the command ------------------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM end what is inside by an exception, which nothing takes for an error of a row."""

    def stop(number: int, _: object) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_IGN)  # the second Ctrl-C of somebody in a hurry
        raise _Stopped(number)

    before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _lines(tallies: dict[str, Tally], would: bool = False) -> list[str]:
    return [
        f"{part}: {line}" if part and not number else line
        for part, tally in tallies.items()
        for number, line in enumerate(tally.lines(would))
    ]


def _run(options: argparse.Namespace) -> None:
    check = options.check or ("none" if options.dry_run else "decode")
    preparation = Preparation(
        read_dataset(options.dataset, options.overrides),
        MediaSettings(check, options.video, options.frames, options.short_side),
        options.rows_per_shard,
        options.held_out,
    )
    executor: Executor = LocalProcesses(options.processes or os.cpu_count() or 1)
    if options.executor == "ray":
        executor = RayCluster(options.address, options.processes)
    if options.dry_run:
        print("\n".join([*_lines(look(preparation, executor), would=True), "Nothing was written."]))
        return
    tallies = prepare(preparation, options.out, executor)
    if tallies is None:
        print(f"{options.out} is finished, with the same settings: nothing to do.")
        return
    print("\n".join(_lines(tallies)))
    for part, tally in tallies.items():
        if tally.rejected:
            print(f"each rejected row is a line of {options.out / part / REJECTS}")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m data_prep.prepare",
        "Annotations and media files to shards.",
        "mine root=/data/mine --out data/mine --dry-run",
    )
    parser.add_argument("dataset", help="the name of a file in conf/prepare, or the path of one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what to change in it: root=/data/llava")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the shards")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written and rejected, and why")
    parser.add_argument(
        "--processes", type=number(Count), metavar="N", help="that work at a time (default: one for each core)"
    )
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="who works (default: local)")
    parser.add_argument("--address", help="of a Ray cluster (default: Ray is started on this machine)")
    parser.add_argument("--video", choices=VIDEOS, default="files", help="videos as they are, or their frames as JPEG")
    parser.add_argument("--frames", default="8", help="8, or fps:1: how many of a video (default: %(default)s)")
    parser.add_argument(
        "--short-side",
        type=number(Count),
        default=256,
        metavar="N",
        help="of frames, at most, in pixels (default: 256)",
    )
    parser.add_argument("--check", choices=CHECKS, help="decode each medium (default, but not in a dry run) or not")
    parser.add_argument(
        "--held-out", type=number(ShareBelowOne), default=0.0, metavar="SHARE", help="of rows, in shards of their own"
    )
    parser.add_argument(
        "--rows-per-shard", type=number(Count), default=512, metavar="N", help="at most (default: %(default)s)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.out is None and not options.dry_run:
        parser.error("--out FOLDER says where the shards go (or --dry-run, that none are wanted)")
    try:
        with _stoppable():
            _run(options)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    except _Stopped as stopped:
        again = "" if options.dry_run else ": what was finished is kept, the same command goes on from there"
        print(f"\nstopped by {signal.Signals(stopped.number).name}{again}", file=sys.stderr)
        return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
