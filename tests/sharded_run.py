"""A few steps of training shared out among processes: `python tests/sharded_run.py FOLDER`, started by tests."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from vllava.batch import IGNORE_INDEX, Step
from vllava.data.packing import PackedSample, pack
from vllava.model.build import load_llm, video_llava
from vllava.training.stage import Stage
from vllava.training.strategies import Fsdp
from vllava.training.task import Recipe

STEPS = 4
SAVED_AT = 2
TRAINED = ["llm.model.layers.1", "llm.model.norm", "llm.lm_head"]


def batch(seed):
    ids = torch.randint(10, 600, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    return pack([PackedSample("random", ids, [IGNORE_INDEX, *ids[1:]], [])])


class Shares(L.LightningDataModule):
    """Two micro-batches a step, dealt out to the processes; the steps after `done`."""

    def __init__(self, done=0):
        super().__init__()
        self.done = done

    def train_dataloader(self):
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        own = [[batch(2 * s + i) for i in range(rank, 2, ranks)] for s in range(self.done, STEPS)]
        return DataLoader([Step(batches, samples=len(batches)) for batches in own], batch_size=None)


class Save(L.Callback):
    """Saves in the background after a step; the folder is whole when training has ended."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, task, *_):
        if trainer.global_step == SAVED_AT:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            self.saving = trainer.strategy.save_in_background(checkpoint, self.path)

    def on_train_end(self, trainer, task):
        self.saving.result()


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, task, *_):
        self.values.append({name: float(trainer.callback_metrics[name]) for name in ("loss", "gradient_norm", "lr")})


def trainer_for(folder, strategy, devices=1, precision="32-true", callbacks=()):
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_steps=STEPS,
        use_distributed_sampler=False,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def stage(folder, trained=TRAINED, **settings):
    return Stage(video_llava(load_llm(str(folder / "llm"), as_stored=True), **settings), trained, Recipe(lr=1e-2))


def main(folder, processes=2):
    torch.set_num_threads(1)
    task, losses = stage(folder), Losses()
    trainer = trainer_for(folder, Fsdp(), processes, callbacks=[Save(folder / "state.part"), losses])
    trainer.fit(task, Shares())
    held = {name: p.to_local().numel() / max(p.numel(), 1) for name, p in task.model.named_parameters()}
    found = {"weights": task.whole, "losses": losses.values, "seen": task.counts.samples_seen, "held": held}
    torch.save(found, folder / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
