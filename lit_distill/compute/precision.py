"""Float32 master weights with arithmetic in the base data type, so training matches inference.

Autocast does not match inference: it computes norms and the residual stream of float32 weights in
float32, so the student would be trained in another precision than it is used in (figures in
docs/training.md). Here every module casts its trainable parameters just before its forward. The
gradient flows through the cast, and the optimizer sees float32. Because the cast is inside the
module, it also works when activation checkpointing recomputes the module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def compute_in(module: nn.Module, dtypes: Mapping[str, torch.dtype], default: torch.dtype) -> None:
    """Make every submodule with float32 parameters compute with casts of them.

    Args:
        module: The network, changed in place; its parameters and its state dict are not.
        dtypes: Data type of each parameter at inference, by name.
        default: Data type of parameters that `dtypes` does not name, such as adapters.
    """
    _report_dtype(module, default)
    for prefix, submodule in module.named_modules():
        casts = {
            name: dtypes.get(f"{prefix}.{name}".lstrip("."), default)
            for name, parameter in submodule.named_parameters(recurse=False)
            if parameter.dtype == torch.float32
        }
        if any(dtype != torch.float32 for dtype in casts.values()):
            submodule.forward = _with_casts(submodule, submodule.forward, casts)
        # peft would cast the input to float32, only for the adapter to cast it back.
        if hasattr(submodule, "lora_A") and default != torch.float32:
            submodule.cast_input_dtype_enabled = False


def _report_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Make ``module.dtype``, to which pipelines cast their inputs, the data type of inference."""
    cls = type(module)
    if isinstance(getattr(cls, "dtype", None), property) and dtype != torch.float32:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        module.__class__ = type(cls.__name__, (cls,), names | {"dtype": property(lambda _: dtype)})


def _with_casts(
    module: nn.Module, forward: Callable[..., Any], dtypes: dict[str, torch.dtype]
) -> Callable[..., Any]:
    takes_one_dtype = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        masters: dict[str, Any] = {name: module._parameters[name] for name in dtypes}
        casts = {name: masters[name].to(dtype) for name, dtype in dtypes.items()}
        if takes_one_dtype and "weight" in casts:
            # Some parents cast the input to `child.weight.dtype`, which is that of the master.
            args = tuple(a.to(casts["weight"].dtype) if isinstance(a, Tensor) else a for a in args)
        module._parameters.update(casts)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(masters)

    return call
