"""The states between the steps: where the teacher was, for the student to be there too.

A student's state after a step has a noise level, its sigma. The teacher passes the same level
somewhere between two of its many small steps; there its state is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lit_distill.pipelines.hooks import LoopState
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


STRAIGHT = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")
"""Schedulers whose step is a straight line over sigma, so that states can be interpolated."""


class Trajectory(NamedTuple):
    """States of a rollout.

    Attributes:
        states: After each of K steps, (K, B, ...); the last are the final latents.
        sigmas: Noise level of each, (K,), float32, falling; the last is 0.
    """

    states: Tensor
    sigmas: Tensor

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Return the trajectories of parts of a batch as that of the whole batch."""
        return cls(torch.cat([part.states for part in parts], 1), parts[0].sigmas)

    def at(self, sigmas: Tensor) -> Trajectory:
        """Return the states at other noise levels, each between two of these on a straight line.

        Args:
            sigmas: Noise levels, (S,), of which none is above the first of these.

        Raises:
            ValueError: If these steps begin below one of the levels.
        """
        own = self.sigmas.double()
        wanted = sigmas.to(own)
        if (wanted > own[0]).any():
            raise ValueError(
                f"the first of the teacher's {len(own)} steps ends at sigma {own[0]:.3g}, below the"
                f" student's {wanted.max():.3g}: the teacher needs more steps than the student"
            )
        below = torch.searchsorted(-own, -wanted).clamp(min=1)
        above = below - 1
        share = ((wanted - own[below]) / (own[above] - own[below])).float()
        share = share.view(-1, *[1] * (self.states.dim() - 1)).to(self.states.device)
        states = self.states.float()
        return Trajectory(states[below] * (1 - share) + states[above] * share, wanted.float())


class Recorder:
    """A `lit_distill.pipelines.hooks.StepCallback` that keeps the state after every step.

    Args:
        cut: Whether a state goes on without its graph: then the gradient of each reaches the
            denoiser's call of its own step only.
    """

    def __init__(self, cut: bool = False) -> None:
        self._cut = cut
        self._states: list[Tensor] = []
        self._sigmas = torch.empty(0)

    def __call__(self, steps: LoopState, latents: Tensor) -> Tensor:
        """Keep a state.

        Raises:
            ValueError: If the scheduler's steps are no straight lines over sigma.
        """
        if type(steps.scheduler).__name__ not in STRAIGHT:
            raise ValueError(
                f"a trajectory needs one of the schedulers {', '.join(STRAIGHT)}, whose states can "
                f"be interpolated; this pipeline has {type(steps.scheduler).__name__}"
            )
        self._sigmas = steps.scheduler.sigmas[1:].float().cpu()
        self._states.append(latents)
        return latents.detach() if self._cut else latents

    def trajectory(self) -> Trajectory:
        """Return what was kept."""
        return Trajectory(torch.stack(self._states), self._sigmas)


def trajectory(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    **options: Any,  # noqa: ANN401
) -> Trajectory:
    """Draw as `lit_distill.rollout` does, and return the states after all steps.

    Every step goes on from where the pipeline is, as when it draws, but the gradient of a state
    ends where its own step began: there is none through the steps before.

    Args:
        pipe: Any diffusers pipeline whose scheduler is an Euler one.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator a sample.
        **options: Further arguments of `lit_distill.rollout`.

    Raises:
        ValueError: If an argument is out of range or the scheduler is another one.
    """
    recorder = Recorder(cut=True)
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
