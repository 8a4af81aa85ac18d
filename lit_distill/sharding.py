"""FSDP2: a denoiser that no single GPU holds, each process keeping its share of every block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_distill.checkpoints import check_state, read_checkpoint
from lit_distill.families import (
    denoiser_classes,
    denoisers,
    pipeline_source,
    repeated_blocks,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh


class FSDP2(ModelParallelStrategy):
    """Shards parameters, gradients and optimizer state over all processes; ``strategy: fsdp2``.

    A checkpoint is one file, as with any other strategy: it is complete or absent, holds no pickled
    code, and loads on any number of processes and in `load_student`. Process 0 gathers it in host
    memory (what is trained, three times over with AdamW).
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Let every process hold a part: Lightning's default is one part a node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what trains, whole; on process 0 only."""
        module: Any = self.lightning_module
        return self._gather(module.trained())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimizer's state, whole, as it is without sharding; on process 0 only."""
        content = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return content | {"state": {i: self._gather(s) for i, s in content["state"].items()}}

    def _gather(self, tensors: dict[str, Any]) -> dict[str, Any]:
        gathered = {}
        for name, tensor in tensors.items():
            full = whole(tensor.detach()) if isinstance(tensor, Tensor) else tensor
            if self.is_global_zero:
                gathered[name] = full.cpu() if isinstance(full, Tensor) else full
        return gathered

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:  # noqa: ANN401
        """Load weights and optimizer state into the shards, and return the rest.

        The file is mapped, not read, and handed out one tensor at a time.

        Raises:
            ValueError: If it is no checkpoint of this package, or does not fit.
        """
        path = Path(self.broadcast(checkpoint_path))
        content = read_checkpoint(path, mmap=True)
        module: Any = self.lightning_module
        trained = module.trained()
        state = content.pop("state_dict")
        check_state(state, trained, f"checkpoint {path}")
        for name, parameter in trained.items():
            assign(parameter, state[name])
        for optimizer, saved in zip(
            self.optimizers, content.get("optimizer_states", []), strict=False
        ):
            _load_optimizer(optimizer, saved)
        return content


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load state as an optimizer of whole parameters saved it."""
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


def load_sharded(
    load: Callable[[], DiffusionPipeline],
    load_rest: Callable[..., DiffusionPipeline],
    empty: dict[str, Any],
    prepare: Callable[[DiffusionPipeline], None],
    mesh: DeviceMesh,
    device: torch.device,
) -> DiffusionPipeline:
    """Return a pipeline whose trainable denoisers are sharded over the mesh.

    Process 0 alone reads the denoisers' weights and hands them out; host memory of the others
    never holds them.

    Args:
        load: Loads the whole pipeline; called on process 0.
        load_rest: Loads it with the components it is given; called on the others.
        empty: The denoisers without memory, of `empty_denoisers`.
        prepare: Makes a pipeline's denoisers trainable.
        mesh: One-dimensional mesh of all processes.
        device: Where this process's shards go.
    """
    full: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}
    if mesh.get_rank() == 0:
        pipe = load()
        dtypes = {key: denoiser.dtype for key, denoiser in denoisers(pipe).items()}
        prepare(pipe)  # draws the adapters just as without sharding
        full = denoisers(pipe)
        pipe.register_modules(**empty)
    else:
        pipe = load_rest(**empty)
    (dtypes,) = _broadcast(dtypes)
    for key, denoiser in denoisers(pipe).items():
        nn.Module.to(denoiser, dtypes[key])  # diffusers' own talks of what it keeps in float32
    prepare(pipe)
    for key, denoiser in denoisers(pipe).items():
        shard(denoiser, mesh, dtypes[key])
        denoiser._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        _hand_out(full[key].state_dict() if full else {}, denoiser)
        full.pop(key, None)
    return pipe


def _broadcast(thing: Any) -> list[Any]:  # noqa: ANN401
    things = [thing]
    torch.distributed.broadcast_object_list(things, src=0)
    return things


def empty_denoisers(name: str, revision: str | None) -> dict[str, Any]:
    """Return the pipeline's denoisers as their configuration describes them, without memory."""
    from accelerate import init_empty_weights

    source = pipeline_source(name)
    empty: dict[str, Any] = {}
    for key, kind in denoiser_classes(name, revision).items():
        config = kind.load_config(source, subfolder=key, revision=revision)
        with init_empty_weights():  # a meta device context breaks tables made on the host
            empty[key] = kind.from_config(config).eval()
    return empty


def shard(denoiser: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard each repeated block, then the rest, for arithmetic in `dtype`.

    Raises:
        RuntimeError: If a trainable parameter is left whole: its gradient would be wrong.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the pipeline's own: timesteps may be float32
    )
    # The root comes last: without it, parameters outside the blocks get each process's own
    # gradient. It reshards after a forward too, which no backward may follow (validation, EMA).
    blocks = [block for each in repeated_blocks(denoiser).values() for block in each]
    for module in [*reversed(blocks), denoiser]:  # inner ones first
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    whole = [n for n, p in denoiser.named_parameters() if not isinstance(p, DTensor)]
    if whole:
        raise RuntimeError(f"{type(denoiser).__name__}: {whole[:3]} were not sharded")


def _hand_out(state: dict[str, Any], denoiser: nn.Module) -> None:
    """Fill a sharded denoiser with the weights that process 0 has."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(denoiser, state, options=options)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as one, on every process; sharded ones are gathered, a collective."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def shard_like(like: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor, the same on every process, sharded and placed as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements)
    return value


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, the same on every process, into a possibly sharded one."""
    target.copy_(shard_like(target, value))
