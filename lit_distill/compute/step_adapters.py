"""Switches the active adapter of a denoiser: one LoRA per student step, or the companion.

In peft every layer stores the names of its active adapters. Here all layers of a denoiser share one
list, so switching takes one assignment. Unlike peft's `set_adapter` it leaves `requires_grad`
unchanged.

The companion is an adapter that an objective trains beside the student's, on the same frozen
weights. It is never exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from lit_distill.errors import InputError

_ATTRIBUTE = "_lit_distill_step_loras"

COMPANION = "companion"
"""Name of the adapter that an objective trains beside the student's."""


def step_names(count: int) -> list[str]:
    """Return the names of the adapters of `count` steps: step_1, step_2, ..."""
    return [f"step_{number}" for number in range(1, count + 1)]


class StepAdapters:
    """The per-step adapters of a denoiser, of which one at a time is active.

    Args:
        names: Their names, one per step; empty if there is nothing to switch.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._active = names[:1]

    @classmethod
    def of(cls, denoiser: nn.Module) -> StepAdapters:
        """Return the denoiser's step adapters; empty if it has none or they are disabled.

        Other adapters that the user has activated with peft or diffusers, such as a style LoRA,
        stay active.
        """
        adapters: StepAdapters | None = getattr(denoiser, _ATTRIBUTE, None)
        layers = [] if adapters is None else _adapter_layers(denoiser)
        if adapters is None or any(layer._disable_adapters for layer in layers):
            return cls([])
        if any(layer._active_adapter is not adapters._active for layer in layers):
            chosen: list[str] = list(layers[0].active_adapters)
            if not set(chosen) & set(adapters._names):
                return cls([])
            adapters._active[:] = chosen
            for layer in layers:
                layer._active_adapter = adapters._active
            adapters._activate(adapters._names[0])
        return adapters

    def bind_step(self, step: int, total: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with a step's adapter active whenever it runs, recomputation included.

        Args:
            step: Index of the step, from 0.
            total: Number of steps in the schedule.
            call: Calls the denoiser.

        Raises:
            ValueError: If the schedule has another number of steps than there are adapters.
        """
        if COMPANION in self._active:
            return self.bind_active(call)
        if not self._names:
            return call
        if total != len(self._names):
            raise InputError(
                f"the student has a LoRA for each of {len(self._names)} steps, but was called with "
                f"a schedule of {total}: set num_inference_steps to {len(self._names)}, with a "
                "scheduler that takes one step for each"
            )
        return partial(self._call_with, self._names[step], call)

    def bind_active(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` with the adapter that is active now active whenever it runs."""
        active = [name for name in self._active if name in (*self._names, COMPANION)]
        return partial(self._call_with, active[0], call) if active else call

    def _call_with(self, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        before = list(self._active)
        self._activate(name)
        try:
            return call(*args, **kwargs)
        finally:
            self._active[:] = before

    @contextmanager
    def companion(self) -> Iterator[None]:
        """Have the companion active in place of the student's adapter until the context is left."""
        before = list(self._active)
        self._activate(COMPANION)
        try:
            yield
        finally:
            self._active[:] = before

    def _activate(self, name: str) -> None:
        if name == COMPANION:
            self._active[:] = [name]
            return
        self._active[:] = [other for other in self._active if other not in self._names] + [name]


def share_active_adapter(denoiser: nn.Module, names: list[str]) -> None:
    """Use existing adapters of the denoiser as its step adapters; the first becomes active.

    Without names nothing is switched by steps, and the adapters that are active remain so.
    """
    adapters = StepAdapters(names)
    layers = _adapter_layers(denoiser)
    if not names:
        adapters._active = list(layers[0].active_adapters)
    for layer in layers:
        layer._active_adapter = adapters._active
    setattr(denoiser, _ATTRIBUTE, adapters)


def switch_adapter_callback(names: list[str]) -> Callable[..., dict[str, Any]]:
    """Return a `callback_on_step_end` that switches adapters in plain diffusers.

    The model card shows the same callback. After the last step it activates the first adapter, for
    the next call.
    """

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        pipe.set_adapters(names[(step + 1) % len(names)])
        return kwargs

    return callback


def _adapter_layers(denoiser: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
