"""What a run is: what of its configuration decides the weights it ends with, and nothing else.

Two runs with the same identity end with the same weights, whatever their folders are called, wherever they compute and
whatever they show on the way. Files are known by what they hold: a folder that moved is still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllava.data.patience import Remote
from vllava.data.shards import read_sources
from vllava.errors import UserError

# What decides nothing: where a run computes, how fast, when it saves, what it shows, what it puts up with.
INDIFFERENT = (
    *("experiment", "ablation", "runs", "run_dir", "rerun", "world", "log_level", "logger", "callbacks", "hydra"),
    "foundations.search",
    *("save_minutes", "stop_seconds", "checkpoint", "preview", "validation"),
    *("data.workers", "data.token_budget", "data.cache", "data.features_gigabytes", "data.remedy", "data.held_out"),
    *("task.max_broken_share", "task.on_nan", "task.max_skipped"),
    *("model.llm.gradient_checkpointing", "model.llm.compile_layers"),
    *("evaluation.workers", "evaluation.runs", "benchmark.cache", "suites"),
)
# What decides by way of other keys, which take their values from these, or in another run.
ELSEWHERE = (
    *("recipes", "foundations", "template", "encoder", "data.seed", "data.stage1", "data.stage2", "toy"),
    *("chain", "evaluation", "benchmark", "benchmarks", "judge"),
)
JUDGE = ("_target_", "name", "model", "base_url", "prompts", "temperature", "max_tokens", "options", "template_options")
# Of the trainer all is indifferent but what is a part of the recipe.
TRAINER = (
    *("precision", "max_epochs", "max_steps", "max_time"),
    *("limit_train_batches", "overfit_batches", "fast_dev_run"),
)
# A run whose learning rate does not depend on them may be given more steps than were planned; see `grows`.
LENGTH = ("trainer.max_epochs", "trainer.max_steps")
# What decides nothing of an evaluation, or is in its benchmark.
_BESIDE = (
    *("run_dir", "remedy", "batch_size", "workers", "plots", "cache", "features", "features_gigabytes"),
    *("search", "runs", "sources"),
)
_BESIDE_BENCHMARK = ("remedy", "cache", "sources", "paper", "expected")
_DESCRIPTIONS = ("config.json", "vllava.json")  # of a model
_PIECE = 1 << 20  # bytes at each end of a weights file that tell it from another

Identity = dict[str, Any]  # nested; a file or folder is {"path": as written, "holds": its fingerprint}


def decides(key: str) -> bool:
    """Whether a value of the configuration, by its dotted key, decides what is learnt."""
    if key == "trainer" or key.startswith("trainer."):
        return any(_within(key, f"trainer.{name}") for name in TRAINER)
    return not any(_within(key, name) for name in (*INDIFFERENT, *ELSEWHERE))


def tells_apart(override: str) -> bool:
    """Whether an override of the command line makes another run of this one."""
    key = override.lstrip("+~").split("=")[0].split("@")[0]
    if "/" in key:  # a choice among files
        return not key.startswith("hydra/")
    if key == "checkpoint":
        return is_checkpoint(override)
    if key.startswith("judge."):
        return any(_within(key, f"judge.{name}") for name in JUDGE)
    return not any(_within(key, name) for name in INDIFFERENT) and (
        decides(key) or any(_within(key, name) for name in ELSEWHERE)
    )


def is_checkpoint(override: str) -> bool:
    """Whether an override is `checkpoint=PATH`, what an evaluation asks, and not a block of a training run."""
    key, _, value = override.lstrip("+~").partition("=")
    return key == "checkpoint" and not value.startswith("{") and value not in ("", "null")


def grows(settings: Mapping[str, Any]) -> bool:
    """Whether a run of these settings, or this identity, takes the same steps whatever number is planned."""
    recipe = (settings.get("task") or {}).get("recipe") or {}
    fixed_warmup = recipe.get("warmup_steps") is not None or recipe.get("warmup_ratio") == 0
    return recipe.get("schedule") == "constant" and fixed_warmup


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def identity_of(settings: Mapping[str, Any]) -> Identity:
    """The identity of a run with this settled and resolved configuration."""
    identity = _pruned(settings, "")
    data = settings.get("data") or {}
    if data.get("sources"):
        kinds = data.get("modalities") or data["sources"]
        named = {kind: listed for kind, listed in data["sources"].items() if listed and kind in kinds}
        identity["data"]["sources"] = _sources(named, data)
    watched = settings.get("validation") or {}
    if watched.get("early_stop"):  # when a run is stopped early decides too
        identity["validation"] = dict(watched)
    return _with_fingerprints(identity)


def evaluation_identity(settings: Mapping[str, Any]) -> Identity:
    """The identity of an evaluation: the checkpoint, the questions, how they are asked, and who judges the answers."""
    asked, benchmark, judge = settings["evaluation"], settings.get("benchmark") or {}, settings.get("judge") or {}
    kept = {key: value for key, value in asked.items() if key not in _BESIDE}
    sources = {kind: _sources(named, asked) for kind, named in (asked.get("sources") or {}).items() if named}
    parts = {
        "evaluation": {**kept, "sources": sources},
        "benchmark": {key: value for key, value in benchmark.items() if key not in _BESIDE_BENCHMARK},
        "judge": {key: value for key, value in judge.items() if key in JUDGE},
    }
    return {name: _with_fingerprints(part) for name, part in parts.items()}


def _sources(named: Any, block: Mapping[str, Any]) -> Any:
    """Folders of shards, in a list or by name, with what they hold."""
    if isinstance(named, Mapping):
        return {key: _sources(value, block) for key, value in named.items()}
    if isinstance(named, list):
        return [_sources(value, block) for value in named]
    return {"path": named, "holds": shards_in(named, Remote.of(block.get("cache")))}


def digest(identity: Identity) -> str:
    """The hash of an identity: of what files hold, not of where they lie."""
    known = {key: value for key, value in flat(identity) if not key.endswith(".path")}
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def flat(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each leaf; an empty list or mapping is one."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    if not items or not tree:
        yield key, tree
    for name, value in items if tree else ():
        yield from flat(value, f"{key}.{name}" if key else str(name))


def differences(before: Identity, now: Identity) -> dict[str, tuple[Any, Any]]:
    """Key -> (value before, value now) of what differs; of files that differ in what they hold, their paths.

    Where it is not known what a folder holds, for it is not there, its path decides.
    """
    old, new = (dict(flat(one)) for one in (before, now))
    found = {}
    for key in [*new, *(key for key in old if key not in new)]:
        name = key.removesuffix(".holds")
        decisive = key if None not in (old.get(key), new.get(key)) or name == key else f"{name}.path"
        if not key.endswith(".path") and old.get(decisive) != new.get(decisive):
            shown = key if name == key else f"{name}.path"
            found[name] = (old.get(shown), new.get(shown))
    return found


def in_words(found: Mapping[str, tuple[Any, Any]], form: str = "{} was {} and is {}", most: int = 4) -> str:
    """Differences in a line: `task.recipe.lr was 0.001 and is 0.0005`."""
    said = [
        form.format(key, old, new) if old != new else f"{key} ({new}) holds something else"
        for key, (old, new) in list(found.items())[:most]
    ]
    return "; ".join(said) + (f"; and {len(found) - most} more" if len(found) > most else "")


# --- files ------------------------------------------------------------------------------------------------------------


def shards_in(folder: str, cache: Remote) -> str | None:
    """The fingerprint of a source: names, sizes, counts and checksums of its shards, as its manifest lists them.

    None where it cannot be read: whoever trains on it will say why.
    """
    try:
        shards = read_sources([folder], "", cache)
    except UserError:
        return None
    listed = [(Path(str(one.path)).name, one.samples, one.size, one.sha256) for one in shards]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def checkpoint_in(folder: Path) -> str:
    """The fingerprint of a model's folder: what describes it, and of each file of weights the size and both ends."""
    found = hashlib.sha256()
    for name in _DESCRIPTIONS:
        found.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    for path in sorted([*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]):
        found.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode())
        found.update(_ends(path))
    return found.hexdigest()[:16]


def _ends(path: Path) -> bytes:
    with open(path, "rb") as file:
        first = file.read(_PIECE)
        file.seek(max(len(first), os.path.getsize(path) - _PIECE))
        return first + file.read(_PIECE)


def _file(path: Path) -> str:
    return hashlib.sha256(f"{path.stat().st_size}".encode() + _ends(path)).hexdigest()[:16]


def _pruned(tree: Mapping[str, Any], where: str) -> Identity:
    kept: Identity = {}
    for name, value in tree.items():
        key = f"{where}.{name}" if where else str(name)
        if isinstance(value, Mapping) and value and (decides(key) or key == "trainer"):
            if inner := _pruned(value, key):
                kept[name] = inner
        elif decides(key):
            kept[name] = value
    return kept


def _with_fingerprints(tree: Any) -> Any:
    """Paths of checkpoints and of files, wherever they stand, with what they hold."""
    if isinstance(tree, Mapping):
        if set(tree) == {"path", "holds"}:
            return dict(tree)
        return {key: _with_fingerprints(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_fingerprints(value) for value in tree]
    if isinstance(tree, str) and (fingerprint := _fingerprint(Path(tree))):
        return {"path": tree, "holds": fingerprint}
    return tree


def _fingerprint(path: Path) -> str | None:
    """What a file, or a folder with a model or a tokenizer, holds; None for whatever is neither."""
    try:
        if path.is_file():
            return _file(path)
        if any((path / name).is_file() for name in _DESCRIPTIONS):
            return checkpoint_in(path)
        return _file(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else None
    except OSError:  # too long a name for a file, no right to look
        return None
