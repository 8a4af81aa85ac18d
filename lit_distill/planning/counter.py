"""Counts what operations allocate, and the floating point operations that they take."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_DEVICE = torch.ops.prim.device.default
_CPU = torch.device("cpu")


def _attention(*shapes: Any, **kwargs: Any) -> int:  # noqa: ANN401
    query, key, value = shapes[:3]
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(*shapes: Any, **kwargs: Any) -> int:  # noqa: ANN401
    gradient, query, key, value = shapes[:4]
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Rules for `FlopCounterMode`, which only counts attention on GPUs."""


def _on_shapes(rule: Any) -> Any:  # noqa: ANN401
    """Return a rule that takes tensors, as those of `flop_registry` do."""

    def count(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401
        return int(rule(*(a.shape if isinstance(a, Tensor) else a for a in args)))

    return count


_RULES: dict[Any, Any] = {
    **flop_registry,
    **{operation: _on_shapes(rule) for operation, rule in CPU_ATTENTION.items()},
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes, each storage once, and FLOPs, of operations on real or fake tensors.

    `torch.utils.flop_counter.FlopCounterMode` is not used, because its module hooks keep alive what
    activation checkpointing has recomputed.

    `torch.autograd.graph.saved_tensors_hooks` misses what checkpointing stores itself: the keyword
    arguments of a call to be recomputed, and the results that selective checkpointing keeps.

    Args:
        granule: Bytes that the size of a storage is rounded up to a multiple of.

    Attributes:
        now: Bytes of the storages that were made since and still live.
        peak: The most that lived at any moment.
        flops: Floating point operations.
        peaks: The most that lived at any moment while a segment was current, by segment.
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule = granule
        self.now = 0
        self.peak = 0
        self.flops = 0
        self.peaks: dict[Any, int] = {}
        self._segments: tuple[Any, ...] = ()
        self._known: set[int] = set()

    def enter(self, segments: Iterable[Any]) -> None:
        """Count what follows as part of these segments, until others are entered."""
        self._segments = tuple(segments)
        self._note()

    def _note(self) -> None:
        self.peak = max(self.peak, self.now)
        for segment in self._segments:
            if self.now > self.peaks.get(segment, -1):
                self.peaks[segment] = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and count what it has made."""
        if func is _DEVICE:  # two thirds of all calls: fake tensors ask where they are
            return _CPU
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        rule = _RULES.get(func._overloadpacket)
        if rule is not None:
            self.flops += rule(*args, **kwargs, out_val=made)
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        before = self.now
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in given:
                continue  # a view, or changed in place
            size = -(-storage.nbytes() // self.granule) * self.granule
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)
        if self.now > before:
            self._note()
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
