"""A small run with loggers for the tests, put together as run.py does: saved at some steps, stopped at others."""

import os
import signal
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from vllava.training.callbacks import History
from vllava.training.continued import Follow
from vllava.training.loggers import build

STEPS = 12


class Line(L.LightningModule):
    """As our tasks do, it optimises by hand and counts the samples it has seen."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.samples_seen = 0

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.1)

    def training_step(self, batch, index):
        loss = (self.weight - batch).square().sum()
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        self.samples_seen += 10
        self.log_dict({"loss": loss.detach(), "samples_seen": float(self.samples_seen)})

    def on_save_checkpoint(self, checkpoint):
        checkpoint["samples_seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint):
        self.samples_seen = checkpoint["samples_seen"]


class Stops(L.Callback):
    """Saves after some steps; ends the process in one of several ways after others."""

    def __init__(self, path, saved, stopped, how):
        self.path, self.saved, self.stopped, self.how = path, saved, stopped, how

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step in self.saved:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == self.stopped and self.how == "interrupt":
            raise KeyboardInterrupt

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.stopped and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


def train(run_dir, saved=(), stopped=None, how=None, samples=(), callbacks=(), **chosen):
    """Train up to STEPS, from where `run_dir` was saved; returns the trainer."""
    run_dir = Path(run_dir)
    path = run_dir / "resume.ckpt"
    history = History(run_dir)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        log_every_n_steps=1,
        logger=build(run_dir, {"seed": 1}, **chosen),
        callbacks=[history, Follow(run_dir / "history.jsonl"), *callbacks, Stops(path, saved, stopped, how)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(torch.arange(float(STEPS)), batch_size=None)
    trainer.fit(Line(), data, ckpt_path=str(path) if path.exists() else None)
    return trainer
