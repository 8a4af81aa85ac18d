"""Noise levels: how much of the clean latents and of noise is in noisy latents, at a timestep.

Noisy latents are ``signal * x0 + noise * epsilon`` in all diffusers schedulers. The kinds of
schedulers differ in the two factors and in what the denoiser predicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lit_distill.errors import InputError


class NoiseLevel(NamedTuple):
    """The noise level of latents, and the timestep that the denoiser is told.

    Attributes:
        timestep: The timestep, in the scheduler's unit; 0 is clean for most.
        signal: Factor of the clean latents.
        noise: Factor of the noise, whose standard deviation is 1.
        scale: What the pipeline divides the latents by before the denoiser gets them.
    """

    timestep: float
    signal: float
    noise: float
    scale: float = 1.0

    def add_noise(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Return clean latents with noise of this level."""
        return self.signal * x0 + self.noise * noise

    def noise_of(self, latents: Tensor, x0: Tensor) -> Tensor:
        """Return the noise in latents of this level if `x0` are the clean ones."""
        return (latents - self.signal * x0) / self.noise


CLEAN = NoiseLevel(0.0, 1.0, 0.0)
"""No noise: where every schedule ends."""


class NoiseLevels:
    """All noise levels of a scheduler's model, and what its predictions mean there.

    Three kinds of schedulers are known: flow matching; those that keep the variance (DDIM, DDPM,
    PNDM, LCM, DPM-Solver, UniPC, ...); and those whose noise is added to unscaled latents (Euler,
    Heun, LMS, ...).

    Args:
        scheduler: The scheduler. Its schedule does not matter.

    Attributes:
        num_train_timesteps: The largest timestep is this, or one below.

    Raises:
        InputError: If the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any) -> None:  # noqa: ANN401
        config, name = scheduler.config, type(scheduler).__name__
        self.prediction = config.get("prediction_type", "epsilon")
        flow = "FlowMatch" in name or config.get("use_flow_sigmas")
        self.flow = bool(flow or self.prediction == "flow_prediction")
        self.num_train_timesteps = int(config.get("num_train_timesteps", 1000))
        # Mochi's times run backwards: 1 is clean.
        self._inverted = bool(config.get("invert_sigmas"))
        known = self.prediction in ("epsilon", "v_prediction", "sample")
        known = known and hasattr(scheduler, "alphas_cumprod")
        clipped = config.get("thresholding") or config.get("timestep_type") == "continuous"
        if not (self.flow or known) or clipped or "sigma_data" in config:
            raise InputError(
                f"{name}: the noise levels of this scheduler are not known (it is not flow "
                "matching, and has no alphas_cumprod or a parametrisation of its own); use "
                "objective Regression"
            )
        self._scaled = not self.flow and float(scheduler.init_noise_sigma) > 1
        if not self.flow:
            products = scheduler.alphas_cumprod.double().cpu().numpy()
            self._sigmas = np.sqrt((1 - products) / products)

    def at(self, timestep: float) -> NoiseLevel:
        """Return the level at a timestep, 0 <= timestep <= num_train_timesteps.

        Schedulers that keep the variance have whole timesteps: the nearest one is used.
        """
        if self.flow:
            share = timestep / self.num_train_timesteps
            noise = 1 - share if self._inverted else share
            return NoiseLevel(timestep, 1 - noise, noise)
        last = len(self._sigmas) - 1
        timestep = min(timestep, last) if self._scaled else float(min(round(timestep), last))
        # Between two timesteps as Euler's schedulers interpolate.
        sigma = float(np.interp(timestep, np.arange(last + 1), self._sigmas))
        scale = math.sqrt(1 + sigma**2)
        if self._scaled:
            return NoiseLevel(timestep, 1.0, sigma, scale)
        return NoiseLevel(timestep, 1 / scale, sigma / scale)

    def of_schedule(self, schedule: Mapping[str, Tensor]) -> list[NoiseLevel]:
        """Return the level before every step of a schedule, and `CLEAN`, where it ends.

        Args:
            schedule: As `lit_distill.pipelines.hooks.read_schedule` returns it.
        """
        times = schedule["timesteps"].tolist()
        if self.flow:
            times = [sigma * self.num_train_timesteps for sigma in schedule["sigmas"].tolist()[:-1]]
        return [*map(self.at, times), CLEAN]

    def check_schedule(self, scheduler: Any, pipeline: str) -> None:  # noqa: ANN401
        """Check that a pipeline's schedule has the noise levels of its timesteps.

        Raises:
            InputError: If it has not: CogView4 tells its denoiser the timestep before the shift.
        """
        if not self.flow or self._inverted:
            return
        told = scheduler.timesteps.cpu() / self.num_train_timesteps
        if (told - scheduler.sigmas[: len(told)].cpu()).abs().max() > 2 / self.num_train_timesteps:
            raise InputError(
                f"{pipeline} gives its denoiser other timesteps than its scheduler's noise levels, "
                "so that its prediction at a noise level can't be read; use objective Regression "
                "or Trajectory"
            )

    def share(self, share: float) -> NoiseLevel:
        """Return the level at a share of all timesteps, 0 (clean) to 1 (noise)."""
        share = 1 - share if self._inverted else share
        return self.at(share * self.num_train_timesteps)

    def predict(self, output: Tensor, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Return the clean latents that a denoiser's output means, before any clipping.

        Args:
            output: The output, guidance applied, as the scheduler's `step` gets it.
            latents: The noisy latents.
            level: Their noise level.
        """
        if self.flow:
            return latents + (level.noise if self._inverted else -level.noise) * output
        if self.prediction == "sample":
            return output
        if self.prediction == "epsilon":
            return (latents - level.noise * output) / level.signal
        # Of latents that keep the variance, whose factors are those of the level over its scale.
        return (level.signal / level.scale**2) * latents - (level.noise / level.scale) * output
