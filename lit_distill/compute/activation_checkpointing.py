"""What the backward pass computes again instead of keeping it, and where the rest is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from lit_distill.compute.recompute_pruning import RecomputePlan, recorded_outputs, unused_layers
from lit_distill.compute.step_adapters import StepAdapters

Checkpointing = Literal["none", "block", "selective", "step", "nested"]

MODES_BY_MEMORY: tuple[Checkpointing, ...] = ("nested", "step", "block", "selective", "none")
"""Checkpointing modes, the one that stores least first."""

BLOCKWISE_MODES: tuple[Checkpointing, ...] = ("nested", "block", "selective")
"""Those that run the denoiser's blocks again one by one."""


def check_mode(checkpointing: str, offload: bool) -> None:
    """Refuse what is not a way to checkpoint.

    Raises:
        ValueError: If the mode is not known, or keeps no inputs of blocks that could be offloaded.
    """
    if checkpointing == "auto":
        raise ValueError(
            "checkpointing auto is chosen when a training with DistillDataModule begins, and does "
            "not count with offloading; name one of " + ", ".join(get_args(Checkpointing))
        )
    if checkpointing not in get_args(Checkpointing):
        raise ValueError(
            f"checkpointing must be one of {', '.join(get_args(Checkpointing))}, "
            f"got {checkpointing!r}"
        )
    if offload and checkpointing not in ("block", "selective"):
        raise ValueError(
            f"offloading moves the inputs of blocks to the host: with checkpointing "
            f"{checkpointing} there is nothing to move; use block or selective"
        )


_BLOCKS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many blocks a call of a denoiser runs, once a rollout has counted them."""

_UNUSED: WeakKeyDictionary[Any, dict[Any, frozenset[Any]]] = WeakKeyDictionary()
"""Layers of a block that are skipped when it runs again, by what requires gradients."""


class Blocks:
    """A denoiser's forward with diffusers' gradient checkpointing of its blocks.

    The backward pass begins with what ran last: to drop and to run again the last block would free
    nothing. So it is kept, from the second rollout on, for its number has to be known.

    Args:
        denoiser: The denoiser.
        forward: Its forward.
        keep_attention: Keep what attention has computed, and run again all but that.
        offload: Keep the blocks' inputs in the host's memory.

    Raises:
        ValueError: If the denoiser does not support gradient checkpointing.
    """

    def __init__(
        self,
        denoiser: Any,  # noqa: ANN401
        forward: Callable[..., Any],
        *,
        keep_attention: bool = False,
        offload: bool = False,
    ) -> None:
        switched = (m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing"))
        self.modules = [m for m in switched if m.gradient_checkpointing is False]
        if not getattr(denoiser, "_supports_gradient_checkpointing", False):
            raise ValueError(
                f"{type(denoiser).__name__} does not support gradient checkpointing of its blocks; "
                "use checkpointing: step"
            )
        self.denoiser, self.forward, self.offload = denoiser, forward, offload
        self.keep_attention = keep_attention
        self.loras = StepAdapters.of(denoiser)
        self.last = _BLOCKS.get(denoiser, 0)
        denoiser.enable_gradient_checkpointing(self._block)
        self._switch(False)

    def run(self, keep_last: bool, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return what forward does.

        The switch is set within, not around, the call: with ``nested`` the call runs again in the
        backward pass, after the rollout has returned.

        Args:
            keep_last: Whether the backward pass is going to begin with the last block.
            *args: Those of the forward.
            **kwargs: Those of the forward.
        """
        self.done, self.keep_last = 0, keep_last
        self._switch(True)
        try:
            output = self.forward(*args, **kwargs)
        finally:
            self._switch(False)
        _BLOCKS[self.denoiser] = self.done
        return output

    def _switch(self, on: bool) -> None:
        for module in self.modules:
            module.gradient_checkpointing = on
            # Another rollout's may have come between: a batch can be drawn in parts.
            module._gradient_checkpointing_func = self._block

    def _block(self, block: Any, *args: Any) -> Any:  # noqa: ANN401
        self.done += 1
        if self.keep_last and self.done == self.last:
            return block(*args)
        plan = RecomputePlan()

        def contexts() -> Any:  # noqa: ANN401
            if not self.keep_attention:
                return nullcontext(), plan.again()
            first, again = _keeping_attention()
            return first, _both(again, plan.again())

        key = (sum(p.requires_grad for p in block.parameters()), *map(_wants_gradient, args))
        known = _UNUSED.setdefault(block, {})
        # To pinned memory, without waiting for the copy; on a CPU it is a plain copy.
        with (
            save_on_cpu(pin_memory=True) if self.offload else nullcontext(),
            recorded_outputs() as layers,
        ):
            # `__call__`, since checkpoint would take a module's attributes for its own options.
            call = self.loras.as_now(block.__call__)
            output = checkpoint(call, *args, use_reentrant=False, context_fn=contexts)
        if key not in known:
            known[key] = unused_layers(_tensors(output), _tensors(args), layers)
        plan.skip = known[key]
        return output


def _wants_gradient(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _keeping_attention() -> Any:  # noqa: ANN401
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    keep = _is_attention(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_attention(op: torch._ops.OpOverload) -> bool:
    """Return whether an operation is a fused attention: torch's own, or flash-attn's, xformers'."""
    name: str = op.name()  # type: ignore[no-untyped-call]
    return any(word in name for word in ("attention", "attn", "flash")) and "backward" not in name
