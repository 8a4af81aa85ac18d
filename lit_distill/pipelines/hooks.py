"""Hooks into a running pipeline: its scheduler's step, its denoisers' forward, its `__call__`.

None of them depends on the model family. `pipelines.rollout` puts them together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.errors import InputError
from lit_distill.pipelines.components import copy_scheduler, denoisers, replaced_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class LoopState:
    """The state of a running denoising loop.

    Attributes:
        pipe: The pipeline.
        scheduler: The scheduler of this loop.
        announced: Number of steps that the pipeline has given to its progress bar.
        index: The scheduler's own count of steps, if it has one.
        done: Number of steps that the scheduler has finished. During a `StepCallback` the step
            that it was called for is not counted yet.
        calls: Number of denoiser calls, not counting recomputation.
        calls_per_step: Number of denoiser calls in the first step; 0 until it is done.
        latents: The output of the last step; not set before the first one.
    """

    latents: Tensor

    def __init__(self, pipe: DiffusionPipeline, scheduler: Any) -> None:  # noqa: ANN401
        self.pipe = pipe
        self.scheduler = scheduler
        self.announced: int | None = None
        self.index: int | None = None
        self.done = 0
        self.calls = 0
        self.calls_per_step = 0

    @property
    def total(self) -> int:
        """Total number of `scheduler.step` calls; known once the pipeline has set the timesteps.

        Pipelines leave out steps of the schedule: the first ones if they start from an image, the
        last one in Sana-Sprint. They announce it to the scheduler, to the progress bar, or in an
        attribute.
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
        """Whether the current denoiser call is the last one, if all steps are like the first."""
        return self.done == self.total - 1 and self.calls == self.total * self.calls_per_step


StepCallback = Callable[[LoopState, Tensor], Tensor]
"""Called after each step with the state and the output; the loop continues with the result."""


@contextmanager
def observed_scheduler(
    pipe: DiffusionPipeline, on_step: StepCallback | None = None
) -> Iterator[LoopState]:
    """Give the pipeline a copy of its scheduler and observe its steps.

    Args:
        pipe: The pipeline; its scheduler is restored on exit.
        on_step: Called after each step.

    Yields:
        The state of the loop, updated at every step.
    """
    scheduler = copy_scheduler(pipe.scheduler)
    original = scheduler.step
    unbound = getattr(original, "__func__", lambda _, *args, **kwargs: original(*args, **kwargs))
    state = LoopState(pipe, scheduler)
    pipe.__dict__.pop("_num_timesteps", None)  # of the last call

    @functools.wraps(unbound)  # pipelines look for `eta` and `generator` in the signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self is not scheduler:  # a copy that the pipeline made, for the sound of its video
            return unbound(self, *args, **kwargs)
        if state.total == 1 and not torch.isfinite(scheduler.timesteps).all():
            raise InputError(
                f"{type(scheduler).__name__} has no one-step schedule with shift_terminal="
                f"{scheduler.config.get('shift_terminal')}: its only timestep is not a number. "
                "Use num_inference_steps >= 2, or set the scheduler's shift_terminal to None"
            )
        output = original(*args, **kwargs)
        latents = output[0]
        index = getattr(scheduler, "step_index", None)
        if index is not None and index == state.index:  # Cosmos goes back and repeats a step
            state.done -= 1
        state.index = index
        if on_step is not None:
            latents = on_step(state, latents)
            output = _with_latents(output, latents)
        state.latents = latents
        state.done += 1
        state.calls_per_step = state.calls_per_step or state.calls
        return output

    progress_bar = pipe.progress_bar

    def announced(iterable: Any = None, total: int | None = None, **options: Any) -> Any:  # noqa: ANN401
        state.announced = total if iterable is None else len(iterable)
        return progress_bar(iterable=iterable, total=total, **options)

    scheduler.step = MethodType(step, scheduler)
    try:
        with replaced_components(pipe, scheduler=scheduler, progress_bar=announced):
            yield state
    finally:
        # Otherwise a circle of references: the latents that multistep schedulers keep would live
        # until the garbage collector runs.
        del scheduler.step


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
def optional_tail(state: LoopState) -> Iterator[None]:
    """Ignore errors of a pipeline after its last step, whose output is all that is needed.

    Pixel-space pipelines (DeepFloyd IF) turn their images into arrays, which fails with gradients;
    others (Kandinsky) refuse to return latents when they are done.
    """
    try:
        yield
    except Exception:
        if not state.done or state.done != state.total:
            raise


@contextmanager
def replaced_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward until the context is left; module hooks still run around it."""
    patched = module.__dict__.get("forward")  # set by another library, to be restored
    module.forward = forward
    try:
        yield
    finally:
        if patched is None:
            del module.forward
        else:
            module.forward = patched


def undecorated_call(pipe: DiffusionPipeline) -> Callable[..., Any]:
    """Return the pipeline's `__call__` without `torch.no_grad` and without progress bar."""
    call = inspect.unwrap(type(pipe).__call__)

    def silent_call(**kwargs: Any) -> Any:  # noqa: ANN401
        with no_progress_bar(pipe):
            return call(pipe, **kwargs)

    return silent_call


@contextmanager
def no_progress_bar(pipe: DiffusionPipeline) -> Iterator[None]:
    """Switch the pipeline's progress bar off until the context is left."""
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**(config or {}) | {"disable": True})
    try:
        yield
    finally:
        pipe._progress_bar_config = config or {}


def replace_call(pipe: DiffusionPipeline, call: Callable[..., Any], **attributes: Any) -> None:  # noqa: ANN401
    """Replace the pipeline's `__call__` for users; `rollout` still calls the original one.

    The pipeline gets a subclass of the same name, so that `save_pretrained` records the class that
    diffusers knows.
    """
    cls: Any = type(pipe)
    call = functools.wraps(cls.__call__)(call)
    body = {"__call__": call, "__module__": cls.__module__, **attributes}
    pipe.__class__ = type(cls.__name__, (cls,), body)


class _ScheduleIsSet(Exception):  # noqa: N818
    """Stops a pipeline at its first denoiser call."""


def read_schedule(pipe: DiffusionPipeline, sample: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the ``timesteps`` and ``sigmas`` that the pipeline sets, without calling a denoiser.

    Args:
        pipe: The pipeline.
        sample: Samples with the pipeline; it is stopped at the first denoiser call.

    Returns:
        ``timesteps``, (steps,), and ``sigmas``, (steps + 1,), if the scheduler has them; float32,
        on the CPU.
    """
    schedule: dict[str, Tensor] = {}

    def read_and_stop(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        for name in ("timesteps", "sigmas"):
            values = getattr(pipe.scheduler, name, None)
            if values is not None:
                schedule[name] = torch.as_tensor(values).float().cpu()
        raise _ScheduleIsSet

    with ExitStack() as stack:
        for denoiser in denoisers(pipe).values():
            stack.enter_context(replaced_forward(denoiser, read_and_stop))
        stack.enter_context(suppress(_ScheduleIsSet))
        sample()
    return schedule


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
