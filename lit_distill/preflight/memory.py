"""What a training step needs of the device's memory, measured small, and what there is of it."""

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
"""What a step may need beyond the arithmetic: fragments, the loss, texts that are longer."""

GIB = 2**30


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that were made since and still live, each storage once.

    `torch.autograd.graph.saved_tensors_hooks` misses what checkpointing keeps by itself: the
    keyword arguments of a call that is to be run again, what selective checkpointing keeps.

    Attributes:
        now: Bytes that live.
        peak: The most that lived at any moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and note what it has made."""
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata in self._known or storage._cdata in given:
                continue  # a view
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def free_bytes(device: torch.device) -> int:
    """Return what can still be allocated on the device, torch's own cache included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


class Choice(NamedTuple):
    """A checkpointing mode, and why it.

    Attributes:
        mode: The mode.
        fits: Whether it fits, with the margin.
        why: What it needs, what there is, and what the next faster one would need.
    """

    mode: Checkpointing
    fits: bool
    why: str


def choose(
    trial: Probe,
    device: torch.device,
    modes: Sequence[Checkpointing],
    times: float,
    grad_steps: int,
) -> Choice:
    """Return the fastest checkpointing mode that the device has memory for.

    Each mode's peak is measured with one and with two back-propagated steps of the trial; it is
    linear in their number, and taken to be so in the number of positions.

    Args:
        trial: EvaluationBatch at a small size, of one sample; with the steps of training.
        device: Where the denoisers are.
        modes: Those that may be chosen.
        times: How many times the trial's positions a batch of training has.
        grad_steps: Steps that the gradient goes through.
    """
    trained = sum(parameter.nbytes for _, parameter in trial.parameters)
    free = free_bytes(device)
    needs: dict[Checkpointing, float] = {}
    for mode in (each for each in MODES_BY_SPEED if each in modes):
        one, two = (_activations(trial, device, mode, steps) for steps in (1, 2))
        peak = one + (grad_steps - 1) * (two - one)
        needs[mode] = MARGIN * (times * peak + 3 * trained)  # gradient, and two moments of AdamW
        if needs[mode] <= free:
            break
    chosen = mode if needs[mode] <= free else min(needs, key=lambda each: needs[each])
    said = [f"{each} {need / GIB:.3g}" for each, need in needs.items()]
    why = f"GiB needed: {', '.join(said)}; free on {device}: {free / GIB:.3g}"
    return Choice(chosen, needs[chosen] <= free, why)


def _activations(trial: Probe, device: torch.device, mode: Checkpointing, grad_steps: int) -> float:
    """Return the peak of a draw and its backward pass in bytes, without the gradients."""
    cuda = device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        with (
            nullcontext() if cuda else LiveBytes() as live,
            trial.gradient(mode, grad_steps) as found,
        ):
            gradients = sum(each.nbytes for each in found if each is not None)
    except torch.OutOfMemoryError:
        return float("inf")
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else live.peak  # type: ignore[union-attr]
    return max(0, peak - gradients)
