"""What a study will need, before it starts: `python -m vllava.plan +study=paper`.

A run that is finished somewhere in `runs` is not counted, and one that several arms or levels share is counted once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from vllava.config import CONF, check_command_line, register_resolvers, with_paths_quoted
from vllava.data.mixture import Source, draws, portions
from vllava.data.patience import Remote
from vllava.data.shards import read_sources
from vllava.errors import UserError
from vllava.plan import GPUS, make
from vllava.runs import METRICS, finished_runs
from vllava.settle import EVALUATE
from vllava.study import Study, with_checkpoints
from vllava.study_run import after, before_of, part_of
from vllava.study_sweep import cells_of


@dataclass(frozen=True)
class Row:
    """One experiment of a study: how many runs of it there are to make and are finished, and what they take.

    samples: of all that are to be made; questions, for an evaluation. rate: of them a second, None where it is not
    known; basis: where the rate is from, in words.
    """

    experiment: str
    to_make: int
    finished: int
    samples: int
    rate: float | None
    basis: str

    @property
    def hours(self) -> float | None:
        return self.samples / self.rate / 3600 if self.rate else None if self.samples else 0.0


def is_study(overrides: list[str]) -> bool:
    """Whether a command line names a study."""
    return any(one.lstrip("+").startswith("study=") for one in overrides)


def swept(overrides: list[str], conf: str | Path = CONF) -> DictConfig:
    """The configuration of a sweep, Hydra's part included; raises UserError for a mistake in it."""
    register_resolvers()
    overrides = with_paths_quoted(overrides)
    check_command_line([one for one in overrides if "," not in one])
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            hydra: Any = GlobalHydra.instance().hydra
            cfg = hydra.compose_config("train", overrides, RunMode.MULTIRUN)
    except HydraException as error:
        raise UserError(str(error).replace("\n", " ")) from error
    HydraConfig.instance().set_config(cfg)
    return cfg


def rows(cfg: DictConfig, rate: float | None, device: tuple[str, int, float]) -> tuple[Study, int, list[Row]]:
    """The study of a sweep's configuration, how many runs it has, and the plan of each of its experiments.

    rate: samples a second that a stage trains, if it is known; device: a GPU's name, their number and their
    utilisation, for the arithmetic where nothing was measured.
    """
    study, given, cells = cells_of(cfg)
    runs = Path(cfg.runs)
    found: dict[str, dict[str, Any]] = {}  # experiment -> what a run is -> its samples and settings, or its folder
    for cell in cells:
        overrides, made = study.overrides_of(cell, given), {}
        for name in study.needed(overrides):
            part = before_of(study, name, given, runs)
            made[name] = part.done or part.folder
            planned = part.done or (samples_of(part.settings), part.settings)
            found.setdefault(part.experiment, {})[part.folder.name] = planned
        overrides = with_checkpoints(overrides, made)
        parts: dict[str, Path] = {}
        before = ""
        for experiment in study.chain_of(cell):
            told = after(experiment, parts)
            if all(_is_there(one) for one in told):
                part = part_of(experiment, [*overrides, *told], runs)
            else:  # what it starts from is still to be made: it is as much work
                part = part_of(experiment, [*overrides, *_without(told)], Path("/nowhere"))
            before = f"{before}/{part.folder.name}"
            parts[experiment] = part.done or Path(part.folder.name)
            key = before if part.done is None else str(part.done)
            try:
                found.setdefault(experiment, {})[key] = part.done or (samples_of(part.settings), part.settings)
            except UserError as error:
                raise UserError(f"{cell.name}, {experiment}: {error.paragraph}") from error
    return study, len(cells), [_row(name, found[name], runs, rate, device) for name in found]


def _is_there(override: str) -> bool:
    return Path(override.partition("=")[2]).exists()


def _without(told: list[str]) -> list[str]:
    return [one.partition("=")[0] + "=null" for one in told if one.startswith("projector=")]


def _row(
    experiment: str, found: Mapping[str, Any], runs: Path, rate: float | None, device: tuple[str, int, float]
) -> Row:
    to_make = [one for one in found.values() if not isinstance(one, Path)]
    samples = sum(number for number, _ in to_make)
    measured, number = measured_rate(runs, experiment)
    basis = f"of {number} finished run{'s' if number > 1 else ''}"
    if rate and experiment != EVALUATE:
        measured, basis = rate, "as given"
    elif not measured and experiment != EVALUATE and to_make:
        measured, basis = arithmetic(to_make[0][1], device)
    return Row(experiment, len(to_make), len(found) - len(to_make), samples, measured, basis if measured else "unknown")


def samples_of(settings: Mapping[str, Any]) -> int:
    """The samples that a run of these settings trains on, epochs counted; the questions that an evaluation asks."""
    if settings["evaluation"]:
        asked = settings["evaluation"]["sources"]
        kinds = settings["data"]["modalities"]
        named = [folder for kind, sources in asked.items() if kind in kinds for folder in (sources or {}).values()]
        return sum(shard.samples for shard in read_sources(named, settings["evaluation"]["remedy"]))
    data, trainer = settings["data"], settings["trainer"]
    chosen = [Source(kind, folder) for kind in data["modalities"] for folder in data["sources"].get(kind) or []]
    cache = Remote.of(data.get("cache"))
    sizes = [sum(s.samples for s in read_sources([one.folder], data["remedy"], cache)) for one in chosen]
    total = sum(draws(portions(data.get("mixture"), chosen), sizes))
    batch = data["global_batch"]
    steps = -(-total // batch)
    limit = trainer.get("limit_train_batches")
    if limit is not None:
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    whole = min(total, steps * batch) * max(1, trainer.get("max_epochs") or 1)
    most = trainer.get("max_steps", -1)
    return min(whole, most * batch) if most > 0 else whole


def measured_rate(runs: Path, experiment: str) -> tuple[float | None, int]:
    """Samples, or questions, a second over the finished runs of an experiment, and how many these are."""
    done, seconds, number = 0, 0.0, 0
    for run in finished_runs(runs, experiment):
        figures = json.loads((run.folder / METRICS).read_text())
        asked = sum(part.get("n", 0) for part in figures.values() if isinstance(part, dict))
        done += figures.get("samples") or asked
        seconds += figures.get("seconds") or 0.0
        number += 1
    return (done / seconds if done and seconds else None), number


def arithmetic(settings: dict[str, Any], device: tuple[str, int, float]) -> tuple[float | None, str]:
    """Samples a second by the plan's arithmetic, and its basis in words; None where there is no recipe to go by."""
    gpu, number, utilisation = device
    if settings["experiment"].removesuffix("_lora") not in settings.get("recipes", {}):
        return None, ""
    plan = make(settings, number)
    flops = plan.epoch_flops / sum(plan.samples.values())
    basis = f"{utilisation:.0%} of {number} x {gpu}; --rate says what was measured"
    return number * GPUS[gpu][1] * 1e12 * utilisation / flops, basis


def text(study: Study, runs: int, planned: list[Row]) -> str:
    """The plan as a page of text."""
    lines = [f"{study.name}: {runs} runs of {', '.join(study.chain)}", ""]
    lines.append(f"{'':16}{'to make':>9}{'finished':>10}{'samples':>13}{'hours':>9}  samples a second")
    for row in planned:
        hours = "-" if row.hours is None else f"{row.hours:.2f}"
        rate = f"{row.rate:,.1f} ({row.basis})" if row.rate else row.basis
        lines.append(f"{row.experiment:16}{row.to_make:>9}{row.finished:>10}{row.samples:>13,}{hours:>9}  {rate}")
    total = sum(row.hours or 0.0 for row in planned)
    unknown = [row.experiment for row in planned if row.hours is None]
    lines += ["", f"together {total:.2f} hours, one run after the other"]
    if unknown:
        lines.append(f"not counted, for none is finished yet: {', '.join(unknown)}")
    return "\n".join(lines)
