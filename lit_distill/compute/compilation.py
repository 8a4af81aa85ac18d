"""Compilation of the denoisers' repeated blocks, shared by teacher and student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage as qwen_image
from torch import Tensor, nn

RECOMPILE_LIMIT = 64
"""Upper limit of graphs per block: with and without gradients, frozen parameters, first shapes."""

_complex_rotary = qwen_image.apply_rotary_emb_qwen


def compile_blocks(denoisers: Iterable[Any], **options: Any) -> None:  # noqa: ANN401
    """Compile the repeated blocks of the denoisers in place.

    Shapes become dynamic when a second size is met, so the number of graphs does not grow with the
    number of image sizes in the data.

    Args:
        denoisers: diffusers models.
        **options: Further arguments of `torch.compile`.

    Raises:
        ValueError: If a denoiser does not declare its repeated blocks.
    """
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    for denoiser in denoisers:
        _use_real_rotary(denoiser)
        denoiser.compile_repeated_blocks(fullgraph=True, **options)


def _use_real_rotary(denoiser: nn.Module) -> None:
    """Make QwenImage's rotary embedding use real numbers: complex ones prevent fusion."""
    if isinstance(denoiser, qwen_image.QwenImageTransformer2DModel):
        denoiser.pos_embed.register_forward_hook(_as_real)
        qwen_image.apply_rotary_emb_qwen = _rotary


def _as_real(module: nn.Module, args: Any, freqs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ANN401
    return tuple(torch.view_as_real(freq) for freq in freqs)


def _rotary(x: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """Return x (B, S, heads, D) rotated by freqs, (S, D/2) complex or (S, D/2, 2) real."""
    if freqs.is_complex():  # from a denoiser that is not compiled
        return _complex_rotary(x, freqs, *args, **kwargs)  # type: ignore[no-any-return]
    cos, sin = freqs.unsqueeze(1).unbind(-1)
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(rotated, -1).flatten(3).type_as(x)
