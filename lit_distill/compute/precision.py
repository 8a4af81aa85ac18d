"""Float32 master weights, arithmetic in the base data type: training computes what inference does.

Autocast is not that: it leaves norms and the residual stream of float32 weights in float32, so that
the student learns to steer a network that nobody will draw with (figures in docs/training.md).
Here every module casts its own trainable parameters just before its forward. The gradient flows
through the cast, and the optimizer sees float32. Being inside the module, the cast is also right
when activation checkpointing runs the module again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(module: nn.Module, dtypes: Mapping[str, torch.dtype], default: torch.dtype) -> None:
    """Let every submodule that owns float32 parameters compute with casts of them.

    Args:
        module: The network, changed in place; its parameters, and so its state dict, are not.
        dtypes: Data type of each parameter in inference, by name.
        default: Data type of parameters that `dtypes` does not name, such as adapters.
    """
    _report_dtype(module, default)
    for prefix, owner in module.named_modules():
        wanted = {
            name: dtypes.get(f"{prefix}.{name}".lstrip("."), default)
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.dtype == torch.float32
        }
        if any(dtype != torch.float32 for dtype in wanted.values()):
            owner.forward = _with_casts(owner, owner.forward, wanted)
        # peft would cast to float32 what the adapter casts back.
        if hasattr(owner, "lora_A") and default != torch.float32:
            owner.cast_input_dtype_enabled = False


def _report_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let ``module.dtype``, to which pipelines cast what they pass in, be that of inference."""
    kind = type(module)
    if isinstance(getattr(kind, "dtype", None), property) and dtype != torch.float32:
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        module.__class__ = type(
            kind.__name__, (kind,), names | {"dtype": property(lambda _: dtype)}
        )


def _with_casts(
    owner: nn.Module, forward: Callable[..., Any], dtypes: dict[str, torch.dtype]
) -> Callable[..., Any]:
    takes_one_dtype = isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        own: dict[str, Any] = {name: owner._parameters[name] for name in dtypes}
        casts = {name: own[name].to(dtype) for name, dtype in dtypes.items()}
        if takes_one_dtype and "weight" in casts:
            # Some parents look at `child.weight.dtype` to cast the input; they see the master's.
            args = tuple(a.to(casts["weight"].dtype) if isinstance(a, Tensor) else a for a in args)
        owner._parameters.update(casts)
        try:
            return forward(*args, **kwargs)
        finally:
            owner._parameters.update(own)

    return call
