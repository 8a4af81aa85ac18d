"""Activation checkpointing of a denoiser, by block, with optional offloading to host memory.

Checkpointing of whole denoiser calls (modes ``step`` and ``nested``) is in `pipelines.rollout`.
"""

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

from lit_distill.compute.recompute_pruning import SkippedLayers, recorded_outputs, unused_layers
from lit_distill.compute.step_adapters import StepAdapters
from lit_distill.errors import InputError

Checkpointing = Literal["none", "block", "selective", "step", "nested"]

MODES_BY_MEMORY: tuple[Checkpointing, ...] = ("nested", "step", "block", "selective", "none")
"""Checkpointing modes, from the least activation memory to the most."""

BLOCKWISE_MODES: tuple[Checkpointing, ...] = ("nested", "block", "selective")
"""Modes that recompute the denoiser block by block."""


def check_mode(checkpointing: str, offload: bool) -> None:
    """Check that the checkpointing mode is known and works with offloading.

    Raises:
        ValueError: If the mode is unknown, or stores no block inputs that could be offloaded.
    """
    if checkpointing == "auto":
        raise InputError(
            "checkpointing auto is resolved when training with DistillDataModule starts, and does "
            "not support offloading; choose one of " + ", ".join(get_args(Checkpointing))
        )
    if checkpointing not in get_args(Checkpointing):
        raise InputError(
            f"checkpointing must be one of {', '.join(get_args(Checkpointing))}, "
            f"got {checkpointing!r}"
        )
    if offload and checkpointing not in ("block", "selective"):
        raise InputError(
            f"offloading moves block inputs to host memory, and checkpointing {checkpointing} "
            "stores none; use block or selective"
        )


_BLOCK_COUNTS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Number of blocks in one call of a denoiser, counted during its first rollout."""

_UNUSED_LAYERS: WeakKeyDictionary[Any, dict[Any, frozenset[Any]]] = WeakKeyDictionary()
"""Layers of a block to skip during recomputation, by which of its tensors require gradients."""


class BlockCheckpointing:
    """Runs a denoiser's forward with diffusers' gradient checkpointing of its blocks.

    The last block is not checkpointed: the backward pass starts with it, so recomputing it would
    save no memory. This takes effect from the second rollout, once the blocks have been counted.

    Args:
        denoiser: The denoiser.
        original_forward: Its forward method.
        keep_attention: Store the outputs of attention and recompute everything else.
        offload: Store the blocks' inputs in host memory.

    Raises:
        ValueError: If the denoiser does not support gradient checkpointing.
    """

    def __init__(
        self,
        denoiser: Any,  # noqa: ANN401
        original_forward: Callable[..., Any],
        *,
        keep_attention: bool = False,
        offload: bool = False,
    ) -> None:
        supported = (m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing"))
        self.modules = [m for m in supported if m.gradient_checkpointing is False]
        if not getattr(denoiser, "_supports_gradient_checkpointing", False):
            raise InputError(
                f"{type(denoiser).__name__} does not support gradient checkpointing of its blocks; "
                "use checkpointing: step"
            )
        self.denoiser = denoiser
        self.original_forward = original_forward
        self.keep_attention = keep_attention
        self.offload = offload
        self.step_adapters = StepAdapters.of(denoiser)
        self.block_count = _BLOCK_COUNTS.get(denoiser, 0)
        denoiser.enable_gradient_checkpointing(self._checkpoint_block)
        self._set_enabled(False)

    def forward(self, keep_last: bool, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return the output of the original forward, with its blocks checkpointed.

        Checkpointing is enabled inside the call rather than around the rollout: with ``nested`` the
        call runs again in the backward pass, after the rollout has returned.

        Args:
            keep_last: Whether the backward pass will start with this call's last block.
            *args: Arguments of the original forward.
            **kwargs: Arguments of the original forward.
        """
        self.blocks_done, self.keep_last = 0, keep_last
        self._set_enabled(True)
        try:
            output = self.original_forward(*args, **kwargs)
        finally:
            self._set_enabled(False)
        _BLOCK_COUNTS[self.denoiser] = self.blocks_done
        return output

    def _set_enabled(self, enabled: bool) -> None:
        for module in self.modules:
            module.gradient_checkpointing = enabled
            # Another rollout may have replaced it meanwhile: a batch can be split into several.
            module._gradient_checkpointing_func = self._checkpoint_block

    def _checkpoint_block(self, block: Any, *args: Any) -> Any:  # noqa: ANN401
        self.blocks_done += 1
        if self.keep_last and self.blocks_done == self.block_count:
            return block(*args)
        skipped = SkippedLayers()

        def contexts() -> Any:  # noqa: ANN401
            if not self.keep_attention:
                return nullcontext(), skipped.during_recompute()
            forward, recompute = _selective_contexts()
            return forward, _both(recompute, skipped.during_recompute())

        key = (sum(p.requires_grad for p in block.parameters()), *map(_requires_grad, args))
        known = _UNUSED_LAYERS.setdefault(block, {})
        # Pinned memory makes the copy asynchronous; on a CPU it is a plain copy.
        with (
            save_on_cpu(pin_memory=True) if self.offload else nullcontext(),
            recorded_outputs() as layers,
        ):
            # Not the module itself: `checkpoint` would read its attributes as options.
            call = self.step_adapters.bind_active(block.__call__)
            output = checkpoint(call, *args, use_reentrant=False, context_fn=contexts)
        if key not in known:
            known[key] = unused_layers(_tensors(output), _tensors(args), layers)
        skipped.layers = known[key]
        return output


def _requires_grad(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and value.requires_grad


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _selective_contexts() -> Any:  # noqa: ANN401
    return create_selective_checkpoint_contexts(_save_attention)  # type: ignore[no-untyped-call]


def _save_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
    save = _is_attention(op)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_attention(op: torch._ops.OpOverload) -> bool:
    """Return whether an operator is fused attention, of torch, flash-attn or xformers."""
    name: str = op.name()  # type: ignore[no-untyped-call]
    return any(word in name for word in ("attention", "attn", "flash")) and "backward" not in name
