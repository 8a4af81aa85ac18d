"""The one idea: a rollout is the pipeline's own `__call__`, run with gradients on.

Direct Distillation (DiffSynth-Studio's `DirectDistillLoss`; the regression of Luhman & Luhman,
arXiv:2101.02388, back-propagated through every step of the student) needs the denoising loop to
be differentiable. diffusers' loops are, but for a `torch.no_grad` decorator. So nothing about a
family's loop is written again here: training equals inference by construction, schedule and all.

Three taps, none of which knows a family, are laid while the pipeline runs:

1. A fresh scheduler, because multistep ones keep graph tensors, whose `step` is watched: the
   result of a rollout is the output of the last step. What a pipeline returns for
   ``output_type="latent"`` is unpacked, rescaled or not, as each family likes.
2. The denoisers' `forward`, wrapped on the instance (so that module hooks, FSDP2's for example,
   still run around it), for activation checkpointing and truncated back-propagation.
3. The progress bar, silenced.

Where the student has a LoRA for every step, the second tap also switches them; `switch_by_step`
lays it around the plain `pipe()`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lit_distill.checkpointing import (
    BY_BLOCK,
    Blocks,
    Checkpointing,
    check_mode,
)
from lit_distill.families import denoisers, guidance
from lit_distill.per_step import StepLoRAs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

StepTap = Callable[["Steps", Tensor], Tensor]
"""Called with what is known of the run and a step's output; what it returns goes on instead."""


def rollout(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float = 1.0,
    grad_steps: int | None = None,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    **call_kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """Draw with the pipeline's own loop and return its final latents, differentiably.

    Whether a graph is built is the caller's choice: under `torch.no_grad` this is the teacher.

    Args:
        pipe: Any diffusers pipeline. Freeze what is not trained; the graph reaches every
            parameter that requires gradients.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator a sample; the pipeline draws its start noise from them.
        cfg_scale: Classifier-free guidance, the textbook scale in every family, >= 1.
            1 means off: exactly one denoiser call a step.
        grad_steps: Back-propagate through the last `grad_steps` steps only (None: all).
        checkpointing: What is recomputed in the backward pass instead of stored: ``"none"``;
            ``"block"``, the denoiser's blocks; ``"selective"``, these but for their attention;
            ``"step"``, each denoiser call but the last; ``"nested"``, each call and, within it, its
            blocks: memory flat in the number of steps.
        offload: Keep the blocks' inputs in the host's memory, with block or selective.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        The output of the last ``scheduler.step``, in the pipeline's own layout: for example
        (B, tokens, channels) for QwenImage and Flux, (B, C, H/8, W/8) for SD3 and SDXL. Undo
        the layout with `LatentCodec`.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
        RuntimeError: If the pipeline never called its scheduler's `step`.
    """
    steps, _ = run(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        cfg_scale=cfg_scale,
        grad_steps=grad_steps,
        checkpointing=checkpointing,
        offload=offload,
        output_type="latent",
        **call_kwargs,
    )
    return steps.latents


@torch.no_grad()
def draw(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float = 1.0,
    tap: StepTap | None = None,
    **call_kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, list[Any]]:
    """Draw as `pipe()` does and return the exact final latents with the images.

    Args:
        pipe: Any diffusers pipeline.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator a sample.
        cfg_scale: Classifier-free guidance, the textbook scale, >= 1; 1 means off.
        tap: Sees every step.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        What `rollout` returns, and what the pipeline made of it: a list of B `PIL.Image.Image`, or
        of B lists of frames.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
    """
    steps, images = run(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        cfg_scale=cfg_scale,
        tap=tap,
        output_type="pil",
        **call_kwargs,
    )
    return steps.latents, images


def run(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float,
    output_type: str,
    tap: StepTap | None = None,
    grad_steps: int | None = None,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    **call_kwargs: Any,  # noqa: ANN401
) -> tuple[Steps, Any]:
    """Run the pipeline as `rollout` does; return its finished steps and what it returned itself."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be >= 1, got {num_inference_steps}")
    if grad_steps is not None and not grad_steps >= 1:
        raise ValueError(f"grad_steps must be >= 1 or None (all steps), got {grad_steps}")
    check_mode(checkpointing, offload)
    # Lists are copied, for Z-Image's pipeline writes its chat template into the caller's prompts.
    call_kwargs = {k: list(v) if isinstance(v, list) else v for k, v in call_kwargs.items()}
    with ExitStack() as stack:
        call_kwargs |= stack.enter_context(guidance(pipe, cfg_scale, len(generator), call_kwargs))
        if cfg_scale == 1:
            call_kwargs.pop("negative_prompt", None)  # unused, and QwenImage warns about it
        steps = stack.enter_context(watched_scheduler(pipe, tap))
        for denoiser in denoisers(pipe).values():
            tapped = _tapped_denoiser(denoiser, steps, grad_steps, checkpointing, offload)
            stack.enter_context(tapped)
        output = undecorated_call(pipe)(
            num_inference_steps=num_inference_steps,
            generator=list(generator),
            output_type=output_type,
            return_dict=False,
            **call_kwargs,
        )
    if not steps.done:
        raise RuntimeError(f"{type(pipe).__name__} never called scheduler.step")
    return steps, output[0]


def undecorated_call(pipe: DiffusionPipeline) -> Callable[..., Any]:
    """Return the pipeline's `__call__` without its `torch.no_grad` decorator, and silent."""
    call = inspect.unwrap(type(pipe).__call__)

    def silent(**kwargs: Any) -> Any:  # noqa: ANN401
        with silenced(pipe):
            return call(pipe, **kwargs)

    return silent


@contextmanager
def silenced(pipe: DiffusionPipeline) -> Iterator[None]:
    """Switch the pipeline's progress bar off."""
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**(config or {}) | {"disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = config or {}


def with_call(pipe: DiffusionPipeline, call: Callable[..., Any], **attributes: Any) -> None:  # noqa: ANN401
    """Let `call` answer for the pipeline's `__call__`, which `rollout` still finds within.

    The pipeline's class keeps its name, so that saving and `rollout` see the class they know.
    """
    own: Any = type(pipe)
    call = functools.wraps(own.__call__)(call)
    body = {"__call__": call, "__module__": own.__module__, **attributes}
    pipe.__class__ = type(own.__name__, (own,), body)


def switch_by_step(pipe: DiffusionPipeline) -> None:
    """Let the plain `pipe()` draw each step with its own LoRA, as `rollout` does by itself."""
    own: Any = type(pipe)
    if getattr(own, "_switches_by_step", False):
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with ExitStack() as stack:
            steps = stack.enter_context(watched_scheduler(self))
            for denoiser in denoisers(self).values():
                stack.enter_context(_tapped_denoiser(denoiser, steps, None, "none", False))
            return own.__call__(self, *args, **kwargs)

    with_call(pipe, call, _switches_by_step=True)


class Steps:
    """Where a running pipeline is.

    Attributes:
        scheduler: The pipeline's scheduler in this run.
        done: Steps that the scheduler has made; in a tap, before the one that it sees.
        calls: Calls of a denoiser, not counting recomputation.
        calls_a_step: Those in the first step, once it is done.
        latents: The output of the last step, once there is one.
    """

    latents: Tensor

    def __init__(self, scheduler: Any) -> None:  # noqa: ANN401
        self.scheduler = scheduler
        self.done = 0
        self.calls = 0
        self.calls_a_step = 0

    @property
    def total(self) -> int:
        """Number of `scheduler.step` calls in the whole run; known once the schedule is set."""
        return len(self.scheduler.timesteps)

    @property
    def at_last_call(self) -> bool:
        """Whether the denoiser's call that runs is the last, as far as the first step tells."""
        return self.done == self.total - 1 and self.calls == self.total * self.calls_a_step


@contextmanager
def watched_scheduler(pipe: DiffusionPipeline, tap: StepTap | None = None) -> Iterator[Steps]:
    """Give the pipeline a fresh scheduler and watch its steps.

    Args:
        pipe: The pipeline; its own scheduler comes back on exit.
        tap: Sees every step.

    Yields:
        The counter, updated at every step.
    """
    own = pipe.scheduler
    fresh = type(own).from_config(own.config)
    step = fresh.step
    steps = Steps(fresh)

    @functools.wraps(step)  # pipelines look for `eta` and `generator` in the signature
    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if steps.total == 1 and not torch.isfinite(fresh.timesteps).all():
            raise ValueError(
                f"{type(fresh).__name__} has no one-step schedule with shift_terminal="
                f"{fresh.config.get('shift_terminal')}: its only timestep is not a number. "
                "Use num_inference_steps >= 2, or set the scheduler's shift_terminal to None"
            )
        output = step(*args, **kwargs)
        latents = output[0]
        if tap is not None:
            latents = tap(steps, latents)
            if isinstance(output, tuple):
                output = (latents, *output[1:])
            else:
                output.prev_sample = latents
        steps.latents = latents
        steps.done += 1
        steps.calls_a_step = steps.calls_a_step or steps.calls
        return output

    fresh.step = watched
    pipe.scheduler = fresh
    try:
        yield steps
    finally:
        pipe.scheduler = own


class _ScheduleIsSet(Exception):  # noqa: N818
    """Leaves a pipeline at its first call of a denoiser."""


def schedule(pipe: DiffusionPipeline, draw: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the ``timesteps`` and ``sigmas`` that the pipeline itself sets; nothing is computed.

    Args:
        pipe: The pipeline.
        draw: Draws with it; left at the first call of a denoiser.

    Returns:
        Those of the two that its scheduler has, as (steps,) or (steps + 1,).
    """
    seen: dict[str, Tensor] = {}

    def look(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for name in ("timesteps", "sigmas"):
            values = getattr(pipe.scheduler, name, None)
            if values is not None:
                seen[name] = torch.as_tensor(values).float().cpu()
        raise _ScheduleIsSet

    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values():
            stack.enter_context(replaced_forward(denoiser, look))
        stack.enter_context(suppress(_ScheduleIsSet))
        draw()
    return seen


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` answer for the module, inside its hooks, until the context is left."""
    own = module.__dict__.get("forward")  # somebody else's patch, to be put back
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _tapped_denoiser(
    denoiser: Any,  # noqa: ANN401
    steps: Steps,
    grad_steps: int | None,
    checkpointing: Checkpointing,
    offload: bool,
) -> Iterator[None]:
    """Lay checkpointing, truncation and each step's LoRA around the denoiser's forward."""
    original = denoiser.forward
    loras = StepLoRAs.of(denoiser)
    blocks = None
    if checkpointing in BY_BLOCK:
        keep_attention = checkpointing == "selective"
        blocks = Blocks(denoiser, original, keep_attention=keep_attention, offload=offload)

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        steps.calls += 1
        # Steps are counted by the scheduler: guidance may call the denoiser twice a step.
        at_step = partial(loras.at, steps.done, steps.total)
        if not torch.is_grad_enabled():
            return at_step(original)(*args, **kwargs)
        if grad_steps is not None and steps.done < steps.total - grad_steps:
            with torch.no_grad():
                return at_step(original)(*args, **kwargs)
        last = steps.at_last_call
        nested = checkpointing == "nested"
        # Run again, each call is the last that has run.
        call = at_step(original if blocks is None else partial(blocks.run, nested or last))
        # The backward pass begins with the last call: to run it again at once would free nothing.
        if nested or (checkpointing == "step" and not last):
            # Cloned, for Kandinsky5's video pipeline updates its latents in place.
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return checkpoint(call, *args, use_reentrant=False, **kwargs)
        return call(*args, **kwargs)

    with replaced_forward(denoiser, forward):
        yield
