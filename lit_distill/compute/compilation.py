"""The denoisers' repeated blocks, compiled once for teacher and student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage as qwen_image
from torch import Tensor, nn

RECOMPILE_LIMIT = 64
"""Variants of a block: with and without gradients, frozen parts, sizes before they are dynamic."""

_complex_rotary = qwen_image.apply_rotary_emb_qwen


def compile_blocks(denoisers: Iterable[Any], **options: Any) -> None:  # noqa: ANN401
    """Compile the repeated blocks of denoisers, in place.

    A second size makes sizes dynamic, so that the number of variants does not grow with the sizes
    in the data.

    Args:
        denoisers: diffusers models.
        **options: Further arguments of `torch.compile`.

    Raises:
        ValueError: If a denoiser names no repeated blocks.
    """
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    for denoiser in denoisers:
        _rotate_in_real_numbers(denoiser)
        denoiser.compile_repeated_blocks(fullgraph=True, **options)


def _rotate_in_real_numbers(denoiser: nn.Module) -> None:
    """Let QwenImage's rotary embedding be computed without complex numbers, which don't fuse."""
    if isinstance(denoiser, qwen_image.QwenImageTransformer2DModel):
        denoiser.pos_embed.register_forward_hook(_as_real)
        qwen_image.apply_rotary_emb_qwen = _rotary


def _as_real(module: nn.Module, args: Any, freqs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ANN401
    return tuple(torch.view_as_real(each) for each in freqs)


def _rotary(x: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """Return x (B, S, heads, D) rotated by freqs, (S, D/2) complex or (S, D/2, 2) real."""
    if freqs.is_complex():  # of a denoiser that is not compiled
        return _complex_rotary(x, freqs, *args, **kwargs)  # type: ignore[no-any-return]
    cos, sin = freqs.unsqueeze(1).unbind(-1)
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(rotated, -1).flatten(3).type_as(x)
