"""What the student is trained towards: per-sample losses of the student against its teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from lit_distill.data.batch import Batch
from lit_distill.pipelines.trajectory import Trajectory


class StudentAndTeacher(Protocol):
    """What an objective may ask for; `DirectDistill` has it."""

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), with their graph."""

    def student_trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step, each with the graph of its own step."""

    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, (B, ...), float32."""

    def teacher_trajectory(self, batch: Batch, sigmas: Tensor) -> Trajectory:
        """Return the teacher's states at the student's noise levels, (K,)."""

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return `model.loss` of each sample, (B,), float32."""


class Objective(ABC):
    """Base of the objectives. `model.loss` is the measure, the objective what it compares."""

    @abstractmethod
    def losses(self, models: StudentAndTeacher, batch: Batch) -> Tensor:
        """Return the training loss of each sample, (B,), float32, with its graph."""


class Regression(Objective):
    """Compares final latents, through all of the student's steps: Direct Distillation."""

    def losses(self, models: StudentAndTeacher, batch: Batch) -> Tensor:
        """Return the loss of the student's final latents against the teacher's."""
        target = models.teacher_target(batch)
        return models.compare(models.student_rollout(batch), target, batch)


class TrajectoryMatching(Objective):
    """Compares the states after every step, each from the student's own state before it."""

    def losses(self, models: StudentAndTeacher, batch: Batch) -> Tensor:
        """Return the mean loss over the student's steps."""
        student = models.student_trajectory(batch)
        teacher = models.teacher_trajectory(batch, student.sigmas)
        pairs = zip(student.states, teacher.states, strict=True)
        return torch.stack([models.compare(*pair, batch) for pair in pairs]).mean(0)
