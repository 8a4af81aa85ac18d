"""Tells a counter which part of a training step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.pipelines.components import denoisers
from lit_distill.planning.counter import Counter


class Segments:
    """Tells a counter which part of the step runs: of which denoiser call, around which block.

    Args:
        counter: The counter.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.call = 0
        self.forward = True
        counter.enter([("forward", 0, "begin")])

    def begin_backward(self) -> None:
        """Count what follows as the backward pass."""
        self.forward = False
        self.counter.enter([("backward", "loss")])

    def on_call(self, *_: Any) -> None:  # noqa: ANN401
        """Begin a denoiser call."""
        if self.forward:
            self.call += 1
            self.counter.enter([("forward", self.call, "begin")])

    def on_block(self, places: list[Any], *_: Any) -> None:  # noqa: ANN401
        """Begin a block."""
        if self.forward:
            self.counter.enter([("forward", self.call, *place) for place in places])

    def after(self, places: list[Any], module: Any, args: Any, output: Any) -> None:  # noqa: ANN401
        """End a block or a call; its backward pass begins where the output's gradient arrives."""
        if not self.forward:
            return
        # What follows a block or a whole call until the next one begins.
        self.counter.enter([("forward", self.call, places[0][0], "after")])
        back = partial(self._on_backward, [("backward", self.call, *place) for place in places])
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(back)

    def _on_backward(self, names: list[Any], *_: Any) -> None:  # noqa: ANN401
        self.counter.enter(names)


@contextmanager
def segments(counter: Counter, pipe: Any) -> Iterator[Segments]:  # noqa: ANN401
    """Let the counter know where a step is.

    The peak of each segment is linear in the number of layers, while the peak of the whole step is
    the largest of them and is not: another segment may be the largest in a deeper denoiser.
    """
    parts = Segments(counter)
    hooks: list[Any] = []
    try:
        for denoiser in denoisers(pipe).values():
            hooks.append(denoiser.register_forward_pre_hook(parts.on_call))
            whole: list[Any] = [("output",)]
            hooks.append(denoiser.register_forward_hook(partial(parts.after, whole)))
            for name, blocks in repeated_blocks(denoiser).items():
                for index, block in enumerate(blocks):
                    places = _places(name, index, len(blocks))
                    hooks.append(block.register_forward_pre_hook(partial(parts.on_block, places)))
                    hooks.append(block.register_forward_hook(partial(parts.after, places)))
        yield parts
    finally:
        for hook in hooks:
            hook.remove()


def _places(name: str, index: int, length: int) -> list[Any]:
    """Return the names of a block's place: those where the peak may be, and between them.

    Memory rises or falls evenly from the second block to the last but one.
    """
    places = {"first": 0, "second": 1, "last but one": length - 2, "last": length - 1}
    named = [(name, place) for place, number in places.items() if number == index]
    return named or [(name, "between")]
