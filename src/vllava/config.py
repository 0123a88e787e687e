"""A configuration composed and checked, before any work is done."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import typing
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vllava.errors import UserError, require_known
from vllava.settle import settle
from vllava.sources import check_spelling

CONF = Path(__file__).parents[2] / "conf"
# fmt: off
TOP_LEVEL = {
    "experiment", "ablation", "seed", "chain", "runs", "run_dir", "world", "log_level", "save_minutes",
    "model", "foundations", "recipes", "tokenizer", "template", "encoder", "projector", "data", "task", "trainer",
    "logger", "preview", "evaluation", "toy", "checkpoint",
}
# fmt: on
NAME_BYTES = 200  # of a run's folder at most; file systems take 255
_HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def run_name(experiment: str, ablation: str, seed: int, overrides: str = "") -> str:
    """The name of a run's folder: what it is, and what was changed on the command line."""
    name = f"{experiment}-{ablation}-s{seed}"
    if overrides:
        name += f"-{overrides.replace('/', '_')}"
    if len(name.encode()) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[: NAME_BYTES - 9].decode(errors='ignore')}-{digest}"


def register_resolvers() -> None:
    """Make `${run_name:…}` known to OmegaConf."""

    def resolve(experiment: str, ablation: str, seed: int) -> str:
        overrides = HydraConfig.get().job.override_dirname if HydraConfig.initialized() else ""
        return run_name(experiment, ablation, seed, overrides)

    OmegaConf.register_new_resolver("run_name", resolve, replace=True)


def composed(overrides: list[str], conf: str | Path = CONF) -> DictConfig:
    """The settled and checked configuration of a command line; raises UserError for a mistake in it."""
    register_resolvers()
    check_spelling(overrides)
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


def check(cfg: DictConfig) -> None:
    """Settle a configuration; raises UserError for an experiment not chosen, a key nobody reads, a missing value."""
    if cfg.experiment is None:
        raise UserError(
            f"Choose what to run: python train.py +experiment=NAME, with NAME one of {_names('experiment')}."
        )
    settle(cfg)
    groups = [override.lstrip("+").split("=")[0] for override in HydraConfig.get().overrides.task]
    if [group for group in groups if group in ("experiment", "ablation")] == ["ablation", "experiment"]:
        raise UserError("Put +ablation=… after +experiment=… on the command line: the later one has the last word.")
    require_known("the configuration", set(cfg), TOP_LEVEL)
    written = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
    for key in sorted(TOP_LEVEL & set(written)):
        _check_node(key, written[key])
    if cfg.chain:
        return  # its experiments are checked when they run
    try:
        OmegaConf.to_container(cfg.evaluation or cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration is not complete: {str(error).splitlines()[0]}.") from error


def _names(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


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
