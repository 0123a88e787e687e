"""How a run is spread over devices, where Lightning's own strategies need a word more."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy


class Fsdp(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes; what to resume from is one file, written by the first process."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
