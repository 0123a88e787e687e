"""Runs in processes of their own: the parts of a chain, and each run of a sweep."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vllava.config import run_name
from vllava.data.patience import Remote
from vllava.data.shards import read_sources
from vllava.data.writing import write_json
from vllava.errors import UserError
from vllava.forked import Forked
from vllava.identity import Identity, tells_apart
from vllava.runs import METRICS, read_run
from vllava.settle import EVALUATE, NAME_HELD_OUT
from vllava.sources import REMEDY
from vllava.stops import CODES, attend, say


def run_apart(experiment: str, run_dir: str | Path, *changes: str) -> None:
    """Run one experiment in a process of its own, with the overrides of this run and `changes`.

    A process each keeps memory apart, and lets a run of a sweep start a process for each device: Lightning starts
    those by repeating the command line, which would be the whole sweep's.
    """
    ours = {"experiment", "run_dir", "chain", "rerun", "benchmarks"}
    given = [one for one in HydraConfig.get().overrides.task if one.lstrip("+~").split("=")[0] not in ours]
    arguments = [f"+experiment={experiment}", *given, *changes, f"run_dir={run_dir}"]
    code = attend(lambda: Forked(Path(sys.argv[0]), arguments))  # asked to stop, the run saves what it needs to resume
    if code in CODES:
        say(f"{experiment} was stopped by {CODES[code]} (see above). Start the same command again to go on.")
        sys.exit(code)
    if code != 0:
        raise UserError(f"{experiment} failed or was stopped (see above). Its folder: {run_dir}.")


def chain_identity(cfg: DictConfig) -> Identity:
    """What a chain is: its parts, and what was asked of all of them."""
    return {"chain": list(cfg.chain), **_of_all_parts(cfg)}


def _of_all_parts(cfg: DictConfig) -> Identity:
    asked = sorted(override for override in HydraConfig.get().overrides.task if tells_apart(override))
    return {"ablation": cfg.ablation, "seed": cfg.seed, "overrides": asked}


def _is_done(part: Path) -> bool:
    done = read_run(part)
    return done is not None and done.is_finished


def _figures(name: str, part: Path, experiment: str, *changes: str) -> dict[str, Any]:
    """What a part of several found: it is run, unless it was done already."""
    if _is_done(part):
        print(f"{name}: was done already, in {part}", flush=True)
    else:
        run_apart(experiment, part, *changes)
        if not _is_done(part):
            raise UserError(f"{name} ended without its result in {part} (see above): start the chain again.")
    return json.loads((part / METRICS).read_text())


def run_chain(cfg: DictConfig) -> None:
    """Run the experiments of a chain one after the other, each in a folder of its own below the run's.

    A part is done when its folder says that it is finished and all it left is there: started again, a chain goes on
    with the first that is not. Own data without held-out shards are not evaluated.
    """
    folder = Path(cfg.run_dir)
    require_folders(cfg)
    parts = {
        experiment: folder / run_name(experiment, cfg.ablation, cfg.seed)
        for experiment in cfg.chain
        if experiment != EVALUATE or cfg.evaluation
    }
    seconds = {}
    for experiment, part in parts.items():
        last = _figures(experiment, part, experiment, f"runs={folder}")
        seconds[experiment] = last.get("seconds", 0.0)
    seconds["total"] = round(sum(seconds.values()), 1)
    write_json(folder / METRICS, {**last, "seconds": seconds})
    if (part / "report.html").is_file():
        shutil.copy(part / "report.html", folder / "report.html")
    if len(parts) < len(cfg.chain):
        print(f"{cfg.experiment}: nothing was evaluated, for no held-out shards are named. {NAME_HELD_OUT}")
    print(f"{cfg.experiment}: done in {seconds['total']:.0f} s; figures and report in {folder}")


def benchmarks_identity(cfg: DictConfig) -> Identity:
    """What several evaluations are: their benchmarks, and what was asked of all of them."""
    return {"benchmarks": dict(cfg.benchmarks), **_of_all_parts(cfg)}


def run_benchmarks(cfg: DictConfig) -> None:
    """Evaluate on several benchmarks one after the other, each in a folder of its own below the run's.

    One that fails keeps no other from being asked; at the end, UserError names those that did. Started again, those
    that are done are not asked again.
    """
    folder, failed, found = Path(cfg.run_dir), {}, {}
    for name, root in cfg.benchmarks.items():
        # The folder in which what the benchmarks have in common is looked for stays the command line's.
        roots = [f"benchmark.root={root}"] if root is not None else []
        try:
            if not _is_done(folder / name):
                print(f"{name}: in {folder / name}", flush=True)
            found[name] = _figures(name, folder / name, cfg.experiment, f"benchmark={name}", *roots)
        except UserError as error:
            failed[name] = error.paragraph
            say(f"error: {name}: {error.paragraph}")
    seconds = round(sum(one.get("seconds", 0.0) for one in found.values()), 1)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cfg.benchmarks)} benchmarks failed: {', '.join(failed)} (see above). The others "
            f"are in {folder}; the same command asks these again."
        )
    write_json(folder / METRICS, {"benchmarks": found, "seconds": seconds})
    print(f"{', '.join(found)}: done in {seconds:.0f} s; figures and reports in the folders below {folder}")


def require_folders(cfg: DictConfig) -> None:
    """Raises UserError, before the first part starts, if shards are missing that a user named for any of them."""
    settings: Any = OmegaConf.to_container(cfg, resolve=False)
    preview, asked = settings["preview"] or {}, (settings["evaluation"] or {}).get("sources") or {}
    named = [*settings["data"]["sources"].values(), *(listed for key, listed in preview.items() if key != "remedy")]
    named += [named_folders.values() for named_folders in asked.values() if named_folders]
    for folder in dict.fromkeys(folder for listed in named for folder in listed):
        read_sources([folder], REMEDY, Remote.of(settings["data"].get("cache")))
