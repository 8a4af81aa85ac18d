"""Distribution matching: the student's samples are moved to where the teacher finds them likely."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.pipelines.noise_levels import NoiseLevel
from lit_distill.training.objectives.base import Losses, Models, Objective, one_denoiser


class DistributionMatching(Objective):
    """Moves samples along the difference of the teacher's score and their own (DMD2).

    Yin et al., arXiv:2405.14867. Noise is added to the student's sample. The direction is from the
    clean latents that the "fake" denoiser predicts, which follows the student's samples, to those
    that the guided teacher predicts. It needs prompts only: neither pairs nor images.

    Teacher, student and fake denoiser are one frozen base: without adapter, with the student's, and
    with a companion adapter of the same shape. There is no other network. The fake denoiser learns
    in the same step from the same samples; it should learn faster than the student (Heusel et al.,
    arXiv:1706.08500), hence its own learning rate, and `updates` noise levels in every step.

    Args:
        low: Lowest noise level, as a share of the timesteps.
        high: Highest noise level.
        shift: Above 1, more of the levels are high: u -> shift u / (1 + (shift - 1) u).
        updates: Noise levels that the fake denoiser learns from in every step.
        optimizer: Options of the fake adapter's parameter group that differ from `model.optimizer`,
            such as {lr: 1e-3, betas: [0.0, 0.99]}.
    """

    needs_base = True
    needs_companion = True
    needs_target = False

    def __init__(
        self,
        low: float = 0.02,
        high: float = 0.98,
        shift: float = 1.0,
        updates: int = 1,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer)
        if not 0 < low < high <= 1:
            raise InputError(
                f"DistributionMatching: low and high must be 0 < low < high <= 1, got {low}, {high}"
            )
        if shift <= 0 or updates < 1:
            raise InputError(
                f"DistributionMatching: shift must be > 0 and updates >= 1, got {shift}, {updates}"
            )
        self.low, self.high, self.shift, self.updates = low, high, shift, updates

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the surrogate of the student's samples, and the fake denoiser's loss.

        The surrogate's gradient at a sample is the direction over the sample's size; its value is
        half the mean square of that.
        """
        batch = models.with_other_noise(batch)
        samples = models.student_rollout(batch).float()
        fixed = samples.detach()
        target = fixed - self._direction(models, fixed, batch)
        student = 0.5 * (samples - target).square().flatten(1).mean(1)
        learned = [self._fake_loss(models, fixed, batch) for _ in range(self.updates)]
        return Losses(student, torch.stack(learned).mean(), one_denoiser(models))

    @torch.no_grad()
    def _direction(self, models: Models, samples: Tensor, batch: Batch) -> Tensor:
        level = self._level(models)
        noisy = level.add_noise(samples, models.noise(samples, batch))
        real = models.teacher_x0(noisy, level, batch)
        fake = models.companion_x0(noisy, level, batch)
        size = (samples - real).abs().flatten(1).mean(1).clamp_min(1e-4)
        return (fake - real) / size.view(-1, *[1] * (samples.dim() - 1))

    def _fake_loss(self, models: Models, samples: Tensor, batch: Batch) -> Tensor:
        level = self._level(models)
        noisy = level.add_noise(samples, models.noise(samples, batch))
        error = models.companion_x0(noisy, level, batch) - samples
        # Weighted as if the denoiser predicted the velocity, which is as hard at all levels.
        return error.square().mean() * (level.scale / level.noise) ** 2

    def _level(self, models: Models) -> NoiseLevel:
        share = self.low + (self.high - self.low) * models.uniform()
        return models.levels.share(self.shift * share / (1 + (self.shift - 1) * share))
