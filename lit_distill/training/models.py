"""Student and teacher, as the objectives see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.adapters.inject import adapters_disabled
from lit_distill.compute.step_adapters import StepAdapters
from lit_distill.data.batch import NO_TARGET, Batch, has_target
from lit_distill.pipelines.components import denoiser_device, denoisers
from lit_distill.pipelines.noise_levels import NoiseLevel, NoiseLevels
from lit_distill.pipelines.trajectory import Trajectory
from lit_distill.teacher.pair_buffer import PairBuffer, with_targets_on
from lit_distill.teacher.stored import stored_target, stored_trajectory
from lit_distill.training.losses import DistillLoss, sample_losses
from lit_distill.training.objectives.base import Objective
from lit_distill.training.randomness import Randomness
from lit_distill.training.student import Student

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StudentAndTeacher:
    """What `lit_distill.training.objectives.base.Models` describes.

    Args:
        student: The student.
        loss: Measure of `compare`.
        steps: Returns the number of optimizer steps that are complete.
    """

    def __init__(self, student: Student, loss: DistillLoss, steps: Callable[[], int]) -> None:
        self.student = student
        self.teacher = student.teacher()
        self.loss = loss
        self.random = Randomness()
        self.buffer = PairBuffer(student.settings.teacher_reuse, student.settings.teacher_buffer)
        self._steps = steps
        self._schedules: dict[Any, list[NoiseLevel]] = {}

    @property
    def pipe(self) -> DiffusionPipeline:
        """The student's pipeline."""
        return self.student.pipe

    @property
    def step(self) -> int:
        """Number of optimizer steps that are complete."""
        return self._steps()

    @cached_property
    def levels(self) -> NoiseLevels:
        """The noise levels of the pipeline's model."""
        return NoiseLevels(self.pipe.scheduler)

    # Samples

    @torch.no_grad()
    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, (B, ...), float32, in the space of the rollout."""
        stored = stored_target(batch, self.student.codec)
        return self.teacher.target(batch) if stored is None else stored

    @torch.no_grad()
    def teacher_trajectory(self, batch: Batch, sigmas: Tensor) -> Trajectory:
        """Return the teacher's states at the student's noise levels, (K,); stored or generated now.

        Raises:
            ValueError: If the rows hold no states, or those of another schedule.
        """
        stored = stored_trajectory(batch, sigmas)
        return self.teacher.trajectory(batch).at(sigmas) if stored is None else stored

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), differentiable where gradients are on."""
        return self.student.rollout(batch)

    def student_trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step; each differentiable in its own step."""
        return self.student.trajectory(batch)

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, (B,), float32."""
        return sample_losses(self.loss, latents, target, batch, self.student.codec)

    @torch.no_grad()
    def pairs(self, batch: Batch, objective: Objective) -> Batch:
        """Return the rows to train on: the batch, or with `teacher_reuse` pairs of the buffer.

        The buffer's pairs have new seeds of the initial noise, so that a prompt never has the same
        one again.
        """
        if self.buffer.reuse == 1 or has_target(batch) or not objective.needs_target:
            return batch
        generate = partial(self._generate, with_states=objective.needs_trajectory)
        pairs = self.buffer.next(batch, generate, self.random.draw)
        return with_targets_on(pairs, denoiser_device(self.pipe))

    def _generate(self, batch: Batch, *, with_states: bool) -> Batch:
        batch = self.with_other_noise(batch)
        if not with_states:
            return {**batch, "latents": self.teacher.target(batch)}
        sigmas = self.student.sigmas(batch)[1:]
        found = self.teacher.trajectory(batch).at(sigmas)
        states = found.states.transpose(0, 1)
        levels = sigmas[:-1].expand(len(states), -1).clone()
        return {
            **batch,
            "latents": states[:, -1].clone(),
            "trajectory": states[:, :-1].clone(),
            "sigmas": levels,
        }

    # Predictions at a noise level

    def student_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the student predicts, (B, ...), with their graph."""
        return self.student.predict(latents, level, batch)

    def teacher_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the guided teacher predicts, without graph."""
        return self.teacher.predict(latents, level, batch)

    def companion_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the companion adapter predicts, with their graph."""
        with ExitStack() as stack:
            for denoiser in denoisers(self.pipe).values():
                stack.enter_context(StepAdapters.of(denoiser).companion())
            return self.student.predict(latents, level, batch)

    def base_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the unguided pretrained weights' prediction; the graph reaches the latents."""
        with adapters_disabled(nn.ModuleDict(denoisers(self.pipe))):
            # Nothing is recomputed: it would be with the adapters.
            return self.student.predict(latents, level, batch, checkpointing="none", offload=False)

    def schedule(self, batch: Batch, num_inference_steps: int) -> list[NoiseLevel]:
        """Return the levels before every step of the student's schedule, and the last one's end."""
        key = batch["size"], num_inference_steps
        if key not in self._schedules:
            self._schedules[key] = self.student.schedule(batch, num_inference_steps)
        return self._schedules[key]

    # Random numbers

    def noise(self, like: Tensor, batch: Batch) -> Tensor:
        """Return new standard normal noise for each row, the same on any number of processes."""
        return self.random.normal(like, batch["seed"])

    def uniform(self) -> float:
        """Return a new random number in [0, 1), the same on all processes."""
        return self.random.uniform()

    def with_other_noise(self, batch: Batch) -> Batch:
        """Return the batch with other seeds of the initial noise, and without targets."""
        other: Any = {**batch, **NO_TARGET, "seed": self.random.seeds(batch["seed"])}
        return other  # type: ignore[no-any-return]

    @contextmanager
    def hooked(self, hooks: Mapping[str, Any]) -> Iterator[None]:
        """Have forward hooks on modules of the denoisers, by name, until the context is left."""
        with ExitStack() as stack:
            for denoiser in denoisers(self.pipe).values():
                for name, hook in hooks.items():
                    handle = denoiser.get_submodule(name).register_forward_hook(hook)
                    stack.callback(handle.remove)
            yield
