"""The clean latents x0 that any pipeline predicts at any noise level, by its own `__call__`.

Methods that compare predictions at random noise levels (distribution matching, consistency,
adversarial features) need them. Guidance, conditioning, scaling of the input and the choice between
two denoisers are in the pipeline's loop, so the loop is run: for two steps at the same level.

1. The first step's output is replaced by the given latents, which puts them into the loop in the
   loop's own layout. What the denoiser returns there is ignored. Its shape is remembered, and the
   next time it is not called for this step.
2. The second step's output is the prediction: one step from the level down to zero noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.errors import InputError
from lit_distill.pipelines.components import copy_scheduler, denoisers, replaced_components
from lit_distill.pipelines.hooks import LoopState, replaced_forward
from lit_distill.pipelines.noise_levels import NoiseLevel, NoiseLevels
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def denoise(
    pipe: DiffusionPipeline,
    latents: Tensor,
    level: NoiseLevel,
    *,
    generator: Sequence[torch.Generator],
    cfg_scale: float = 1.0,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    **call_kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """Return the clean latents that the pipeline predicts, differentiable where gradients are on.

    Args:
        pipe: Any diffusers pipeline whose scheduler is of a kind that `NoiseLevels` knows.
        latents: Noisy latents, (B, ...), in the space of `lit_distill.rollout`; float32.
        level: Their noise level, of `NoiseLevels` of the pipeline's scheduler.
        generator: One generator per sample. The noise that they draw is not used.
        cfg_scale: Classifier-free guidance, the textbook scale, >= 1; 1 means off.
        checkpointing: What the backward pass recomputes; see `lit_distill.rollout`.
        offload: Store the blocks' inputs in host memory.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        The prediction, (B, ...), float32, in the space of `lit_distill.rollout`.

    Raises:
        InputError: If the scheduler's kind is unknown, or the pipeline does more to its latents
            than its scheduler.
    """
    scheduler = _TwoEqualSteps(pipe, latents, level)
    shape = {k: v for k, v in call_kwargs.items() if isinstance(v, int | float | str)}
    key = (len(generator), cfg_scale != 1, *sorted(shape.items()))
    with ExitStack() as stack:
        stack.enter_context(replaced_components(pipe, scheduler=scheduler.scheduler))
        for denoiser in denoisers(pipe).values():
            stack.enter_context(_first_step_skipped(denoiser, scheduler, key))
        run_pipeline(
            pipe,
            num_inference_steps=4,  # enough to see whether the schedule is an ordinary one
            generator=generator,
            cfg_scale=cfg_scale,
            on_step=scheduler.on_step,
            output_type="latent",
            grad_steps=1,
            checkpointing=checkpointing,
            offload=offload,
            **call_kwargs,
        )
    if scheduler.prediction is None:
        raise InputError(
            f"{type(pipe).__name__} leaves out steps of its schedule, so that its prediction at a "
            "noise level can't be read; use objective Regression or Trajectory"
        )
    return scheduler.prediction


class _TwoEqualSteps:
    """A copy of a pipeline's scheduler whose schedule is the same level twice, then zero noise.

    Attributes:
        scheduler: The copy.
        prediction: The clean latents, (B, ...), float32, after the second step.
        in_loop: Whether the given latents have entered the loop.
    """

    def __init__(self, pipe: DiffusionPipeline, latents: Tensor, level: NoiseLevel) -> None:
        self.pipeline = type(pipe).__name__
        self.latents = latents
        self.level = level
        self.levels = NoiseLevels(pipe.scheduler)
        self.prediction: Tensor | None = None
        self.in_loop = False
        self.scheduler = copy_scheduler(pipe.scheduler)
        self._replace("set_timesteps", self._set_timesteps)
        self._replace("step", self._step)
        self._replace("scale_model_input", self._scale_model_input)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        """Replace a method of the scheduler; pipelines look into the signature of the original."""
        original = getattr(type(self.scheduler), name, None)
        if original is not None:
            replacement = functools.wraps(original)(functools.partial(method, original))
            self.scheduler.__dict__[name] = MethodType(replacement, self.scheduler)

    def _set_timesteps(
        self,
        original: Callable[..., None],
        scheduler: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        original(scheduler, *args, **kwargs)
        self.levels.check_schedule(scheduler, self.pipeline)
        scheduler.timesteps = torch.full_like(scheduler.timesteps[:1], self.level.timestep).repeat(
            2
        )
        scheduler.num_inference_steps = 2
        if getattr(scheduler, "sigmas", None) is not None:
            scheduler.sigmas = torch.tensor([self.level.noise, self.level.noise, 0.0])

    def _scale_model_input(
        self,
        original: Callable[..., Tensor],
        scheduler: Any,  # noqa: ANN401
        sample: Tensor,
        *_: Any,  # noqa: ANN401
        **__: Any,  # noqa: ANN401
    ) -> Tensor:
        scheduler.is_scale_input_called = True
        return sample / self.level.scale

    def _step(
        self,
        original: Callable[..., Any],
        scheduler: Any,  # noqa: ANN401
        model_output: Tensor,
        timestep: Any,  # noqa: ANN401
        sample: Tensor,
        *_: Any,  # noqa: ANN401
        return_dict: bool = True,
        **__: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        result = sample
        if self.in_loop:
            if (
                not torch.equal(sample, self.latents.to(sample))
                or model_output.shape != sample.shape
            ):
                raise InputError(
                    f"{self.pipeline} does more to its latents than its scheduler does, so that "
                    "its prediction at a noise level can't be read; use objective Regression or "
                    "Trajectory"
                )
            self.prediction = self.levels.predict(
                model_output.float(), self.latents.float(), self.level
            )
            result = self.prediction.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result, result)

    def on_step(self, state: LoopState, latents: Tensor) -> Tensor:
        """Put the given latents into the loop after the first step."""
        if self.in_loop:
            return latents
        self.in_loop = True
        # A copy, since Kandinsky5's video pipeline updates its latents in place.
        return self.latents.to(latents.dtype, copy=True)


_OUTPUTS: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
"""Denoiser -> key of a call -> what it returned, of which only the shapes are used."""


@contextmanager
def _first_step_skipped(denoiser: Any, scheduler: _TwoEqualSteps, key: Any) -> Iterator[None]:  # noqa: ANN401
    """Return zeros of the remembered shape in the first step.

    The key has nothing of a single row in it (the length of its prompt), so that all processes that
    share a sharded denoiser call it alike.
    """
    original = denoiser.forward
    outputs = _OUTPUTS.setdefault(denoiser, {})
    calls = 0

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal calls
        if scheduler.in_loop:
            return original(*args, **kwargs)
        calls += 1
        if (calls, key) not in outputs:
            # An adapter's dropout draws random numbers here, and not when the shape is known.
            devices = range(torch.cuda.device_count())
            with torch.random.fork_rng(devices):
                output = original(*args, **kwargs)
            outputs[calls, key] = tree_map_only(
                Tensor, lambda t: t.new_zeros(()).expand(t.shape), output
            )
        return tree_map_only(Tensor, lambda t: t.contiguous(), outputs[calls, key])

    with replaced_forward(denoiser, forward):
        yield
