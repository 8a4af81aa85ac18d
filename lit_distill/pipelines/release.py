"""Frees a pipeline or a network at once, without waiting for Python's garbage collector."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CYCLIC = ("_diffusers_hook", "_hf_hook", "_old_forward", "_compiled_call_impl")
"""Attributes of a module that refer back to it.

diffusers' `HookRegistry` (every call of a transformer makes one), accelerate's offloading, and a
compiled call.
"""


def release(pipe: DiffusionPipeline) -> None:
    """Free a pipeline that is not used any more: its memory is free once no caller holds a part.

    Without it, networks in reference cycles stay in memory until the garbage collector runs, which
    does not know how much memory they take. The pipeline is empty afterwards.
    """
    components = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    pipe.__dict__.clear()  # methods that were replaced on the instance refer to it
    for component in components:
        break_cycles(component)


def break_cycles(network: nn.Module) -> None:
    """Remove what keeps a network alive that nobody refers to; it can't be used afterwards."""
    for module in network.modules():
        # A method that was replaced on the instance usually holds the original one.
        replaced = [n for n in module.__dict__ if callable(getattr(type(module), n, None))]
        for name in (*CYCLIC, *replaced):
            module.__dict__.pop(name, None)
    forget_tables(network)


def forget_tables(network: nn.Module) -> None:
    """Clear what a network's methods keep for every size that they were called with.

    QwenImage keeps positions, for example, and with them the network. All networks of its class
    compute theirs again when they are called.
    """
    for module in network.modules():
        for method in filter(inspect.isfunction, vars(type(module)).values()):
            # diffusers wraps the cached method in a function that skips it while compiling.
            for cached in inspect.getclosurevars(method).nonlocals.values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
