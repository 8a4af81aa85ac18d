"""Figures of a whole model from those of a few of its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lit_distill.planning.fake_step import Figures

FEW = 3
"""Layers of the smaller of the two runs that the whole model is extrapolated from."""


def layer_counts_to_run(counts: Mapping[str, int]) -> list[dict[str, int]]:
    """Return the numbers of layers to run: few of each kind, then one kind with one more."""
    few = dict.fromkeys(counts, FEW)
    return [few, *({**few, name: FEW + 1} for name in counts)]


def extrapolate(runs: Sequence[Figures], counts: Mapping[str, int]) -> Figures:
    """Return the figures of the whole model, each linear in the number of every kind of layer."""
    base = runs[0]
    shared: Iterable[Any] = [key for key in base if all(key in run for run in runs)]
    return {
        key: base[key]
        + sum(
            (number - FEW) * (run[key] - base[key])
            for number, run in zip(counts.values(), runs[1:], strict=True)
        )
        for key in shared
    }
