"""Bytes that weights take: as they are, quantised, or shared among devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.errors import InputError

_BITS = {
    "bitsandbytes_8bit": 8.0,
    "bitsandbytes_4bit": 4.0,
    "Int8WeightOnlyConfig": 8.0,
    "Int8DynamicActivationInt8WeightConfig": 8.0,
    "Float8WeightOnlyConfig": 8.0,
    "Float8DynamicActivationFloat8WeightConfig": 8.0,
    "Int4WeightOnlyConfig": 4.0,
    "UIntXWeightOnlyConfig": 8.0,
}
"""Bits of a quantised weight, by quantizer."""

_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits."""


def bits_per_weight(quantization: Mapping[str, Any]) -> float:
    """Return the bits that a quantised weight takes, its share of the scales included.

    Raises:
        InputError: If the storage of this quantizer is not known.
    """
    backend = quantization.get("quant_backend")
    arguments = quantization.get("quant_kwargs") or {}
    name = arguments.get("quant_type") if backend == "torchao" else backend
    if backend == "quanto":
        name = {"int8": "bitsandbytes_8bit", "float8": "bitsandbytes_8bit"}.get(
            str(arguments.get("weights_dtype")), "bitsandbytes_4bit"
        )
    if name not in _BITS:
        raise InputError(
            f"model.quantization: the storage of {name!r} is not known to plan; known: "
            + ", ".join(_BITS)
        )
    bits = _BITS[name]
    if name == "bitsandbytes_4bit":
        # A float32 scale a block; double quantisation stores 8 bits, and a float32 every 256.
        double = arguments.get("bnb_4bit_use_double_quant")
        bits += (8 + 32 / 256) / _BLOCK if double else 32 / _BLOCK
    if name == "Int4WeightOnlyConfig":
        bits += 32 / 128  # scale and zero point in bfloat16, for each group of 128
    return bits


def weight_bytes(
    module: nn.Module, quantization: Mapping[str, Any] | None, *, frozen_only: bool = False
) -> float:
    """Return the bytes of a denoiser's parameters and of its buffers.

    Args:
        module: The denoiser.
        quantization: How the weights of its linear layers are quantised, if they are.
        frozen_only: Leave out what trains.
    """
    total = float(sum(buffer.nbytes for buffer in module.buffers()))
    bits = bits_per_weight(quantization) if quantization else 0.0
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or (frozen_only and parameter.requires_grad):
                continue
            quantised = quantization and isinstance(owner, nn.Linear) and name == "weight"
            total += parameter.numel() * bits / 8 if quantised else parameter.nbytes
    return total


def largest_linear(module: nn.Module) -> int:
    """Return the bytes of the largest linear weight, which is dequantised when it is used."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
    return max((weight.numel() * 2 for weight in weights), default=0)


def gathered_bytes(module: nn.Module, dtype: torch.dtype) -> float:
    """Return what FSDP2 holds beside its shards: two blocks, and what is outside of blocks.

    A block is gathered while the one before it is computed. In the backward pass the gradient of
    one block's trained parameters is whole too, in `dtype` and, to be reduced, in float32.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    blocks = [block for each in repeated_blocks(module).values() for block in each]
    inside = {id(p) for block in blocks for p in block.parameters()}
    root = _count(p for p in module.parameters() if id(p) not in inside)
    largest = max((_count(block.parameters()) for block in blocks), default=0)
    trained = (_count(p for p in block.parameters() if p.requires_grad) for block in blocks)
    return size * (root + 2 * largest) + (size + 4) * max(trained, default=0)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
