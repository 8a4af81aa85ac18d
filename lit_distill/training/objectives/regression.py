"""Direct Distillation: the student's final latents against the teacher's."""

from __future__ import annotations

from lit_distill.data.batch import Batch
from lit_distill.training.objectives.base import Losses, Models, Objective


class Regression(Objective):
    """Compares final latents, through all of the student's steps: Direct Distillation.

    DiffSynth-Studio's `DirectDistillLoss`; Luhman & Luhman, arXiv:2101.02388.
    """

    def __init__(self) -> None:
        super().__init__()

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the loss of the student's final latents against the teacher's."""
        target = models.teacher_target(batch)
        return Losses(models.compare(models.student_rollout(batch), target, batch))
