"""The latents after every step of a rollout, and their interpolation to other noise levels.

They are targets for the student's intermediate steps. Each state of the student has a noise level,
its sigma. The teacher reaches the same sigma between two of its smaller steps, and its state there
is interpolated linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.errors import InputError
from lit_distill.pipelines.hooks import LoopState
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


INTERPOLABLE_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")
"""Schedulers whose steps are linear in sigma, so that states can be interpolated exactly."""


class Trajectory(NamedTuple):
    """The states of a rollout after each of its K steps.

    Attributes:
        states: Latents, (K, B, ...), in the space of the rollout; the last are the final latents.
        sigmas: Their noise levels, (K,), float32, decreasing; the last is 0.
    """

    states: Tensor
    sigmas: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Return the trajectories of parts of a batch as that of the whole batch."""
        return cls(torch.cat([part.states for part in parts], 1), parts[0].sigmas)

    def at(self, sigmas: Tensor) -> Trajectory:
        """Return the states at other noise levels, interpolated linearly between two steps.

        Args:
            sigmas: Noise levels, (S,), none above the first one of this trajectory.

        Returns:
            The states at these levels, (S, B, ...), float32.

        Raises:
            ValueError: If a noise level is above the first one of this trajectory.
        """
        known = self.sigmas.double()
        sigmas = sigmas.to(known)
        if (sigmas > known[0]).any():
            raise InputError(
                f"the first of the teacher's {len(known)} steps ends at sigma {known[0]:.3g}, below"
                f" the student's {sigmas.max():.3g}: the teacher needs more steps than the student"
            )
        below = torch.searchsorted(-known, -sigmas).clamp(min=1)
        above = below - 1
        weight = ((sigmas - known[below]) / (known[above] - known[below])).float()
        weight = weight.view(-1, *[1] * (self.states.dim() - 1)).to(self.states.device)
        states = self.states.float()
        return Trajectory(states[below] * (1 - weight) + states[above] * weight, sigmas.float())


class TrajectoryRecorder:
    """A `lit_distill.pipelines.hooks.StepCallback` that records the state after every step.

    Args:
        detach: Whether the loop continues from a detached state. The gradient of each state then
            reaches only the denoiser calls of its own step.
    """

    def __init__(self, detach: bool = False) -> None:
        self._detach = detach
        self._states: list[Tensor] = []
        self._sigmas = torch.empty(0)

    def __call__(self, state: LoopState, latents: Tensor) -> Tensor:
        """Record the latents and return those that the loop continues with.

        Raises:
            ValueError: If the scheduler's steps are not linear in sigma.
        """
        if type(state.scheduler).__name__ not in INTERPOLABLE_SCHEDULERS:
            raise InputError(
                "a trajectory needs one of the schedulers "
                f"{', '.join(INTERPOLABLE_SCHEDULERS)}, whose states can be interpolated; this "
                f"pipeline has {type(state.scheduler).__name__}"
            )
        self._sigmas = state.scheduler.sigmas[1:].float().cpu()
        self._states.append(latents)
        return latents.detach() if self._detach else latents

    def trajectory(self) -> Trajectory:
        """Return the recorded states."""
        return Trajectory(torch.stack(self._states), self._sigmas)


def trajectory(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    **options: Any,  # noqa: ANN401
) -> Trajectory:
    """Sample as `lit_distill.rollout` does and return the states after all steps.

    The states are those of an ordinary rollout, but each is detached before the next step. The
    gradient of a state therefore reaches its own step only.

    Args:
        pipe: Any diffusers pipeline with an Euler scheduler.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator per sample.
        **options: Further arguments of `lit_distill.rollout`.

    Raises:
        ValueError: If an argument is out of range or the scheduler is not supported.
    """
    recorder = TrajectoryRecorder(detach=True)
    options.setdefault("cfg_scale", 1.0)
    run_pipeline(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        on_step=recorder,
        output_type="latent",
        **options,
    )
    return recorder.trajectory()
