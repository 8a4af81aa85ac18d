"""The default learning rate schedule. YAML may name any of torch's by its class path."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Learning rate that rises linearly, then falls to zero along a half cosine.

    Args:
        optimizer: The optimizer.
        num_warmup_steps: Optimizer steps of the rise.
        num_training_steps: Optimizer steps in total; null: as many as the trainer makes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int = 20,
        num_training_steps: int | None = None,
    ) -> None:
        self.num_warmup_steps = num_warmup_steps
        self.num_training_steps = num_training_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at the current step."""
        step = self.last_epoch
        if step < self.num_warmup_steps:
            factor = (step + 1) / (self.num_warmup_steps + 1)
        else:
            rest = max(1, (self.num_training_steps or math.inf) - self.num_warmup_steps)
            factor = (1 + math.cos(math.pi * min(1.0, (step - self.num_warmup_steps) / rest))) / 2
        return [factor * base for base in self.base_lrs]
