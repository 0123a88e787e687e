"""What a run measures and shows while it trains."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import matplotlib
import torch
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from vllava.batch import Batch, Step
from vllava.model.flops import peak
from vllava.training.lines import cut_back
from vllava.training.task import Task

matplotlib.use("Agg")

VALIDATION = "val_loss"  # how the names of a validation's figures begin


def progress_bar() -> ProgressBar:
    """A bar with loss, learning rate, samples/s and time left; on a file, a line now and then."""
    return _Bar(refresh_rate=1 if sys.stderr.isatty() else 50)


class _Bar(TQDMProgressBar):
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in shown.items()}


class Throughput(L.Callback):
    """Logs what all ranks together do in a second, how well the device is used, and the memory it takes.

    samples, useful tokens, the share of useful tokens and of supervised ones, the share of time spent waiting for data,
    gigabytes: of a GPU the most that was allocated, of a process on CPUs what it holds now (the first rank's); and,
    where the device's peak is known, mfu: the FLOPs that the step's samples need, recomputation not counted, over what
    the devices could have done at their dense bf16 peak.
    """

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.peak = device_peak(task.device)
        if self.peak and trainer.is_global_zero:
            print(f"mfu: of {self.peak.tflops:g} TFLOP/s, {self.peak.what}", flush=True)

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.began = time.perf_counter()
        self.waited = self.began - getattr(self, "ended", self.began)
        if isinstance(task, Task):  # neither work nor waiting for data
            self.waited, task.seconds_aside = max(self.waited - task.seconds_aside, 0.0), 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        self.ended = time.perf_counter()
        seconds = self.ended - self.began + self.waited
        done: dict[str, float] = getattr(task, "totals", {})
        rates = {"samples_per_second": done.get("samples", 0) / seconds, "data_wait_share": self.waited / seconds}
        packed = [b for b in batch.micro_batches if isinstance(b, Batch)]
        if done.get("tokens"):
            rates["tokens_per_second"] = done["tokens"] / seconds
            rates["supervised_token_share"] = done["terms"] / done["tokens"]
        if packed:
            rates["useful_token_share"] = sum(int(b.cu_seqlens[-1]) for b in packed) / sum(
                len(b.token_ids) for b in packed
            )
        if self.peak and done.get("flops"):
            rates["mfu"] = done["flops"] / seconds / trainer.world_size / (self.peak.tflops * 1e12)
        rates["memory_gb"] = memory(task.device) / 1e9
        for name, value in rates.items():
            task.log(name, torch.tensor(value, dtype=torch.float64), prog_bar=name in _ON_THE_BAR)

    def facts(self) -> dict[str, Any]:
        """What metrics.json says beside the MFU."""
        if not (peak := getattr(self, "peak", None)):
            return {}
        return {"mfu_of": {"tflops": peak.tflops, "peak": peak.what}}


_ON_THE_BAR = ("samples_per_second", "data_wait_share", "mfu", "memory_gb")


class Peak(NamedTuple):
    """What a device can do at most, and of what that is the figure."""

    tflops: float
    what: str


def device_peak(device: torch.device) -> Peak | None:
    """The peak of a GPU; None for one that is not in the table, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    value = peak(name)
    kind = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16 (it has no bf16)"
    return Peak(value, f"the dense {kind} peak of {name}") if value else None


def memory(device: torch.device) -> float:
    """Bytes: the most that was allocated on a GPU, or what the process holds in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


class History(L.Callback):
    """Keeps every step's metrics in history.jsonl; at the end writes metrics.json and the loss curve.

    What is not finite is null in them: JSON has no NaN.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.rows: list[dict[str, Any]] = []
        self.extra: dict[str, float] = {}  # of the current step alone: a validation's

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero:
            path = self.run_dir / "history.jsonl"
            self.rows = cut_back(path, trainer.global_step)  # resumed: keep what came before
            self.file = open(path, "a")  # noqa: SIM115

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            logged = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(VALIDATION)}
            row = plain({"step": trainer.global_step, **logged, **self.extra})
            self.rows.append(row)
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
            self.file.flush()
        self.extra.clear()

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.file.close()

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write metrics.json and loss.png; returns the metrics."""
        tail = self.rows[-max(len(self.rows) // 10, 1) :]
        means = {}
        for key in ("loss", "samples_per_second", "tokens_per_second", "data_wait_share", "mfu", "memory_gb"):
            values = [row[key] for row in tail if row.get(key) is not None]
            if values or key in ("loss", "samples_per_second", "data_wait_share"):
                means[key] = sum(values) / len(values) if values else None
        metrics = plain({"steps": len(self.rows), "final_tenth": means, **facts})
        (self.run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
        plot_loss(self.rows, self.run_dir / "loss.png")
        return metrics


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history, up to one that a kill cut off."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plain(value: Any) -> Any:
    """The value with None for every number that is NaN or infinite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss at every step, and its running mean."""
    from matplotlib import pyplot

    drawn = [row for row in rows if row["loss"] is not None]
    steps, losses = [row["step"] for row in drawn], [row["loss"] for row in drawn]
    mean, smooth = losses[0] if losses else 0.0, []
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="each step")
    axes.plot(steps, smooth, color="#1f4e9c", linewidth=1.8, label="running mean")
    held_out = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="#c2571a", markersize=3, linewidth=1.2, label="held out")
    axes.set(xlabel="optimiser step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
