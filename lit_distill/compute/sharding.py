"""Sharding of a denoiser with FSDP2: each process stores a part of every block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.compute.repeated_blocks import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(denoiser: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard each repeated block, then the remaining parameters; compute in `dtype`.

    Raises:
        RuntimeError: If a parameter was not sharded: its gradient would be wrong.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the pipeline chooses them: timesteps may be float32
    )
    # The root comes last. Without it the gradients of parameters outside the blocks would not be
    # reduced. It reshards after the forward, too, since no backward may follow (validation, EMA).
    blocks = [block for blocks in repeated_blocks(denoiser).values() for block in blocks]
    for module in [*reversed(blocks), denoiser]:  # inner modules first
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    unsharded = [n for n, p in denoiser.named_parameters() if not isinstance(p, DTensor)]
    if unsharded:
        raise RuntimeError(f"{type(denoiser).__name__}: {unsharded[:3]} were not sharded")


def broadcast_state_dict(state: dict[str, Any], denoiser: nn.Module) -> None:
    """Load weights that only process 0 has into a sharded denoiser."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(denoiser, state, options=options)


def replicate(module: nn.Module) -> None:
    """Keep a small module whole on every process, the same everywhere, its gradients averaged.

    For modules beside sharded ones; DDP does it by itself.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the host where `keep` is set, else nothing; a collective."""
    full = ((name, full_tensor(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in full if keep}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor itself, with its graph."""
    local = getattr(tensor, "to_local", None)
    return local() if local else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on every process. Gathers sharded tensors, which is a collective."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def shard_like(like: Tensor, value: Tensor) -> Tensor:
    """Shard and place a whole tensor, the same on every process, as `like` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if isinstance(like, DTensor):
        value = distribute_tensor(value, like.device_mesh, like.placements)
    return value


@torch.no_grad()
def assign_tensor(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every process, into a possibly sharded one."""
    target.copy_(shard_like(target, value))
