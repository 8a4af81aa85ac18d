"""What the student's latents are compared with the teacher's by.

One class a loss; a new one is a `DistillLoss` named in YAML by its class path. Which of these is
better than the mean squared error, and by how much, is measured in benchmarks/quality.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from lit_distill.pipelines.latent_codec import LatentCodec


class DistillLoss(nn.Module, ABC):
    """Base of the losses between a student's and a teacher's latents.

    Attributes:
        needs_codec: Whether it looks at images, or at latents laid out as the VAE has them. The
            VAE then stays on the device while training.
    """

    needs_codec: ClassVar[bool] = False

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return one loss a sample.

        Args:
            student: Latents of the student's rollout, (B, ...), float32, in the pipeline's layout.
            target: Latents of the teacher, of the same shape, without gradient.
            codec: The codec of this size, with `needs_codec`; else None. Its `decode` is
                differentiable.

        Returns:
            (B,), float32, >= 0.
        """


class LatentMSE(DistillLoss):
    """Mean squared error over a sample's latents: the loss of Direct Distillation."""

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return mean((student - target)^2) of each sample, (B,)."""
        return (student - target).square().flatten(1).mean(1)


class LatentL1(DistillLoss):
    """Mean absolute error over a sample's latents, which a few far-off elements sway less."""

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return mean(|student - target|) of each sample, (B,)."""
        return (student - target).abs().flatten(1).mean(1)


class LatentRMSE(DistillLoss):
    """Root of a sample's mean squared error: hard rows weigh no more than easy ones.

    The gradient at a sample's latents has the same norm whatever its error, so that no row makes
    the step jump.

    Args:
        eps: Error, in the latents' unit, below which it goes over into the mean squared error.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}")
        self.eps = eps

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return sqrt(mean((student - target)^2) + eps^2) - eps of each sample, (B,)."""
        error = (student - target).square().flatten(1).mean(1)
        return (error + self.eps**2).sqrt() - self.eps
