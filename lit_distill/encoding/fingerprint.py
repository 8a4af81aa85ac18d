"""Digests of texts, numbers, tensors, images, and of a model's weights, used as cache keys."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def fingerprint(content: Any) -> str:  # noqa: ANN401
    """Return a digest of nested texts, numbers, tensors and pictures.

    Raises:
        TypeError: If the content has a value of another type.
    """
    digest = hashlib.sha256()

    def update(value: Any) -> None:  # noqa: ANN401
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Image.Image):
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for entry in value.items() if isinstance(value, dict) else value:
                update(entry)
        elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
            digest.update(repr(value).encode() + b"\0")
        else:
            raise TypeError(f"cannot compute a digest of a {type(value).__name__}")

    update(content)
    return digest.hexdigest()


def weights_summary(module: torch.nn.Module) -> list[Any]:
    """Return a summary that identifies a model's weights: names, shapes, a few values."""
    summary: list[Any] = [type(module).__name__]
    for name, tensor in module.state_dict().items():
        flat = tensor.flatten()
        summary.append((name, tuple(tensor.shape), flat[:16].cpu(), flat[-16:].cpu()))
    return summary
