"""Random numbers of a training step that do not depend on how its rows are spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Randomness:
    """Numbers from the run's seed, the number of the batch, and the row.

    So no generator's state has to be saved, and two processes draw for their halves of a batch what
    one draws for the whole.
    """

    def __init__(self) -> None:
        self.start(0, 0)

    def start(self, seed: int, batch: int) -> None:
        """Begin a batch."""
        self._words = (seed, batch)
        self._draws = 0

    def uniform(self) -> float:
        """Return a new number in [0, 1), the same on all processes."""
        return float(np.random.default_rng([*self._words, self._next()]).random())

    def draw(self, population: int, count: int) -> list[int]:
        """Return `count` different numbers below `population`, the same on all processes."""
        rng = np.random.default_rng([*self._words, self._next()])
        return rng.choice(population, count, replace=False).tolist()  # type: ignore[no-any-return]

    def seeds(self, rows: Sequence[int]) -> list[int]:
        """Return a new seed for each of the rows' seeds, 0 <= seed < 2^31."""
        draw = self._next()
        sequences = (np.random.SeedSequence([*self._words, draw, row]) for row in rows)
        return [int(each.generate_state(1)[0]) % 2**31 for each in sequences]

    def normal(self, like: Tensor, rows: Sequence[int]) -> Tensor:
        """Return new standard normal noise, (B, ...), float32, for rows with these seeds."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds(rows)]
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(like.device)

    def _next(self) -> int:
        self._draws += 1
        return self._draws
