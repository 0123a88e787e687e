"""Questions for tests, and what a process does that answers them: started by tests, killed by them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from shard_fixtures import jpeg, mp4

from vllava.conversation import TEMPLATES
from vllava.data.build import sample_decoder
from vllava.data.packing import ConversationPacker
from vllava.evaluation.generate import Asking, answer
from vllava.evaluation.predictions import Predictions
from vllava.evaluation.questions import question
from vllava.model.checkpoint import load

ASKED = {"benchmark": "test", "sha256": "0"}
WORDS = ["What is it?", "Is there a red circle?", "Where?", "How many squares are to the left of it?", "Why?"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class CountedMedium:
    """A medium that writes down each time it is read, by whatever process."""

    kind: str
    path: str
    log: str

    @property
    def key(self):
        return self.path

    def read(self):
        with open(self.log, "a") as file:
            file.write(f"{self.path}\n")
        return Path(self.path).read_bytes()


def asked_of(folder, media=6, each=4):
    """Questions about images and videos, several about each, and some about nothing, their order shuffled."""
    found = []
    for number in range(media):
        kind, data = (("image", jpeg(20 * number)), ("video", mp4(20 * number, frames=4)))[number % 2]
        path = folder / f"{kind}-{number}"
        if not path.exists():
            path.write_bytes(data)
        medium = CountedMedium(kind, str(path), str(folder / "log"))
        found += [question(f"q{number}-{i}", WORDS[(number + i) % 5] * (i + 1), medium) for i in range(each)]
    found += [question(f"text-{i}", word) for i, word in enumerate(WORDS)]
    random.Random(0).shuffle(found)
    return found


def ask_in_process(checkpoint, media, folder, rank, ranks, port):
    """What a process of a run does: as torchrun starts it, where there are several."""
    torch.set_num_threads(1)
    if ranks > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in {**numbers, "MASTER_PORT": port}.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    model, tokenizer, _ = load(checkpoint)
    packer = ConversationPacker(tokenizer, TEMPLATES["vicuna_v1"], model.specs, 4096, 512)
    asking = Asking(model, packer, sample_decoder(model.specs, decoder="pyav"), 24, batch_size=4, workers=0)
    trainer = L.Trainer(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", **QUIET)
    answer(asking, asked_of(media, media=12), Predictions(folder, "predictions", ASKED), trainer)
