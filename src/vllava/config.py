"""A configuration composed, settled (whose data a run reads) and checked, before any work is done."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import logging
import re
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

from vllava.errors import UserError
from vllava.sources import MODALITIES, REMEDY, STAGES, Folders, check_spelling, folders, questions, united

log = logging.getLogger(__name__)

CONF = Path(__file__).parents[2] / "conf"
# fmt: off
TOP_LEVEL = {
    "experiment", "ablation", "seed", "chain", "runs", "run_dir", "world", "log_level", "save_minutes",
    "model", "foundations", "recipes", "tokenizer", "template", "encoder", "projector", "data", "task", "trainer",
    "logger", "preview", "evaluation", "toy",
}
# fmt: on
EVALUATE = "evaluate"  # the experiment of a chain that asks held-out shards
NAME_HELD_OUT = "Name some that no stage trains on: data.held_out.image=[FOLDER, …]"
OWN_ANSWERS = 64  # tokens of an answer at most, where evaluation.max_new_tokens leaves it open
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
    _known("the configuration", set(cfg), TOP_LEVEL)
    written = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
    for key in sorted(TOP_LEVEL & set(written)):
        _check_node(key, written[key])
    if cfg.chain:
        return  # its experiments are checked when they run
    try:
        OmegaConf.to_container(cfg.evaluation or cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration is not complete: {str(error).splitlines()[0]}.") from error


def settle(cfg: DictConfig) -> None:
    """Decide, in place, which folders a run reads: those that are named, or, where none is, the toy world's.

    Naming any source of training replaces all of the toy world, its previews and evaluation included. What a stage's
    own block says (data.stage1, data.stage2) holds in that stage; the command line has the last word. Afterwards
    `data`, `preview` and `evaluation` hold what is used, with the remedy that fits, and `toy` and the blocks are gone:
    a second call changes nothing. Warns of what is named and not used; raises UserError where nothing is left to read.
    """
    if "toy" not in cfg:
        return
    with open_dict(cfg):
        toy = _taken(cfg, "toy")
        _known("toy", set(toy), {"data", "preview", "evaluation"})
        blocks = {stage: _taken(cfg.data, stage) for stage in STAGES}
        held_out = folders("data.held_out", _taken(cfg.data, "held_out"))
        named = {"": folders("data.sources", _taken(cfg.data, "sources"))}
        for stage, block in blocks.items():
            if not isinstance(block, dict):
                raise UserError(f"data.{stage} holds settings of that stage: data.{stage}.sources.image=[FOLDER, …]")
            named[stage] = folders(f"data.{stage}.sources", block.pop("sources", None))
        own = any(any(sources.values()) for sources in named.values())
        if cfg.chain:
            stages = [name for name in cfg.chain if own and name != EVALUATE]
            cfg.data.sources = united([_own_sources(cfg, name, named) for name in stages])
        else:
            cfg.data.update(_of_stage(cfg.experiment, blocks))
            if own and cfg.experiment != EVALUATE:
                cfg.data.sources = _own_sources(cfg, cfg.experiment, named)
                _fill(cfg.data, {"remedy": REMEDY})
            else:
                _fill(cfg.data, toy.get("data", {}))
        if not own and named[""]:
            raise UserError(
                f"data.sources.{next(iter(named['']))}=[] names no folder. To leave a modality of the toy world out, "
                "name the others: data.modalities=[image, video]"
            )
        _settle_preview(cfg, held_out, own, toy.get("preview"))
        _settle_evaluation(cfg, held_out, own, toy.get("evaluation", {}))
        trained = {folder for sources in named.values() for listed in sources.values() for folder in listed}
        for folder in [f for asked in _asked(cfg).values() for f in asked.values() if f in trained]:
            log.warning("%s is evaluated on and trained on: its figures say what was learnt by heart", folder)


def _settle_preview(cfg: DictConfig, held_out: Folders, own: bool, toys: dict | None) -> None:
    if cfg.preview is None:
        return
    shown = _of_run(cfg, folders("preview", _plain(cfg, "preview"))) or _of_run(cfg, held_out)
    cfg.preview = {**shown, "remedy": REMEDY} if shown else None if own else toys


def _settle_evaluation(cfg: DictConfig, held_out: Folders, own: bool, toys: dict) -> None:
    node = cfg.evaluation
    asked = _of_run(cfg, _asked(cfg)) or _of_run(cfg, questions("data.held_out", held_out))
    if not node or "_target_" not in node:
        if not cfg.chain or (own and not asked):
            cfg.evaluation = None
        elif asked:
            cfg.evaluation = {"sources": asked}
    elif asked:
        node.sources = asked
        _fill(node, {"remedy": REMEDY, "max_new_tokens": OWN_ANSWERS})
    elif own:
        raise UserError(f"No held-out shards are named, so there is nothing to evaluate. {NAME_HELD_OUT}")
    else:
        node.sources = None
        _fill(node, toys)


def _asked(cfg: DictConfig) -> dict[str, dict[str, str]]:
    return questions("evaluation.sources", _plain(cfg.evaluation, "sources") if cfg.evaluation else None)


def _own_sources(cfg: DictConfig, experiment: str, named: dict[str, Folders]) -> Folders:
    """The folders that an experiment trains on, where a user named any; raises UserError where none is left."""
    stage = _stage(experiment)
    apart = named.get(stage, {})
    key = f"data.{stage}.sources" if any(apart.values()) and _has_last_word(stage, "sources") else "data.sources"
    chosen = {kind: listed for kind, listed in (apart if key != "data.sources" else named[""]).items() if listed}
    if not chosen:
        raise UserError(
            f"{experiment} has no data: folders are named, but none for it. Name some: data.sources.image=[FOLDER, …] "
            f"for both stages, or data.{stage}.sources.image=[FOLDER, …]"
        )
    used = _of_run(cfg, chosen)
    left_out = ", ".join(f"{key}.{kind}" for kind in chosen if kind not in used)
    takes = f"this run takes {' and '.join(_modalities(cfg))} alone (ablation {cfg.ablation}, data.modalities)"
    if not used:
        raise UserError(f"Nothing is left to train on in {experiment}: {takes}, and only {left_out} is named.")
    if left_out and not cfg.chain:
        log.warning("%s: %s is not used: %s", experiment, left_out, takes)
    return used


def _of_stage(experiment: str, blocks: dict[str, dict]) -> dict:
    """What the block of an experiment's stage changes in `data`."""
    stage = _stage(experiment)
    return {key: value for key, value in blocks.get(stage, {}).items() if _has_last_word(stage, key)}


def _has_last_word(stage: str, key: str) -> bool:
    """Whether a stage's value holds: not where the command line names the common key alone."""
    given = [o.lstrip("+~") for o in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    common, apart = (any(re.match(rf"{name}[.=]", o) for o in given) for name in (f"data.{key}", f"data.{stage}.{key}"))
    return apart or not common


def _stage(experiment: str) -> str:
    return experiment.removesuffix("_lora")


def _modalities(cfg: DictConfig) -> list[str]:
    listed = _plain(cfg.data, "modalities")
    return [listed] if isinstance(listed, str) else listed or list(MODALITIES)


def _of_run(cfg: DictConfig, named: dict[str, Any]) -> dict[str, Any]:
    """What is named of the modalities that the run takes."""
    return {kind: value for kind, value in named.items() if value and kind in _modalities(cfg)}


def _fill(node: DictConfig, values: dict) -> None:
    """Set what a node leaves open."""
    for key, value in values.items():
        if node.get(key) is None:
            node[key] = value


def _plain(node: DictConfig, key: str) -> Any:
    """A value with its interpolations resolved; None where there is none."""
    if key not in node or OmegaConf.is_missing(node, key):
        return None
    value = node[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _taken(node: DictConfig, key: str) -> Any:
    """What a node holds under a key, which is removed from it."""
    value = _plain(node, key)
    node.pop(key, None)
    return value or {}


def _names(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


def _known(where: str, keys: set[str], known: set[str]) -> None:
    for key in sorted(map(str, keys - known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}."
        raise UserError(f"Unknown key {key!r} in {where}: {hint}")


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
        _known(where, set(node) - _HYDRA_KEYS, set(parameters) | ({*STAGES, "held_out"} if where == "data" else set()))
    for key, value in node.items():
        hint = next((h for h in typing.get_args(hints.get(key)) if dataclasses.is_dataclass(h)), hints.get(key))
        if dataclasses.is_dataclass(hint) and isinstance(value, dict):
            _known(f"{where}.{key}", set(value), {field.name for field in dataclasses.fields(hint)})
        else:
            _check_node(f"{where}.{key}", value)


def _parameters(target: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(target).parameters)
