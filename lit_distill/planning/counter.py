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

GRANULE = 512
"""Bytes that CUDA's caching allocator rounds sizes up to."""

_DEVICE = torch.ops.prim.device.default
_CPU = torch.device("cpu")


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:  # noqa: ANN401
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _attention_backward(
    grad: Any,  # noqa: ANN401
    query: Any,  # noqa: ANN401
    key: Any,  # noqa: ANN401
    value: Any,  # noqa: ANN401
    *args: Any,  # noqa: ANN401
    out_val: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_RULES: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes, each storage once, and FLOPs, of operations on real or fake tensors.

    `torch.utils.flop_counter.FlopCounterMode` is not used, because its module hooks keep alive what
    activation checkpointing has recomputed.

    Attributes:
        now: Bytes of the storages that were made since and still live.
        flops: Floating point operations.
        peaks: The most that lived at any moment while a segment was current, by segment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.flops = 0
        self.peaks: dict[Any, int] = {}
        self._segments: tuple[Any, ...] = ()
        self._known: set[int] = set()

    @property
    def peak(self) -> int:
        """The most that lived at any moment."""
        return max(self.peaks.values(), default=0)

    def enter(self, segments: Iterable[Any]) -> None:
        """Count what follows as part of these segments, until others are entered."""
        self._segments = tuple(segments)
        self._note()

    def _note(self) -> None:
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
            size = -(-storage.nbytes() // GRANULE) * GRANULE
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
