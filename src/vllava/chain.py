"""Runs in processes of their own: the parts of a chain, and each run of a sweep."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vllava.config import run_name
from vllava.data.patience import Remote
from vllava.data.shards import read_sources
from vllava.data.writing import write_json
from vllava.errors import UserError
from vllava.settle import EVALUATE, NAME_HELD_OUT
from vllava.sources import REMEDY
from vllava.stops import CODES, say, wait

CHAIN = "unfinished.json"  # in a chain's folder while it is: what is done


def run_apart(experiment: str, run_dir: str | Path, *changes: str) -> float:
    """Run one experiment in a process of its own, with the overrides of this run and `changes`; returns the seconds.

    A process each keeps memory apart, and lets a run of a sweep start a process for each device: Lightning starts
    those by repeating the command line, which would be the whole sweep's.
    """
    ours = ("+experiment=", "experiment=", "run_dir=")
    given = [override for override in HydraConfig.get().overrides.task if not override.startswith(ours)]
    started = time.time()
    command = [sys.executable, sys.argv[0], f"+experiment={experiment}", *given, *changes, quoted("run_dir", run_dir)]
    code = wait(command)  # asked to stop, the run saves what it needs to resume
    if code in CODES:
        say(f"{experiment} was stopped by {CODES[code]} (see above). Start the same command again to go on.")
        sys.exit(code)
    if code != 0:
        raise UserError(f"{experiment} failed or was stopped (see above). Its folder: {run_dir}.")
    return round(time.time() - started, 1)


def quoted(key: str, path: str | Path) -> str:
    """An override whose value may hold characters that mean something to Hydra: a run's name has `=` and `,`."""
    return f"{key}='{path}'"


def run_chain(cfg: DictConfig) -> None:
    """Run the experiments of a chain one after the other, each in a folder of its own below the run's.

    The evaluation is left out where the data are a user's own and no held-out shards are named. Started again with the
    same overrides, an unfinished chain goes on with the part it was in. Raises UserError if they are others.
    """
    folder = Path(cfg.run_dir)
    overrides = sorted(HydraConfig.get().overrides.task)
    seconds = done_parts(folder, overrides)
    require_folders(cfg)
    parts = [experiment for experiment in cfg.chain if experiment != EVALUATE or cfg.evaluation]
    for experiment in parts:
        part = folder / run_name(experiment, cfg.ablation, cfg.seed)
        if experiment in seconds:
            print(f"{experiment}: was done already, in {part}", flush=True)
            continue
        seconds[experiment] = run_apart(experiment, part, quoted("runs", folder))
        write_json(folder / CHAIN, {"overrides": overrides, "seconds": seconds})
    last = json.loads((part / "metrics.json").read_text())
    seconds["total"] = round(sum(seconds.values()), 1)
    write_json(folder / "metrics.json", {**last, "seconds": seconds})
    if (part / "report.html").is_file():
        shutil.copy(part / "report.html", folder / "report.html")
    (folder / CHAIN).unlink()
    if len(parts) < len(cfg.chain):
        print(f"{cfg.experiment}: nothing was evaluated, for no held-out shards are named. {NAME_HELD_OUT}")
    print(f"{cfg.experiment}: done in {seconds['total']:.0f} s; figures and report in {folder}")


def require_folders(cfg: DictConfig) -> None:
    """Raises UserError, before the first part starts, if shards are missing that a user named for any of them."""
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    preview, asked = settings["preview"] or {}, (settings["evaluation"] or {}).get("sources") or {}
    named = [*settings["data"]["sources"].values(), *(listed for key, listed in preview.items() if key != "remedy")]
    named += [named_folders.values() for named_folders in asked.values() if named_folders]
    for folder in dict.fromkeys(folder for listed in named for folder in listed):
        read_sources([folder], REMEDY, Remote.of(settings["data"].get("cache")))


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
