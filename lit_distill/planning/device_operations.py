"""The operations that a GPU would choose, for tensors that only pretend to hold data.

PyTorch chooses how attention and RMS norm are computed by the device of their inputs. Fake tensors
are on the CPU here, since fake CUDA tensors need a build with CUDA. So the choice is made by hand:
flash attention without a mask, memory-efficient attention with one, and the fused RMS norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

Device = Literal["cuda", "cpu"]

GRANULES: dict[Device, int] = {"cuda": 512, "cpu": 1}
"""Bytes that a device's allocator rounds sizes up to; PyTorch's caching allocator on CUDA."""

_ATTENTION = functional.scaled_dot_product_attention
_RMS_NORM = functional.rms_norm
_FLASH_WIDTH = 256
"""The widest head that flash attention takes."""


@contextmanager
def operations_of(device: Device) -> Iterator[None]:
    """Let fake tensors take the operations of `device`; real tensors take their usual ones."""
    functional.scaled_dot_product_attention = (
        _cuda_attention if device == "cuda" else _cpu_attention
    )
    if device == "cuda":
        functional.rms_norm = _cuda_rms_norm
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = _ATTENTION
        functional.rms_norm = _RMS_NORM


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not _is_fake(query, key, value) or query.ndim != 4:
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    key, value = _repeat_heads(query, key, value, enable_gqa)
    width = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    scale = width**-0.5 if scale is None else scale
    if attn_mask is None and half and width <= _FLASH_WIDTH:
        # Widths are padded to a multiple of 8.
        query, key, value = (functional.pad(t, (0, -width % 8)) for t in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return output[..., :width] if width % 8 else output
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
    return output[0]


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not _is_fake(query, key, value) or query.ndim != 4 or attn_mask is not None:
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **options)
    key, value = _repeat_heads(query, key, value, enable_gqa)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return output


def _repeat_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    if not enable_gqa or key.shape[1] == query.shape[1]:
        return key, value
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return what memory-efficient attention adds to the logits, its rows aligned to 8."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    rows, columns = query.shape[-2], key.shape[-2]
    if columns % 8:
        mask = mask.expand(*mask.shape[:-1], columns)
        mask = functional.pad(mask, (0, -columns % 8))[..., :columns]
    return mask.expand(*query.shape[:2], rows, columns)


def _cuda_rms_norm(
    input: Tensor,
    normalized_shape: Any,  # noqa: ANN401
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    if not _is_fake(input, weight):
        return _RMS_NORM(input, normalized_shape, weight, eps)
    fused: Tensor = torch.ops.aten._fused_rms_norm(input, list(normalized_shape), weight, eps)[0]
    return fused


def _is_fake(*tensors: Tensor | None) -> bool:
    return any(isinstance(tensor, FakeTensor) for tensor in tensors)
