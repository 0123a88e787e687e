"""How a run is spread over devices, where Lightning's own strategies need a word more."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from vllava.errors import UserError, reason

REST = "rest.ckpt"  # in a sharded checkpoint's folder: all but the weights and the states of their optimisers


class Fsdp(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes; what to resume from is a folder into which every process writes its part.

    Any number of processes can resume from it. It holds the weights that are trained, in no process as a whole.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=True)
        self._beside: Any = None  # the processes once more, so that saving in the background meets no other message
        self._last: Future | None = None  # save in the background

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self._beside = torch.distributed.new_group(backend="gloo")

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's part of each trained weight, where it lies: nothing is copied."""
        model = cast(nn.Module, self.model)
        state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
        return {name: state[name] for name, p in model.named_parameters() if p.requires_grad}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This process's part of an optimiser's states, by the names of the weights."""
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return cast(dict[str, Any], get_optimizer_state_dict(cast(nn.Module, self.model), own))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """The folder appears whole or not at all."""
        path = Path(filepath)
        unfinished = path.with_name(f"{path.name}.part")
        state = self._begin(checkpoint, unfinished)
        try:
            dcp.save(state, checkpoint_id=unfinished, process_group=self._beside)
        except CheckpointException as error:  # in all processes
            raise _unwritten(unfinished, error) from error
        if self.is_global_zero:
            shutil.rmtree(path, ignore_errors=True)
            os.replace(unfinished, path)
        self.barrier()

    def save_in_background(self, checkpoint: dict[str, Any], path: Path) -> Future:
        """Copy this process's part and write the copy to the folder `path` while training goes on.

        The future is done when every process has written its part: the folder is whole then, or the future has a
        UserError that says why not. A save waits for the one before it.
        """
        saving: Any = dcp.async_save(self._begin(checkpoint, path), checkpoint_id=path, process_group=self._beside)
        done: Future[Path] = Future()
        self._last = done

        def finish(written: Future) -> None:
            error = written.exception()
            if error is None:
                done.set_result(path)
            else:
                done.set_exception(_unwritten(path, error) if isinstance(error, CheckpointException) else error)

        (saving if isinstance(saving, Future) else saving.upload_completion).add_done_callback(finish)
        return done

    def _begin(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Make the folder and write all but the tensors, which are returned; raises UserError in all processes."""
        if self._last is not None:
            wait([self._last])
        states = {f"optimizer_{i}": state for i, state in enumerate(checkpoint["optimizer_states"])}
        failed = None
        if self.is_global_zero:
            rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                with open(folder / REST, "wb") as file:
                    file.write(_serialised(rest))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                failed = reason(error)
        if failed := self.broadcast(failed):
            raise UserError(f"{folder} cannot be written ({failed}).")
        return {"state_dict": checkpoint["state_dict"], **states}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this process's parts into the model and the optimisers; returns the rest of the checkpoint.

        Raises UserError for a checkpoint of another strategy.
        """
        path = Path(checkpoint_path)
        if not (path / REST).is_file():
            raise UserError(
                f"{path} was not saved with trainer=fsdp, which keeps a folder with {REST}. Resume with the trainer "
                "that the run began with."
            )
        model = cast(nn.Module, self.model)
        states = {f"optimizer_{i}": self.optimizer_state(optimizer) for i, optimizer in enumerate(self.optimizers)}
        # Tensors are filled where they lie, so those of the model and the optimisers themselves.
        state: dict[str, Any] = {"state_dict": self.lightning_module_state_dict(), **states}
        dcp.load(state, checkpoint_id=path, process_group=self._beside)
        for number, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(model, optimizer, state[f"optimizer_{number}"])
        return torch.load(path / REST, map_location="cpu", weights_only=weights_only)


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unwritten(folder: Path, error: CheckpointException) -> UserError:
    """What is said where some process could not write its part."""
    rank, (why, _) = min(error.failures.items())
    return UserError(f"{folder} cannot be written (process {rank}: {reason(why)}).")


class DeepSpeed(DeepSpeedStrategy):
    """DeepSpeed's ZeRO-2, which clips and steps itself; what to resume from is a folder, written by all processes."""

    config: Any

    def __init__(self, offload_optimizer: bool = False) -> None:
        super().__init__(
            stage=2, offload_optimizer=offload_optimizer, logging_batch_size_per_gpu=1, exclude_frozen_parameters=True
        )
        self.config["zero_force_ds_cpu_optimizer"] = False  # the task brings its own

    def setup(self, trainer: L.Trainer) -> None:
        task: Any = trainer.lightning_module
        self.config["gradient_clipping"] = task.recipe.clip_norm
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Gradients are added up until a backward pass outside: for all micro-batches of a step but the last."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options: Any = None) -> None:
        """The folder appears whole or not at all."""
        unfinished = f"{filepath}.part"
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)
            os.replace(unfinished, filepath)

    def trained_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained weights in float32, on the CPU of the first process; every process has to call this.

        The model's own are rounded to bfloat16 where it computes in that.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        whole = ((name, safe_get_full_fp32_param(parameter)) for name, parameter in trained)
        return {name: weight.cpu() for name, weight in whole if self.is_global_zero}
