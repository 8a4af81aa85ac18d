"""LoRA layers that compute what peft's do, bit for bit, with fewer passes over the activations.

peft adds ``lora_B(lora_A(x)) * scaling`` to the base layer's output: two more tensors of its size,
each written and read, and one more in the backward pass, in every adapted layer. Adding in place,
with the scale in the addition, needs none of them. And where a block runs again for its backward
pass and has no use for the layer's output, its large products are left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lit_distill.compute.recompute_pruning import SkipMatmuls, is_skipped, record_output


class FusedLoraLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA of a linear layer; what the short way does not cover goes peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return base_layer(x) + scaling * lora_B(lora_A(x)), (..., out_features)."""
        plain = not (self.disable_adapters or self.merged or args or kwargs or self.lora_variant)
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if not plain or name not in self.lora_A:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        scaling: float = self.scaling[name]
        dropout = self.lora_dropout[name]
        # Times a power of two is exact, so that rounding once or twice is the same.
        if math.frexp(scaling)[0] != 0.5 or not isinstance(dropout, nn.Identity):
            return super().forward(x)  # type: ignore[no-any-return]
        down, up = self.lora_A[name], self.lora_B[name]
        inner = down(self._cast_input_dtype(x, down.weight.dtype))
        if not torch.compiler.is_compiling() and is_skipped(self):
            with SkipMatmuls():  # type: ignore[no-untyped-call]
                return self._sum(x, inner, up, scaling)
        result = self._sum(x, inner, up, scaling)
        if not torch.compiler.is_compiling():
            record_output(self, result)
        return result

    def _sum(self, x: Tensor, inner: Tensor, up: nn.Module, scaling: float) -> Tensor:
        result: Tensor = self.base_layer(x)
        added: Tensor = up(inner)
        if added.dtype != result.dtype:  # an addition in place can't promote
            return (result + added * scaling).to(result.dtype)
        return result.add_(added, alpha=scaling)


def use_fused_lora(module: nn.Module) -> None:
    """Let the module's LoRA layers, where they are peft's plain ones, take the short way."""
    for layer in module.modules():
        if type(layer) is lora.Linear:  # quantised layers have classes of their own
            layer.__class__ = FusedLoraLinear
