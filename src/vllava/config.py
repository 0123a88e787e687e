"""A configuration composed and checked, before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vllava.checks import MISSING, Count, NotNegative, OneOf, Seed, Whole, hints_of, require, require_all
from vllava.data.build import Modality
from vllava.errors import UserError, require_known
from vllava.folders import safe_name
from vllava.identity import LENGTH, tells_apart
from vllava.options import check_callbacks, check_override, check_trainer, refuse
from vllava.settle import EVALUATE, settle
from vllava.sources import check_spelling

PROJECT = Path(__file__).parents[2]
CONF = PROJECT / "conf"
# fmt: off
TOP_LEVEL = {
    "experiment", "ablation", "seed", "chain", "runs", "run_dir", "world", "log_level", "save_minutes", "stop_seconds",
    "model", "foundations", "recipes", "tokenizer", "template", "encoder", "projector", "data", "task", "trainer",
    "logger", "callbacks", "preview", "evaluation", "validation", "toy", "rerun", "checkpoint",
    "benchmark", "benchmarks", "judge", "suites",
}
# fmt: on
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
# Of what no signature speaks of. These decide what is read and run, so they are checked first.
_HINTS: dict[str, Any] = {
    "experiment": str | None,
    "ablation": str,
    "seed": Seed,
    "chain": list[str] | str | None,
    "rerun": bool,
    **dict.fromkeys(("runs", "run_dir", "world", "tokenizer", "template"), str),
    "log_level": Annotated[str, OneOf(LOG_LEVELS)],
    **dict.fromkeys(("save_minutes", "stop_seconds"), NotNegative),
    "projector": str | None,
    "foundations": dict[str, str | list[str]],  # the list: folders to search
    **dict.fromkeys(("recipes", "encoder", "model", "data", "task", "trainer"), dict[str, Any]),
    **dict.fromkeys(("callbacks", "validation", "preview", "evaluation", "toy"), dict[str, Any] | None),
    **dict.fromkeys(("benchmark", "judge", "suites"), dict[str, Any] | None),
    "checkpoint": dict[str, Any] | str | None,
    "benchmarks": list[str] | dict[str, str | None] | str | None,
}
_HINTS_IN: dict[str, dict[str, Any]] = {  # of nodes that no function takes as they are
    "validation": {
        **{"every_steps": Count | None, "samples": Count, "answers": bool, "early_stop": str | None},
        "patience": Count,
    },
    "checkpoint": {"every_steps": Count | None, "keep_last": Whole, "keep_best": str | None},
}
NAME_BYTES = 200  # of a run's folder at most, all of them ASCII; file systems take 255
_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def run_name(experiment: str, ablation: str, seed: int, *overrides: str) -> str:
    """The name of a run's folder: experiment, ablation, model, benchmark, seed, and six characters for other changes.

    Model and benchmark are left out where the command line chooses none. The name is for people; what a run is, says
    its identity.
    """
    shown = [one for one in overrides if one.startswith(("model=", "benchmark="))]
    chosen = [one.partition("=")[2] for one in sorted(shown, reverse=True)]
    own: tuple[str, ...] = ("seed=", *shown)
    if "task.recipe.schedule=constant" in overrides:  # such a run may be given more steps: it is the same
        own += tuple(f"{key}=" for key in LENGTH)
    others = sorted(one for one in overrides if tells_apart(one) and not one.startswith(own))
    named = [experiment, ablation, *chosen, f"s{seed}"]
    if others:
        named.append(hashlib.sha256("\n".join(others).encode()).hexdigest()[:6])
    return safe_name("-".join(named))[:NAME_BYTES]


def study_name(name: str, *overrides: str) -> str:
    """The name of a study's folder, with six characters for what else its command line changes in all of its runs."""
    chosen = ("arm=", "level=", "seed=", "study=", "study_dir=")
    others = sorted(one for one in overrides if tells_apart(one) and not one.lstrip("+").startswith(chosen))
    made = [f"study-{name}", *([hashlib.sha256("\n".join(others).encode()).hexdigest()[:6]] if others else [])]
    return "-".join(made)


def register_resolvers() -> None:
    """Make `${run_name:…}`, `${project:…}` and the like known to OmegaConf."""

    def resolve(experiment: str, ablation: str, seed: int) -> str:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        return run_name(experiment, ablation, seed, *overrides)

    def of_study(name: str) -> str:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        return study_name(name, *overrides)

    OmegaConf.register_new_resolver("run_name", resolve, replace=True)
    OmegaConf.register_new_resolver("study_name", of_study, replace=True)
    OmegaConf.register_new_resolver("joined", lambda values, none="": ",".join(map(str, values)) or none, replace=True)
    OmegaConf.register_new_resolver("project", of_project, replace=True)


def of_project(path: str) -> str:
    """A path of the project's own, such as assets/llm: as it is where one works in the project, else absolute."""
    return path if Path.cwd() == PROJECT.resolve() else str(PROJECT / path)


# Keys whose values are paths: these may hold any characters, also such as mean something to Hydra.
PATHS = ("run_dir", "runs", "world", "projector", "evaluation.checkpoint", "checkpoint", "benchmark.root")


def with_paths_quoted(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which a path that Hydra could not read as it stands is put in quotes."""
    sweeps = not {"-m", "--multirun"}.isdisjoint(arguments)
    return [_quoted(argument, sweeps) for argument in arguments]


def _quoted(argument: str, sweeps: bool) -> str:
    key, equals, value = argument.partition("=")
    if sweeps and "," in value:  # several values, in Hydra's own way to write them
        return argument
    plain = re.fullmatch(r"|null|'.*'|\".*\"|\$\{.*\}.*", value)
    if not equals or key.lstrip("+") not in PATHS or plain:
        return argument
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"{key}='{escaped}'"


def composed(overrides: list[str], conf: str | Path = CONF) -> DictConfig:
    """The settled and checked configuration of a command line; raises UserError for a mistake in it."""
    register_resolvers()
    overrides = with_paths_quoted(overrides)
    check_command_line(overrides)
    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            cfg = hydra.compose("train", overrides, return_hydra_config=True)
    except HydraException as error:
        raise UserError(str(error).replace("\n", " ")) from error
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    check(cfg)
    return cfg


def composed_beside(overrides: list[str]) -> DictConfig:
    """`composed`, in a process that runs a configuration already, from the same files; that one stays as it is."""
    running, job = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    try:
        GlobalHydra.instance().clear()
        return composed(overrides, _conf())
    finally:
        GlobalHydra.instance().clear()
        if running is not None:
            GlobalHydra.instance().initialize(running)
        HydraConfig.instance().cfg = job


def check(cfg: DictConfig) -> None:
    """Settle a configuration; raises UserError for an experiment not chosen, a key nobody reads, a missing value."""
    if cfg.chain is not None:
        _check_chain(cfg)
    if cfg.benchmarks is not None:
        _check_benchmarks(cfg)
    if cfg.experiment is None:
        raise UserError(
            f"Choose what to run: python train.py +experiment=NAME, with NAME one of {_names('experiment')}."
        )
    _check_first(cfg)
    settle(cfg)
    groups = [override.lstrip("+").split("=")[0] for override in HydraConfig.get().overrides.task]
    if [group for group in groups if group in ("experiment", "ablation")] == ["ablation", "experiment"]:
        raise UserError("Put +ablation=… after +experiment=… on the command line: the later one has the last word.")
    require_known("the configuration", set(cfg), TOP_LEVEL)
    written = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
    for key in sorted(TOP_LEVEL & set(written)):
        _check_node(key, written[key])
    _check_all_values(cfg)
    if cfg.chain or cfg.benchmarks:
        return  # its experiments are checked when they run
    try:
        for node in (cfg.evaluation, cfg.benchmark, cfg.judge) if cfg.evaluation else (cfg,):
            OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration is not complete: {str(error).splitlines()[0]}.{_wanted(cfg)}") from error


def _wanted(cfg: DictConfig) -> str:
    """What to do about the value that is missing most often."""
    if not cfg.benchmark or not OmegaConf.is_missing(cfg.benchmark, "root"):
        return ""
    return f" Say where the data of {cfg.benchmark.name} lie: benchmark.root=FOLDER"


def _check_chain(cfg: DictConfig) -> None:
    """A chain names experiments that there are, none of them a chain; one of the command line needs no experiment."""
    given = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))["chain"]
    require("chain", given, list[str] | str)
    known = _names("experiment").split(", ")
    parts = [cfg.chain] if isinstance(cfg.chain, str) else list(cfg.chain)
    for part in parts:
        require_known("chain", [part], known)
        if "chain" in OmegaConf.load(_conf() / "experiment" / f"{part}.yaml"):
            raise UserError(f"chain={parts} names {part}, which is a chain itself: name its experiments.")
    if not parts or len(set(parts)) < len(parts):
        raise UserError(f"chain={parts}: name one experiment or several different ones, such as chain=[stage1,stage2].")
    cfg.chain = parts
    cfg.experiment = cfg.experiment or "chain"


def _check_benchmarks(cfg: DictConfig) -> None:
    """`benchmarks` becomes a mapping from names of benchmarks to their roots; raises UserError for names of none."""
    given = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
    asked = given["benchmarks"]
    require("benchmarks", asked, _HINTS["benchmarks"])
    if cfg.chain or cfg.experiment != EVALUATE:
        raise UserError(f"benchmarks={asked} is for +experiment={EVALUATE}, which asks them one after the other.")
    if isinstance(asked, str):
        require_known("benchmarks", [asked], given["suites"])
        asked = given["suites"][asked]
    names = _names("benchmark").split(", ")
    require_known("benchmarks", asked, names)
    if not asked or len(set(asked)) < len(asked):
        raise UserError(f"benchmarks={asked}: name one or several different ones of {', '.join(names)}.")
    cfg.benchmarks = asked if isinstance(asked, dict) else dict.fromkeys(asked)


def check_command_line(overrides: list[str]) -> None:
    """Raises UserError for overrides for which Hydra's own message would lead astray."""
    check_spelling(overrides)
    for override in overrides:
        check_override(override)
        _check_choice(override)


def _check_choice(override: str) -> None:
    """Raises UserError for a group of which a number or the like is chosen: Hydra ends at it with a traceback."""
    group, _, value = override.lstrip("+~").partition("=")
    if (_conf() / group).is_dir() and re.fullmatch(r"-?\d+(\.\d*)?|null|true|false|\{.*", value.lower()):
        names = (
            _names(group) or f"{group}/{f', {group}/'.join(sorted(path.name for path in (_conf() / group).iterdir()))}"
        )
        raise UserError(f"{override}: {group} is chosen by a name; there are: {names}.")


def _check_first(cfg: DictConfig) -> None:
    """Raises UserError for what would be in the way of finding out what is to run."""
    written = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
    plain = {key: value for key, value in written.items() if "${" not in str(value) or isinstance(value, dict)}
    require_all("", plain, _HINTS)
    require("data.modalities", plain["data"].get("modalities", MISSING), list[Modality])
    if plain["data"].get("modalities") == []:
        raise UserError("data.modalities is [], which leaves nothing to train on: name some of image, video, text.")
    for name, value in plain["trainer"].items():
        refuse(f"trainer.{name}", value)
    if "ckpt_path" in written:
        refuse("ckpt_path", written["ckpt_path"])


def _check_all_values(cfg: DictConfig) -> None:
    """Raises UserError for a value that what is configured cannot have; what is missing is not looked at."""
    try:
        values = typing.cast(dict, OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration is not complete: {str(error).splitlines()[0]}.") from error
    require_all("", values, _HINTS)
    if values["data"].get("remedy", "") is None:  # of a chain or an evaluation, which read other data
        del values["data"]["remedy"]
    for key, hints in _HINTS_IN.items():
        require_all(key, values.get(key) or {}, hints)
    check_callbacks(values.get("callbacks"))
    for key in sorted(TOP_LEVEL & set(values) - {"recipes", "toy"}):
        _check_values(key, values[key])
    check_trainer(values["trainer"])


def _check_values(where: str, node: Any) -> None:
    """Values of a node with `_target_` must be of the types of its parameters; the same for what it contains."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        target = get_object(node["_target_"])
        if not node.get("_partial_"):
            _require_given(where, node, target)
        require_all(where, node, {} if target is Trainer else hints_of(target))
    for key, value in node.items():
        _check_values(f"{where}.{key}", value)


def _require_given(where: str, node: dict, target: Any) -> None:
    """Raises UserError where a parameter without a default is not given."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [name for name, p in _parameters(target).items() if p.kind in kinds and p.default is p.empty]
    if absent := [name for name in needed if name not in node and "_args_" not in node]:
        raise UserError(f"{where}.{absent[0]} is missing: {node['_target_']} needs it.")


def _names(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (_conf() / group).glob("*.yaml")))


def _conf() -> Path:
    """The folder of the configuration that is running."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return Path(next((source.path for source in sources if source.provider == "main"), CONF))


def _check_node(where: str, node: Any) -> None:
    """Keys of a node with `_target_` must be parameters of that target; the same for what it contains."""
    if not isinstance(node, dict):
        return
    if "_target_" not in node:
        for key, value in node.items():
            _check_node(f"{where}.{key}", value)
        return
    try:
        target = get_object(node["_target_"])
    except Exception as error:  # hydra wraps whatever the import raised
        raise UserError(f"{where}._target_={node['_target_']!r} cannot be imported ({error}).") from error
    parameters = _parameters(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        require_known(where, set(node) - _HYDRA_KEYS, set(parameters))
    for key, value in node.items():
        hint = next((h for h in typing.get_args(hints.get(key)) if dataclasses.is_dataclass(h)), hints.get(key))
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            require_known(f"{where}.{key}", set(value), {field.name for field in dataclasses.fields(hint)})
        else:
            _check_node(f"{where}.{key}", value)


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(target).parameters)
