"""What an optimizer keeps and allocates, measured on a few small parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lit_distill.planning.counter import Counter

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def optimizer_bytes(make: MakeOptimizer) -> tuple[float, float]:
    """Return the bytes of an optimizer's state and temporaries for each byte of parameters.

    Args:
        make: Makes the optimizer of a list of parameters.
    """
    parameters = [nn.Parameter(torch.zeros(128, 128)) for _ in range(4)]
    optimizer = make(parameters)
    for group in optimizer.param_groups:
        # On a GPU the implementation that takes all tensors at once is the default.
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    size = sum(parameter.nbytes for parameter in parameters)
    optimizer.step()
    state = sum(
        value.nbytes
        for each in optimizer.state.values()
        for value in each.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    with Counter() as counter:
        optimizer.step()
    return state / size, counter.peak / size
