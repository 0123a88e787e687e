"""Whether shards are as they were written: `python -m data_prep.verify FOLDER … [--decode SHARE|all]`.

Of each manifest in a folder, or one level below it: every shard's size and checksum, its samples, their keys and
records, its index; with --decode, whether pictures and videos can be decoded as training will. Where `prepare` made
the shards, that rows = samples + rejects too.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_prep.executors import Executor, LocalProcesses
from data_prep.progress import Progress
from data_prep.workplace import REJECTS
from vllava.checks import Count, Share
from vllava.commands import Parser, number
from vllava.data.broken import why
from vllava.data.index import Entry, index_path, read_index, scan
from vllava.data.picture import decode_image
from vllava.data.record import Parsed, parse
from vllava.data.shards import MANIFEST
from vllava.data.video import video_decoder
from vllava.errors import UserError, reading, reason
from vllava.folders import sha256_of

SHOWN = 20  # problems of a folder that are printed


@dataclass
class Found:
    """What is in a shard, or in several: samples by modality, decoded ones, what is wrong, and the keys' hashes."""

    modalities: Counter[str] = field(default_factory=Counter)
    decoded: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(self.modalities.values())


def verify(folder: Path, decode: float, executor: Executor, shown: bool = True) -> dict[Path, Found]:
    """What is found in a folder's shards, for each manifest; `decode` is the share of samples that are decoded.

    Raises UserError where there is no manifest, or one that cannot be read.
    """
    manifests = [path for path in (folder / MANIFEST, *sorted(folder.glob(f"*/{MANIFEST}"))) if path.is_file()]
    if not manifests:
        raise UserError(f"{folder} holds no {MANIFEST}: it is no folder of shards, or its preparation is unfinished.")
    return {path.parent: _verify(path, decode, executor, shown) for path in manifests}


def _verify(path: Path, decode: float, executor: Executor, shown: bool) -> Found:
    with reading(path, "Make these shards again."):
        manifest = json.loads(path.read_bytes())
        jobs = [dict(entry) for entry in manifest["shards"]]
        names = [str(entry["name"]) for entry in jobs]
        settings = manifest.get("settings")
        counts = settings.get("counts") if isinstance(settings, dict) else None
        with executor, Progress(sum(entry["samples"] for entry in jobs), shown) as progress:
            total = Found()
            for samples, found in executor.run(partial(_verify_shard, path.parent, decode), jobs):
                progress.add(samples)
                total.modalities.update(found.modalities)
                total.decoded += found.decoded
                total.problems += found.problems
        total.problems += [f"{name} is listed twice" for name, number in Counter(names).items() if number > 1]
        if counts:
            total.problems += _conservation(path.parent, counts, total)
    total.problems.sort()
    return total


def _conservation(folder: Path, counts: dict, found: Found) -> Iterator[str]:
    """What does not add up in the numbers of a preparation."""
    try:
        with open(folder / REJECTS, encoding="utf-8") as file:
            rejects = sum(1 for line in file if json.loads(line))
    except (OSError, ValueError) as error:
        yield f"{REJECTS} cannot be read ({reason(error)})"
        return
    if rejects != counts["rejected"]:
        yield f"{REJECTS} lists {rejects} rows, the manifest counts {counts['rejected']}"
    if found.samples != counts["written"]:
        yield f"the shards hold {found.samples} samples, the manifest counts {counts['written']}"
    if counts["rows"] != counts["written"] + counts["rejected"]:
        yield f"{counts['rows']} rows are not {counts['written']} written and {counts['rejected']} rejected ones"
    if dict(found.modalities) != counts["modalities"]:
        yield f"the shards hold {dict(found.modalities)}, the manifest counts {counts['modalities']}"


# --- a shard ----------------------------------------------------------------------------------------------------------


def _verify_shard(folder: Path, decode: float, entry: dict) -> tuple[int, Found]:
    """The samples that a manifest's entry announces, and what is found."""
    found = Found()
    name = entry["name"]
    try:
        _look_into(folder / name, entry, decode, found)
    except (OSError, ValueError, UserError) as error:
        message = error.paragraph if isinstance(error, UserError) else reason(error)
        found.problems.append(f"{name}: {message}")
    return entry["samples"], found


def _look_into(path: Path, entry: dict, decode: float, found: Found) -> None:
    """Look at a shard; what is wrong with it as a whole is raised, or put down like what is wrong with a sample."""
    name, size = entry["name"], path.stat().st_size
    if size != entry.get("bytes", size):
        raise ValueError(f"it has {size} bytes, the manifest says {entry['bytes']}")
    if "sha256" in entry and sha256_of(path) != entry["sha256"]:
        found.problems.append(f"{name}: its checksum is not the manifest's: it was changed or damaged")
    with open(path, "rb") as file:
        entries, _ = scan(file, size)
        for sample in entries:
            files = {}
            for extension, place in sample.files.items():
                file.seek(place.offset)
                files[extension] = file.read(place.size)
            if problem := _sample_problem(files, _drawn(sample.key, decode), found):
                found.problems.append(f"{name}, {sample.key}: {problem}")
    if len(entries) != entry["samples"]:
        found.problems.append(f"{name}: it holds {len(entries)} samples, the manifest says {entry['samples']}")
    if index_path(path).exists():
        found.problems += [f"{name}: {problem}" for problem in _index_problems(path, size, entries)]


def _sample_problem(files: dict[str, bytes], decode: bool, found: Found) -> str | None:
    """Count a sample; says what is wrong with it, if anything is."""
    try:
        parsed = parse(files)
    except UserError as error:
        found.modalities["unreadable"] += 1
        return why(error)
    found.modalities[_modality(parsed)] += 1
    if decode:
        found.decoded += 1
        try:
            _decode(parsed)
        except Exception as error:  # of a library too: one sample's trouble is no reason to stop
            return why(error)
    return None


def _modality(parsed: Parsed) -> str:
    kinds = sorted(set(parsed.kinds))
    return "mixed" if len(kinds) > 1 else kinds[0] if kinds else "text"


def _drawn(key: str, share: float) -> bool:
    """Whether a sample is among the share that is decoded: always the same ones."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64


def _decode(parsed: Parsed) -> None:
    for kind, medium in zip(parsed.kinds, parsed.files, strict=True):
        if medium.features_of:
            continue
        if kind == "video" and not medium.prepared:
            video_decoder("auto")(medium.data[0], 8)
        else:
            for data in medium.data:
                decode_image(data)


def _index_problems(path: Path, size: int, entries: Sequence[Entry]) -> Iterator[str]:
    index = read_index(index_path(path), size)
    listed = [(entry.key, {name: place[:2] for name, place in entry.files.items()}) for entry in index]
    if listed != [(entry.key, {name: place[:2] for name, place in entry.files.items()}) for entry in entries]:
        yield "its index does not say where its members lie: make it again, python -m data_prep.index --again FOLDER"


# --- the command ------------------------------------------------------------------------------------------------------


def _share(text: str) -> float:
    return 1.0 if text == "all" else number(Share)(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        "python -m data_prep.verify", "Whether shards are as they were written, and readable.", "data/mine --decode all"
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of shards, with their manifest")
    parser.add_argument("--decode", type=_share, default=0.0, metavar="SHARE|all", help="of samples (default: none)")
    parser.add_argument(
        "--processes", type=number(Count), default=os.cpu_count(), metavar="N", help="at a time (default: all cores)"
    )
    options = parser.parse_args(arguments)
    wrong = False
    try:
        for folder in options.folders:
            for place, found in verify(folder, options.decode, LocalProcesses(options.processes)).items():
                kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.modalities.items())) or "none"
                decoded = f", {found.decoded:,} decoded" if options.decode else ""
                print(f"{place}: {found.samples:,} samples ({kinds}){decoded}, {len(found.problems):,} problems")
                for problem in found.problems[:SHOWN]:
                    print(f"  {problem}")
                if len(found.problems) > SHOWN:
                    print(f"  and {len(found.problems) - SHOWN:,} more")
                wrong = wrong or bool(found.problems)
    except UserError as error:
        sys.exit(f"error: {error.paragraph}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
