"""Losses between the student's latents and the teacher's.

A new loss is a subclass of `DistillLoss`, named in YAML by its class path. benchmarks/quality.py
measures how each compares with the mean squared error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.pipelines.latent_codec import LatentCodec


class DistillLoss(nn.Module, ABC):
    """Base of the losses between a student's and a teacher's latents.

    Attributes:
        needs_codec: Whether it needs images, or latents in the VAE's layout. The VAE then stays on
            the device during training.
    """

    needs_codec: ClassVar[bool] = False

    @abstractmethod
    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return the loss of each sample.

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
    """Mean absolute error over a sample's latents, which outliers influence less."""

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return mean(|student - target|) of each sample, (B,)."""
        return (student - target).abs().flatten(1).mean(1)


class LatentRMSE(DistillLoss):
    """Root of a sample's mean squared error: hard rows weigh no more than easy ones.

    The gradient at a sample's latents has the same norm whatever its error, so that no row
    dominates a step.

    Args:
        eps: Error, in the latents' unit, below which the loss is close to a mean squared error.
    """

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        if not eps > 0:
            raise InputError(f"eps must be > 0, got {eps}")
        self.eps = eps

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return sqrt(mean((student - target)^2) + eps^2) - eps of each sample, (B,)."""
        error = (student - target).square().flatten(1).mean(1)
        return (error + self.eps**2).sqrt() - self.eps


def sample_losses(
    loss: DistillLoss,
    student: Tensor,
    target: Tensor,
    batch: Batch,
    codec: Callable[[Batch], LatentCodec],
) -> Tensor:
    """Return the loss of each sample, (B,), float32.

    Args:
        loss: The loss.
        student: Latents of the student, (B, ...).
        target: Latents of the teacher.
        batch: The rows.
        codec: Returns the codec of the batch's resolution.

    Raises:
        ValueError: If the target does not have the shape of the student's latents.
    """
    if student.shape != target.shape:
        raise InputError(
            f"row {batch['row'][0]}: the target's latents are {tuple(target.shape[1:])}, but "
            f"the pipeline generates {tuple(student.shape[1:])} at size {batch['size']} "
            "(height, width); were they made by another pipeline or at another size?"
        )
    losses: Tensor = loss(
        student.float(), target.float(), codec(batch) if loss.needs_codec else None
    )
    return losses
