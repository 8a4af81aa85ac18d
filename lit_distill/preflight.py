"""Checks before training that a pipeline can be distilled the way this package does it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.families import denoisers
from lit_distill.rollout import draw, replaced_forward, rollout

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PreflightError(RuntimeError):
    """The pipeline failed a check; the message names it, what was seen and the remedy."""


def preflight(pipe: DiffusionPipeline, *, seed: int = 0, **call_kwargs: Any) -> None:  # noqa: ANN401
    """Draw one sample in two steps, twice, and compare.

    Checks that the rollout with gradients on ends in the latents of the pipeline without, and that
    without guidance the denoiser is called once a step.

    Args:
        pipe: The pipeline, its trainable parameters requiring gradients.
        seed: Seed of the noise.
        **call_kwargs: Arguments of the pipeline's call for one sample, ``prompt`` among them.

    Raises:
        PreflightError: Naming the check that failed.
    """
    calls = 0

    def counted(forward: Any) -> Any:  # noqa: ANN401
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        return call

    def arguments() -> dict[str, Any]:
        generator = [torch.Generator().manual_seed(seed)]
        return {"num_inference_steps": 2, "generator": generator, **call_kwargs}

    expected, _ = draw(pipe, **arguments())
    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values():
            stack.enter_context(replaced_forward(denoiser, counted(denoiser.forward)))
        with torch.enable_grad():
            found = rollout(pipe, **arguments())
    name = type(pipe).__name__
    if not found.requires_grad:
        raise PreflightError(
            f"{name}: no gradient reaches the end of the rollout; is a trainable parameter used?"
        )
    # Attention may take another kernel when it records a graph: equal up to rounding.
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= (1e-4 if found.dtype == torch.float32 else 5e-2):
        raise PreflightError(
            f"{name}: two draws of one seed differ by {error:.1e} of the largest value; "
            "train with dropout off, or, if the pipeline itself is not deterministic here, with "
            "preflight: false"
        )
    if calls >= 4:  # schedulers of higher order take a third
        raise PreflightError(
            f"{name}: {calls} denoiser calls in 2 steps with guidance off; this family needs a "
            "line in lit_distill.families.QUIRKS"
        )
