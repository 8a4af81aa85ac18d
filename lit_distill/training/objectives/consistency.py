"""Trajectory-segmented consistency: all points of a segment lead the student to its end."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.pipelines.noise_levels import NoiseLevel
from lit_distill.training.objectives.base import Losses, Models, Objective, one_denoiser


class Consistency(Objective):
    """Trajectory-segmented consistency distillation, with progressively fewer segments (Hyper-SD).

    Ren et al., arXiv:2404.13686. Noise is added to the teacher's samples. From there one step of
    the student leads to the end of the segment. From a little further down, where one step of the
    guided teacher leads, it should lead to the same latents. The second jump is a constant: no
    gradient reaches it. The segments are the steps of the student's own schedule with that many
    steps, so that the last stage trains what the student does when it samples.

    Args:
        segments: Numbers of segments, one for each stage; the last is usually the student's number
            of steps.
        steps_per_stage: Optimizer steps of each stage but the last, which lasts to the end.
        teacher_steps: Number of teacher steps into which all timesteps are divided.
    """

    needs_base = True
    whole_rollouts = False

    def __init__(
        self,
        segments: list[int] | None = None,
        steps_per_stage: int = 1000,
        teacher_steps: int = 50,
    ) -> None:
        super().__init__()
        self.segments = list(segments or [8, 4, 2, 1])
        if min(self.segments) < 1 or steps_per_stage < 1 or teacher_steps < 1:
            raise InputError(
                "Consistency: segments, steps_per_stage and teacher_steps must be >= 1, got "
                f"{self.segments}, {steps_per_stage}, {teacher_steps}"
            )
        self.steps_per_stage, self.teacher_steps = steps_per_stage, teacher_steps

    def stage(self, step: int) -> int:
        """Return the number of segments in an optimizer step, counted from 0."""
        return self.segments[min(step // self.steps_per_stage, len(self.segments) - 1)]

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the loss of the student's jump against its jump from further down."""
        clean = models.teacher_target(batch)
        start, lower, end = self._levels(models, batch)
        noisy = start.add_noise(clean, models.noise(clean, batch))
        with torch.no_grad():
            guided = models.teacher_x0(noisy, start, batch)
            below = _jump(noisy, guided, start, lower)
            target = below
            if lower != end:
                target = _jump(below, models.student_x0(below, lower, batch), lower, end)
        landed = _jump(noisy, models.student_x0(noisy, start, batch), start, end)
        loss = models.compare(landed, target, batch)
        return Losses(loss, complete=one_denoiser(models))

    def _levels(self, models: Models, batch: Batch) -> tuple[NoiseLevel, NoiseLevel, NoiseLevel]:
        """Return where a jump starts, where the teacher's step leads, and where the jump ends."""
        edges = models.schedule(batch, self.stage(models.step))
        segment = int(models.uniform() * (len(edges) - 1))
        above, end = edges[segment], edges[segment + 1]
        # One teacher step or more above the end, in the scheduler's own direction of time.
        size = models.levels.num_train_timesteps / self.teacher_steps
        last = end.timestep if end.noise else models.levels.share(0.0).timestep
        length = abs(above.timestep - last)
        count = max(1, round(length / size))
        position = count - int(models.uniform() * count)
        direction = (above.timestep - last) / count
        start = above if position == count else models.levels.at(last + position * direction)
        lower = end if position == 1 else models.levels.at(last + (position - 1) * direction)
        return start, lower, end


def _jump(latents: Tensor, x0: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
    """Return the latents at another level with the same clean latents and the same noise."""
    return end.add_noise(x0, start.noise_of(latents, x0))
