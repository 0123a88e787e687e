"""Checkpoints in the published on-disk layout: a folder with config.json and its weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllava.errors import UserError, reading, reason
from vllava.folders import replacing, sha256_of
from vllava.model.headers import load_pickled, only_tensors, read_json, read_layout
from vllava.model.mapped import spooled

log = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_YOUNG = 2_000_000_000  # nanoseconds; clocks of file systems tick every few milliseconds, of some every two seconds
MOST_LAYERS = 1024  # of any model; the deepest published ones have some 120


class Checkpoint:
    """A local folder, or a hub id, with config.json and model.safetensors or pytorch_model.bin, in shards or whole.

    Raises UserError, which names the folder and what it lacks, on construction or on first reading.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = local_folder(path)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"No checkpoint at {self.folder}: it has no config.json. Give the folder of a saved model.")
        self.config = read_json(self.folder / "config.json")

    @property
    def weights(self) -> list[Path]:
        """The files of the weights."""
        return sorted(self._parts)

    @cached_property
    def _parts(self) -> dict[Path, set[str] | None]:
        """The files of the weights, each with the names of the tensors that an index says it has."""
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return {self.folder / name: None}
            if (self.folder / f"{name}.index.json").is_file():
                return self._indexed(f"{name}.index.json")
        raise UserError(f"The checkpoint {self.folder} has no weights: expected {' or '.join(WEIGHTS)}.")

    def _indexed(self, index: str) -> dict[Path, set[str] | None]:
        listed = read_json(self.folder / index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise UserError(f"{self.folder / index} has no weight_map that says which file each tensor is in.")
        suffix = Path(index.removesuffix(".index.json")).suffix
        parts: dict[str, set[str]] = {}
        for name, file in listed.items():
            parts.setdefault(file, set()).add(name)
        odd = [file for file in parts if Path(file).name != file or Path(file).suffix != suffix]
        self.require(not odd, f"has a {index} that lists files it may not name: {shortened(odd)}")
        lost = sorted(file for file in parts if not (self.folder / file).is_file())
        self.require(not lost, f"lacks files that its {index} lists: {shortened(lost)}")
        return {self.folder / file: names for file, names in parts.items()}

    def require(self, condition: bool, otherwise: str) -> None:
        """Raises UserError 'The checkpoint FOLDER …' unless the condition holds."""
        if not condition:
            raise UserError(f"The checkpoint {self.folder} {otherwise}.")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights, all of them read, once in a process: about 1.5 GB/s."""
        with reading(f"The checkpoint {self.folder}"):
            states = tuple(_FileState.of(path) for path in self.weights)
            # A file this young could be written again without its state telling.
            settled = all(time.time_ns() - state.modified > _YOUNG for state in states)
            return _remembered(states) if settled else sha256_of(*self.weights)

    @cached_property
    def layout(self) -> dict[str, Tensor]:
        """All tensors by name on the meta device, from the files' headers alone.

        Raises UserError where a file does not hold what it announces, or another tensor than its index says.
        """
        found: dict[str, Tensor] = {}
        for path, listed in self._parts.items():
            layout = read_layout(path)
            absent, unlisted = (listed or layout.keys()) - layout.keys(), layout.keys() - (listed or layout.keys())
            self.require(not absent, f"lacks in {path.name} what its index lists: {shortened(sorted(absent))}")
            self.require(
                not unlisted, f"has in {path.name} what its index does not list: {shortened(sorted(unlisted))}"
            )
            found |= layout
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; where the files allow it they are mapped, and take no memory until they are used."""
        _ = self.layout  # checked before anything is read
        return {name: value for path in self.weights for name, value in _read(path).items()}


class _FileState(NamedTuple):
    """A file, and what changes when it is written to."""

    path: Path
    size: int
    modified: int  # nanoseconds
    changed: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _FileState:
        found = path.stat()
        return cls(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _remembered(states: tuple[_FileState, ...]) -> str:
    return sha256_of(*(state.path for state in states))


def is_hub_id(path: str | Path) -> bool:
    """Whether a path that is no folder may be a hub id: `organisation/name`, with no folder `organisation` here."""
    parts = Path(path).parts
    return len(parts) == 2 and not Path(path).is_absolute() and not Path(parts[0]).exists()


def local_folder(path: str | Path) -> Path:
    """The folder itself, or where the files of a hub id (`organisation/name`) lie once they are downloaded.

    Raises UserError where there is neither.
    """
    with reading(f"The checkpoint {str(path)[:200]}"):
        folder = Path(path)
        if folder.exists() or not is_hub_id(path):
            return folder
        try:
            found = snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model"])
            if not any(Path(found).glob("*.safetensors")):
                snapshot_download(str(path), allow_patterns=["*.bin"])
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise UserError(
                f"There is no folder {path}, and the hub gives no model of that name ({reason(error)})."
            ) from error
        return Path(found)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file; nothing but tensors is ever unpickled.

    Raises UserError that names the file, before anything is allocated, where it does not hold what it announces.
    """
    read_layout(path)
    return _read(path)


def _read(path: Path) -> dict[str, Tensor]:
    with reading(path, "Is it a complete file of tensors?"):
        return load_file(path) if path.suffix == ".safetensors" else only_tensors(load_pickled(path))


def sized(checkpoint: Checkpoint, given: Any, keys: tuple[str, ...], where: str = "config.json") -> dict[str, int]:
    """The sizes of these names in a checkpoint's settings; raises UserError that names one that is none."""
    checkpoint.require(isinstance(given, dict), f"has settings in {where} that are no JSON object")
    for key in keys:
        most = MOST_LAYERS if "layers" in key else 1 << 24
        value = given.get(key)
        checkpoint.require(value is not None, f"has no {key} in its {where}")
        checkpoint.require(
            type(value) is int and 0 < value <= most,
            f"has {key}={str(value)[:40]} in its {where}, where a number from 1 to {most:,} is expected",
        )
    return {key: given[key] for key in keys}


def load_strictly(
    module: nn.Module, checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str, ignored: tuple[str, ...] = ()
) -> None:
    """Load the tensors under `prefix` into a module; those that start with one of `ignored` are meant to be left.

    Raises UserError that lists keys missing, left over, of another shape or type: nothing is dropped in silence.
    """
    kept = require_fit(module, checkpoint, tensors, prefix, ignored)
    module.load_state_dict({name.removeprefix(prefix): value for name, value in kept.items()})
    warn_of_no_numbers(module, checkpoint.folder)


def require_fit(
    module: nn.Module, checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str, ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors that belong to a module, see `load_strictly`; both may be on the meta device."""
    kept = {name: value for name, value in tensors.items() if not name.startswith(ignored or ("\0",))}
    kept.pop(f"{prefix}embeddings.position_ids", None)  # a constant that older versions saved
    wanted = {prefix + name: value for name, value in module.state_dict().items()}
    require_same(kept, wanted, f"{checkpoint.folder} does not fit {type(module).__name__}")
    return kept


def require_same(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], otherwise: str) -> None:
    """Raises UserError `otherwise: …` that lists names missing, left over, of another shape or type than wanted."""
    both = sorted(wanted.keys() & tensors.keys())
    refuse(
        otherwise,
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
        [
            f"shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}: {name}"
            for name in both
            if tensors[name].shape != wanted[name].shape
        ]
        + [
            f"{str(tensors[name].dtype).removeprefix('torch.')}, expected numbers of 16 bits or more: {name}"
            for name in both
            if wanted[name].dtype in FLOATS and tensors[name].dtype not in FLOATS
        ],
    )


def refuse(otherwise: str, missing: list[str], left_over: list[str], different: list[str]) -> None:
    """Raises UserError `otherwise: …` with what is listed; nothing where all lists are empty."""
    problems = [f"missing: {name}" for name in missing] + [f"left over: {name}" for name in left_over] + different
    if problems:
        raise UserError(f"{otherwise}: {shortened(problems, 12, '; ')}. Is it the checkpoint of another model?")


def shortened(names: list[str], most: int = 6, separator: str = ", ") -> str:
    """The first few of a list, in one line."""
    more = f" … and {len(names) - most} more" if len(names) > most else ""
    return separator.join(name if len(name) <= 160 else f"{name[:157]}…" for name in names[:most]) + more


@torch.no_grad()
def warn_of_no_numbers(module: nn.Module, folder: Path) -> None:
    """Logs the names of parameters that hold NaN or infinity: a model with such weights may answer nothing but noise.

    A warning and no error, since rows for tokens that nobody uses are like that in some published models.
    """
    # A sum is finite unless a number is not, or the numbers are huge: only then does each have to be looked at.
    found = [n for n, p in module.named_parameters() if p.is_floating_point() and not p.sum().isfinite()]
    found = [n for n in found if not module.get_parameter(n).isfinite().all()]
    if found:
        log.warning("%s has weights that are no numbers (NaN or infinite): %s", folder, shortened(found))


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """`write_half`; the folder appears whole or not at all, in place of none but one that we wrote."""
    with replacing(folder) as unfinished:
        write_half(model, unfinished)


def write_half(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` in float16, as public checkpoints are kept, a weight at a time in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = spooled(((name, value.half()) for name, value in model.state_dict().items()), folder)
    model.save_pretrained(folder, state_dict=halves)


def write_tensors(tensors: dict[str, Tensor], folder: Path, name: str | None = None) -> None:
    """Tensors as safetensors: in the file `name`, or as a model's weights, in shards where they are large."""
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if name:
        save_file(whole, folder / name)
    else:
        save_torch_state_dict(whole, folder, metadata={"format": "pt"})
