"""Videos as files beside videos as frames: size and speed of decoding. `python -m perf.clips FOLDER_OF_CLIPS`."""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch

from data_prep.annotations import Dataset
from data_prep.executors import LocalProcesses
from data_prep.media import MediaSettings
from data_prep.prepare import Preparation, prepare
from perf.__main__ import table
from perf.timing import timed
from vllava.batch import MediumSpec
from vllava.data.build import sample_decoder
from vllava.data.samples import SampleDecoder
from vllava.data.shards import ShardReader, read_manifest

SPEC = MediumSpec(224, 8 * 257, 8)
FORMS = {
    "files": MediaSettings(),
    "8 frames, short side 256": MediaSettings(video="frames", frames="8", short_side=256),
    "8 frames, short side 224": MediaSettings(video="frames", frames="8", short_side=224),
}


def run(clips: Path, repeats: int = 7) -> list[dict]:
    """Rows of megabytes, and of clips/s that one process decodes as training does, for each form."""
    names = sorted(path.name for path in clips.iterdir() if path.suffix.lower() in (".mp4", ".mkv", ".webm", ".avi"))
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Something."}]
    decode = sample_decoder({"video": SPEC})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"video": str(clips.resolve() / name), "conversations": turns}) for name in names]
        (Path(folder) / "rows.jsonl").write_text("\n".join(lines))
        dataset = Dataset("clips", Path(folder), ("rows.jsonl",), outside=True)
        for form, settings in FORMS.items():
            out = Path(folder) / form
            prepare(Preparation(dataset, settings, len(names)), out, LocalProcesses(1), shown=False)
            shards = read_manifest(out, "")
            reader = ShardReader(shards, 1)
            samples = [reader.read(0, index) for index in range(shards[0].samples)]
            read = timed(partial(_decode, decode, samples))
            seconds = median(read() for _ in range(repeats))
            size = Path(str(shards[0].path)).stat().st_size / 1e6
            rows.append({"videos as": form, "MB": size, "clips/s": len(samples) / seconds})
    return rows


def _decode(decode: SampleDecoder, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    for sample in samples:
        decode(*sample)


if __name__ == "__main__":
    torch.set_num_threads(1)  # as a loader's worker
    print(table(run(Path(sys.argv[1]))))
