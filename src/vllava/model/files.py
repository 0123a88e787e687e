"""Checkpoints in the published on-disk layout: a folder with config.json and its weights."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllava.errors import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Checkpoint:
    """A folder with config.json and model.safetensors or pytorch_model.bin.

    Raises UserError, which names the folder and what it lacks, on construction or on first reading.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"No checkpoint at {self.folder}: it has no config.json. Give the folder of a saved model.")
        try:
            self.config = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            raise UserError(f"{self.folder / 'config.json'} is not valid JSON ({error}).") from error
        found = [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]
        self.require(bool(found), f"has no weights: expected {' or '.join(WEIGHTS)}")
        self.weights = found[0]

    def require(self, condition: bool, otherwise: str) -> None:
        """Raises UserError 'The checkpoint FOLDER …' unless the condition holds."""
        if not condition:
            raise UserError(f"The checkpoint {self.folder} {otherwise}.")

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights file."""
        digest = hashlib.sha256()
        with open(self.weights, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return read_tensors(self.weights)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file; nothing but tensors is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a file of tensors ({error}). Is it complete?") from error


def load_strictly(module: nn.Module, checkpoint: Checkpoint, prefix: str, ignored: tuple[str, ...] = ()) -> None:
    """Load the tensors under `prefix` into a module; those that start with one of `ignored` are meant to be left.

    Raises UserError that lists keys missing, left over or of another shape: nothing is dropped in silence.
    """
    tensors = {name: value for name, value in checkpoint.tensors().items() if not name.startswith(ignored or ("\0",))}
    tensors.pop(f"{prefix}embeddings.position_ids", None)  # a constant that older versions saved
    wanted = {prefix + name: value for name, value in module.state_dict().items()}
    problems = [f"missing: {name}" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"left over: {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}: {name}"
        for name in sorted(wanted.keys() & tensors.keys())
        if tensors[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(
            f"{checkpoint.weights} does not fit {type(module).__name__}: {'; '.join(problems[:12])}{more}. "
            "Is it the checkpoint of another model?"
        )
    module.load_state_dict({name.removeprefix(prefix): value for name, value in tensors.items()})


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """`save_pretrained` in float16, as public checkpoints are kept; the folder appears whole or not at all."""
    with replacing(folder) as unfinished:
        half = {name: value.half() for name, value in model.state_dict().items()}
        model.save_pretrained(unfinished, state_dict=half)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends without an error."""
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
