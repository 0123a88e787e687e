"""What a run starts from where nobody says it: stage 2 from a stage-1 run, an evaluation from a stage-2 run.

The run that is meant is known by what it is, not by its folder's name: the one that the same command line would have
trained in that stage.
"""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from vllava.config import composed_beside, run_name
from vllava.errors import UserError
from vllava.identity import Identity, differences, identity_of, in_words, is_checkpoint
from vllava.imported import IMPORTED, imported
from vllava.runs import Run, finished_runs, read_run, tell

AUTO = "auto"
PROJECTOR = "checkpoint/projector.safetensors"
# What a stage sets for itself: a value given for the later stage need not have been the earlier one's.
OWN = re.compile(r"(task|trainer)\.|data\.(global_batch|image_fit)$")
# Overrides that concern another run.
_OTHERS = ("experiment", "run_dir", "projector", "chain", "rerun", "evaluation", "benchmark", "benchmarks", "judge")


def resolve(cfg: DictConfig) -> None:
    """Put the paths of the runs that are meant in place of `auto`, and say which; raises UserError where in doubt.

    A checkpoint of another format that is evaluated is imported first, see vllava.imported.
    """
    if cfg.evaluation and cfg.evaluation.get("checkpoint") == AUTO:
        run = _meant(cfg, "stage2", "evaluation.checkpoint", "checkpoint")
        cfg.evaluation.checkpoint = str(run.folder / "checkpoint")
        cfg.evaluation.plots = plots(run)
    elif cfg.evaluation and "checkpoint" in cfg.evaluation and not cfg.benchmarks:
        given, search = str(cfg.evaluation.checkpoint), OmegaConf.to_object(cfg.foundations.search)
        if not cfg.evaluation.get("plots") and (named := read_run(Path(given).parent)) is not None:
            cfg.evaluation.plots = plots(named)
        cfg.evaluation.checkpoint = str(imported(given, Path(cfg.runs) / IMPORTED, typing.cast(Any, search)))
    if not cfg.evaluation and not cfg.chain and cfg.projector == AUTO:
        cfg.projector = str(_meant(cfg, "stage1", "projector", PROJECTOR).folder / PROJECTOR)


def plots(run: Run) -> dict[str, str]:
    """The loss curves of a stage-2 run and of the stage-1 run it started from, where they are."""
    start = (run.identity.get("projector") or {}) if isinstance(run.identity.get("projector"), dict) else {}
    first = Path(start["path"]).parents[1] if "path" in start else None
    curves = {"stage 1": first and first / "loss.png", "stage 2": run.folder / "loss.png"}
    return {name: str(path) for name, path in curves.items() if path is not None and path.is_file()}


def _meant(cfg: DictConfig, experiment: str, key: str, result: str) -> Run:
    """The finished run of an experiment that this one goes on from."""
    runs = Path(cfg.runs)
    candidates = finished_runs(runs, experiment)
    wanted, why_not = _wanted(experiment)
    unlike = [(run, _differences(run.identity, wanted)) for run in candidates] if wanted else []
    same = [run for run, found in unlike if not found]
    fitting = [(run, found) for run, found in unlike if all(map(OWN.match, found))]
    if same or len(fitting) == 1:
        run, found = (same[0], {}) if same else fitting[0]
        tell(f"{key}: {run.folder / result}" + (f" ({_unlike(found)})" if found else ""))
        return run
    expected = runs / run_name(experiment, cfg.ablation, cfg.seed, *HydraConfig.get().overrides.task) / result
    if not candidates:
        unfinished = read_run(expected.parents[len(Path(result).parts) - 1])
        state = f" {unfinished.folder} is unfinished: start it again to end it." if unfinished else ""
        raise UserError(
            f"No {'projector' if experiment == 'stage1' else 'checkpoint'} at {expected}, and no finished run of "
            f"{experiment} in {runs}.{state} Train one with `python train.py +experiment={experiment}` (same ablation, "
            f"model and seed), or give one with {key}=PATH."
        )
    listed = ", or ".join(
        f"{key}={run.folder / result} ({_unlike(found) if found else why_not or 'the same'})"
        for run, found in (unlike or [(run, {}) for run in candidates])[:6]
    )
    what = "more than one may be meant" if len(fitting) > 1 else "none is the one that this command line would train"
    raise UserError(
        f"Which run of {experiment} is meant is in doubt: of {len(candidates)} in {runs}, {what}. Name one: {listed}; "
        f"or train it: python train.py +experiment={experiment} with the same overrides."
    )


def _wanted(experiment: str) -> tuple[Identity | None, str]:
    """The identity that this command line would have in another experiment; None, and why, where it has none."""
    given = [
        override
        for override in HydraConfig.get().overrides.task
        if _key(override) not in _OTHERS and not is_checkpoint(override)
    ]
    try:
        settings: Any = OmegaConf.to_container(composed_beside([f"+experiment={experiment}", *given]), resolve=True)
        return identity_of(settings), ""
    except UserError as error:
        return None, str(error)


def _differences(found: Identity, wanted: Identity) -> dict[str, tuple[Any, Any]]:
    """What differs between a run and the wanted one, but for what both started from."""
    before, now = ({key: value for key, value in one.items() if key != "projector"} for one in (found, wanted))
    return differences(before, now)


def _unlike(found: dict[str, tuple[Any, Any]]) -> str:
    return in_words(found, "{}: {} there, {} here")


def _key(override: str) -> str:
    return re.split(r"[.=@/]", override.lstrip("+~"), maxsplit=1)[0]
