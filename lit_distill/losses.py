"""What the student's latents are compared with the teacher's by.

One class a loss; a new one is a `DistillLoss` named in YAML by its class path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class DistillLoss(nn.Module, ABC):
    """Base of the losses between a student's and a teacher's final latents."""

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """Return one loss a sample.

        Args:
            student: Latents of the student's rollout, (B, ...), float32, in the pipeline's layout.
            target: Latents of the teacher, of the same shape, without gradient.

        Returns:
            (B,), float32, >= 0.
        """


class LatentMSE(DistillLoss):
    """Mean squared error over a sample's latents: the loss of Direct Distillation."""

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """Return mean((student - target)^2) of each sample, (B,)."""
        return (student - target).square().flatten(1).mean(1)
