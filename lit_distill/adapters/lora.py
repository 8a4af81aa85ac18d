"""LoRA as factors: the update of each module, sums and comparisons of such updates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The update of one module: ``weight + alpha / rank * up @ down``.

    Attributes:
        down: (rank, in) or, for a convolution, (rank, in, height, width).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Scale of the update, times the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def folded(self) -> Factors:
        """Return the same update with a scale of 1, for layouts that store no alpha."""
        if self.scale == 1:
            return self
        return Factors(self.down, self.up * self.scale, float(self.rank))

    def delta(self) -> Tensor:
        """Return the update itself, (out, in) or (out, in, height, width), float32."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.view(up.shape[0], *down.shape[1:])


LoRA = dict[str, dict[str, Factors]]
"""Denoiser (``transformer``, ...) -> module, by diffusers' name -> factors."""


def add_loras(first: LoRA, second: LoRA) -> LoRA:
    """Return the LoRA whose update is the sum of two: ranks add up where both adapt a module."""
    total: LoRA = {component: dict(weights) for component, weights in first.items()}
    for component, weights in second.items():
        mine = total.setdefault(component, {})
        for name, factors in weights.items():
            mine[name] = _add(mine[name], factors) if name in mine else factors
    return total


def _add(one: Factors, two: Factors) -> Factors:
    one, two = one.folded(), two.folded()
    down = torch.cat([one.down.float(), two.down.float()])
    up = torch.cat([one.up.float(), two.up.float()], dim=1)
    return Factors(down, up, float(len(down)))


def differences(found: LoRA, expected: LoRA, tolerance: float) -> list[str]:
    """Return what is said of every module that two LoRAs don't update alike.

    The updates are compared by what they make of a few random inputs, so that large ones need not
    be multiplied out.
    """
    lines = []
    for component, weights in expected.items():
        arrived = found.get(component, {})
        for name in sorted(set(weights) | set(arrived)):
            mine, theirs = _probe(weights.get(name)), _probe(arrived.get(name))
            if theirs is None and mine is not None and mine.any():
                lines.append(f"{component}.{name} did not arrive")
            elif mine is None and theirs is not None and theirs.any():
                lines.append(f"{component}.{name} arrived, but was not trained")
            elif mine is not None and theirs is not None:
                error = (mine - theirs).norm() / mine.norm().clamp_min(1e-30)
                if not error <= tolerance and (mine.any() or theirs.any()):
                    lines.append(f"{component}.{name} differs by {error:.1e} (relative)")
    return lines


def _probe(factors: Factors | None) -> Tensor | None:
    if factors is None:
        return None
    down, up = factors.down.float().flatten(1), factors.up.float().flatten(1)
    inputs = torch.randn(down.shape[1], 4, generator=torch.Generator().manual_seed(0))
    product: Tensor = factors.scale * (up @ (down @ inputs))
    return product
