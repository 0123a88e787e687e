"""Training from files, as `train.py` does it: decoding, tokenising and packing in a loader process beside the steps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import lightning as L
from torch.utils.data import DataLoader

from perf.contenders import MIXTURES, TOKENIZER, TRAINED, Geometry, bare_trainer, build
from perf.data import Kinds
from perf.timing import take_turns
from vllava.batch import Step
from vllava.data.build import conversation_data
from vllava.data.datamodule import DataModule
from vllava.model.build import load_tokenizer
from vllava.model.video_llava import VideoLlava
from vllava.training.stage import Stage
from vllava.training.task import Recipe

HEADER = (
    "training at the small size from JPEGs of 500 x 375 and H.264 clips of 320 x 240 and 5 s, one loader process, "
    "beside the same steps from memory; the first two steps are not counted"
)
STEPS = 8
COUNTED = STEPS - 2


class _Clock(L.Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_) -> None:
        self.ends.append(time.perf_counter())


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of samples/s from files and from memory for each stage, and their ratio."""
    return [_compare(stage, repeats, bf16) for stage in ("stage1", "stage2")]


def _compare(stage: str, repeats: int, bf16: bool) -> dict:
    model, _ = build(Geometry())
    trained = [part.rstrip(".") for part in TRAINED[stage] if part in ("projector", "llm.")]

    def seconds(data: DataModule | DataLoader) -> float:
        """Of a step."""
        clock = _Clock()
        trainer = bare_trainer([clock], bf16, max_steps=STEPS)
        trainer.fit(Stage(model, trained, Recipe(lr=1e-5)), data)
        return (clock.ends[-1] - clock.ends[-1 - COUNTED]) / COUNTED

    with tempfile.TemporaryDirectory() as root:
        files = _data(model, stage, Path(root))
        steps: list[Step] = list(_data(model, stage, Path(root), workers=0).train_dataloader())
        memory: DataLoader = DataLoader(steps, batch_size=None)  # type: ignore[arg-type]
        contenders = {"from files": lambda: seconds(files), "from memory": lambda: seconds(memory)}
        timing = take_turns(contenders, repeats)
    samples = MIXTURES[stage].samples
    return {
        "stage": stage,
        "samples/s from files": samples / timing.median("from files"),
        "samples/s from memory": samples / timing.median("from memory"),
        "files / memory": timing.ratio("from files", "from memory"),
        "tokens of a batch": median(sum(int(b.cu_seqlens[-1]) for b in step.micro_batches) for step in steps),
    }


def _data(model: VideoLlava, stage: str, root: Path, workers: int = 1) -> DataModule:
    """The stage's mixture in shards below `root`, which are written if they are not there."""
    counts = MIXTURES[stage].counts
    kinds = {"image": "images", "video": "raw video"}
    if not any(root.iterdir()):
        media = Kinds()
        for kind, count in counts.items():
            media.write(kinds[kind], root / kind, STEPS * count)
    sources = {kind: [str(root / kind)] for kind in counts}
    batch = sum(counts.values())
    tokenizer = load_tokenizer(TOKENIZER)
    return conversation_data(model.specs, tokenizer, sources, list(counts), batch, seed=0, workers=workers)
