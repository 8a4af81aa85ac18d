"""What a block need not compute when it runs again: outputs that its backward pass has no use for.

A block mostly ends with ``x + gate * linear(y)``. When the gate is frozen, the backward pass needs
the gate, not the linear's output, which only the next block needs, and that has it already. torch
stops running a block again once all that the backward pass needs is there, which leaves out what
comes after the last such tensor only: where image and text take turns, the image's last linear is
computed in vain, up to a third of the block's products.

Which layers these are is read off the graph of the block's first run.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Operations whose backward pass needs none of their inputs' values.
_PASSES = {
    f"{name}Backward0"
    for name in ("Add", "Sub", "View", "UnsafeView", "Transpose", "Permute", "Unsqueeze", "Squeeze")
    + ("Slice", "Split", "SplitWithSizes", "Cat", "Clone", "ToCopy", "Expand", "T")
}


class _State(threading.local):
    """Of the thread that runs a block: the backward pass of a GPU has its own."""

    outputs: list[tuple[nn.Module, Any]] | None = None
    skip: Collection[nn.Module] = ()


_state = _State()


def is_skipped(layer: nn.Module) -> bool:
    """Return whether a block runs again that has no use for the layer's output."""
    return layer in _state.skip


def record_output(layer: nn.Module, output: Tensor) -> None:
    """Note a layer's output, of those that can skip it."""
    if _state.outputs is not None and output.grad_fn is not None:
        _state.outputs.append((layer, output.grad_fn))


class SkipMatmuls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Leaves out matrix products and sums; their outputs hold anything. The graph is as ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Return memory of the right shape in place of a product, and do all else."""
        aten = torch.ops.aten
        if func in (aten.addmm.default, aten.mm.default):
            left, right = args[-2:]
            with _disable_current_modes():  # selective checkpointing knows of no such operation
                return left.new_empty(left.shape[0], right.shape[1])
        if func is aten.add_.Tensor:
            return args[0]
        return func(*args, **(kwargs or {}))


class RecomputePlan:
    """Which layers of one run of a block are skipped when it runs again."""

    def __init__(self) -> None:
        self.skip: frozenset[nn.Module] = frozenset()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Skip them."""
        before, _state.skip = _state.skip, self.skip
        try:
            yield
        finally:
            _state.skip = before


@contextmanager
def recorded_outputs() -> Iterator[list[tuple[nn.Module, Any]]]:
    """Yield a list that layers note their outputs in."""
    before, _state.outputs = _state.outputs, []
    try:
        yield _state.outputs
    finally:
        _state.outputs = before


def unused_layers(
    outputs: list[Tensor], inputs: list[Tensor], layers: list[tuple[nn.Module, Any]]
) -> frozenset[nn.Module]:
    """Return the layers whose output no tensor that is kept for the backward pass depends on.

    Args:
        outputs: What a block has returned.
        inputs: What it was given.
        layers: Layers that ran in it, with the graph's node of their output.
    """
    ends = {tensor.grad_fn for tensor in outputs} - {None}
    begins = {tensor.grad_fn for tensor in inputs} - {None}
    consumers: dict[Any, list[Any]] = {node: [] for node in ends}
    open_nodes: list[Any] = list(ends)
    while open_nodes:
        node = open_nodes.pop()
        for source, _ in node.next_functions:
            if source is None or source in begins:
                continue
            if source not in consumers:
                consumers[source] = []
                open_nodes.append(source)
            consumers[source].append(node)
    known: dict[Any, bool] = {}

    def free(node: Any) -> bool:  # noqa: ANN401
        if node not in known:
            used_by = consumers.get(node)
            known[node] = used_by is not None and all(_passes(c) and free(c) for c in used_by)
        return known[node]

    # A layer may run twice: both outputs must be of no use.
    return frozenset(
        {layer for layer, node in layers if free(node)}
        - {layer for layer, node in layers if not free(node)}
    )


def _passes(node: Any) -> bool:  # noqa: ANN401
    if node.name() == "MulBackward0":  # keeps a factor only for the gradient of the other
        return any(source is None for source, _ in node.next_functions)
    return node.name() in _PASSES
