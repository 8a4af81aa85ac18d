"""The student's states after every step against the teacher's."""

from __future__ import annotations

import torch

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.training.objectives.base import Losses, Models, Objective
from lit_distill.training.settings import Settings


class Trajectory(Objective):
    """Compares the states after every step, each from the student's own state before it.

    No gradient goes through more than one step. Rows need the teacher's states: ``lit-distill
    generate --store_trajectory true``, or the online teacher.
    """

    needs_trajectory = True

    def __init__(self) -> None:
        super().__init__()

    def check(self, settings: Settings) -> None:
        """Check that `grad_steps`, which has no meaning here, is not set."""
        super().check(settings)
        if settings.grad_steps is not None:
            raise InputError(
                "model.objective: Trajectory and model.grad_steps: set one; with Trajectory no "
                "gradient goes through more than one step"
            )

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the mean loss over the student's steps."""
        student = models.student_trajectory(batch)
        teacher = models.teacher_trajectory(batch, student.sigmas)
        pairs = zip(student.states, teacher.states, strict=True)
        return Losses(torch.stack([models.compare(*pair, batch) for pair in pairs]).mean(0))
