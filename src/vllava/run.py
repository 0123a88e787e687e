"""Put a run together from its configuration and carry it out."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning_utilities.core.imports import RequirementCache
from omegaconf import DictConfig, OmegaConf

from vllava.config import check, run_name
from vllava.data.writing import write_json
from vllava.errors import UserError
from vllava.evaluation.preview import Preview
from vllava.evaluation.report import write_report
from vllava.features import use_features
from vllava.model.build import load_tokenizer
from vllava.model.checkpoint import load_projector
from vllava.model.device import computes_in_bf16
from vllava.model.precision import halve_frozen
from vllava.model.video_llava import VideoLlava
from vllava.training.callbacks import History, SaveToResume, Throughput, progress_bar
from vllava.training.loggers import log_samples
from vllava.training.task import Task

RESUME = "resume.ckpt"  # in a run's folder while it is unfinished
CHAIN = "unfinished.json"  # in a chain's folder while it is: what is done


def run(cfg: DictConfig) -> None:
    """Carry out one configuration: a chain of experiments, an evaluation, or a training run."""
    check(cfg)
    quiet(cfg.log_level)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    if cfg.chain:
        run_chain(cfg)
    elif HydraConfig.get().mode is RunMode.MULTIRUN:
        run_apart(cfg.experiment, cfg.run_dir)
    elif cfg.evaluation:
        instantiate(cfg.evaluation)
    else:
        train(cfg)


def quiet(level: str) -> None:
    """Keep libraries' notices off the screen; our own messages are at WARNING and above."""
    import transformers

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning"):
        logging.getLogger(name).setLevel(level)
    transformers.utils.logging.set_verbosity(getattr(logging, level))
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")  # advice about checkpoints and modes chosen on purpose


def run_apart(experiment: str, run_dir: str | Path, *changes: str) -> float:
    """Run one experiment in a process of its own, with the overrides of this run and `changes`; returns the seconds.

    A process each keeps memory apart, and lets a run of a sweep start a process for each device: Lightning starts
    those by repeating the command line, which would be the whole sweep's.
    """
    ours = ("+experiment=", "experiment=", "run_dir=")
    given = [override for override in HydraConfig.get().overrides.task if not override.startswith(ours)]
    started = time.time()
    command = [sys.executable, sys.argv[0], f"+experiment={experiment}", *given, *changes, quoted("run_dir", run_dir)]
    process = subprocess.Popen(command)
    while process.returncode is None:
        # Ctrl-C at the terminal reaches the run as well, which saves what it needs to resume: wait for it.
        with suppress(KeyboardInterrupt):
            process.wait()
    if process.returncode != 0:
        raise UserError(f"{experiment} failed or was stopped (see above). Its folder: {run_dir}.")
    return round(time.time() - started, 1)


def quoted(key: str, path: str | Path) -> str:
    """An override whose value may hold characters that mean something to Hydra: a run's name has `=` and `,`."""
    return f"{key}='{path}'"


def run_chain(cfg: DictConfig) -> None:
    """Run the experiments of a chain one after the other, each in a folder of its own below the run's.

    Started again with the same overrides, an unfinished chain goes on with the part it was in. Raises UserError if
    they are others.
    """
    folder = Path(cfg.run_dir)
    overrides = sorted(HydraConfig.get().overrides.task)
    seconds = done_parts(folder, overrides)
    for experiment in cfg.chain:
        part = folder / run_name(experiment, cfg.ablation, cfg.seed)
        if experiment in seconds:
            print(f"{experiment}: was done already, in {part}", flush=True)
            continue
        seconds[experiment] = run_apart(experiment, part, quoted("runs", folder))
        write_json(folder / CHAIN, {"overrides": overrides, "seconds": seconds})
    last = json.loads((part / "metrics.json").read_text())
    seconds["total"] = round(sum(seconds.values()), 1)
    (folder / "metrics.json").write_text(json.dumps({**last, "seconds": seconds}, indent=1) + "\n")
    if (part / "report.html").is_file():
        shutil.copy(part / "report.html", folder / "report.html")
    (folder / CHAIN).unlink()
    print(f"{cfg.experiment}: done in {seconds['total']:.0f} s; figures and report in {folder}")


def done_parts(folder: Path, overrides: list[str]) -> dict[str, float]:
    """The seconds of each part that an unfinished chain has done; raises UserError if its overrides were others."""
    if not (folder / CHAIN).is_file():
        return {}
    found = json.loads((folder / CHAIN).read_text())
    if found["overrides"] != overrides:
        raise UserError(
            f"{folder} holds an unfinished chain that was started with {' '.join(found['overrides'])}. Start that one "
            f"again to end it, delete {folder / CHAIN} to give it up, or choose another folder with run_dir=…"
        )
    return found["seconds"]


def require_cuda_for_deepspeed(cfg: DictConfig) -> None:
    """Raises UserError where DeepSpeed is asked for and cannot run."""
    asked = "DeepSpeed" in str(cfg.trainer.strategy)
    if asked and not (torch.cuda.is_available() and RequirementCache("deepspeed>=0.19.2")):
        raise UserError(
            "DeepSpeed runs on CUDA GPUs, with the package deepspeed installed, 0.19.2 or later: "
            "choose trainer=ddp or trainer=fsdp."
        )


def train(cfg: DictConfig) -> None:
    """One training run: build, fit, export to `checkpoint/`, write the figures."""
    require_cuda_for_deepspeed(cfg)
    started = time.time()
    run_dir = Path(cfg.run_dir)
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    tokenizer = load_tokenizer(cfg.tokenizer)
    model = instantiate(cfg.model)
    if cfg.projector:
        load_projector(model, Path(cfg.projector))
    task: Task = instantiate(cfg.task)(model=model)
    task.check(settings)
    data = instantiate(cfg.data, _convert_="all")(specs=task.specs, tokenizer=tokenizer)
    if data.wants_features:
        use_features(data, model, settings["encoder"], half="bf16" in precision(cfg))
    halved = False
    if isinstance(model, VideoLlava) and "bf16" in precision(cfg) and computes_in_bf16():
        halved = halve_frozen(model, llm="Fsdp" not in str(cfg.trainer.strategy))  # FSDP2 wants one type in a layer
    preview = Preview(cfg.preview, task.specs, tokenizer, settings) if cfg.preview else None
    announce(cfg, task, data)
    history = History(run_dir)
    trainer = build_trainer(cfg, settings, [Throughput(), history, progress_bar()])
    trainer.fit(task, data, ckpt_path=unfinished(run_dir, settings))
    if not trainer.is_global_zero:
        return
    if halved or task.whole:
        weights = task.trained_weights()
        task.model = instantiate(cfg.model)  # its frozen weights are what they were
        left_over = task.model.load_state_dict(weights, strict=False).unexpected_keys
        assert not left_over, left_over
    task.export(run_dir / "checkpoint", tokenizer, settings)
    if (run_dir / RESUME).is_dir():  # DeepSpeed's
        shutil.rmtree(run_dir / RESUME)
    (run_dir / RESUME).unlink(missing_ok=True)
    facts = {
        "samples": task.samples_seen * trainer.world_size,
        "broken": len(task.broken),
        "seconds": round(time.time() - started, 1),
    }
    metrics = history.finish(facts)
    rows = preview.rows(task.model) if preview else []
    log_samples(trainer.logger, rows)
    write_report(run_dir, run_dir.name, {}, rows, {cfg.experiment: run_dir / "loss.png"}, metrics)
    print(f"{cfg.experiment}: done in {time.time() - started:.0f} s; checkpoint, figures and report.html in {run_dir}")


def unfinished(run_dir: Path, settings: Any) -> str | None:
    """The checkpoint an interrupted run of this very configuration left behind, if there is one.

    Writes the configuration to config.yaml. Raises UserError if the unfinished run had another configuration.
    """
    path, config = run_dir / RESUME, run_dir / "config.yaml"
    if path.exists() and (not config.is_file() or yaml.safe_load(config.read_text()) != settings):
        raise UserError(
            f"{run_dir} holds an unfinished run of another configuration ({config}). Start that one again to end it, "
            f"delete {path} to give it up, or choose another folder with run_dir=…"
        )
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    if not path.exists():
        return None
    print(f"resuming the interrupted run in {run_dir}", flush=True)
    return str(path)


def announce(cfg: DictConfig, task: Task, data: Any) -> None:
    """Say in two lines what is about to be trained, on what."""
    trained = ", ".join(f"{name} {count:,}" for name, count in task.trained.items())
    total = sum(p.numel() for p in task.parameters())
    steps = f"{data.samples:,} samples, {data.steps_per_epoch} steps of {data.global_batch} per epoch"
    print(f"{cfg.experiment} ({cfg.ablation}, seed {cfg.seed}): trains {trained} of {total:,} parameters")
    print(f"{steps}; run folder {cfg.run_dir}", flush=True)


def precision(cfg: DictConfig) -> str:
    """The precision of a run, resolved for the device."""
    if cfg.trainer.precision != "auto":
        return str(cfg.trainer.precision)
    return "bf16-mixed" if computes_in_bf16() else "32-true"


def build_trainer(cfg: DictConfig, settings: Any, callbacks: list[L.Callback]) -> L.Trainer:
    """Lightning's Trainer as configured."""
    run_dir = Path(cfg.run_dir)
    logger = instantiate(cfg.logger)(run_dir=run_dir, name=run_dir.name, config=settings)
    return instantiate(cfg.trainer, precision=precision(cfg))(
        logger=logger if logger is not None else False,
        callbacks=[*callbacks, SaveToResume(run_dir / RESUME, cfg.save_minutes)],
        enable_checkpointing=False,  # Lightning's own, which does not save by the clock in manual optimisation
        default_root_dir=run_dir,
    )
