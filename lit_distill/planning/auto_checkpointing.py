"""Chooses the checkpointing mode for the memory that a device has free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing
from lit_distill.planning.cards import GIB, MARGIN
from lit_distill.planning.fake_step import UnplannableError
from lit_distill.planning.planner import Planner


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


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device, including torch's cache."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + cached


def choose_checkpointing(
    planner: Planner, device: torch.device, modes: Sequence[Checkpointing]
) -> Choice:
    """Return the fastest checkpointing mode that the device has memory for.

    Where none fits, or the pipeline can't be planned, it is the mode that needs least.

    Args:
        planner: Plans the training step.
        device: Where the denoisers are; the memory that they take is not counted again.
        modes: The modes to choose from.
    """
    free = free_bytes(device)
    needs: dict[Checkpointing, float] = {}
    try:
        for mode in (each for each in planner.modes if each in modes):
            needs[mode] = planner.memory(mode)[0].total - planner.loaded
            if needs[mode] <= (1 - MARGIN) * free:
                break
    except UnplannableError as error:
        return Choice(next(each for each in MODES_BY_MEMORY if each in modes), False, str(error))
    chosen = min(needs, key=lambda each: needs[each])
    fits = needs[mode] <= (1 - MARGIN) * free
    listed = ", ".join(f"{each} {need / GIB:.3g}" for each, need in needs.items())
    reason = f"GiB needed: {listed}; free on {device}: {free / GIB:.3g}, less {MARGIN:.0%}"
    return Choice(mode if fits else chosen, fits, reason)
