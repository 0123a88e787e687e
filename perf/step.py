"""A training step of each stage: ours, and the port in `transformers` in a plain padded loop and in its Trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import lightning as L
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from perf.contenders import (
    MIXTURES,
    TRAINED,
    Geometry,
    Loop,
    bare_trainer,
    build,
    draw,
    packed,
    padded,
    repeated,
    train_only,
)
from perf.timing import take_turns, timed
from vllava.batch import Batch, Step
from vllava.data.packing import PackedSample, pack
from vllava.model.video_llava import VideoLlava
from vllava.training.stage import Stage
from vllava.training.task import Recipe

STEPS = 2  # that a trainer is timed for, after one that is not
PORT = "port, padded loop"
HEADER = (
    "stage 1: 14 images and 18 videos a batch (558 : 702); stage 2: 14 and 2 (665 : 100); ratio: to the port's loop"
)


def run(repeats: int, bf16: bool) -> list[dict]:
    """Rows of samples/s, useful tokens/s and the ratio to the port, for each mixture and contender."""
    return [row for mixture in MIXTURES for row in compare(mixture, repeats, bf16, trainers=" " not in mixture)]


def compare(name: str, repeats: int, bf16: bool = False, trainers: bool = False) -> list[dict]:
    """The rows of one mixture; `trainers`: also in Lightning and in the Trainer of `transformers`."""
    model, port = build(Geometry())
    mixture = MIXTURES[name]
    parts = TRAINED[name.split()[0]]
    samples = draw(model, mixture)
    rows, inputs, single = packed(samples), padded(port, samples), [pack([sample]) for sample in samples]
    ours = Loop(model.train(), train_only(model, parts), bf16)
    theirs = Loop(port.train(), train_only(port, parts), bf16)
    losses = {"ours": ours.packed_step(rows), PORT: theirs.padded_step(inputs)}
    contenders = {
        "ours": timed(lambda: ours.packed_step(rows)),
        PORT: timed(lambda: theirs.padded_step(inputs)),
        "ours, unpacked": timed(lambda: ours.packed_step(single)),
    }
    if trainers:
        contenders["ours, Lightning"] = in_lightning(model, parts, rows, bf16)
        contenders["port, HF Trainer"] = in_hf_trainer(port, samples, bf16)
    timing = take_turns(contenders, repeats)
    tokens = sum(map(len, samples))
    return [
        {
            "mixture": name,
            "who": who,
            "samples/s": mixture.samples / timing.median(who),
            "useful tokens/s": tokens / timing.median(who),
            "ratio": timing.ratio(who, PORT),
            "first loss": f"{losses[who]:.5f}" if who in losses else None,
        }
        for who in contenders
    ]


def in_lightning(model: VideoLlava, parts: list[str], rows: list[Batch], bf16: bool) -> Callable[[], float]:
    """Seconds of a step in our training task, as `train.py` runs it."""

    class Clock(L.Callback):
        def on_train_batch_end(self, *_) -> None:
            ends.append(time.perf_counter())

    ends: list[float] = []
    trained = [part.rstrip(".") for part in parts if part in ("projector", "llm.")]
    step = Step(rows, samples=sum(row.num_samples for row in rows))

    def run() -> float:
        ends.clear()
        trainer = bare_trainer([Clock()], bf16)
        trainer.fit(Stage(model, trained, Recipe(lr=1e-5)), repeated(step, 1 + STEPS))
        return (ends[-1] - ends[0]) / STEPS

    return run


def in_hf_trainer(port, samples: list[PackedSample], bf16: bool) -> Callable[[], float]:
    """Seconds of a step of the port in the Trainer of `transformers`."""

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            ends.append(time.perf_counter())

    ends: list[float] = []

    def run() -> float:
        ends.clear()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                max_steps=1 + STEPS,
                per_device_train_batch_size=len(samples),
                learning_rate=1e-5,
                use_cpu=True,
                bf16=bf16,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            trainer = Trainer(
                port,
                settings,
                train_dataset=samples,
                data_collator=lambda drawn: padded(port, drawn),
                callbacks=[Clock()],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return (ends[-1] - ends[0]) / STEPS

    return run
