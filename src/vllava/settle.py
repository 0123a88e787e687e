"""Whose data a run reads: a user's own, where any are named, else the toy world's."""

from __future__ import annotations

import logging
import re
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from vllava.data.address import shown
from vllava.errors import UserError, require_known
from vllava.sources import MODALITIES, REMEDY, STAGES, Folders, folders, questions, united

log = logging.getLogger(__name__)

HELD_OUT = "vllava.evaluation.benchmarks.held_out.HeldOut"  # the benchmark that asks shards
EVALUATE = "evaluate"  # the experiment of a chain that asks held-out shards
NAME_HELD_OUT = "Name some that no stage trains on: data.held_out.image=[FOLDER, …]"
OWN_ANSWERS = 64  # tokens of an answer at most, where evaluation.max_new_tokens leaves it open


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
        require_known("toy", set(toy), {"data", "preview", "evaluation", "benchmark"})
        _settle_checkpoint(cfg)
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
        _settle_evaluation(cfg, held_out, own, toy.get("evaluation", {}), toy.get("benchmark", {}))
        _settle_validation(cfg, held_out, own, toy.get("preview"))
        trained = {folder for sources in named.values() for listed in sources.values() for folder in listed}
        for folder in [f for asked in _asked(cfg).values() for f in asked.values() if f in trained]:
            _warn("%s is evaluated on and trained on: its figures say what was learnt by heart", shown(folder))


@rank_zero_only
def _warn(message: str, *values: object) -> None:
    """Said by the first process alone: each of a run settles its configuration by itself."""
    log.warning(message, *values)


def _settle_preview(cfg: DictConfig, held_out: Folders, own: bool, toys: dict | None) -> None:
    if cfg.preview is None:
        return
    shown = _of_run(cfg, folders("preview", _plain(cfg, "preview"))) or _of_run(cfg, held_out)
    cfg.preview = {**shown, "remedy": REMEDY} if shown else None if own else toys


def _settle_checkpoint(cfg: DictConfig) -> None:
    """`checkpoint=PATH` says what is evaluated; in a training run, `checkpoint` is a block of its own."""
    if not isinstance(cfg.checkpoint, str):
        return
    if not cfg.evaluation or "_target_" not in cfg.evaluation:
        raise UserError(
            f"checkpoint={cfg.checkpoint} is for +experiment={EVALUATE}. A stage starts from projector=PATH; when it "
            "saves is said by checkpoint.every_steps and what is beside it."
        )
    cfg.evaluation.checkpoint, cfg.checkpoint = cfg.checkpoint, None


def _settle_evaluation(cfg: DictConfig, held_out: Folders, own: bool, toys: dict, benchmark: dict) -> None:
    node = cfg.evaluation
    asked = _of_run(cfg, _asked(cfg)) or _of_run(cfg, questions("data.held_out", held_out))
    if not node or "_target_" not in node:
        if not cfg.chain or (own and not asked):
            cfg.evaluation = None
        elif asked:
            cfg.evaluation = {"sources": asked}
        cfg.benchmark = cfg.judge = None
    elif cfg.benchmarks:
        node.sources = cfg.benchmark = cfg.judge = None  # each of them settles its own
    elif not cfg.benchmark or cfg.benchmark.get("_target_") != HELD_OUT:
        node.sources = None
    elif asked:
        node.sources = asked
        _fill(node, {"remedy": REMEDY, "max_new_tokens": OWN_ANSWERS})
    elif own:
        raise UserError(f"No held-out shards are named, so there is nothing to evaluate. {NAME_HELD_OUT}")
    else:
        node.sources = None
        _fill(node, toys)
        _fill(cfg.benchmark, benchmark)
    if cfg.benchmark and cfg.benchmark.get("_target_") == HELD_OUT:
        _fill(cfg.benchmark, {key: _plain(node, key) for key in ("sources", "remedy", "cache", "max_new_tokens")})
        _fill(cfg.benchmark, {"sources": {}, "groups": {}})


def _settle_validation(cfg: DictConfig, held_out: Folders, own: bool, toys: dict | None) -> None:
    """Which held-out shards a run looks at while it trains: its own, those of the evaluation, or those of previews."""
    node = cfg.validation
    if not node or node.every_steps is None or cfg.chain or cfg.experiment == EVALUATE:
        return
    named = questions("validation.sources", _plain(node, "sources"))
    shown = {key: value for key, value in (_plain(cfg, "preview") or {}).items() if key != "remedy"}
    candidates = [named, _asked(cfg), questions("data.held_out", held_out), questions("preview", shown)]
    toy = {} if own or not toys else {key: value for key, value in toys.items() if key != "remedy"}
    found = next((f for c in [*candidates, questions("preview", toy)] if (f := _of_run(cfg, c))), None)
    if not found:
        raise UserError(f"validation.every_steps={node.every_steps}, but no held-out shards are named. {NAME_HELD_OUT}")
    node.sources = found
    node.remedy = toys["remedy"] if toys and not own else REMEDY


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
        _warn("%s: %s is not used: %s", experiment, left_out, takes)
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
