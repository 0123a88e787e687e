"""Put a run together from its configuration and carry it out."""

from __future__ import annotations

import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.imports import RequirementCache
from omegaconf import DictConfig, OmegaConf

from vllava.answering import evaluate
from vllava.chain import benchmarks_identity, chain_identity, run_apart, run_benchmarks, run_chain
from vllava.config import check, register_resolvers
from vllava.cores import cores
from vllava.data.address import shown
from vllava.data.writing import appearing
from vllava.errors import UserError
from vllava.evaluation.preview import Preview
from vllava.evaluation.report import write_report
from vllava.features import use_features
from vllava.folders import require_replaceable
from vllava.identity import Identity, evaluation_identity, grows, identity_of
from vllava.lineage import resolve
from vllava.model.build import as_stored, load_tokenizer
from vllava.model.checkpoint import load_projector
from vllava.model.device import best_device, computes_in_bf16
from vllava.model.mapped import with_weights
from vllava.model.precision import set_precision
from vllava.model.video_llava import VideoLlava
from vllava.options import cut_short, extra_callbacks, implied, in_words, with_extras
from vllava.runs import RESUME, Run, claim, is_first_process, occupied, place, read_run, tell
from vllava.stops import Stops
from vllava.study_run import run_cell
from vllava.training.broken import BrokenList
from vllava.training.callbacks import History, Throughput, progress_bar
from vllava.training.continued import Follow
from vllava.training.durable import Checkpoints, Durable
from vllava.training.finite import require_finite
from vllava.training.loggers import log_samples
from vllava.training.ranks import Ranks, end_with_launcher, explaining
from vllava.training.saving import Generations, SaveToResume, folder_in_use
from vllava.training.task import Task
from vllava.watching import show_model, validation

MOST_PROCESSES = 4  # on CPUs, unless trainer.devices says how many


def run(cfg: DictConfig) -> None:
    """Carry out one configuration: a run of a study, a chain of experiments, an evaluation, or a training run."""
    register_resolvers()  # which a process that a launcher started does not know yet
    if "study" in cfg:
        run_cell(cfg)
        return
    check(cfg)
    quiet(cfg.log_level)
    if HydraConfig.get().mode is RunMode.MULTIRUN and not cfg.chain and not cfg.benchmarks:
        run_apart(cfg.experiment, cfg.run_dir, *(["rerun=true"] if cfg.rerun else []))
        return
    stops = Stops(cfg.stop_seconds)
    folder = place(Path(cfg.run_dir), cfg.rerun)
    cfg.run_dir = str(folder)
    with folder_in_use(folder, stops):
        claim(folder)
        log_to(folder)
        resolve(cfg)
        with occupied(Run(folder, cfg.experiment, cfg.ablation, cfg.seed, identity(cfg))) as run:
            if run is None:
                say_finished(folder)
                tidy(cfg, folder)  # the run may have been killed before it did
            elif cfg.chain or cfg.benchmarks:
                run_chain(cfg) if cfg.chain else run_benchmarks(cfg)
                run.finish()
            else:
                end_with_launcher(HydraConfig.get().job.name)
                with stops:
                    evaluate(cfg, stops) if cfg.evaluation else train(cfg, stops)
                    if is_first_process():
                        run.finish()
                        tidy(cfg, folder)


def identity(cfg: DictConfig) -> Identity:
    """What a chain, an evaluation or a training run is."""
    if cfg.chain:
        return chain_identity(cfg)
    if cfg.benchmarks:
        return benchmarks_identity(cfg)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return evaluation_identity(settings) if cfg.evaluation else identity_of(settings)


def say_finished(folder: Path) -> None:
    """What is said to somebody who starts a finished run again."""
    found = read_run(folder)
    ended = f" ({found.ended})" if found else ""
    tell(f"{folder} is finished{ended}, with the same settings: nothing to do. rerun=true runs it again, elsewhere.")


def tidy(cfg: DictConfig, folder: Path) -> None:
    """Remove what a finished run went on from, unless it may be given more steps."""
    if cfg.evaluation or not grows(cfg):
        Generations(folder / RESUME).clear()


def log_to(folder: Path) -> None:
    """Keep messages in the run's train.log, with the tracebacks that are not shown on the screen."""
    handler = logging.FileHandler(folder / "train.log")
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def quiet(level: str) -> None:
    """Keep libraries' notices off the screen; our own messages are at WARNING and above."""
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity(getattr(logging, level))
    transformers.utils.logging.disable_progress_bar()
    if not is_first_process():  # what concerns all processes is said by the first, and is in each one's log
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step")  # float16 may leave the first step out
    logging.raiseExceptions = False  # a log on a full disk is no reason to print tracebacks
    warnings.filterwarnings("ignore", module="lightning")  # advice about checkpoints and modes chosen on purpose


def require_cuda_for_deepspeed(cfg: DictConfig) -> None:
    """Raises UserError where DeepSpeed is asked for and cannot run."""
    asked = "DeepSpeed" in str(cfg.trainer.strategy)
    if asked and not (torch.cuda.is_available() and RequirementCache("deepspeed>=0.19.2")):
        raise UserError(
            "DeepSpeed runs on CUDA GPUs, with the package deepspeed installed, 0.19.2 or later: "
            "choose trainer=ddp or trainer=fsdp."
        )


def train(cfg: DictConfig, stops: Stops) -> None:
    """One training run: build, fit, export to `checkpoint/`, write the figures."""
    require_cuda_for_deepspeed(cfg)
    started = time.time()
    run_dir = Path(cfg.run_dir)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    require_replaceable(run_dir / "checkpoint")  # now, and not when all the work is done
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    tokenizer = load_tokenizer(cfg.tokenizer)
    which = Checkpoints.of(settings["checkpoint"])
    stored = partial(foundation, cfg, **as_stored(settings["model"]))
    model = stored()
    task: Task = instantiate(cfg.task)(model=model)
    task.broken_list = BrokenList(run_dir / "broken.jsonl")
    task.check(settings)
    data = instantiate(cfg.data, _convert_="all")(specs=task.specs, tokenizer=tokenizer)
    if data.wants_features:
        use_features(data, model, settings["encoder"], half="bf16" in precision(cfg))
    halved = False
    if isinstance(model, VideoLlava) and "Fsdp" not in str(cfg.trainer.strategy):  # which does it part by part
        halved = set_precision(model, "bf16" in precision(cfg) and computes_in_bf16())
    preview = None
    if settings["preview"]:
        asked = {kind: folders for kind, folders in settings["preview"].items() if kind != "remedy"}
        preview = Preview(asked, task.specs, tokenizer, settings, settings["preview"]["remedy"])
    history, throughput = History(run_dir), Throughput()
    watched = validation(settings, task, tokenizer, preview, history.extra.update)
    saving = SaveToResume(Generations(run_dir / RESUME), cfg.save_minutes, stops, keep_last=grows(settings))
    durable = Durable(run_dir / "checkpoints", which, stored, tokenizer, settings)
    trainer = build_trainer(cfg, settings, [throughput, *watched, history, progress_bar(), durable], saving, task)
    data.trainer = trainer  # which may limit an epoch
    announce(cfg, task, data)
    show_model(task.model, run_dir)
    with in_words(), explaining(Ranks(trainer, stops), stops):
        trainer.fit(task, data, ckpt_path=unfinished(run_dir, settings))
    together = preview.rows(task.model) if preview and task.sharded else []  # by all processes
    if not trainer.is_global_zero:
        return
    weights = task.trained_weights()
    require_finite(weights)
    if halved or task.whole:  # the frozen weights of a model anew are what they were
        anew = stored if task.sharded else partial(foundation, cfg)
        task.model = with_weights(anew, weights, run_dir)
    task.export(run_dir / "checkpoint", tokenizer, settings)
    rows = preview.rows(task.model) if preview and not task.sharded else together
    figures = [task.facts(), cut_short(task), throughput.facts(), *(callback.facts() for callback in watched)]
    conclude(cfg, trainer, history, figures, rows, time.time() - started)


def conclude(
    cfg: DictConfig, trainer: L.Trainer, history: History, figures: list[dict], rows: list[dict], seconds: float
) -> None:
    """Write what a run found, to its folder and its loggers, and say that it is done."""
    run_dir = Path(cfg.run_dir)
    facts = {**{key: value for part in figures for key, value in part.items()}, "seconds": round(seconds, 1)}
    if "warning" in facts:
        print(f"warning: {facts['warning']}")
    metrics = history.finish(facts)
    log_samples(trainer.loggers, rows)
    write_report(run_dir, run_dir.name, {}, rows, {cfg.experiment: run_dir / "loss.png"}, metrics)
    print(f"{cfg.experiment}: done in {seconds:.0f} s; checkpoint, figures and report.html in {run_dir}")


def foundation(cfg: DictConfig, **changes: Any) -> Any:
    """The model as it is before training; `changes` to its settings say how to read it."""
    model = instantiate(cfg.model, **changes)
    if cfg.projector:
        load_projector(model, Path(cfg.projector))
    return model


def unfinished(run_dir: Path, settings: Any) -> str | None:
    """The newest whole state that an interrupted run left, if there is one. Writes the configuration to config.yaml."""
    states = Generations(run_dir / RESUME).newest()
    with appearing(run_dir / "config.yaml") as part:
        part.write_text(yaml.safe_dump(settings, sort_keys=False))
    if not states:
        return None
    tell(f"resuming the interrupted run in {run_dir}")
    return str(states[0])


@rank_zero_only
def announce(cfg: DictConfig, task: Task, data: Any) -> None:
    """Say in a few lines what is about to be trained, on what."""
    trained = ", ".join(f"{name} {count:,}" for name, count in task.trained.items())
    total = sum(p.numel() for p in task.parameters())
    plural = "s" if data.steps_per_epoch > 1 else ""
    steps = f"{data.samples_per_epoch:,} samples, {data.steps_per_epoch} step{plural} of {data.global_batch} per epoch"
    print(f"{cfg.experiment} ({cfg.ablation}, seed {cfg.seed}): trains {trained} of {total:,} parameters")
    if cfg.projector:
        print(f"starts from {cfg.projector}")
    for folder, size, drawn in zip(data.sources, data.sizes, data.draws, strict=True):
        mixed = "" if drawn == size else f", {drawn:,} in an epoch ({drawn / data.samples:.1%} of it)"
        print(f"{shown(folder)}: {size:,} samples{mixed}")
    print(f"{steps}; run folder {cfg.run_dir}", flush=True)


def precision(cfg: DictConfig) -> str:
    """The precision of a run, resolved for the device."""
    if cfg.trainer.precision != "auto":
        return str(cfg.trainer.precision)
    return "bf16-mixed" if computes_in_bf16() else "32-true"


def share_out_cores(cfg: DictConfig, task: Task) -> dict[str, Any]:
    """What `trainer.devices=auto` means on CPUs: processes that share the cores, for they beat threads.

    The toy's stage 2 on two cores: 38 samples/s with one thread, 42 with two, 52 with two processes of one. Each has
    a copy of the model, so they are four at most.
    """
    cpu = cfg.trainer.accelerator == "cpu" or (cfg.trainer.accelerator == "auto" and best_device().type == "cpu")
    if not (cpu and cfg.trainer.devices == "auto" and cfg.trainer.strategy == "auto" and task.shares_batches):
        return {}
    own = cores()
    processes = min(own, MOST_PROCESSES)
    torch.set_num_threads(max(1, own // processes))
    return {"devices": processes, "strategy": "ddp"} if processes > 1 else {}


def build_trainer(
    cfg: DictConfig, settings: Any, callbacks: list[L.Callback], saving: SaveToResume, task: Task
) -> L.Trainer:
    """Lightning's Trainer as configured; what saves comes after all other callbacks."""
    run_dir = Path(cfg.run_dir)
    loggers = instantiate(cfg.logger)(run_dir=run_dir, config=settings) if cfg.get("logger") else []
    with in_words():
        extras = extra_callbacks(settings["callbacks"])
    changed = {**share_out_cores(cfg, task), **implied(settings["trainer"], extras, run_dir)}
    with in_words(TypeError, ValueError):
        return instantiate(cfg.trainer, precision=precision(cfg), **changed)(
            logger=loggers,
            callbacks=[
                *with_extras(callbacks, extras, cfg.trainer.get("enable_progress_bar")),
                Follow(run_dir / "history.jsonl"),
                saving,
            ],
            enable_checkpointing=False,  # Lightning's own, which does not save by the clock in manual optimisation
            default_root_dir=run_dir,
        )
