"""Lightning's strategy ``fsdp2``: parameters, gradients and optimizer state sharded."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lit_distill.compute.sharding import assign_tensor, full_tensor, shard_like
from lit_distill.training.checkpoint_io import check_state, read_checkpoint


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes; ``strategy: fsdp2``.

    A checkpoint is one file, as with any other strategy: it is written atomically, holds no pickled
    code, and loads on any number of processes and in `load_student`. Process 0 gathers it in host
    memory (with AdamW, three times the size of the trained weights).
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Shard over all processes: Lightning's default is one shard per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what trains, unsharded; on process 0 only."""
        module: Any = self.lightning_module
        return self._gather(module.trained())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state as it is without sharding; on process 0 only."""
        content = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return content | {"state": {i: self._gather(s) for i, s in content["state"].items()}}

    def _gather(self, tensors: dict[str, Any]) -> dict[str, Any]:
        gathered = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor.detach()) if isinstance(tensor, Tensor) else tensor
            if self.is_global_zero:
                gathered[name] = full.cpu() if isinstance(full, Tensor) else full
        return gathered

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:  # noqa: ANN401
        """Load weights and optimizer state into the shards, and return the rest.

        The file's checksums are verified on every process. Then it is memory-mapped, and one tensor
        at a time is sharded.

        Raises:
            InputError: If it is not a checkpoint of this package, or does not fit.
        """
        path = self.broadcast(checkpoint_path)
        content = read_checkpoint(path, mmap=True)
        self.checkpoint_io.last = str(path), int(content["global_step"])  # type: ignore[attr-defined]
        module: Any = self.lightning_module
        trained = module.trained()
        state = content.pop("state_dict")
        check_state(state, trained, f"checkpoint {path}")
        for name, parameter in trained.items():
            assign_tensor(parameter, state[name])
        for optimizer, saved in zip(
            self.optimizers, content.get("optimizer_states", []), strict=False
        ):
            _load_optimizer(optimizer, saved)
        return content


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load the state that an optimizer of unsharded parameters saved."""
    state = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in saved["state"].items():
        like = parameters[index]
        state[index] = {
            name: shard_like(like, value) if getattr(value, "shape", None) == like.shape else value
            for name, value in entries.items()
        }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


StrategyRegistry.register("fsdp2", FSDP2, "FSDP2 over all processes, one checkpoint file")
