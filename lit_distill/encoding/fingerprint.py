"""Digests of content: texts, numbers, tensors, images, and the weights of a model."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def fingerprint(content: Any) -> str:  # noqa: ANN401
    """Return a digest of texts, numbers, tensors and pictures, however nested.

    Raises:
        TypeError: If there is something else in it.
    """
    digest = hashlib.sha256()

    def feed(value: Any) -> None:  # noqa: ANN401
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Image.Image):
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for entry in value.items() if isinstance(value, dict) else value:
                feed(entry)
        elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
            digest.update(repr(value).encode() + b"\0")
        else:
            raise TypeError(f"cannot tell the content of a {type(value).__name__}")

    feed(content)
    return digest.hexdigest()


def weights_summary(module: torch.nn.Module) -> list[Any]:
    """Return what tells one set of weights from another: names, shapes, types, a few values."""
    facts: list[Any] = [type(module).__name__]
    for name, tensor in module.state_dict().items():
        flat = tensor.flatten()
        facts.append((name, tuple(tensor.shape), flat[:16].cpu(), flat[-16:].cpu()))
    return facts
