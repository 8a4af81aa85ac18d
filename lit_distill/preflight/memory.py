"""The memory that a training step needs, measured at a small size, and the memory that is free."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.preflight.probe import Probe

MODES_BY_SPEED: tuple[Checkpointing, ...] = ("none", "selective", "block", "step", "nested")
"""Checkpointing modes, the fastest first (benchmarks/results/step_1024.json)."""

MARGIN = 1.2
"""Factor for what the measurement leaves out: fragmentation, the loss, longer prompts."""

GIB = 2**30


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors that were created inside it, each storage once.

    `torch.autograd.graph.saved_tensors_hooks` misses what checkpointing stores itself: the keyword
    arguments of a call to be recomputed, and the results that selective checkpointing keeps.

    Attributes:
        now: Bytes that are live.
        peak: The largest number of bytes that were live at any moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and count its new storages."""
        output = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage._cdata in self._known or storage._cdata in inputs:
                continue  # a view
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return output

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device, including torch's cache."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


class Choice(NamedTuple):
    """A checkpointing mode, and why it was chosen.

    Attributes:
        mode: The mode.
        fits: Whether it fits, with the margin.
        reason: The memory that it and the faster modes need, and the memory that is free.
    """

    mode: Checkpointing
    fits: bool
    reason: str


def choose_checkpointing(
    probe: Probe,
    device: torch.device,
    modes: Sequence[Checkpointing],
    scale: float,
    grad_steps: int,
) -> Choice:
    """Return the fastest checkpointing mode that the device has memory for.

    Each mode's peak is measured with one and with two back-propagated steps of the probe. It is
    linear in their number, and assumed to be linear in the number of positions.

    Args:
        probe: One sample at a small size, with the steps of training.
        device: Where the denoisers are.
        modes: The modes to choose from.
        scale: Positions in a training batch, as a multiple of the probe's.
        grad_steps: Steps that the gradient goes through.
    """
    trained = sum(parameter.nbytes for _, parameter in probe.parameters)
    free = free_bytes(device)
    needs: dict[Checkpointing, float] = {}
    for mode in (each for each in MODES_BY_SPEED if each in modes):
        one, two = (_activations(probe, device, mode, steps) for steps in (1, 2))
        peak = one + (grad_steps - 1) * (two - one)
        needs[mode] = MARGIN * (scale * peak + 3 * trained)  # gradient and AdamW's two moments
        if needs[mode] <= free:
            break
    chosen = mode if needs[mode] <= free else min(needs, key=lambda each: needs[each])
    listed = ", ".join(f"{each} {need / GIB:.3g}" for each, need in needs.items())
    reason = f"GiB needed: {listed}; free on {device}: {free / GIB:.3g}"
    return Choice(chosen, needs[chosen] <= free, reason)


def _activations(probe: Probe, device: torch.device, mode: Checkpointing, grad_steps: int) -> float:
    """Return the peak of a sample and its backward pass in bytes, without the gradients."""
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        with (
            nullcontext() if cuda else LiveBytes() as live,
            probe.gradient(mode, grad_steps) as gradient,
        ):
            gradients = sum(each.nbytes for each in gradient if each is not None)
    except torch.OutOfMemoryError:
        return float("inf")
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else live.peak  # type: ignore[union-attr]
    return max(0, peak - gradients)
