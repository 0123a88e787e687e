"""How a run is spread over devices, where Lightning's own strategies need a word more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn


class Fsdp(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes; what to resume from is one file, written by the first process."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


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
