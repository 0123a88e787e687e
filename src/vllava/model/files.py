"""Checkpoints in the published on-disk layout: a folder with config.json and its weights."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllava.errors import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """A local folder, or a hub id, with config.json and model.safetensors or pytorch_model.bin, in shards or whole.

    Raises UserError, which names the folder and what it lacks, on construction or on first reading.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = local_folder(path)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"No checkpoint at {self.folder}: it has no config.json. Give the folder of a saved model.")
        self.config = self._json("config.json")

    def _json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except ValueError as error:
            raise UserError(f"{self.folder / name} is not valid JSON ({error}).") from error

    @cached_property
    def weights(self) -> list[Path]:
        """The files of the weights."""
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return [self.folder / name]
            if (self.folder / f"{name}.index.json").is_file():
                shards = self._json(f"{name}.index.json").get("weight_map", {})
                files = [self.folder / shard for shard in sorted(set(shards.values()))]
                lost = [file.name for file in files if not file.is_file()]
                self.require(bool(files) and not lost, f"lacks files that its {name}.index.json lists: {lost}")
                return files
        raise UserError(f"The checkpoint {self.folder} has no weights: expected {' or '.join(WEIGHTS)}.")

    def require(self, condition: bool, otherwise: str) -> None:
        """Raises UserError 'The checkpoint FOLDER …' unless the condition holds."""
        if not condition:
            raise UserError(f"The checkpoint {self.folder} {otherwise}.")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights."""
        digest = hashlib.sha256()
        for path in self.weights:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: value for path in self.weights for name, value in read_tensors(path).items()}


def local_folder(path: str | Path) -> Path:
    """The folder itself, or where the files of a hub id (`organisation/name`) lie once they are downloaded.

    Raises UserError where there is neither.
    """
    folder = Path(path)
    is_hub_id = len(folder.parts) == 2 and not folder.is_absolute() and not Path(folder.parts[0]).exists()
    if folder.exists() or not is_hub_id:
        return folder
    try:
        found = snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.model"])
        if not any(Path(found).glob("*.safetensors")):
            snapshot_download(str(path), allow_patterns=["*.bin"])
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"There is no folder {path}, and the hub gives no model of that name ({reason}).") from error
    return Path(found)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file; nothing but tensors is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a file of tensors ({error}). Is it complete?") from error


def load_strictly(
    module: nn.Module, checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str, ignored: tuple[str, ...] = ()
) -> None:
    """Load the tensors under `prefix` into a module; those that start with one of `ignored` are meant to be left.

    Raises UserError that lists keys missing, left over or of another shape: nothing is dropped in silence.
    """
    kept = {name: value for name, value in tensors.items() if not name.startswith(ignored or ("\0",))}
    kept.pop(f"{prefix}embeddings.position_ids", None)  # a constant that older versions saved
    wanted = {prefix + name: value for name, value in module.state_dict().items()}
    require_same(kept, wanted, f"{checkpoint.folder} does not fit {type(module).__name__}")
    module.load_state_dict({name.removeprefix(prefix): value for name, value in kept.items()})


def require_same(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], otherwise: str) -> None:
    """Raises UserError `otherwise: …` that lists names missing, left over or of another shape than wanted."""
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"left over: {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}: {name}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(f"{otherwise}: {'; '.join(problems[:12])}{more}. Is it the checkpoint of another model?")


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` in float16, as public checkpoints are kept; the folder appears whole or not at all."""
    with replacing(folder) as unfinished:
        half = {name: value.half() for name, value in model.state_dict().items()}
        model.save_pretrained(unfinished, state_dict=half)


def write_tensors(tensors: dict[str, Tensor], folder: Path, name: str | None = None) -> None:
    """Tensors as safetensors: in the file `name`, or as a model's weights, in shards where they are large."""
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    if name:
        save_file(whole, folder / name)
    else:
        save_torch_state_dict(whole, folder, metadata={"format": "pt"})


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
