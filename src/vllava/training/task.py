"""The training step all tasks share: accumulate the micro-batches of a global batch, clip, step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vllava.batch import MediumSpec, Step
from vllava.checks import OneOf, Share
from vllava.errors import UserError
from vllava.model.device import computes_in_bf16
from vllava.model.sharding import gathered
from vllava.training.broken import BrokenLimit, BrokenList
from vllava.training.counts import Counts
from vllava.training.finite import ACTIONS, OnNan, described
from vllava.training.recipe import Recipe, freeze_all_but, parameter_groups
from vllava.training.strategies import DeepSpeed

log = logging.getLogger(__name__)

__all__ = ["Recipe", "Task", "freeze_all_but"]


class Task(L.LightningModule):
    """One optimiser step per global batch, whatever the number of devices and micro-batches.

    With L(b) the summed loss of micro-batch b and n(b) its number of loss terms (supervised tokens, or pairs), a
    step descends  sum over all micro-batches of all ranks of L(b)  /  sum of n(b): the mean over the global
    batch, independent of how it was packed.
    """

    shares_batches = False  # whether processes may share a global batch out without changing what is learnt

    def __init__(
        self,
        model: nn.Module,
        trained: list[str],
        recipe: Recipe,
        max_broken_share: Share = 0.01,
        on_nan: Annotated[str, OneOf(ACTIONS)] = "stop",
        max_skipped: Share = 0.01,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = Recipe(**recipe) if not isinstance(recipe, Recipe) else recipe
        BrokenLimit(max_broken_share)
        self.max_broken_share = max_broken_share
        self.on_nan = OnNan(on_nan, max_skipped)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in the checkpoints
        self.trained = freeze_all_but(model, trained)
        self.broken_list = BrokenList()  # of all; a run gives it a file
        self.sharded = False
        self.whole: dict[str, Tensor] = {}  # when training has ended, the weights of a model that was shared out
        self.counts = Counts()
        self.sources: list[str] = []  # of the data, by their number
        self.seed = torch.initial_seed()
        self.totals: dict[str, float] = {}  # of the last step, over all ranks: samples, tokens, terms, flops
        self.seconds_aside = 0.0  # since the last step, on what is not training: whoever takes them adds them
        self._losses: list[Tensor] = []  # of the micro-batches of the step
        self._read: tuple[float, float] = (0.0, 0.0)  # its loss and gradient norm over all ranks

    def loss_sum(self, batch: Any) -> Tensor:
        """The summed loss of a micro-batch."""
        raise NotImplementedError

    def loss_terms(self, batch: Any) -> int:
        """How many terms `loss_sum` adds up."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """The tokens of a micro-batch, visual ones included; 0 where a task has none."""
        return 0

    def flops(self, batch: Any) -> float:
        """What a micro-batch costs, forward and backward; 0 where a task does not know."""
        return 0.0

    def idle_loss(self) -> Tensor:
        """A loss of zero in which every trained parameter has a part: the turn of a rank that has no micro-batch."""
        return torch.stack([p.sum() * 0 for p in self.parameters() if p.requires_grad]).sum()

    def shard(self, mesh: Any, half: bool) -> None:
        """Share the model out among devices, see `sharding.shard`; raises UserError where a task cannot."""
        raise UserError(f"trainer=fsdp is for the stages; {type(self).__name__} trains with trainer=auto or ddp.")

    @property
    def specs(self) -> dict[str, MediumSpec]:
        """What the data must deliver for each medium."""
        raise NotImplementedError

    def check(self, settings: dict) -> None:
        """Raises UserError for what `settings`, the run's resolved configuration, asks and this model cannot do."""

    def export(self, folder: Path, tokenizer: Any, settings: dict) -> None:
        """Write what was trained; `settings` is the run's resolved configuration."""
        raise NotImplementedError

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeed) and self.on_nan.action == "skip":
            raise UserError("task.on_nan=skip is not for DeepSpeed, which clips and steps at once: take trainer=fsdp.")
        if isinstance(strategy, ModelParallelStrategy) and self._half:
            raise UserError(
                "trainer=fsdp does not train in float16: trainer.precision=bf16-mixed, or 32-true where the device "
                "has no bfloat16; trainer=ddp does."
            )
        if isinstance(strategy, ModelParallelStrategy) and not self.sharded:
            half = "bf16" in str(self.trainer.precision) and computes_in_bf16()
            self.shard(self.device_mesh["data_parallel"], half)  # type: ignore[index]
            self.sharded = True

    def on_train_end(self) -> None:
        if self.sharded or isinstance(self.trainer.strategy, DeepSpeed):
            self.whole = self.whole_weights()

    def trained_weights(self) -> dict[str, Tensor]:
        """What was trained, by the model's names; where the model was shared out, when training has ended."""
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: self.whole[name] for name in trained} if self.whole else trained

    def whole_weights(self) -> dict[str, Tensor]:
        """While training: what is trained, whole, in the first process; every process has to call this.

        Of a model that is shared out they are mapped from a file on the run's disk; others are the very weights.
        """
        if isinstance(self.trainer.strategy, DeepSpeed):
            return self.trainer.strategy.trained_state(self.model)
        weights = self.trained_weights()
        if self.sharded:
            return gathered(self.model, weights, Path(self.trainer.default_root_dir), self.trainer.is_global_zero)
        return weights

    @contextmanager
    def lent(self, model: nn.Module) -> Iterator[None]:
        """Another model in the place of the one that trains, to be exported."""
        own, self.model = self.model, model
        try:
            yield
        finally:
            self.model = own

    def on_train_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        self.sources = list(getattr(data, "sources", []))
        self.counts.drawn = self.counts.drawn or [0] * len(self.sources)
        if self.global_step > self.planned_steps():
            raise UserError(
                f"This run has taken {self.global_step} steps already, and {self.planned_steps()} are planned now: "
                "raise trainer.max_steps or trainer.max_epochs, or train a shorter one elsewhere: run_dir=…"
            )
        self.model.train()  # models come from disk in evaluation mode, and Lightning leaves modes as they are
        if self.trainer.is_global_zero:
            self.broken_list.start(self.global_step)

    def training_step(self, step: Step, index: int) -> None:
        total = self._count(step)
        # Dropout and masks follow from the step alone: a resumed run draws what an undisturbed one would.
        torch.manual_seed(self.seed + self.global_step * self.trainer.world_size + self.global_rank)
        self._losses = []
        # Every rank takes as many turns as the one with the most micro-batches: each is a collective operation.
        own_turns = torch.tensor(len(step.micro_batches), device=self.device)  # NCCL reduces on GPUs only
        turns = int(self.trainer.strategy.reduce(own_turns, reduce_op="max"))
        batches = [*step.micro_batches, *[None] * (max(turns, 1) - len(step.micro_batches))]
        for number, batch in enumerate(batches):
            with nullcontext() if number == len(batches) - 1 else self._without_sync():
                # A micro-batch at a time lies on the device: from pinned memory, while it still computes.
                part = self.idle_loss() if batch is None else self.loss_sum(batch.to(self.device, non_blocking=True))
                # Gradients are averaged over ranks: times world_size makes that average a sum.
                part = part * (self.trainer.world_size / total)
                self.manual_backward(part)
            self._losses.append(part.detach())
        loss = sum(self._losses, torch.zeros((), device=self.device))
        self._clip_and_step(step, self.trainer.strategy.reduce(loss, reduce_op="mean"))
        self._log_step()

    def _count(self, step: Step) -> Tensor:
        """Add up what the ranks' shares of a step hold; returns its loss terms, at least one, on the device."""
        batches = step.micro_batches
        drawn = [step.drawn.get(source, 0) for source in range(len(self.sources))]
        terms, tokens = (sum(map(count, batches)) for count in (self.loss_terms, self.tokens))
        teraflops = sum(map(self.flops, batches)) / 1e12
        counts = [terms, step.samples, len(step.broken), step.dropped_turns, tokens, teraflops, *drawn]
        summed = self.trainer.strategy.reduce(
            torch.tensor(counts, dtype=torch.float32, device=self.device), reduce_op="sum"
        )
        counted = summed.tolist()
        terms, samples, broken, dropped, tokens = map(int, counted[:5])
        self._require_whole(samples)
        self._count_samples(step, samples, broken, dropped)
        self.counts.drawn = [n + int(more) for n, more in zip(self.counts.drawn, counted[6:], strict=True)]
        self.counts.tokens_seen += tokens
        self.totals = {"terms": terms, "samples": samples, "tokens": tokens, "flops": counted[5] * 1e12}
        return summed[0].clamp(min=1)

    def _clip_and_step(self, step: Step, loss: Tensor) -> None:
        """Take the optimiser's step, unless the loss or the gradient is not finite."""
        optimizer: Any = self.optimizers()
        self._current = step, loss
        if isinstance(self.trainer.strategy, DeepSpeed):  # which clips and steps at once
            self._judge(float(loss), 0.0)
            optimizer.step()
            norm = float(self.trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0)
            if self._half and not math.isfinite(norm):  # left out by its own scaler
                self._read = float(loss), norm
                self.counts.scaler_skips += 1
            else:
                self._judge(float(loss), norm)
        else:
            if self._scaler is None:
                self._clip(optimizer)
            optimizer.step()  # with a scaler it calls `on_before_optimizer_step`, when it has divided the gradients
            optimizer.zero_grad()
        del self._current

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self._scaler is not None and not isinstance(self.trainer.strategy, DeepSpeed):
            self._clip(optimizer)

    @property
    def _scaler(self) -> Any:
        """What multiplies losses in float16, if the run computes in it."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    @property
    def _half(self) -> bool:
        """Whether the run computes in float16."""
        return str(self.trainer.precision).startswith("16")

    def _clip(self, optimizer: Any) -> None:
        """Clip the gradient; drops it where the step is to be skipped: an optimiser leaves alone what has none."""
        trained = [p for p in self.parameters() if p.requires_grad]
        norm: Any = nn.utils.clip_grad_norm_(trained, self.recipe.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # The step's one wait for the device; what is logged is read here as well.
        if not self._judge(*torch.stack([self._current[1], norm.to(self._current[1])]).tolist()):
            optimizer.zero_grad()

    def _judge(self, loss: float, norm: float) -> bool:
        """Whether a step may be taken; raises UserError, on all ranks, where it ends the run."""
        self._read = loss, norm
        if math.isfinite(loss) and math.isfinite(norm):
            self.counts.skipped_in_a_row = 0
            return True
        if math.isfinite(loss) and self._scaler is not None and self._scaler.get_scale() > 1:
            self.counts.scaler_skips += 1  # the scaler has found it too, and scales the next step less
            return False
        suspects, everything = described(self._current[0], self._losses)
        suspects = self._of_all_ranks(suspects) if not math.isfinite(loss) else []
        keys = suspects or self._of_all_ranks(everything)
        what = "The samples of the micro-batches with such a loss" if suspects else "The samples of the step"
        event = {"step": self.global_step + 1, "loss": loss, "gradient_norm": norm, "what": what, "keys": keys}
        in_a_row = self.counts.skipped_in_a_row + 1
        self.on_nan.require(event, len(self.counts.skipped) + 1, in_a_row, self.planned_steps(), self._half)
        self.counts.skipped.append(event)
        self.counts.skipped_in_a_row = in_a_row
        if self.trainer.is_global_zero:
            log.warning("step %d skipped: loss %g, gradient norm %g; see metrics.json", event["step"], loss, norm)
        return False

    def _log_step(self) -> None:
        """Log on the CPU what is known there: a number on a GPU is waited for when it is shown."""
        scheduler: Any = self.lr_schedulers()
        rates = scheduler.get_last_lr()
        loss, norm = self._read
        self._log("lr", rates[0], prog_bar=True)
        if len(rates) > 1:
            for name, rate in zip(self._groups, rates, strict=True):
                self._log(f"lr/{name}", rate)
        scheduler.step()
        self._log("loss", loss, prog_bar=True)
        self._log("gradient_norm", norm, prog_bar=True)
        self._log("tokens_seen", self.counts.tokens_seen)
        self._log("samples_seen", self.counts.samples_seen)

    def _log(self, name: str, value: float, prog_bar: bool = False) -> None:
        self.log(name, torch.tensor(value, dtype=torch.float64), prog_bar=prog_bar)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint to resume from holds trained weights only."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in trained}
        checkpoint |= self.counts.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.counts.load(checkpoint)

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        groups = parameter_groups(self.model, recipe, self.trained)
        self._groups = [group.pop("name") for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": recipe.scheduler(optimizer, self.planned_steps())}

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run, epochs and `max_steps` considered."""
        trainer: Any = self.trainer
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "steps_per_epoch"):
            return int(trainer.estimated_stepping_batches)
        # Lightning's own estimate starts the loader, which a resumed run must not do before it knows its place.
        limits = [trainer.max_steps, (trainer.max_epochs or -1) * data.steps_per_epoch]
        return min(limit for limit in limits if limit > 0)

    def _without_sync(self):
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else nullcontext()

    def _planned_samples(self) -> int | None:
        """Samples of the whole run, if the data say how many they are."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "steps_per_epoch"):
            return None
        epochs, rest = divmod(self.planned_steps(), data.steps_per_epoch)
        return epochs * data.samples_per_epoch + rest * data.global_batch

    def _require_whole(self, samples: int) -> None:
        """Raises UserError unless the ranks' shares are a global batch together: each has dealt it out by itself."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "steps_per_epoch"):
            return
        batch = self.global_step % data.steps_per_epoch
        expected = min(data.global_batch, data.samples - batch * data.global_batch)
        if samples != expected:
            raise UserError(
                f"Step {self.global_step + 1} has {samples} samples over all ranks, where its global batch has "
                f"{expected}: the ranks see different shards or indexes. Give all of them the same files."
            )

    def _mixed_shards(self) -> int:
        """How many shards are mixed at a time, 0 if all of them are."""
        data: Any = getattr(self.trainer, "datamodule", None)
        window = getattr(data, "shuffle_window", 0)
        return window if window and len(data.shards) > window else 0

    def _count_samples(self, step: Step, samples: int, broken: int, dropped: int) -> None:
        """Add a step's samples over all ranks; raises UserError, on all of them, when too many are broken."""
        counts = self.counts
        before = counts.samples_broken
        counts.samples_seen += samples
        counts.samples_broken += broken
        counts.turns_dropped += dropped
        if not broken:
            return
        found = self._of_all_ranks([(key, why, step.tracebacks.get(key, "")) for key, why in step.broken])
        counts.add_broken([(key, why) for key, why, _ in found])
        if self.trainer.is_global_zero:
            self.broken_list.add(self.global_step + 1, found, before)
        limit = BrokenLimit(self.max_broken_share, self._planned_samples(), self._mixed_shards())
        if rule := limit.exceeded(counts.samples_broken, counts.samples_seen, counts.broken_by_shard):
            key, why, _ = found[-1]
            raise UserError(
                f"{counts.samples_broken} of the first {counts.samples_seen} samples are broken: {rule}. The last one: "
                f"{key}: {why}; {self.broken_list.place}. Mend or remove them, or raise the limit if leaving them out "
                "is what you want."
            )

    def _of_all_ranks(self, own: list) -> list:
        """The items of every rank's list; all ranks call it together."""
        if self.trainer.world_size == 1:
            return own
        lists: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(lists, own)
        return [item for items in lists for item in items]

    def facts(self) -> dict[str, Any]:
        """What a run's figures say about its samples, with a warning if more were broken than the limit allows."""
        seen, broken = self.counts.samples_seen, self.counts.samples_broken
        facts = self.counts.facts(self.sources)
        if broken > self.max_broken_share * seen:
            facts["warning"] = (
                f"{broken} of {seen} samples ({broken / seen:.2%}) were broken and left out, more than "
                f"task.max_broken_share={self.max_broken_share:g}; {self.broken_list.place}."
            )
        return facts
