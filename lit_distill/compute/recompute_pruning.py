"""Skips layers during recomputation whose output the backward pass does not need.

Most blocks end with ``x + gate * linear(y)``. When the gate is frozen, the backward pass needs the
gate but not the linear's output, which is only an input of the next block. torch stops recomputing
a block once all saved tensors are restored, so it skips only what comes after the last of them. In
blocks that alternate between image and text tokens, the image's last linear would be recomputed for
nothing, up to a third of the block's FLOPs.

Which layers can be skipped is found in the autograd graph of the block's first forward.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Operators that save no tensor for the backward pass.
_SAVES_NOTHING = {
    f"{name}Backward0"
    for name in ("Add", "Sub", "View", "UnsafeView", "Transpose", "Permute", "Unsqueeze", "Squeeze")
    + ("Slice", "Split", "SplitWithSizes", "Cat", "Clone", "ToCopy", "Expand", "T")
}


class _State(threading.local):
    """Per thread: on a GPU the backward pass, and so recomputation, has its own thread."""

    outputs: list[tuple[nn.Module, Any]] | None = None
    skip: Collection[nn.Module] = ()


_state = _State()


def is_skipped(layer: nn.Module) -> bool:
    """Return whether the layer is in a block that is being recomputed without its output."""
    return layer in _state.skip


def record_output(layer: nn.Module, output: Tensor) -> None:
    """Record the autograd node of a layer's output, for layers that can skip their matmuls."""
    if _state.outputs is not None and output.grad_fn is not None:
        _state.outputs.append((layer, output.grad_fn))


class SkipMatmuls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Skips matmuls and in-place sums; outputs are uninitialised, the autograd graph the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Return uninitialised memory of the right shape for a matmul; run all other operators."""
        aten = torch.ops.aten
        if func in (aten.addmm.default, aten.mm.default):
            left, right = args[-2:]
            with _disable_current_modes():  # selective checkpointing must not see it
                return left.new_empty(left.shape[0], right.shape[1])
        if func is aten.add_.Tensor:
            return args[0]
        return func(*args, **(kwargs or {}))


class SkippedLayers:
    """The layers of a block that are skipped when it is recomputed; set after its forward."""

    def __init__(self) -> None:
        self.layers: frozenset[nn.Module] = frozenset()

    @contextmanager
    def during_recompute(self) -> Iterator[None]:
        """Skip the layers until the context is left."""
        before, _state.skip = _state.skip, self.layers
        try:
            yield
        finally:
            _state.skip = before


@contextmanager
def recorded_outputs() -> Iterator[list[tuple[nn.Module, Any]]]:
    """Yield a list to which layers append themselves and the node of their output."""
    before, _state.outputs = _state.outputs, []
    try:
        yield _state.outputs
    finally:
        _state.outputs = before


def unused_layers(
    outputs: list[Tensor], inputs: list[Tensor], layers: list[tuple[nn.Module, Any]]
) -> frozenset[nn.Module]:
    """Return the layers whose output no tensor saved for the backward pass depends on.

    Args:
        outputs: Outputs of the block.
        inputs: Inputs of the block.
        layers: Layers that ran in the block, with the autograd node of their output.
    """
    ends = {tensor.grad_fn for tensor in outputs} - {None}
    begins = {tensor.grad_fn for tensor in inputs} - {None}
    consumers: dict[Any, list[Any]] = {node: [] for node in ends}
    to_visit: list[Any] = list(ends)
    while to_visit:
        node = to_visit.pop()
        for source, _ in node.next_functions:
            if source is None or source in begins:
                continue
            if source not in consumers:
                consumers[source] = []
                to_visit.append(source)
            consumers[source].append(node)
    known: dict[Any, bool] = {}

    def unused(node: Any) -> bool:  # noqa: ANN401
        if node not in known:
            used_by = consumers.get(node)
            known[node] = used_by is not None and all(
                _saves_no_input(consumer) and unused(consumer) for consumer in used_by
            )
        return known[node]

    # A layer may run twice: both outputs must be unused.
    return frozenset(
        {layer for layer, node in layers if unused(node)}
        - {layer for layer, node in layers if not unused(node)}
    )


def _saves_no_input(node: Any) -> bool:  # noqa: ANN401
    if node.name() == "MulBackward0":  # saves a factor only for the gradient of the other one
        return any(source is None for source, _ in node.next_functions)
    return node.name() in _SAVES_NOTHING
