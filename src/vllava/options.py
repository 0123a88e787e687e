"""The options of Lightning's Trainer: each works as its documentation says, or is refused with what does it here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelSummary, ProgressBar, Timer
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import FSDPStrategy

from vllava.checks import Count, OneOf, Range, Whole, require_all, written
from vllava.errors import UserError, reason

PROCESSES_OF_A_CORE = 4  # at most: more would wait for one another, each with a copy of the model
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
_SAME = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # as Lightning understands them
STRATEGIES = ("auto", "ddp")
_ENDLESS = Annotated[int, Range(-1)]

# Types and ranges where Lightning's signature says less.
HINTS: dict[str, Any] = {
    "accelerator": Annotated[str, OneOf(("auto", "cpu", "gpu", "cuda", "mps"))],
    "num_nodes": Count,
    "fast_dev_run": Whole | bool,
    "max_epochs": _ENDLESS | None,
    "max_steps": _ENDLESS,
    "min_epochs": Whole | None,
    "min_steps": Whole | None,
    "log_every_n_steps": Whole | None,
    "reload_dataloaders_every_n_epochs": Whole,
    "profiler": Annotated[str, OneOf(PROFILERS)] | dict[str, Any] | None,
    "limit_train_batches": Count | Annotated[float, Range(0, 1, above=True)] | None,
    "detect_anomaly": bool,
    "deterministic": bool | Literal["warn"] | None,
    "benchmark": bool | None,
    "enable_progress_bar": bool | None,
    "enable_model_summary": bool | None,
    "plugins": dict[str, Any] | list[dict[str, Any]] | None,
    "overfit_batches": Whole | Annotated[float, Range(0, 1)],
}

_VALIDATION = "no validation loop of Lightning's runs here: see validation.every_steps"
_CHECKPOINTS = "what to resume from is saved every save_minutes, checkpoints by checkpoint.every_steps and keep_best"
_BATCHES = "the batch of an optimiser step is data.global_batch, over all devices; data.token_budget is a micro-batch"
_CLIPPING = "gradients are clipped by their norm, at task.recipe.clip_norm"
# What has no effect, or another one, beside what this project does itself: the values that ask for nothing, and what to
# use.
REFUSED: dict[str, tuple[tuple, str]] = {
    "accumulate_grad_batches": ((1, None), _BATCHES),
    "gradient_clip_val": ((None,), _CLIPPING),
    "gradient_clip_algorithm": ((None,), _CLIPPING),
    "logger": ((), "choose one with logger=NAME, one of conf/logger; logger=none for none"),
    "callbacks": ((), "add one with +callbacks.NAME._target_=CLASS"),
    "ckpt_path": ((), "a run goes on by itself when its command is started again"),
    "default_root_dir": ((), "run_dir=FOLDER says where a run writes, runs=FOLDER where runs lie"),
    "enable_checkpointing": ((), _CHECKPOINTS),
    "limit_val_batches": ((None, 1.0, 0, 0.0), _VALIDATION),
    "limit_test_batches": ((None, 1.0, 0, 0.0), "held-out questions are asked by +experiment=evaluate"),
    "limit_predict_batches": ((None, 1.0, 0, 0.0), "held-out questions are asked by +experiment=evaluate"),
    "val_check_interval": ((None, 1.0), _VALIDATION),
    "check_val_every_n_epoch": ((None, 1), _VALIDATION),
    "num_sanity_val_steps": ((None, 0), _VALIDATION),
    "inference_mode": ((True,), _VALIDATION),
    "use_distributed_sampler": ((False,), "the data module shares samples out among ranks itself"),
    "sync_batchnorm": ((False,), "no model here has batch normalisation"),
    "barebones": ((False,), "a run keeps its history; logger=none and enable_progress_bar=false leave out the rest"),
    "enable_autolog_hparams": ((True,), "a run's configuration is logged as a whole"),
    "model_registry": ((None,), "the trained weights are in the run's folder, in checkpoint/"),
    "gpus": ((), "trainer.devices says how many devices, trainer.accelerator which"),
    "resume_from_checkpoint": ((), "a run goes on by itself when its command is started again"),
    "auto_lr_find": ((False,), "set task.recipe.lr"),
    "auto_scale_batch_size": ((False,), "set data.global_batch and data.token_budget"),
    "track_grad_norm": ((-1,), "gradient_norm is in history.jsonl and in the logger, of every step"),
}
# Callbacks that reach into Lightning's automatic optimisation, its validation or its checkpoints.
REFUSED_CALLBACKS = {
    "GradientAccumulationScheduler": _BATCHES,
    "BatchSizeFinder": "set data.global_batch and data.token_budget; python -m vllava.plan counts the memory",
    "LearningRateFinder": "try some rates with a sweep: -m task.recipe.lr=1e-4,3e-4,1e-3",
    "StochasticWeightAveraging": "the learning rate follows the recipe's schedule",
    "WeightAveraging": "the weights that a run exports are the last ones",
    "BackboneFinetuning": "task.trained names what is trained",
    "Checkpoint": _CHECKPOINTS,
    "ModelPruning": "the weights that a run exports are what it trained",
}


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for an option that does nothing here, or a value that this machine or a run cannot have."""
    for name, value in trainer.items():
        refuse(f"trainer.{name}", value)
    require_all("trainer", trainer, HINTS)
    _check_length(trainer)
    _check_devices(trainer)
    _check_nodes(trainer.get("num_nodes", 1))
    _check_strategy(trainer)
    _check_precision(trainer)


def refuse(key: str, value: Any) -> None:
    """Raises UserError for an option that asks for what is done otherwise here."""
    name = key.removeprefix("trainer.")
    harmless, instead = REFUSED.get(name, ((value,), ""))
    if not any(type(one) is type(value) and one == value for one in harmless):
        raise UserError(f"{key} is not for runs of vllava: {instead}.")


def check_override(override: str) -> None:
    """Raises UserError for an override of the command line that Hydra would call unknown, where we know what is meant.

    Of an option that is refused, Hydra would advise to add it with a plus.
    """
    key, _, value = override.lstrip("+~").partition("=")
    if key == "ckpt_path" or (key.startswith("trainer.") and key.removeprefix("trainer.") in REFUSED):
        harmless, _ = REFUSED[key.removeprefix("trainer.")]
        plain = {"none": "null"}.get(value.lower(), value.lower())
        if plain not in [{None: "null"}.get(one, str(one).lower()) for one in harmless]:
            refuse(key, object())


def _check_length(trainer: Mapping[str, Any]) -> None:
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if trainer.get("fast_dev_run"):
        return
    for name, value in (("max_epochs", epochs), ("max_steps", steps)):
        if value == 0:
            raise UserError(f"trainer.{name} is 0, which trains nothing: a whole number from 1, or -1 for no limit.")
    if epochs in (None, -1) and steps == -1:
        raise UserError(
            "trainer.max_epochs and trainer.max_steps are both without a limit: the learning rate falls towards the "
            "end of a run, so it needs one. Set either."
        )
    for what, most in (("epochs", epochs), ("steps", steps)):
        least = trainer.get(f"min_{what}")
        if least and most not in (None, -1) and least > most:
            raise UserError(f"trainer.min_{what} is {least}, more than trainer.max_{what}={most}.")
    if (most := trainer.get("max_time")) is not None:
        try:
            Timer(timedelta(**most) if isinstance(most, Mapping) else most)
        except Exception as error:  # of whatever it was given
            raise UserError(
                f"trainer.max_time is {most!r}, but must be DD:HH:MM:SS, such as '00:12:00:00', or a mapping such as "
                "{hours: 12}."
            ) from error


def _check_devices(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for devices that this machine does not have."""
    accelerator, devices = trainer.get("accelerator", "auto"), trainer.get("devices", "auto")
    gpus = torch.cuda.device_count()
    mps = torch.backends.mps.is_available()
    if (accelerator == "gpu" and not (gpus or mps)) or (accelerator == "cuda" and not gpus):
        raise UserError(f"trainer.accelerator is {accelerator}, but there is no GPU here that PyTorch can use.")
    if accelerator == "mps" and not mps:
        raise UserError("trainer.accelerator is mps, but there is none here that PyTorch can use.")
    on_gpus = gpus > 0 and accelerator != "cpu"
    most = gpus if on_gpus else 1 if mps and accelerator != "cpu" else PROCESSES_OF_A_CORE * (os.cpu_count() or 1)
    here = f"this machine has {gpus} GPU{'s' * (gpus > 1)}" if on_gpus else f"without a GPU, {most} processes at most"
    form = "auto or a whole number from 1" + (", -1 for all, or a list such as [0, 1]" if on_gpus else "")
    named = _numbers(devices)
    if devices == "auto" or (on_gpus and devices in (-1, "-1")):
        return
    if named is None:
        raise UserError(f"trainer.devices is {written(devices)}, but must be {form}.")
    if isinstance(named, int) and not 1 <= named <= most:
        raise UserError(f"trainer.devices is {named}, but must be {form}: {here}.")
    if isinstance(named, list) and not on_gpus:
        raise UserError(f"trainer.devices is {written(devices)}, which names GPUs, but must be {form}: {here}.")
    if isinstance(named, list) and (not set(named) <= set(range(gpus)) or len(set(named)) != len(named) or not named):
        raise UserError(f"trainer.devices is {written(devices)}, but must name GPUs once each: {here}, counted from 0.")


def _check_nodes(nodes: int) -> None:
    """Raises UserError where a run would wait for other nodes in vain."""
    known = ("MASTER_ADDR", "SLURM_", "LSB_", "OMPI_", "PMI_", "GROUP_RANK", "NODE_RANK")
    if nodes > 1 and not any(name.startswith(known) for name in os.environ):
        raise UserError(
            f"trainer.num_nodes is {nodes}, but nothing says where the other nodes are: start the run with srun or "
            "torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each node."
        )


def _numbers(devices: Any) -> int | list[int] | None:
    """The number of devices, or the devices that are named; None for what is neither."""
    if isinstance(devices, str):
        parts = [part.strip() for part in devices.strip(",").split(",")]
        if not all(part.isdecimal() for part in parts):
            return None
        return [int(part) for part in parts] if "," in devices else int(devices)
    whole = [type(item) is int for item in (devices if isinstance(devices, list) else [devices])]
    return devices if all(whole) else None


def _check_strategy(trainer: Mapping[str, Any]) -> None:
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, Mapping):
        if "_target_" not in strategy:
            raise UserError("trainer.strategy is a mapping without a _target_: choose trainer=ddp, fsdp or zero2.")
        if issubclass(get_object(strategy["_target_"]), FSDPStrategy):
            raise UserError("trainer.strategy is Lightning's first FSDP: choose trainer=fsdp, which is the second.")
        return
    if strategy not in STRATEGIES:
        near = "fsdp" if "fsdp" in str(strategy) else "zero2" if "deepspeed" in str(strategy) else None
        hint = f"trainer={near}" if near else "trainer=single, ddp, fsdp, zero2 or zero2_offload"
        names = " or ".join(STRATEGIES)
        raise UserError(f"trainer.strategy is {written(strategy)}, but must be {names}; choose {hint}.")


def _check_precision(trainer: Mapping[str, Any]) -> None:
    precision = trainer.get("precision", "auto")
    meant = _SAME.get(str(precision), precision) if type(precision) in (int, str) else precision
    if meant not in PRECISIONS:
        why = ""
        if str(precision) in ("16-true", "bf16-true", "64-true", "64"):
            why = " Weights that are trained stay in float32; bf16-mixed keeps frozen ones in bfloat16."
        raise UserError(f"trainer.precision is {written(precision)}, but must be one of {', '.join(PRECISIONS)}.{why}")
    strategy = trainer.get("strategy")
    if meant == "16-mixed" and (trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()):
        raise UserError("trainer.precision is 16-mixed, which needs a GPU: bf16-mixed or 32-true run on CPUs.")
    if meant == "16-mixed" and "Fsdp" in str(strategy):
        raise UserError("trainer.precision is 16-mixed, which FSDP2 does not scale: bf16-mixed or 32-true.")


def check_callbacks(named: Mapping[str, Any] | None) -> None:
    """Raises UserError for an extra callback that is none, or that cannot do here what it is for."""
    for name, node in (named or {}).items():
        if node is None:
            continue
        if not isinstance(node, Mapping) or "_target_" not in node:
            raise UserError(f"callbacks.{name} names no class: +callbacks.{name}._target_=CLASS")
        target = get_object(node["_target_"])  # which is known to be there
        if not isinstance(target, type):  # a function that makes one
            continue
        if not issubclass(target, L.Callback):
            raise UserError(f"callbacks.{name}._target_={node['_target_']} is not a callback of Lightning's.")
        for refused, instead in REFUSED_CALLBACKS.items():
            kind = getattr(lightning_callbacks, refused, None)
            if kind is not None and issubclass(target, kind):
                raise UserError(f"callbacks.{name}: {target.__name__} is not for runs of vllava: {instead}.")


def extra_callbacks(named: Mapping[str, Any] | None) -> list[L.Callback]:
    """The callbacks that a configuration adds, in its order."""
    made = [instantiate(node, _convert_="all") for node in (named or {}).values() if node is not None]
    for callback in made:
        if not isinstance(callback, L.Callback):
            raise UserError(f"callbacks: {type(callback).__name__} is not a callback of Lightning's.")
    return made


def with_extras(ours: list[L.Callback], extras: list[L.Callback], bar: bool | None) -> list[L.Callback]:
    """A run's own callbacks and those that are added: a progress bar that is added stands in for ours."""
    replaced = bar is False or any(isinstance(extra, ProgressBar) for extra in extras)
    kept = [one for one in ours if not (replaced and isinstance(one, ProgressBar))]
    return [*kept, *extras, *([KnownMonitors()] if extras else [])]


def implied(trainer: Mapping[str, Any], extras: list[L.Callback], run_dir: Path) -> dict[str, Any]:
    """The arguments of the Trainer that follow from the others."""
    found: dict[str, Any] = {}
    if any(isinstance(extra, ModelSummary) for extra in extras):
        found["enable_model_summary"] = True
    if trainer.get("profiler") is not None:
        found["profiler"] = profiler(trainer["profiler"], run_dir)
    return found


def profiler(asked: str | Mapping[str, Any], run_dir: Path) -> Profiler:
    """A profiler that writes its report to profile-*.txt in the run's folder: Lightning would log it, out of sight."""
    if isinstance(asked, str):
        return PROFILERS[asked](dirpath=run_dir, filename="profile")
    made = instantiate(asked, _convert_="all")
    if not isinstance(made, Profiler):
        raise UserError(f"trainer.profiler makes a {type(made).__name__}, which is not a profiler of Lightning's.")
    made.dirpath = made.dirpath or run_dir
    made.filename = made.filename or "profile"
    return made


@contextmanager
def in_words(*more: type[Exception]) -> Iterator[None]:
    """What Lightning, or Hydra with its classes, refuses becomes a UserError; exceptions of the types `more`, too."""
    kinds: tuple[type[Exception], ...] = (MisconfigurationException, InstantiationException, *more)
    try:
        yield
    except kinds as error:
        cause: BaseException = error
        while not isinstance(cause, UserError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise
        raise UserError(f"Options of trainer or callbacks do not go together: {reason(cause)}") from error


class KnownMonitors(L.Callback):
    """Stops a run in its first step where a callback waits for a figure that there is none of.

    Lightning would do so at the end of the first epoch. Figures of validation are not looked for: they come later.
    """

    def __init__(self) -> None:
        self.looked = False

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if self.looked:
            return
        self.looked = True
        measured = sorted(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            waits_for = getattr(callback, "monitor", None)
            if isinstance(waits_for, str) and waits_for not in measured and not waits_for.startswith("val"):
                raise UserError(
                    f"{type(callback).__name__} waits for {waits_for!r}, which a run does not measure. There are: "
                    f"{', '.join(measured)}."
                )


def cut_short(task: Any) -> dict[str, Any]:
    """What a run's figures say where it ended before its planned steps, as by max_time: the rate was still falling."""
    done, planned = task.trainer.global_step, task.planned_steps()
    if done >= planned:
        return {}
    print(f"warning: ended after {done} of {planned} planned steps, before the learning rate had come down")
    return {"planned_steps": planned}
