"""LoRA layers that are bit-identical to peft's but make fewer passes over the activations.

peft adds ``lora_B(lora_A(x)) * scaling`` to the base layer's output. This writes and reads two more
tensors of the output's size in every adapted layer, and one more in the backward pass. Adding in
place, with the scale as part of the addition, needs none of them. When a block is recomputed and
its backward pass does not need the layer's output, the large matmuls are skipped as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from lit_distill.compute.recompute_pruning import SkipMatmuls, is_skipped, record_output


class FusedLoraLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA linear layer with a fused update; falls back to peft where it does not apply."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return base_layer(x) + scaling * lora_B(lora_A(x)), (..., out_features)."""
        plain = not (self.disable_adapters or self.merged or args or kwargs or self.lora_variant)
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if not plain or name not in self.lora_A:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        scaling: float = self.scaling[name]
        dropout = self.lora_dropout[name]
        # Multiplying by a power of two is exact, so it does not matter when the result is rounded.
        if math.frexp(scaling)[0] != 0.5 or not isinstance(dropout, nn.Identity):
            return super().forward(x)  # type: ignore[no-any-return]
        down, up = self.lora_A[name], self.lora_B[name]
        hidden = down(self._cast_input_dtype(x, down.weight.dtype))
        if not torch.compiler.is_compiling() and is_skipped(self):
            with SkipMatmuls():  # type: ignore[no-untyped-call]
                return self._add_update(x, hidden, up, scaling)
        result = self._add_update(x, hidden, up, scaling)
        if not torch.compiler.is_compiling():
            record_output(self, result)
        return result

    def _add_update(self, x: Tensor, hidden: Tensor, up: nn.Module, scaling: float) -> Tensor:
        result: Tensor = self.base_layer(x)
        update: Tensor = up(hidden)
        if update.dtype != result.dtype:  # an in-place addition does not promote types
            return (result + update * scaling).to(result.dtype)
        return result.add_(update, alpha=scaling)


def use_fused_lora(module: nn.Module) -> None:
    """Replace the class of the module's plain peft LoRA layers by `FusedLoraLinear`."""
    for layer in module.modules():
        if type(layer) is lora.Linear:  # quantised layers have other classes
            layer.__class__ = FusedLoraLinear
