"""LoRA as pairs of factors: the update of each module, sums and comparisons of LoRAs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The update of one module: ``weight + alpha / rank * up @ down``.

    Attributes:
        down: (rank, in) or, for a convolution, (rank, in, height, width).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: The scale of the update times the rank.
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
        """The factor of the product ``up @ down``."""
        return self.alpha / self.rank

    def folded(self) -> Factors:
        """Return the same update with scale 1, for layouts that store no alpha."""
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
    """Return the sum of two LoRAs; where both adapt a module, their ranks add up."""
    total: LoRA = {component: dict(weights) for component, weights in first.items()}
    for component, weights in second.items():
        summed = total.setdefault(component, {})
        for name, factors in weights.items():
            summed[name] = _add(summed[name], factors) if name in summed else factors
    return total


def _add(one: Factors, two: Factors) -> Factors:
    one, two = one.folded(), two.folded()
    down = torch.cat([one.down.float(), two.down.float()])
    up = torch.cat([one.up.float(), two.up.float()], dim=1)
    return Factors(down, up, float(len(down)))


def differences(found: LoRA, expected: LoRA, tolerance: float) -> list[str]:
    """Return a message for every module whose update differs between two LoRAs.

    The updates are compared on a few random inputs, without multiplying out the factors.

    Args:
        found: The LoRA that was read back.
        expected: The LoRA that was trained.
        tolerance: Largest relative error.
    """
    lines = []
    for component, weights in expected.items():
        loaded = found.get(component, {})
        for name in sorted(set(weights) | set(loaded)):
            trained, read = _probe(weights.get(name)), _probe(loaded.get(name))
            if read is None and trained is not None and trained.any():
                lines.append(f"{component}.{name} is missing")
            elif trained is None and read is not None and read.any():
                lines.append(f"{component}.{name} was loaded, but was not trained")
            elif trained is not None and read is not None:
                error = (trained - read).norm() / trained.norm().clamp_min(1e-30)
                if not error <= tolerance and (trained.any() or read.any()):
                    lines.append(f"{component}.{name} differs by {error:.1e} (relative)")
    return lines


def _probe(factors: Factors | None) -> Tensor | None:
    """Return the update applied to four random inputs, (out, 4); None if there is no update."""
    if factors is None:
        return None
    down, up = factors.down.float().flatten(1), factors.up.float().flatten(1)
    inputs = torch.randn(down.shape[1], 4, generator=torch.Generator().manual_seed(0))
    product: Tensor = factors.scale * (up @ (down @ inputs))
    return product
