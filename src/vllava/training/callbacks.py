"""What a run measures and shows while it trains."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from vllava.batch import Batch, Step
from vllava.training.lines import cut_back

matplotlib.use("Agg")


def progress_bar() -> ProgressBar:
    """A bar with loss, learning rate, samples/s and time left; on a file, a line now and then."""
    return _Bar(refresh_rate=1 if sys.stderr.isatty() else 50)


class _Bar(TQDMProgressBar):
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in shown.items()}


class Throughput(L.Callback):
    """Logs samples and tokens per second, the share of useful tokens, and the share of time spent waiting for data."""

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()
        self.waited = self.began - getattr(self, "ended", self.began)

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        seconds = self.ended - self.began + self.waited
        task.log("samples_per_second", batch.samples * trainer.world_size / seconds, prog_bar=True)
        task.log("data_wait_share", self.waited / seconds, prog_bar=True)
        packed = [b for b in batch.micro_batches if isinstance(b, Batch)]
        if packed:
            computed = sum(len(b.token_ids) for b in packed)
            task.log("tokens_per_second", computed * trainer.world_size / seconds)
            task.log("useful_token_share", sum(int(b.cu_seqlens[-1]) for b in packed) / computed)
            task.log("supervised_token_share", sum(b.num_supervised for b in packed) / computed)


class History(L.Callback):
    """Keeps every step's metrics in history.jsonl; at the end writes metrics.json and the loss curve."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero:
            path = self.run_dir / "history.jsonl"
            self.rows = cut_back(path, trainer.global_step)  # resumed: keep what came before
            self.file = open(path, "a")  # noqa: SIM115

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            row = {"step": trainer.global_step, **{k: float(v) for k, v in trainer.callback_metrics.items()}}
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.close()

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and loss.png; returns the metrics."""
        tail = self.rows[-max(len(self.rows) // 10, 1) :]
        means = {
            key: sum(row[key] for row in tail) / len(tail) for key in ("loss", "samples_per_second", "data_wait_share")
        }
        metrics = {"steps": len(self.rows), "final_tenth": means, **facts}
        (self.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        plot_loss(self.rows, self.run_dir / "loss.png")
        return metrics


def plot_loss(rows: list[dict[str, float]], path: Path) -> None:
    """The loss at every step, and its running mean."""
    from matplotlib import pyplot

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    mean, smooth = losses[0], []
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="#1f4e9c", linewidth=1.8, label="running mean")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
