"""The repeated blocks of a denoiser."""

from __future__ import annotations

from torch import nn


def repeated_blocks(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the denoiser's lists of repeated blocks (modules of one class), by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].children())
    }
