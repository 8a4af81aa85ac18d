"""A LoRA for every step of the student: which of a denoiser's adapters is the active one.

peft asks every layer which of its adapters is active. Here all layers of a denoiser share one list,
so that to switch them is one assignment, and no `requires_grad` changes with it, as it does with
peft's own `set_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

_ATTRIBUTE = "_lit_distill_step_loras"


def step_names(count: int) -> list[str]:
    """Return the names of the adapters of `count` steps: step_1, step_2, ..."""
    return [f"step_{number}" for number in range(1, count + 1)]


class StepAdapters:
    """The adapters of a denoiser's steps, of which one at a time is active.

    Args:
        names: Their names, one a step; none where the denoiser has nothing to switch.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._active = names[:1]

    @classmethod
    def of(cls, denoiser: nn.Module) -> StepAdapters:
        """Return those of a denoiser; with nothing to switch if it has none or they are off.

        What a user has activated beside them with peft or diffusers, a style, stays active.
        """
        own: StepAdapters | None = getattr(denoiser, _ATTRIBUTE, None)
        layers = [] if own is None else _layers(denoiser)
        if own is None or any(layer._disable_adapters for layer in layers):
            return cls([])
        if any(layer._active_adapter is not own._active for layer in layers):
            chosen: list[str] = list(layers[0].active_adapters)
            if not set(chosen) & set(own._names):
                return cls([])
            own._active[:] = chosen
            for layer in layers:
                layer._active_adapter = own._active
            own._activate(own._names[0])
        return own

    def at(self, step: int, total: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` such that a step's LoRA is active whenever it runs: also when run again.

        Args:
            step: Number of the step, from 0.
            total: Steps of the whole run.
            call: Runs the denoiser.

        Raises:
            ValueError: If the run has another number of steps.
        """
        if not self._names:
            return call
        if total != len(self._names):
            raise ValueError(
                f"the student has a LoRA for each of {len(self._names)} steps, but is to draw with "
                f"a schedule of {total}: set num_inference_steps to {len(self._names)}, with a "
                "scheduler that makes one step of each"
            )
        return partial(self._run, self._names[step], call)

    def as_now(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return `call` such that what is active now is so whenever it runs."""
        now = [name for name in self._active if name in self._names]
        return partial(self._run, now[0], call) if now else call

    def _run(self, name: str, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        before = list(self._active)
        self._activate(name)
        try:
            return call(*args, **kwargs)
        finally:
            self._active[:] = before

    def _activate(self, name: str) -> None:
        self._active[:] = [other for other in self._active if other not in self._names] + [name]


def share_active_adapter(denoiser: nn.Module, names: list[str]) -> None:
    """Make adapters, which the denoiser has already, those of its steps; the first is active."""
    loras = StepAdapters(names)
    for layer in _layers(denoiser):
        layer._active_adapter = loras._active
    setattr(denoiser, _ATTRIBUTE, loras)


def switch_adapter_callback(names: list[str]) -> Callable[..., dict[str, Any]]:
    """Return the `callback_on_step_end` with which plain diffusers switches adapters.

    It is the one of the model card. After the last step comes the first one, for the next call.
    """

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        pipe.set_adapters(names[(step + 1) % len(names)])
        return kwargs

    return callback


def _layers(denoiser: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
