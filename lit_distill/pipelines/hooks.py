"""Hooks on a running pipeline: its scheduler, its denoisers' forward, its call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.pipelines.components import copy_scheduler, denoisers, replaced_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


StepCallback = Callable[["LoopState", Tensor], Tensor]
"""Called with what is known of the run and a step's output; what it returns goes on instead."""


def undecorated_call(pipe: DiffusionPipeline) -> Callable[..., Any]:
    """Return the pipeline's `__call__` without its `torch.no_grad` decorator, and silent."""
    call = inspect.unwrap(type(pipe).__call__)

    def silent(**kwargs: Any) -> Any:  # noqa: ANN401
        with no_progress_bar(pipe):
            return call(pipe, **kwargs)

    return silent


@contextmanager
def no_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """Switch the pipeline's progress bar off."""
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**(config or {}) | {"disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = config or {}


def replace_call(pipe: DiffusionPipeline, call: Callable[..., Any], **attributes: Any) -> None:  # noqa: ANN401
    """Let `call` answer for the pipeline's `__call__`, which `rollout` still finds within.

    The pipeline's class keeps its name, so that saving and `rollout` see the class they know.
    """
    own: Any = type(pipe)
    call = functools.wraps(own.__call__)(call)
    body = {"__call__": call, "__module__": own.__module__, **attributes}
    pipe.__class__ = type(own.__name__, (own,), body)


class LoopState:
    """Where a running pipeline is.

    Attributes:
        pipe: The pipeline.
        scheduler: Its scheduler in this run.
        announced: Number of steps that the pipeline told its progress bar.
        index: The scheduler's own count, where it has one.
        done: Steps that the scheduler has made; in a on_step, before the one that it sees.
        calls: Calls of a denoiser, not counting recomputation.
        calls_a_step: Those in the first step, once it is done.
        latents: The output of the last step, once there is one.
    """

    latents: Tensor

    def __init__(self, pipe: DiffusionPipeline, scheduler: Any) -> None:  # noqa: ANN401
        self.pipe = pipe
        self.scheduler = scheduler
        self.announced: int | None = None
        self.index: int | None = None
        self.done = 0
        self.calls = 0
        self.calls_a_step = 0

    @property
    def total(self) -> int:
        """Number of `scheduler.step` calls in the whole run; known once the schedule is set.

        Pipelines leave steps of the schedule out: the first ones when they start from an image, the
        last one in Sana-Sprint. They tell so to the scheduler, the progress bar, or to themselves.
        """
        skipped = 0
        steps = getattr(self.scheduler, "num_inference_steps", None)
        if steps is not None and self.announced is not None:
            skipped = max(0, steps - self.announced) * getattr(self.scheduler, "order", 1)
        begin = getattr(self.scheduler, "begin_index", None) or 0
        total = len(self.scheduler.timesteps) - max(skipped, begin)
        return min(total, getattr(self.pipe, "_num_timesteps", total))

    @property
    def at_last_call(self) -> bool:
        """Whether the denoiser's call that runs is the last, as far as the first step tells."""
        return self.done == self.total - 1 and self.calls == self.total * self.calls_a_step


@contextmanager
def observed_scheduler(
    pipe: DiffusionPipeline, on_step: StepCallback | None = None
) -> Iterator[LoopState]:
    """Give the pipeline a copy of its scheduler and watch its steps.

    Args:
        pipe: The pipeline; its own scheduler comes back on exit.
        on_step: Sees every step.

    Yields:
        The counter, updated at every step.
    """
    own = pipe.scheduler
    fresh = copy_scheduler(own)
    step = fresh.step
    unbound = getattr(step, "__func__", lambda _, *args, **kwargs: step(*args, **kwargs))
    steps = LoopState(pipe, fresh)
    pipe.__dict__.pop("_num_timesteps", None)  # of the run before

    @functools.wraps(unbound)  # pipelines look for `eta` and `generator` in the signature
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self is not fresh:  # a copy that the pipeline made, for the sound of its video
            return unbound(self, *args, **kwargs)
        if steps.total == 1 and not torch.isfinite(fresh.timesteps).all():
            raise ValueError(
                f"{type(fresh).__name__} has no one-step schedule with shift_terminal="
                f"{fresh.config.get('shift_terminal')}: its only timestep is not a number. "
                "Use num_inference_steps >= 2, or set the scheduler's shift_terminal to None"
            )
        output = step(*args, **kwargs)
        latents = output[0]
        index = getattr(fresh, "step_index", None)
        if index is not None and index == steps.index:  # Cosmos goes back and makes a step again
            steps.done -= 1
        steps.index = index
        if on_step is not None:
            latents = on_step(steps, latents)
            output = _with_latents(output, latents)
        steps.latents = latents
        steps.done += 1
        steps.calls_a_step = steps.calls_a_step or steps.calls
        return output

    bar = pipe.progress_bar

    def heard(iterable: Any = None, total: int | None = None, **options: Any) -> Any:  # noqa: ANN401
        steps.announced = total if iterable is None else len(iterable)
        return bar(iterable=iterable, total=total, **options)

    fresh.step = MethodType(watched, fresh)
    pipe.scheduler = fresh
    try:
        with replaced_components(pipe, progress_bar=heard):
            yield steps
    finally:
        pipe.scheduler = own


def _with_latents(output: Any, latents: Tensor) -> Any:  # noqa: ANN401
    """Return a scheduler's output with other latents.

    LCM's pipelines decode the denoised prediction beside them, which is the same in the last step.
    """
    before = output[0]
    entries = output.to_tuple() if hasattr(output, "to_tuple") else output
    changed = (
        latents
        if each is before or (isinstance(each, Tensor) and torch.equal(each, before))
        else each
        for each in entries
    )
    if isinstance(output, tuple):
        return tuple(changed)
    for name, each in zip(output.keys(), changed, strict=True):
        output[name] = each
    return output


@contextmanager
def optional_tail(steps: LoopState) -> Iterator[None]:
    """Ignore errors of a pipeline after its last step, whose output is all that is needed.

    Pixel-space pipelines (DeepFloyd IF) turn their images into arrays, which fails with gradients;
    others (Kandinsky) refuse to return latents when they are done.
    """
    try:
        yield
    except Exception:
        if not steps.done or steps.done != steps.total:
            raise


class _ScheduleIsSet(Exception):  # noqa: N818
    """Leaves a pipeline at its first call of a denoiser."""


def read_schedule(pipe: DiffusionPipeline, sample: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the ``timesteps`` and ``sigmas`` that the pipeline itself sets; nothing is computed.

    Args:
        pipe: The pipeline.
        sample: Samples with it; left at the first call of a denoiser.

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
        sample()
    return seen


@contextmanager
def counted_batches(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """Note the batch size of every call of a denoiser, in the list that is yielded."""
    batches: list[int] = []

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            # The latents come first, as a tensor or a list of a tensor for each sample.
            given = (
                value for value in (*args, *kwargs.values()) if isinstance(value, list | Tensor)
            )
            batches.append(len(next(given)))
            return forward(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values():
            stack.enter_context(replaced_forward(denoiser, counting(denoiser.forward)))
        yield batches


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
